"""HW: what each GPU did when it was tried (`check --deep`): context, memory, products, rates, the link."""

from __future__ import annotations

from collections.abc import Iterator

from xflux_trainer.speed import peak
from xflux_trainer.timing_cards import card_of

from xflux_doctor.bill import need
from xflux_doctor.check import Case, SkipCheck, check
from xflux_doctor.checks.cards import holder
from xflux_doctor.checks.spare import used, without
from xflux_doctor.facts import Gpu, GpuProbe, Product, Reading
from xflux_doctor.finding import Change, Finding, error, warning
from xflux_doctor.floors import floor_of
from xflux_doctor.probes.each_gpu import LIMITS
from xflux_doctor.verdict import fitting, held_by

GIB = 1 << 30
_SQUARE = "8192x8192x8192"
_OF_PEAK = 0.35
"""Share of the data sheet's rate below which a card that nobody measured is slow: healthy ones have 0.6 to 0.9."""
_XID = "dmesg | grep -i xid"


def card(case: Case, probe: GpuProbe) -> Gpu | None:
    """The card of NVML's list that this device really is."""
    return next((gpu for gpu in case.facts.gpus or () if probe.uuid and gpu.uuid.endswith(probe.uuid)), None)


def name(case: Case, probe: GpuProbe) -> str:
    """By NVML's number where that is known, as everywhere else."""
    gpu = card(case, probe)
    where = f"GPU {gpu.index}" if gpu else f"Device {probe.device}"
    return f"{where} ({probe.name})" if probe.name else where


def spared(case: Case, probe: GpuProbe, reason: str) -> tuple[tuple[Change, ...], tuple[str, ...], str]:
    """The job on the other cards, see `without`."""
    gpu = card(case, probe)
    if gpu is None:
        devices = used(case)
        gpu = devices[probe.device] if probe.device < len(devices) else None
    return without(case, {gpu.index}, reason) if gpu else ((), (), "")


@check("HW201", "every GPU of the job makes a context, and is the one that is meant", needs=("gpu_probes",))
def context(case: Case) -> Iterator[Finding]:
    """`check --deep` starts CUDA on each visible GPU and asks the driver which card it got; CUDA's order is not NVML's
    where CUDA_DEVICE_ORDER is not PCI_BUS_ID (CUDA programming guide, environment variables). A context that comes
    after 40 s is waited for, and is a warning."""
    meant, told, unknown = used(case), False, ""
    for probe in case.facts.gpu_probes or ():
        late = probe.done.get("context", 0.0) > LIMITS["context"]
        crossed = probe.uuid and probe.device < len(meant) and not meant[probe.device].uuid.endswith(probe.uuid)
        told = told or bool(crossed) or late or "context" in probe.failed
        if why := probe.failed.get("context"):
            edits, commands, plan = spared(case, probe, "no context can be made on the card")
            again = "was started once, and then no more" if "context" in probe.done else "could not be started"
            yield error(
                f"{name(case, probe)}: CUDA {again}: {why}",
                "Training would stop at the same place, before its first step.",
                f"Look for an Xid in the kernel log; a card in exclusive mode or that wants a reset does so. {plan}",
                edits=edits, commands=(_XID, *commands),
            )  # fmt: skip
            continue
        if why := probe.skipped.get("context"):
            unknown = f"{name(case, probe)} was not tried: {why}"
        if late:
            yield _late(case, probe)
        if crossed:
            got = card(case, probe)
            yield warning(
                f"Device {probe.device} of the job is {f'GPU {got.index}' if got else probe.name} at {probe.pci}; by "
                f"NVML's order it is GPU {meant[probe.device].index}.",
                "Cards chosen by number are then others than those that nvidia-smi shows.",
                "Set CUDA_DEVICE_ORDER=PCI_BUS_ID.",
                commands=("export CUDA_DEVICE_ORDER=PCI_BUS_ID",),
            )
    if unknown and not told:
        raise SkipCheck(unknown)


def _late(case: Case, probe: GpuProbe) -> Finding:
    """A context that came, after its time."""
    gpu, took, own = card(case, probe), probe.done["context"], probe.context_seconds
    seen = f"{name(case, probe)}: its CUDA context came after {took:.0f} s; {LIMITS['context']:.0f} s is the bound."
    if own is not None and own < took / 2:
        return warning(
            f"{seen} All but {own:.0f} s of it was the import of torch.",
            "The disk that torch lies on is slow, or the host is busy: every start of the training waits as long.",
            "Try again when the host is quiet; if that changes nothing, install torch on a disk of this machine.",
        )
    if own is not None:
        seen += f" CUDA's own start was {own:.0f} s of it."
    off = gpu is not None and gpu.health.persistence is False
    because = ("Persistence mode is off: each program that finds the cards unused starts the driver anew." if off else
               "The driver was still starting (persistence mode off), or the host is busy.")  # fmt: skip
    return warning(
        seen,
        f"{because} The card works; every start of the training waits as long.",
        "Turn persistence mode on (nvidia-smi -pm 1, or the service nvidia-persistenced; on the host, when this is a "
        "container), or try again when the host is quiet.",
        commands=("sudo nvidia-smi -pm 1",),
    )


@check("HW202", "the memory that the job needs can really be taken", needs=("gpu_probes", "train"))
def memory(case: Case) -> Iterator[Finding]:
    """`check --deep` allocates the forecast on each GPU in one piece, then as the trainer does: weights, then
    activations that come, go and come again in other sizes. ME101 compares numbers; this tries."""
    bill = need(case)
    for probe in case.facts.gpu_probes or ():
        if why := probe.failed.get("memory"):
            yield error(f"{name(case, probe)} failed while memory was taken: {why}",
                        "Training would stop there.", "Look for an Xid in the kernel log.",
                        commands=(_XID,))  # fmt: skip
        if not probe.wanted or probe.pieces is not False:
            continue
        if probe.total and fitting(held_by(bill), probe.total) == "does not fit":
            continue  # larger than the card itself: ME101's
        gpu = card(case, probe)
        who = "; ".join(holder(process) for process in gpu.processes) if gpu else ""
        free = f"{(probe.free or 0) / GIB:.1f} GiB were free"
        yield error(
            f"{name(case, probe)}: of {probe.wanted / GIB:.1f} GiB that the job will allocate {probe.taken / GIB:.1f} "
            f"came, where {free}. In use by {who or 'what the driver does not name'}.",
            "It would end in 'CUDA out of memory'.",
            "End what holds the memory if it is yours (the doctor never does), or choose another GPU; ME101 has the "
            "plan that fits beside it.",
            commands=("nvidia-smi --query-compute-apps=pid,name,used_memory --format=csv",),
        )


@check("HW203", "every GPU multiplies rightly", needs=("gpu_probes",))
def products(case: Case) -> Iterator[Finding]:
    """Products of random values in the job's type (fp8 too where the card has it) against float64, element by element,
    each several times over: a sick card gives wrong numbers, and no error."""
    for probe in case.facts.gpu_probes or ():
        bad = [one for one in probe.products if not (one.error <= 1 and one.repeated)]
        edits, commands, plan = spared(case, probe, "the card computes wrongly") if bad else ((), (), "")
        for one in bad:
            seen = _wrong(one)
            yield error(
                f"{name(case, probe)}: {seen}",
                "The card, its memory or its driver is sick: training on it ends in NaN, or in weights that are worth "
                "nothing, without a word.",
                f"Take the card out of use and have it tested (`dcgmi diag -r 3`). {plan}",
                edits=edits, commands=commands,
            )  # fmt: skip
        if why := probe.failed.get("products"):
            yield error(f"{name(case, probe)} failed while it multiplied matrices: {why}",
                        "Training would stop at its first product.", "Look for an Xid in the kernel log.",
                        commands=(_XID,))  # fmt: skip


def _wrong(one: Product) -> str:
    if not one.repeated:
        return f"the same product in {one.kind} does not give the same bits every time."
    return f"an element of a product in {one.kind} is off by {one.error:.3g} times what rounding can do."


@check("HW204", "every GPU multiplies as fast as cards like it", needs=("gpu_probes",))
def rate(case: Case) -> Iterator[Finding]:
    """The rate of an 8192³ product in bf16 against three quarters of what this project measured on such a card, or a
    third of its data sheet's."""
    judged = 0
    for probe in case.facts.gpu_probes or ():
        measured = next((one.rates.get(_SQUARE) for one in probe.products if one.kind in ("bfloat16", "float16")), None)
        floor, known, sheet = floor_of(probe.name, "matmul_bf16_tflops"), card_of(probe.name), peak(probe.name, "bf16")
        least = floor.value if floor else _OF_PEAK * sheet if sheet else None
        if measured is None or least is None:
            continue
        judged += 1
        if measured >= least:
            continue
        expected = f"{known.bf16:.0f} were measured on such a card" if known else f"its data sheet says {sheet:.0f}"
        yield warning(
            f"{name(case, probe)} multiplies at {measured:.0f} TFLOP/s; {expected}.{_heat(probe.loaded)}",
            "Every step takes as much longer.",
            "See what holds its clocks down, who else computes on it (HW121) and whether its power is limited.",
            commands=("nvidia-smi -q -d PERFORMANCE,POWER,CLOCK,TEMPERATURE",),
            docs="" if floor is None else "https://docs.nvidia.com/deploy/nvml-api/group__nvmlClocksEventReasons.html",
        )
    if not judged:
        raise SkipCheck("no product was timed, or what these cards reach is not known")


def _heat(reading: Reading | None) -> str:
    """What NVML said while products were timed."""
    if reading is None:
        return ""
    held_down = [word for word in reading.throttle if word not in ("none", "idle")]
    words = [f"{reading.sm_clock} of {reading.sm_clock_max} MHz" if reading.sm_clock and reading.sm_clock_max else "",
             f"{reading.temperature} °C" if reading.temperature is not None else "",
             f"{reading.power:.0f} of {reading.power_limit:.0f} W" if reading.power and reading.power_limit else "",
             f"held down by {', '.join(held_down)}" if held_down else ""]  # fmt: skip
    told = ", ".join(word for word in words if word)
    return f" Meanwhile: {told}." if told else ""


@check("HW205", "bytes come to every GPU as fast as its slot allows", needs=("gpu_probes",))
def link(case: Case) -> Iterator[Finding]:
    """Copies from pinned host memory, one GPU at a time, against half of what PCIe carries; advisory: a slot of fewer
    lanes may be all that this machine has."""
    judged = 0
    for probe in case.facts.gpu_probes or ():
        for stage in ("bandwidth", "link"):
            if why := probe.failed.get(stage):
                judged += 1
                yield error(f"{name(case, probe)} failed while memory was copied: {why}",
                            "Training would stop there.", "Look for an Xid in the kernel log.",
                            commands=(_XID,))  # fmt: skip
        floor = floor_of(probe.name, "h2d_gbs")
        if probe.h2d_gbs is None or floor is None:
            continue
        judged += 1
        if probe.h2d_gbs < floor.value:
            back = f", and back at {probe.d2h_gbs:.1f}" if probe.d2h_gbs else ""
            yield warning(
                f"{name(case, probe)} gets {probe.h2d_gbs:.1f} GB/s from the host's memory{back}; {floor.value:g} is "
                f"the floor ({floor.source}).",
                "Streamed blocks, offloaded states and the loading of weights take as much longer.",
                "See the slot's width and generation, and whether the process runs on the card's side of the machine.",
                commands=("nvidia-smi -q -d PERFORMANCE | grep -i link -A 6", "nvidia-smi topo -m"),
            )
    if not judged:
        raise SkipCheck("no copy was timed, or what these cards' slots carry is not known")
