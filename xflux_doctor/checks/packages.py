"""SW108 to SW117: whether the installed packages are whole, in their place, and what they say of each other."""

from __future__ import annotations

from collections.abc import Iterator

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from xflux_doctor.bill import fused
from xflux_doctor.check import Case, SkipCheck, check
from xflux_doctor.checks.rules import LINKED, broken, look
from xflux_doctor.checks.software import role_needed
from xflux_doctor.facts import Package
from xflux_doctor.finding import Edit, Finding, error, warning
from xflux_doctor.refused import ALL_OR_NONE
from xflux_doctor.steptime import FLASH_4
from xflux_doctor.versions import version_of
from xflux_doctor.visible import selected

_INSTALL = "xflux-doctor fix --install"


def _declared(case: Case, package: Package) -> Iterator[Requirement]:
    """The requirements of a package that hold in the interpreter under test; odd lines are left out."""
    environment: dict[str, str] = {"extra": ""}
    if case.facts.python:
        version = case.facts.python.version
        environment |= {"python_version": ".".join(version.split(".")[:2]), "python_full_version": version}
    for line in package.requires:
        try:
            requirement = Requirement(line)
        except InvalidRequirement:
            continue
        if requirement.marker is None or requirement.marker.evaluate(environment):
            yield requirement


def _outside(requirement: Requirement, package: Package) -> bool:
    try:
        return not requirement.specifier.contains(Version(package.version).public, prereleases=True)
    except InvalidVersion:
        return False  # SW103 speaks of such versions


def _needed(case: Case, name: str) -> bool:
    """Whether this job imports the package."""
    pin = case.stack.packages.get(name) if case.stack else None
    return pin is not None and role_needed(case, pin)


@check("SW108", "the libraries beside torch are those it was built with", needs=("packages",))
def linked_wheels(case: Case) -> Iterator[Finding]:
    """torch's wheel names the nvidia-* and triton wheels that it is linked to, each by its exact version (METADATA)."""
    packages = case.facts.packages or {}
    torch = packages.get("torch")
    if torch is None or not torch.requires:
        raise SkipCheck("torch is not installed, or declares nothing")
    for wanted in _declared(case, torch):
        name = canonicalize_name(wanted.name)
        if not name.startswith(LINKED):
            continue
        found = packages.get(name)
        if found is None:
            yield error(
                f"torch {torch.version} is linked to {wanted.name} {wanted.specifier}, which is not installed.",
                "`import torch` fails: '… cannot open shared object file', unless the system has the same library.",
                f"Run `{_INSTALL}`.",
            )
        elif _outside(wanted, found):
            yield _other_wheel(torch, wanted, found)


def _other_wheel(torch: Package, wanted: Requirement, found: Package) -> Finding:
    """An older NCCL lacks functions, another major release has another file name; the rest is only untested."""
    pin = Version(next(iter(wanted.specifier)).version.removesuffix(".*"))
    have = Version(found.version)
    seen = f"{found.name} is {found.version}; torch {torch.version} was built with {wanted.specifier}."
    if have.major != pin.major:
        because = "`import torch` does not find the library: its file name carries the major release."
        return error(seen, because, f"Run `{_INSTALL}`.")
    if "nccl" in found.name and have < pin:
        because = "`import torch` fails where the older NCCL lacks a function: 'undefined symbol: nccl…'."
        return error(seen, because, f"Run `{_INSTALL}`.")
    return warning(seen, "The pair was never tested by torch's releases.", f"Run `{_INSTALL}`.")


@check("SW109", "what the packages declare holds", needs=("packages",))
def declared(case: Case) -> Iterator[Finding]:
    """Every Requires-Dist of the installed packages, as `pip check` reads them; known breakages are SW105's."""
    packages = case.facts.packages or {}
    there = look(case)
    told = [{rule.what, *rule.when} for rule in case.matrix.rules if broken(rule, there)]
    for package in packages.values():
        make = error if _needed(case, package.name) else warning
        for wanted in _declared(case, package):
            name = canonicalize_name(wanted.name)
            found = packages.get(name)
            if package.name == "torch" and name.startswith(LINKED):
                continue  # SW108
            if found is None and package.location:
                yield make(
                    f"{package.name} {package.version} requires {wanted.name}, which is not installed.",
                    "Its import fails: 'No module named …'.",
                    f"Run `{_INSTALL}`.",
                )
            elif any({package.name, name} <= pair for pair in told):
                continue  # SW105 says what breaks
            elif found is not None and _outside(wanted, found):
                yield warning(
                    f"{package.name} {package.version} declares {wanted.name}{wanted.specifier}; {found.version} is "
                    "installed.",
                    "It may fail where it uses what changed, and the next `pip install` may move either of them.",
                    f"Run `{_INSTALL}`.",
                )


@check("SW110", "no package has lost files", needs=("packages",))
def whole(case: Case) -> Iterator[Finding]:
    """Libraries and first modules against RECORD: a broken download, a full disk, two packages in one folder."""
    for package in (case.facts.packages or {}).values():
        if package.damaged and package.files:
            make = error if _needed(case, package.name) or package.name.startswith(LINKED) else warning
            more = f" and {len(package.damaged) - 1} more" if len(package.damaged) > 1 else ""
            yield make(
                f"{package.damaged[0]}{more} of {package.name} {package.version} is missing or has another size than "
                "its RECORD says.",
                "An install that broke off, or another package that wrote over it: the import fails or crashes.",
                "Install it again over what is there.",
                commands=(f"pip install --force-reinstall --no-deps {package.name}=={package.version}",),
            )


@check("SW111", "the packages come from the interpreter's own folder", needs=("packages", "python"))
def own_folder(case: Case) -> Iterator[Finding]:
    """PYTHONPATH and ~/.local come before the interpreter's own packages (CPython, Lib/site.py)."""
    assert case.facts.python
    places = {"path": "PYTHONPATH", "user": "the user's folder"}
    for origin, place in places.items():
        names = [p.name for p in (case.facts.packages or {}).values() if p.origin == origin and _needed(case, p.name)]
        if names:
            folder = next(p.location for p in (case.facts.packages or {}).values() if p.name == names[0])
            yield warning(
                f"{', '.join(names[:6])}{' …' if len(names) > 6 else ''} of {case.facts.python.executable} come from "
                f"{place} ({folder}).",
                "Other interpreters of this user or shell import them too, and pip upgrades another copy.",
                "Unset PYTHONPATH for the run." if origin == "path" else "Use a venv, or set PYTHONNOUSERSITE=1.",
            )


@check("SW112", "pip and conda agree on what is installed", needs=("packages", "python"))
def conda(case: Case) -> Iterator[Finding]:
    """pip over a package of conda: conda's next change breaks it (docs.conda.io, Using pip in a conda environment)."""
    assert case.facts.python
    if not case.facts.python.conda:
        raise SkipCheck("this is no conda environment")
    for package in (case.facts.packages or {}).values():
        if package.conda and (package.installer != "conda" or package.conda != package.version.partition("+")[0]):
            yield warning(
                f"conda installed {package.name} {package.conda}; {package.installer or 'pip'} put {package.version} "
                "over it.",
                "Files of both lie in one folder, and conda's next change brings its own back.",
                "Remove both and install one, in a fresh environment if you can.",
                commands=(f"pip uninstall -y {package.name}", f"conda remove --force {package.name}"),
            )


@check("SW113", "no package of the stack is a link to sources", needs=("packages", "stack"))
def no_editable(case: Case) -> Iterator[Finding]:
    """The version of an editable install says when it was linked, not what its folder holds now (PEP 660)."""
    assert case.stack
    for name in case.stack.packages:
        package = (case.facts.packages or {}).get(name)
        if package is not None and package.editable:
            yield warning(
                f"{name} {package.version} is an editable install.",
                "What it holds may be any version: the pin does not vouch for it.",
                f"For a tested pair run `{_INSTALL}`.",
            )


@check("SW114", "Python has the lock that the wheels are built for", needs=("python",))
def with_gil(case: Case) -> Iterator[Finding]:
    """Free-threaded builds take wheels tagged cp313t or cp314t, which most of the stack does not have (PEP 703)."""
    assert case.facts.python
    if case.facts.python.free_threaded:
        yield error(
            f"{case.facts.python.executable} is a free-threaded build of Python {case.facts.python.version}.",
            "deepspeed, sentencepiece and others have no wheel for it.",
            "Make a venv with the usual build of Python.",
        )


@check("SW115", "torch's files are of the version that its metadata names", needs=("packages",))
def one_version(case: Case) -> Iterator[Finding]:
    """torch/version.py against the dist-info folder: an upgrade that broke off leaves a mixture."""
    for name in ("torch", "torchvision"):
        package = (case.facts.packages or {}).get(name)
        if package is None or not package.module_version:
            continue
        if package.module_version != package.version.partition("+")[0]:
            yield error(
                f"{name}'s metadata says {package.version} and its version.py {package.module_version}.",
                "Files of two releases lie in one folder: the import crashes or finds wrong symbols.",
                "Install it again over what is there.",
                commands=(f"pip install --force-reinstall --no-deps {name}=={package.version}",),
            )


_FORMATS = {"int8": "optimum-quanto", "int4": "optimum-quanto", "fp8": "optimum-quanto", "nf4": "bitsandbytes",
            "torchao-int8": "torchao", "torchao-fp8": "torchao", "fp8-dynamic": "torch"}  # fmt: skip
"""What the trainer imports for each quantization (trainer/quantize.py, PACKAGES; a test compares them)."""
_OLD_TORCH = {"torchao": "==0.9.0", "optimum-quanto": "==0.2.4"}
"""The releases for torch before 2.5 (trainer/quantize.py, `_install`)."""


@check("SW116", "the training file's formats have their packages", needs=("train", "trainer", "packages"))
def formats_installed(case: Case) -> Iterator[Finding]:
    """A quantised base wants optimum-quanto, bitsandbytes or torchao, 8-bit AdamW torchao; no stack holds the last two.

    Whether the package works on this device only the trainer can try, and does before it loads anything.
    """
    train, installed = case.job.train, case.facts.packages
    assert train is not None and installed is not None
    torch = version_of(case.facts, "torch")
    wanted = [("quantization", train.quantization, _FORMATS.get(train.quantization, ""))]
    wanted.append(("optimizer", train.optimizer, "torchao" if train.optimizer == "adamw8bit" else ""))
    for key, value, package in wanted:
        if package in ("", "torch") or package in installed:  # without torch itself nothing runs: SW103
            continue
        pin = _OLD_TORCH.get(package, "") if torch is not None and torch < Version("2.5") else ""
        pin = "==0.7.0" if key == "optimizer" and torch is not None and torch < Version("2.6") else pin
        yield error(
            f"{key} is {value}, and {package} is not installed.",
            "The trainer stops before its first step.",
            f"Install it, or set another {key}.",
            commands=(f"pip install '{package}{pin}'",),
        )


_HOPPER = (9, 0)


@check("SW117", "what is asked of the fused kernels can be had", needs=("train", "trainer"))
def kernels_asked(case: Case) -> Iterator[Finding]:
    """attention flash-attn-4 wants that package and a card of capability 9.0, checkpointed_blocks the fused kernels."""
    train = case.job.train
    assert train is not None
    if fused(case) and train.attention == FLASH_4:
        lack = _flash_4_lacks(case)
        if lack:
            yield error(
                f"attention is {FLASH_4}, and {lack}.",
                "The trainer stops before its first step.",
                "Set attention to auto, which takes the fastest that works.",
                edits=(Edit("train", ("attention",), "auto", "the fastest that works"),),
                commands=(f"pip install {FLASH_4}",) if "installed" in lack else (),
            )
    cut = case.job.strategy in ("zero3", "fsdp")  # LA116
    if train.checkpointed_blocks is not None and train.gradient_checkpointing and not cut and not fused(case):
        asked = f"checkpointed_blocks is {train.checkpointed_blocks}"
        yield error(
            f"{asked}, which fused kernels alone do, and {_no_kernels(case)}.",
            "The trainer stops before its first step.",
            "Set checkpointed_blocks to null: every block recomputes its activations.",
            edits=(Edit("train", ("checkpointed_blocks",), None, ALL_OR_NONE),),
        )


def _no_kernels(case: Case) -> str:
    """Why diffusers' blocks compute, in the order in which the trainer looks (trainer/fast.py)."""
    assert case.job.train is not None
    if case.job.use_cpu:
        return "the job runs on the CPU"
    return "mixed_precision is no" if case.job.train.mixed_precision == "no" else "Triton is not installed"


def _flash_4_lacks(case: Case) -> str:
    """Why flash-attn-4 cannot compute this job's attention; empty where nothing is known against it."""
    if case.job.use_cpu:
        return "the job runs on the CPU"
    cards = selected(case.facts.gpus or (), case.facts.environment, case.job.gpu_ids)
    old = next((gpu for gpu in cards if gpu.capability < _HOPPER), None)
    if old is not None:
        major, minor = old.capability
        return f"GPU {old.index} ({old.name}) has compute capability {major}.{minor}: it is for 9.0 and newer"
    if case.facts.packages is not None and FLASH_4 not in case.facts.packages:
        return "it is not installed"
    return ""
