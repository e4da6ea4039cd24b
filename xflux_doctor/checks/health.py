"""HW: the condition of the cards that this job uses, as the driver tells it. What it does not tell is no finding."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from xflux_doctor.check import Case, SkipCheck, check
from xflux_doctor.checks.spare import used, without
from xflux_doctor.facts import Gpu, GpuHealth
from xflux_doctor.finding import Finding, error, warning

_MEMORY_DOCS = "https://docs.nvidia.com/deploy/a100-gpu-mem-error-mgmt/"
_RECOVERY = {
    "gpu_reset": "a reset of the GPU",
    "node_reboot": "a reboot of the machine",
    "drain_p2p": "that GPU-to-GPU traffic ends and the GPU is reset",
    "drain_and_reset": "that its work ends and the GPU is reset",
    "recover_imex_domain": "that the NVLink domain between machines is recovered",
    "bus_reset": "a reset of its bus",
    "system_reboot": "a reboot of the machine",
}
_SLOWED = {
    "hw_slowdown": "hardware slowdown",
    "hw_thermal": "too hot (hardware limit)",
    "hw_power_brake": "the power supply asks for less",
    "sw_thermal": "too hot (the driver's limit)",
}


def _told(case: Case, tells: Callable[[GpuHealth], object | None]) -> tuple[Gpu, ...]:
    """The used cards whose driver answers the question; a skip where none does, for unknown is no pass."""
    found = tuple(gpu for gpu in used(case) if tells(gpu.health) not in (None, ""))
    if not found:
        raise SkipCheck("the driver does not tell")
    return found


def _bad_card(case: Case, gpu: Gpu, seen: str, because: str, hint: str, *, docs: str, fatal: bool = True) -> Finding:
    """An error with the plan on the other cards; a warning where the driver says that the card can go on."""
    if not fatal:
        return warning(seen, because, hint, docs=docs)
    edits, commands, plan = without(case, {gpu.index}, f"GPU {gpu.index} is not well")
    return error(seen, because, f"{hint} {plan}".strip(), edits=edits, commands=commands, docs=docs)


def _name(gpu: Gpu) -> str:
    return f"GPU {gpu.index} ({gpu.name}{f' at {gpu.pci}' if gpu.pci else ''})"


def well(gpu: Gpu) -> bool:
    """Whether the driver itself says that the card needs no recovery; drivers before 570 say nothing."""
    return gpu.health.recovery_action == "none"


@check("HW110", "no card has uncorrected memory errors", needs=("gpus",))
def ecc_errors(case: Case) -> Iterator[Finding]:
    """NVML's count of uncorrected ECC errors since the driver was loaded; any wants a reset or a new card."""
    for gpu in _told(case, lambda health: health.ecc_uncorrected):
        count = gpu.health.ecc_uncorrected or 0
        if count:
            yield _bad_card(
                case,
                gpu,
                f"{_name(gpu)} had {count} uncorrected memory error{'s' if count > 1 else ''} since the driver loaded.",
                "The process that meets one dies with 'uncorrectable ECC error encountered'"
                + ("; the driver says that the card can go on." if well(gpu) else ", and the next may meet it again."),
                "Have the card reset; if they come back, have it replaced.",
                docs=_MEMORY_DOCS,
                fatal=not well(gpu),
            )


@check("HW111", "no memory row waits to be remapped or cannot be", needs=("gpus",))
def row_remapping(case: Case) -> Iterator[Finding]:
    """A failed remap is a card to replace; a pending one waits for a reset, and work can go on (NVIDIA's guide)."""
    for gpu in _told(case, lambda health: health.remap_failed):
        if gpu.health.remap_failed:
            because = "The card has no spare row left for a faulty one: uncorrected errors will come back."
            seen = f"{_name(gpu)}: remapping of a memory row has failed."
            yield _bad_card(case, gpu, seen, because, "Have the card replaced.", docs=_MEMORY_DOCS)
        elif gpu.health.remap_pending:
            yield warning(
                f"{_name(gpu)}: a memory row is to be remapped at the next reset.",
                "The faulty row is out of use already and the job can run.",
                "Have the card reset when nobody uses it.",
                docs=_MEMORY_DOCS,
            )


@check("HW112", "no memory page waits to be retired", needs=("gpus",))
def page_retirement(case: Case) -> Iterator[Finding]:
    """Cards before Ampere take faulty pages out of use at the next driver load (NVML retired pages)."""
    for gpu in _told(case, lambda health: health.retirement_pending):
        if gpu.health.retirement_pending:
            yield warning(
                f"{_name(gpu)}: faulty memory pages wait to be retired.",
                "Until then the job may be given one of them and die of an ECC error.",
                "Have the card reset, or the machine rebooted.",
                docs="https://docs.nvidia.com/deploy/dynamic-page-retirement/",
            )


@check("HW113", "the ECC mode is the one that was asked for", needs=("gpus",))
def ecc_mode(case: Case) -> Iterator[Finding]:
    """A changed ECC mode takes effect at the next reset; with it the memory that is free may change (NVML)."""
    for gpu in _told(case, lambda health: health.ecc_pending):
        now, then = gpu.health.ecc, gpu.health.ecc_pending
        if now != then:
            yield warning(
                f"{_name(gpu)}: ECC is {'on' if now else 'off'} and will be {'on' if then else 'off'} after a reset.",
                "Ranks that start before and after it differ in memory and in speed."
                if then
                else "After it memory errors go unseen.",
                "Reboot, or set the mode back.",
                commands=(f"sudo nvidia-smi -i {gpu.index} -e {int(bool(now))}",),
            )


@check("HW114", "the driver asks for no recovery of a card", needs=("gpus",))
def recovery_action(case: Case) -> Iterator[Finding]:
    """NVML's field 230, since driver 570: what has to be done before the card can be trusted again."""
    for gpu in _told(case, lambda health: health.recovery_action):
        action = gpu.health.recovery_action
        if action == "none":
            continue
        alone = action in ("drain_p2p", "recover_imex_domain") and case.job.num_processes == 1
        yield _bad_card(
            case,
            gpu,
            f"{_name(gpu)}: the driver asks for {_RECOVERY.get(action, action)} ({action}).",
            "Traffic between cards is not reliable until then."
            if alone
            else "CUDA fails on this card until it is done.",
            "Have it done by whoever runs the machine (the doctor never does).",
            docs="https://docs.nvidia.com/deploy/gpu-debug-guidelines/",
            fatal=not alone,
        )


@check("HW116", "the clocks are not held down by heat or power", needs=("gpus",))
def clocks(case: Case) -> Iterator[Finding]:
    """NVML's reasons for low clocks at this moment; idle and the power limit of a working card are normal."""
    for gpu in _told(case, lambda health: health.throttle or None):
        found = [words for reason, words in _SLOWED.items() if reason in gpu.health.throttle]
        if found:
            heat = f" It has {gpu.health.temperature} °C." if gpu.health.temperature is not None else ""
            yield warning(
                f"{_name(gpu)}: its clocks are held down: {', '.join(found)}.{heat}",
                "It computes at a fraction of its speed, and every other rank waits for it.",
                "Look at cooling and power cables; on a rented machine take another one.",
                commands=(f"nvidia-smi -q -i {gpu.index} -d PERFORMANCE,TEMPERATURE,POWER",),
            )


@check("HW117", "the NVSwitch fabric is set up", needs=("gpus",))
def fabric(case: Case) -> Iterator[Finding]:
    """Until the fabric manager has set it up, CUDA answers 802 on HGX machines although nvidia-smi lists the cards."""
    found = _told(case, lambda health: health.fabric)
    bad = [gpu for gpu in found if gpu.health.fabric in ("not_started", "in_progress", "failed")]
    if not bad:
        return
    assert case.facts.driver
    states = ", ".join(f"GPU {gpu.index}: {gpu.health.fabric.replace('_', ' ')}" for gpu in bad)
    # A single card that was passed into a virtual machine may never join a fabric and works.
    make = error if len(case.facts.gpus or ()) > 1 else warning
    yield make(
        f"The NVSwitch fabric is not ready ({states}).",
        "CUDA does not start: 'CUDA error: system not yet initialized' (802).",
        "Have nvidia-fabricmanager started on the host, in the driver's very version "
        f"({case.facts.driver.version}); right after a boot wait a minute.",
        commands=("systemctl status nvidia-fabricmanager", "nv-fabricmanager -v"),
        docs="https://docs.nvidia.com/datacenter/tesla/fabric-manager-user-guide/",
    )


@check("HW119", "every card has its PCIe lanes", needs=("gpus",))
def pcie_width(case: Case) -> Iterator[Finding]:
    """The link's width does not fall when a card is idle, as its speed does: fewer lanes are a slot or a fault."""
    for gpu in _told(case, lambda health: health.pcie_width):
        now, most = gpu.health.pcie_width or 0, gpu.health.pcie_width_max or 0
        # Desktop boards give two cards 8 lanes each; that is their design.
        desktop = any(word in gpu.name for word in ("GeForce", "RTX", "TITAN"))
        if 0 < now * (4 if desktop else 2) <= most:
            yield warning(
                f"{_name(gpu)} has {now} of {most} PCIe lanes.",
                "Loading, offloading and exchange between cards without NVLink take that much longer.",
                "Have the card reseated, or put into another slot.",
            )


@check("HW122", "the driver stays loaded between programs", needs=("gpus",))
def persistence(case: Case) -> Iterator[Finding]:
    """Without persistence mode the last program's end unloads the driver; only told where that costs over a second."""
    seconds = case.facts.timings.get("nvml_start", 0.0)
    off = [gpu for gpu in _told(case, lambda health: health.persistence) if gpu.health.persistence is False]
    if off and seconds > 1.0:
        yield warning(
            f"The driver took {seconds:.1f} s to start, and persistence mode is off on {len(off)} cards.",
            "Every program that finds the cards unused waits that long.",
            "Have it turned on (on the host, when this is a container).",
            commands=("sudo nvidia-smi -pm 1",),
        )
