"""HW115: the driver's error reports in the kernel log."""

from __future__ import annotations

from collections.abc import Iterator

from xflux_doctor.check import Case, check
from xflux_doctor.checks.spare import used, without
from xflux_doctor.facts import Xid
from xflux_doctor.finding import Finding, error, warning
from xflux_doctor.gather.driver import same_place

_DOCS = "https://docs.nvidia.com/deploy/xid-errors/"
_FRESH = 2 * 3600.0
_RECENT = 24 * 3600.0
_BROKEN = {
    48: ("a double-bit memory error", "a reset"),
    62: ("its micro-controller halted", "a reset"),
    64: ("a memory row could not be remapped", "a reset, and a new card if it comes back"),
    74: ("an NVLink error", "a reset, and a look at the link"),
    79: ("it fell off the bus", "a reboot"),
    95: ("an uncontained memory error", "a reset"),
    119: ("its system processor (GSP) did not answer", "a reset"),
    120: ("its system processor (GSP) failed", "a reset"),
    140: ("an unrecovered memory error", "a reset"),
}
_PROGRAM = {13: "a program's kernel failed", 31: "a program touched memory that is not its own"}
"""These come from the program on the card; 43 and 45 only say that such a program was ended."""
_HARDWARE = frozenset(
    [56, 57, 58, 63, *range(68, 78), *range(80, 87), 88, 89, 92, 94, *range(96, 106), *range(110, 119),
     *range(121, 126)]
)  # fmt: skip
"""Source: github.com/imbue-ai/cluster-health, its host checks' list, without those that _BROKEN names."""


@check("HW115", "the kernel log has no fresh error report of a card", needs=("xids", "gpus"))
def kernel_reports(case: Case) -> Iterator[Finding]:
    """Xid numbers of the last day on this job's cards; those that only a faulty program causes are named as such."""
    places = {same_place(gpu.pci): gpu for gpu in used(case) if gpu.pci}
    lost = {same_place(card.pci) for card in case.facts.lost_gpus if card.pci}
    latest: dict[tuple[str, int], list[Xid]] = {}
    for xid in case.facts.xids or ():
        if xid.seconds <= _RECENT:
            latest.setdefault((same_place(xid.pci), xid.number), []).append(xid)
    for (place, number), reports in latest.items():
        newest = min(reports, key=lambda report: report.seconds)
        if newest.text.startswith("SXid"):
            yield from _switch(case, newest)
            continue
        gpu = places.get(place)
        if gpu is None and place not in lost:
            continue  # another job's card
        name = f"GPU {gpu.index}" if gpu else "The lost card"
        times = f"{len(reports)} times, last" if len(reports) > 1 else "once,"
        seen = f"{name} at {place}: Xid {number} {times} {_ago(newest.seconds)} ago: {_what(number)}."
        fine = gpu is not None and gpu.health.recovery_action == "none"
        if number in _BROKEN and newest.seconds <= _FRESH and gpu and not fine:
            edits, commands, plan = without(case, {gpu.index}, f"Xid {number}")
            hint = f"The card wants {_BROKEN[number][1]}. {plan}".strip()
            yield error(seen, "Ranks on it die or hang.", hint, edits=edits, commands=commands, docs=_DOCS)
        elif number in _BROKEN or number in _HARDWARE:
            because = "The driver says that the card can go on." if fine else "The card may fail again."
            hint = f"It wants {_BROKEN[number][1]}." if number in _BROKEN else "If it comes back, take another card."
            yield warning(seen, because, hint, commands=("dmesg | grep -i xid",), docs=_DOCS)
        elif number in _PROGRAM and newest.seconds <= _FRESH:
            yield warning(seen, "That is the program's fault, most likely; the card is not at fault by this alone.",
                          "If it was this job, look at its log: `xflux-doctor explain LOG`.", docs=_DOCS)  # fmt: skip


def _switch(case: Case, report: Xid) -> Iterator[Finding]:
    if case.job.local_processes > 1 and report.seconds <= _FRESH:
        yield error(
            f"The NVSwitch at {report.pci} reported a fatal error, SXid {report.number}, {_ago(report.seconds)} ago.",
            "CUDA work that goes over NVLink dies until the cards and the switch are reset.",
            "Have the machine rebooted, or take another one; one rank does not need the switch.",
            docs="https://docs.nvidia.com/datacenter/tesla/fabric-manager-user-guide/",
        )


def _what(number: int) -> str:
    if number in _BROKEN:
        return _BROKEN[number][0]
    return _PROGRAM.get(number, "an error of the card or its driver")


def _ago(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.0f} min"
