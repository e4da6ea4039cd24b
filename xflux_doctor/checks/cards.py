"""HW: which cards this job gets, and who else is on them."""

from __future__ import annotations

from collections.abc import Iterator

from packaging.version import InvalidVersion, Version

from xflux_doctor.bill import need
from xflux_doctor.check import Case, SkipCheck, check
from xflux_doctor.checks.spare import chosen, used, without
from xflux_doctor.facts import Gpu, GpuProcess, LostGpu
from xflux_doctor.finding import Edit, Finding, error, warning
from xflux_doctor.gather.gpus import DENIED
from xflux_doctor.verdict import fitting, held_by
from xflux_doctor.visible import cards, named_slices, parse

GIB = 1 << 30
_P2P_DRIVER = Version("550.40.07")
_UNSEEN = 3 * GIB // 2
"""The driver itself holds up to 0.6 GiB of a large card (H100: 0.5, H200: 0.6), so less than this is nobody's."""
_TRAINERS = ("python", "pt_main", "accelerate", "deepspeed", "torchrun")
_MIG_DOCS = "https://docs.nvidia.com/datacenter/tesla/mig-user-guide/mig-device-names.html"


@check("HW106", "every card of the machine answers", needs=("gpus",))
def none_lost(case: Case) -> Iterator[Finding]:
    """A card that has fallen off the bus or wants a reset is counted by the driver and cannot be opened (NVML)."""
    if case.job.use_cpu:
        raise SkipCheck("the job runs on the CPU")
    lost = [card for card in case.facts.lost_gpus if card.reason != DENIED]
    if not lost:
        return
    whole = len(case.facts.gpus or ()) + len(case.facts.lost_gpus)
    named = "; ".join(f"GPU {card.index}{f' at {card.pci}' if card.pci else ''}: {card.reason}" for card in lost)
    seen = f"Of {whole} GPUs {len(lost)} {'does' if len(lost) == 1 else 'do'} not answer. {named}."
    mend = "A reset (`nvidia-smi --gpu-reset -i N`) or a reboot of the machine may bring it back; else it is broken."
    commands: tuple[str, ...] = ("dmesg | grep -i xid",)
    if _avoids(case, lost):
        because = "This job does not use it; CUDA may still refuse to start while it is there (the probes tell)."
        yield warning(seen, because, mend, commands=commands)
        return
    edits, more, plan = without(case, {card.index for card in lost}, "a card does not answer")
    yield error(
        seen,
        "A rank that gets it dies, or CUDA does not start at all: 'CUDA unknown error', 'no CUDA-capable device'.",
        f"{mend} {plan}".strip(),
        edits=edits,
        commands=(*commands, *more),
    )


def _avoids(case: Case, lost: list[LostGpu]) -> bool:
    """Whether no rank gets a lost card. By number that is sure only below the first one: CUDA may leave it out."""
    value = chosen(case)
    if value is None:
        return case.job.local_processes <= len(case.facts.gpus or ())
    numbers = [entry for entry in parse(value) if isinstance(entry, int)]
    return all(number < min(card.index for card in lost) for number in numbers)


@check("HW118", "no rank shares a MIG slice with another", needs=("gpus",))
def mig(case: Case) -> Iterator[Finding]:
    """A process sees one MIG slice, and no whole card beside it (NVIDIA MIG user guide, device enumeration)."""
    gpus, value = case.facts.gpus or (), chosen(case)
    if case.job.use_cpu:
        raise SkipCheck("the job runs on the CPU")
    if value is not None and value.startswith("MIG-"):
        yield from _named_slice(case, gpus, value)
        return
    asked = cards(gpus, value)
    split = [gpu for gpu in asked if gpu.mig]
    if not split:
        return
    names = ", ".join(f"GPU {gpu.index} ({len(gpu.slices)} slices seen)" for gpu in split)
    seen = f"{names} {'is' if len(split) == 1 else 'are'} in MIG mode; the job starts {_ranks(case)}."
    whole = [gpu for gpu in asked if not gpu.mig]
    slices = [item for gpu in split for item in gpu.slices]
    if case.job.local_processes > 1 or (whole and slices):
        edits, commands, plan = without(case, {gpu.index for gpu in split}, "a process sees one MIG slice")
        make = error if case.job.local_processes > 1 else warning
        yield make(
            seen,
            "CUDA shows a process one slice and no card beside it: every rank gets the same one, and NCCL stops with "
            "'Duplicate GPU detected'." if case.job.local_processes > 1 else
            "CUDA shows a process one slice and hides the whole cards beside it.",
            plan.removeprefix("Or ").capitalize() or "Start one rank, or have MIG mode turned off.",
            edits=edits or _one_rank(case),
            commands=commands,
            docs=_MIG_DOCS,
        )  # fmt: skip
    elif not slices:
        because = "Without a slice CUDA finds no device on such a card."
        hint = "Have slices made, or MIG mode turned off; in a container ask for a slice (nvidia.com/mig-…)."
        yield warning(seen, because, hint, commands=("nvidia-smi -L",), docs=_MIG_DOCS)
    elif len(slices) > 1:
        largest = max(slices, key=lambda item: item.memory_total)
        yield warning(
            seen,
            f"CUDA takes the first slice, {slices[0].name} with {slices[0].memory_total / GIB:.0f} GiB, "
            "whatever the others are.",
            "Name the slice that you mean.",
            commands=(f"export CUDA_VISIBLE_DEVICES={largest.uuid}",),
            docs=_MIG_DOCS,
        )


def _ranks(case: Case) -> str:
    count = case.job.local_processes
    return f"{count} ranks" if count > 1 else "1 rank"


def _one_rank(case: Case) -> tuple[Edit, ...]:
    if case.job.accelerate is None or case.job.local_processes == 1 or case.job.num_machines > 1:
        return ()
    one = Edit("accelerate", ("num_processes",), 1, "a process sees one MIG slice")
    if case.job.distributed_type != "MULTI_GPU":
        return (one,)
    return (one, Edit("accelerate", ("distributed_type",), "NO", "one process needs no process group"))


def _named_slice(case: Case, gpus: tuple[Gpu, ...], value: str) -> Iterator[Finding]:
    entries = [part for part in value.split(",") if part.strip()]
    found = named_slices(gpus, value)
    if not found:
        known = [item.uuid for gpu in gpus for item in gpu.slices]
        if not known and any(gpu.mig for gpu in gpus):
            raise SkipCheck("the slices of the cards cannot be listed from here")
        yield error(
            f"{entries[0]} names none of the {len(known)} MIG slices that are here.",
            "CUDA finds no device.",
            "Take a name of the list." if known else "No card is in MIG mode: name a card instead.",
            commands=("nvidia-smi -L",),
            docs=_MIG_DOCS,
        )
    elif case.job.local_processes > 1:
        yield error(
            f"{len(entries)} MIG slice{'s are' if len(entries) > 1 else ' is'} named; the job starts {_ranks(case)}.",
            "Every rank sees the first slice only, and NCCL stops with 'Duplicate GPU detected'.",
            "Start one rank on one slice, or train on whole cards.",
            edits=_one_rank(case),
            docs=_MIG_DOCS,
        )
    elif len(entries) > 1:
        name = f"{found[0][1].name} of GPU {found[0][0].index}"
        yield warning(
            f"{len(entries)} MIG slices are named.", f"A process sees only the first, {name}.", docs=_MIG_DOCS
        )


@check("HW120", "RTX 40 cards are told to exchange through host memory", needs=("gpus", "driver"))
def rtx40_p2p(case: Case) -> Iterator[Finding]:
    """Before driver 550.40.07 their P2P hangs (huggingface/accelerate@v1.14.0:src/accelerate/utils/environment.py)."""
    assert case.facts.driver
    found = [gpu for gpu in used(case) if "RTX 40" in gpu.name]
    if len(found) < 2:
        return
    try:
        if Version(case.facts.driver.version) >= _P2P_DRIVER:
            return
    except InvalidVersion:
        raise SkipCheck(f"the driver's version {case.facts.driver.version} cannot be compared") from None
    environment = case.facts.environment
    values = {name: environment.get(name) for name in ("NCCL_P2P_DISABLE", "NCCL_IB_DISABLE")}
    if all(value not in (None, "0") for value in values.values()):
        return
    seen = f"{len(found)} × {found[0].name} under driver {case.facts.driver.version}; P2P works from 550.40.07 on."
    on = "export NCCL_P2P_DISABLE=1 NCCL_IB_DISABLE=1"
    if "0" in values.values():
        named = " and ".join(f"{name}=0" for name, value in values.items() if value == "0")
        because = f"{named} keeps accelerate from turning it off: the ranks hang, or exchange wrong numbers."
        yield error(seen, because, "Set both to 1, or upgrade the driver.", commands=(on,))
    else:
        because = (
            "`accelerate launch` turns P2P and InfiniBand off by itself, which is slower; torchrun does not, and hangs."
        )
        yield warning(seen, because, "Upgrade the driver; with another launcher set both variables.", commands=(on,))


@check("HW121", "nobody else is on the job's cards", needs=("gpus",))
def shared(case: Case) -> Iterator[Finding]:
    """Another process takes the card's time and may take its memory later; ME101 judges what is free now."""
    for gpu in used(case):
        if gpu.mig or gpu.memory_used < GIB:
            continue  # a slice's processes are not told apart
        holders = [p for p in gpu.processes if p.used is None or p.used >= GIB]
        unseen = gpu.memory_used - sum(p.used or 0 for p in gpu.processes)
        outside = unseen if unseen >= _UNSEEN and all(p.used is not None for p in gpu.processes) else 0
        outside = 0 if case.facts.host and case.facts.host.wsl else outside  # there it is Windows' own screen
        if not (holders or outside) or _memory_is_short(case, gpu):  # ME101 names who holds memory that is short
            continue
        named = [holder(p) for p in holders]
        if outside:
            named.append(f"{outside / GIB:.1f} GiB are held {_place(case)}")
        yield warning(
            f"GPU {gpu.index}: {gpu.memory_used / GIB:.1f} of {gpu.memory_total / GIB:.1f} GiB are in use: "
            f"{'; '.join(named)}.",
            "The job fits beside it now. The other shares the card's time and may want more memory.",
            "If it is left over from a run of yours, end it (the doctor never does); or choose another card.",
            commands=tuple(line for p in holders for line in _commands(p)),
        )


def _memory_is_short(case: Case, gpu: Gpu) -> bool:
    if case.job.train is None:
        return False
    try:
        bill = need(case)
    except (SkipCheck, OSError):
        return False
    free = min(gpu.memory_free, case.job.gpu_limit or gpu.memory_free)
    return fitting(held_by(bill), free) != "fits"


def _place(case: Case) -> str:
    if case.facts.host and case.facts.host.container:
        return "outside this container"
    return "by what the driver does not name (a desktop, a container, another user)"


def holder(process: GpuProcess) -> str:
    """A process that holds memory of a card, in words."""
    size = f" holds {process.used / GIB:.1f} GiB" if process.used else ""
    if not process.name:
        return f"process {process.pid}, outside this container,{size}"
    age = f", {process.seconds / 3600:.1f} h old" if process.seconds is not None else ""
    return f"process {process.pid} {process.name} of {process.user or 'another user'}{size}{age}"


def _commands(process: GpuProcess) -> tuple[str, ...]:
    if not process.name:
        return ()
    look = f"ps -fp {process.pid}"
    return (look, f"kill {process.pid}") if process.name.startswith(_TRAINERS) else (look,)


@check("HW123", "several cards work together under WSL2", needs=("gpus", "host"))
def wsl(case: Case) -> Iterator[Finding]:
    """WSL2 has part of NVML, little pinned memory and no choice of single cards in Docker (CUDA on WSL user guide)."""
    assert case.facts.host
    if not case.facts.host.wsl:
        raise SkipCheck("this is not WSL")
    if len(used(case)) > 1:
        yield warning(
            f"This is WSL2 and the job starts {_ranks(case)} on {len(used(case))} GPUs.",
            "Pinned memory is small there, other processes are not listed, and Docker passes all GPUs or none.",
            "Take native Linux for more than one GPU, or start one rank.",
            docs="https://docs.nvidia.com/cuda/wsl-user-guide/",
        )
