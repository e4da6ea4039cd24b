"""`plan` for programs, in bytes. `report/plan.schema.json` describes it, and a test holds them together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from xflux_trainer.memory import PHASES, Bill, Term

from xflux_doctor import __version__, xflux_bill
from xflux_doctor.check import Case
from xflux_doctor.plans import Card, Row, at_peak
from xflux_doctor.report.jsonreport import encode
from xflux_doctor.verdict import LAUNCHER, fitting, gpu_entry, host_room

if TYPE_CHECKING:
    from xflux_doctor.xflux import XFlux

__all__ = ["document", "encode", "first", "xflux_document"]
SCHEMA = 1


def document(case: Case, bill: Bill, cards: tuple[Card, ...], rows: list[Row], chosen: Row | None) -> dict[str, Any]:
    """The plan of the bundled trainer's job."""
    host, others = (_most(terms) for terms in (bill.host, bill.host_of_others))
    terms = at_peak(bill.gpu, bill.peak_phase) if bill.gpu else None
    return _whole(
        case, cards, rows, terms, bill.gpu_context, (host, others), bill.error_bar, chosen if cards else None,
        bill.gpu_holes,
    )  # fmt: skip


def _most(terms: tuple[Term, ...]) -> dict[str, int]:
    """{name: bytes} of the phase that needs most."""
    found = [at_peak(terms, phase) for phase in PHASES]
    return max(found, key=lambda each: sum(each.values()))


def xflux_document(case: Case, found: XFlux, cards: tuple[Card, ...], rows: list[Row]) -> dict[str, Any]:
    """The plan of a job of X-Flux's own scripts, whose first row is the job as it is."""
    host = {"the whole transformer, while it loads": xflux_bill.host_bytes(found)}
    terms = None if case.job.use_cpu else rows[0].terms
    chosen = first(rows, cards)
    return _whole(case, cards, rows, terms, rows[0].context, (host, host), xflux_bill.ERROR_BAR, chosen)


def _whole(
    case: Case, cards: tuple[Card, ...], rows: list[Row], terms: dict[str, int] | None, context: int,
    host: tuple[dict[str, int], dict[str, int]], error_bar: float, chosen: Row | None, holes: int = 0,
) -> dict[str, Any]:  # fmt: skip
    ranks: list[dict[str, Any]] = []
    for rank in range(case.job.local_processes):
        limit = cards[rank].limit if cards else None
        gpu = None if terms is None else gpu_entry(terms, context, limit, holes)
        ranks.append({"gpu": gpu, "host": _host(case, host, rank)})
    smallest = min((card.limit for card in cards), default=None)
    own = next((row for row in rows if not row.changes), None)
    timed = chosen or own
    others = [
        {**_row(row), "gpu": gpu_entry(row.terms, row.context, smallest, row.holes), "seconds_per_step": row.seconds}
        for row in rows
        if row is not chosen
    ]
    return {
        "schema": SCHEMA,
        "version": __version__,
        "error_bar": error_bar,
        "ranks": ranks,
        "seconds_per_step": None if timed is None else timed.seconds,
        "plan": None
        if chosen is None
        else {
            **_row(chosen),
            "why": _why(chosen, cards),
            "gpu": gpu_entry(chosen.terms, chosen.context, smallest, chosen.holes),
        },
        "alternatives": others,
    }


def _row(row: Row) -> dict[str, Any]:
    host = {"peak_bytes": row.host, "lacks_bytes": row.lacks}
    return {"label": row.label, "changes": row.changes, "lossy": row.lossy, "host": host}


def _host(case: Case, terms: tuple[dict[str, int], dict[str, int]], rank: int) -> dict[str, Any]:
    """One rank's host memory, by the terms of the first rank and of the others; the limit is that of all ranks of this
    machine and their launcher together, less what the container's processes hold already."""
    first, other = (sum(each.values()) for each in terms)
    every = first + other * (case.job.local_processes - 1)
    limit, used = host_room(case.facts.host) if case.facts.host else (0, 0)
    verdict = fitting(every + LAUNCHER + used, limit) if limit else None
    return {
        "terms": terms[min(rank, 1)], "peak_bytes": other if rank else first, "all_ranks_bytes": every,
        "limit_bytes": limit or None, "verdict": verdict,
    }  # fmt: skip


def first(rows: list[Row], cards: tuple[Card, ...]) -> Row | None:
    """The first of the table that fits; one that is tight where none fits."""
    for word in ("fits", "tight"):
        for row in rows:
            if row.verdict(cards) == word:
                return row
    return None


def _why(row: Row, cards: tuple[Card, ...]) -> str:
    if row.lacks:
        return "nothing that this machine says to have the memory for fits the card"
    if row.verdict(cards) != "fits":
        return "it is tight, and nothing else that may be taken fits"
    if not row.changes:
        return "as it is it fits, and nothing that may be changed makes it faster"
    if row.seconds is not None:
        return "the fastest that fits"
    return "the fastest that fits, by the times of an H100" if row.order else "the first change that fits"
