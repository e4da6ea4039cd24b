"""What stands in a compatibility matrix: stacks (whole pin sets) and rules. Frozen values, no file is read here.

A stack keeps version and build apart, because the public index's wheel calls itself `2.4.0` and says
`2.4.0+cu121` only in `torch/version.py`, while the PyTorch index calls the same wheel `2.4.0+cu121`.
"""

# Without `from __future__ import annotations`: of annotations kept as text msgspec evaluates each one, 1.2 ms a start.
from typing import Literal

import msgspec

from xflux_doctor.errors import DoctorError
from xflux_doctor.finding import Severity

SCHEMA = 1
Role = Literal["core", "deepspeed", "quant", "log", "install"]


class Pin(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One package of a stack."""

    version: str
    accepts: str = ""
    """A specifier of versions that are fine though not the pin; empty: only the pin itself."""
    build: str = ""
    """The CUDA build that `version.py` must name, for example `cu121` or `cpu`."""
    index: str = ""
    """Where the wheel of that build comes from."""
    index_required: bool = False
    """True where the public index's wheel of this version is another build."""
    role: Role = "core"
    """What needs it. `core`: every job. `deepspeed`, `quant`, `log`: only jobs that use them."""
    install_only: bool = False
    """Pinned for the install, never judged."""
    note: str = ""

    @property
    def exact(self) -> str:
        """The version for pip; with the build where only another index has that build's wheel."""
        return f"{self.version}+{self.build}" if self.build and self.index_required else self.version

    def page(self, name: str) -> str:
        """The one page of the other index that lists this project's wheels; empty where the public index has it."""
        return f"{self.index}/{name}/" if self.index and self.index_required else ""


class Tested(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """When the stack was last installed and run; `never` is an honest answer."""

    cpu: str
    gpu: str


class Stack(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A whole pin set that was installed, imported and trained with."""

    name: str
    summary: str
    python: str
    packages: dict[str, Pin]
    cuda: str | None
    driver: str | None
    tested: Tested
    driver_blackwell: str | None = None
    gpu_archs: tuple[str, ...] = ()
    glibc: str | None = None
    """The oldest glibc that its wheels' tags allow, for example 2.28."""
    nccl: str | None = None
    cudnn: str | None = None
    triton: str | None = None
    download_gib: float | None = None
    """GiB of wheels that pip fetches for all of it."""
    installed_gib: float | None = None
    """GiB that they fill once unpacked; None: not known, and no disk is asked for room."""
    source: tuple[str, ...] = ()

    @property
    def is_cpu(self) -> bool:
        return self.cuda is None


class Rule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One row: `what` must satisfy `need` when everything under `when` and `job` holds."""

    id: str
    title: str
    what: str
    need: str
    severity: Severity
    because: str
    source: tuple[str, ...]
    checked: str
    when: dict[str, str] = {}
    job: tuple[str, ...] = ()
    """What the job must do for the row to matter; see conditions.JOBS."""
    hint: str = ""
    """The next step, where installing the stack's packages is not the one."""


class Matrix(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A whole matrix, or a site's own file that is laid over ours."""

    schema: int
    checked: str = ""
    stacks: tuple[Stack, ...] = ()
    rules: tuple[Rule, ...] = ()
    drop: tuple[str, ...] = ()
    """Stacks and rules of ours that a site's file takes away."""

    def stack(self, name: str) -> Stack:
        for stack in self.stacks:
            if stack.name == name:
                return stack
        known = ", ".join(s.name for s in self.stacks)
        raise DoctorError(f"There is no stack {name!r} in the matrix.", f"Known stacks: {known}.", code=2)

    def names(self) -> frozenset[str]:
        """Everything that a stack pins or a rule speaks of."""
        pinned = {name for stack in self.stacks for name in stack.packages}
        return frozenset(pinned.union(*({rule.what, *rule.when} for rule in self.rules)))


def has_kernels(archs: tuple[str, ...], capability: tuple[int, int]) -> bool:
    """A cubin sm_XY runs on X.Z with Z >= Y and the same major (torch/cuda/__init__.py, _check_cubins)."""
    pairs = [(int(arch[3:-1]), int(arch[-1])) for arch in archs]
    return any(major == capability[0] and minor <= capability[1] for major, minor in pairs)


def requirements(stack: Stack) -> list[str]:
    """Lines of a pip requirements file that installs the stack, lines about indexes first.

    A wheel that only another index has is named with its build, and only that project's page of the index is given
    (`--find-links`): with `--extra-index-url` pip would look there for every other package as well, and take the public
    index's wheel without a word when the index does not answer.
    """
    pages = [page for name, pin in stack.packages.items() if (page := pin.page(name))]
    return [f"--find-links {page}" for page in pages] + [f"{name}=={pin.exact}" for name, pin in stack.packages.items()]
