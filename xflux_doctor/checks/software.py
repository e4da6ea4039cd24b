"""SW: the interpreter and the packages, held against the stack and the matrix's rules."""

from __future__ import annotations

from collections.abc import Iterator

from packaging.specifiers import SpecifierSet

from xflux_doctor import pins as pins_of
from xflux_doctor.check import Case, SkipCheck, check
from xflux_doctor.facts import Package
from xflux_doctor.finding import Finding, error, warning
from xflux_doctor.gather.shadows import STACK
from xflux_doctor.matrix import Pin
from xflux_doctor.visible import selected

_INSTALL = "xflux-doctor fix --install"


@check("SW101", "a stack of the matrix fits this machine")
def stack_fits(case: Case) -> Iterator[Finding]:
    """The driver, the GPUs and the Python together decide which pin set can be installed."""
    if case.stack is None:
        yield error(
            case.stack_because or "No stack of the matrix fits this machine.",
            "No pin set was tested for this combination.",
            "Use a Python or a driver that one of the stacks takes: `xflux-doctor matrix list`.",
        )


@check("SW102", "Python is in the stack's range", needs=("stack", "python"))
def python_in_range(case: Case) -> Iterator[Finding]:
    """Each stack has its own range: wheels of old releases end at an old Python."""
    assert case.stack and case.facts.python
    if not SpecifierSet(case.stack.python).contains(case.facts.python.version, prereleases=True):
        yield error(
            f"Python is {case.facts.python.version}; stack {case.stack.name} wants {case.stack.python}.",
            "Some of its packages have no wheel for this Python.",
            "Make a venv with a Python in that range, or choose another stack: `xflux-doctor matrix list`.",
        )


@check("SW103", "the packages are the stack's", needs=("stack", "packages"))
def pins(case: Case) -> Iterator[Finding]:
    """Each package is exact, compatible, a later patch, the wrong build, too old, too new, missing or broken."""
    assert case.stack and case.facts.packages is not None
    judged = {name: pin for name, pin in case.stack.packages.items() if not pin.install_only}
    missing = [n for n, pin in judged.items() if n not in case.facts.packages and role_needed(case, pin)]
    if missing:
        names = ", ".join(f"{name} {pins_of.wanted(judged[name])}" for name in missing)
        yield error(f"Missing of stack {case.stack.name}: {names}.", "The job cannot start.", f"Run `{_INSTALL}`.")
    for name, pin in judged.items():
        if name in case.facts.packages:
            needed = role_needed(case, pin)
            finding = judge(name, pin, case.facts.packages[name], needed, cpu=case.job.use_cpu)
            if finding is not None:
                yield finding


def role_needed(case: Case, pin: Pin) -> bool:
    """Whether this job uses the package: DeepSpeed only under DEEPSPEED, quanto only for a quantized base."""
    if pin.role == "deepspeed":
        return case.job.deepspeed
    if pin.role == "quant":
        return case.job.quanto
    return pin.role == "core"


def judge(name: str, pin: Pin, package: Package, needed: bool, *, cpu: bool = False) -> Finding | None:
    """Hold one installed package against its pin: an error where this job needs it, else a warning."""
    make = error if needed else warning
    word = pins_of.judge(pin, package)
    if word == "unreadable":
        return make(f"{name} calls its version {package.version!r}.", "It cannot be judged.", f"Run `{_INSTALL}`.")
    if not package.files:
        seen = f"{name} {package.version} has metadata in {package.location} and no module beside it."
        return make(seen, "A half-removed install: its import fails.", f"Run `{_INSTALL}`.")
    if package.build == "cpu" and pin.build not in ("", "cpu") and not cpu:
        return _wrong_build(name, pin, package, cpu)  # its version is the smaller fault
    span = f"{pins_of.wanted(pin)}, or {pin.accepts}" if pin.accepts else pins_of.wanted(pin)
    if word == "later patch":  # whatever is known to break is SW105's
        because = f"It is a later patch than what was tested in this stack: {span}."
        return warning(f"{name} is {package.version}; the stack has {pins_of.wanted(pin)}.", because,
                       f"It should do. If it makes trouble, run `{_INSTALL}`.")  # fmt: skip
    if word in ("too old", "too new"):
        because = f"It is {word}: only {span} was tested in this stack."
        return make(f"{name} is {package.version}; the stack has {pins_of.wanted(pin)}.", because, f"Run `{_INSTALL}`.")
    return _wrong_build(name, pin, package, cpu) if word == "wrong build" else None


def _wrong_build(name: str, pin: Pin, package: Package, cpu: bool) -> Finding:
    seen = f"{name} {package.version} is the {package.build} build; the stack has {pins_of.wanted(pin)}."
    if package.build == "cpu" and not cpu:
        because = "A CPU build cannot use a GPU: 'AssertionError: Torch not compiled with CUDA enabled'."
        return error(seen, because, f"Run `{_INSTALL}`.")
    if pin.build == "cpu":
        return warning(seen, "It runs on the CPU too, and takes gigabytes more of disk.")
    return warning(seen, "The wheels of other packages are paired with the stack's build.", f"Run `{_INSTALL}`.")


@check("SW104", "no package is shadowed", needs=("packages",))
def shadowed(case: Case) -> Iterator[Finding]:
    """Two installs of one name on the path: the version that pip shows need not be the one that is imported."""
    assert case.facts.packages is not None
    for package in case.facts.packages.values():
        if package.copies > 1:
            yield warning(
                f"{package.name} is installed {package.copies} times; {package.location} comes first.",
                "pip may show, upgrade or remove the other one.",
                "Remove all copies and install one, in a clean venv if you can.",
                commands=(f"pip uninstall -y {package.name}",),
            )


@check("SW118", "no file here has a package's name")
def shadowed_here(case: Case) -> Iterator[Finding]:
    """`-m` puts the working folder first on the path: a torch.py there is imported for the package (sys.path)."""
    for name in case.facts.shadows:
        package = name.removesuffix(".py")
        needed = package in STACK or (package == "deepspeed" and case.job.deepspeed)
        make = error if needed else warning
        yield make(
            f"{name} lies in the working folder.",
            f"A job that is started here imports it in the place of {package}.",
            "Rename it and remove its __pycache__, or start from another folder.",
        )


@check("SW106", "torch can be imported")
def torch_imports(case: Case) -> Iterator[Finding]:
    """torch is imported in a child process with a deadline: a crash or a hang is a finding, not our end."""
    why = case.facts.unknown.get("torch", "")
    if case.facts.torch is None and not why:
        raise SkipCheck("torch was not imported (quick level)")
    if case.facts.torch is None:
        yield error(
            f"In a child process {why}.",
            "Training would die the same way before its first line.",
            f"Repair the packages with `{_INSTALL}`; the line above names the library that failed.",
        )


@check("SW107", "torch sees the GPUs that the driver sees", needs=("torch", "gpus"))
def torch_sees_gpus(case: Case) -> Iterator[Finding]:
    """A CPU build, a bad CUDA_VISIBLE_DEVICES or a forbidden device node leaves torch with fewer devices."""
    assert case.facts.torch and case.facts.gpus is not None
    if case.job.use_cpu:
        raise SkipCheck("the job runs on the CPU")
    if not case.facts.torch.cuda:
        raise SkipCheck("torch is a CPU build (see SW103)")
    seen = len(case.facts.torch.devices)
    visible_here = len(selected(case.facts.gpus, case.facts.environment, case.job.gpu_ids))
    if 0 < seen < visible_here and not any(gpu.mig for gpu in case.facts.gpus):
        yield error(
            f"{visible_here} GPUs should be visible; torch {case.facts.torch.version} sees {seen}.",
            "A GPU is out of order, or its device node is closed to this process: a rank on it would die.",
            "Compare `nvidia-smi -L` with `ls -l /dev/nvidia*`, or leave the missing GPU out by CUDA_VISIBLE_DEVICES.",
        )
    if seen == 0 and case.facts.gpus:
        yield error(
            f"The driver lists {len(case.facts.gpus)} GPUs; torch {case.facts.torch.version} sees none.",
            "CUDA does not start in this environment.",
            "Look at CUDA_VISIBLE_DEVICES and at the driver's version above; try `python -c 'import torch; "
            "torch.cuda.init()'` for CUDA's own words.",
        )
