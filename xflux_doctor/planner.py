"""The plans of a case, and which one is taken: on the cards that its ranks see, however they share the work."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from xflux_doctor import strategy
from xflux_doctor.batch import accumulation_places
from xflux_doctor.check import Case, SkipCheck
from xflux_doctor.facts import Gpu
from xflux_doctor.finding import Edit
from xflux_doctor.plans import Card, Row
from xflux_doctor.plansearch import SAME, Found, Search, order_of
from xflux_doctor.visible import selected

MOST_RANKS = 1024
"""Of one machine: a file may say a billion, for which other checks have a word."""


def search(case: Case, cards: tuple[Card, ...], visible: tuple[Gpu, ...] = ()) -> Found:
    """All plans of a job that has a bill on GPUs. `visible`: the cards that are meant, where they are those of here.

    Without cards there is nothing to fit, and the job as it is alone. Raises SkipCheck where there is no bill.
    """
    found = Search(case, cards, visible).run()
    chosen = found.chosen
    if not cards or (chosen is not None and "img_size" not in chosen.changes and not chosen.lacks):
        return found
    return _shared_otherwise(case, cards, visible, found)


def _shared_otherwise(case: Case, cards: tuple[Card, ...], visible: tuple[Gpu, ...], found: Found) -> Found:
    """With the plans that fit when the ranks share the work in another way; what is smaller comes after these."""
    more: list[Row] = []
    for name, laid, edits in strategy.others(case):
        for row in Search(laid, cards, visible).run().rows:
            if row.verdict(cards) != "does not fit" and "img_size" not in row.changes:
                label = strategy.NAMES[name] + (f": {row.label}" if row.changes else "")
                changes = {edits[0].key[0]: edits[0].value, **row.changes}
                more.append(msgspec.structs.replace(row, label=label, changes=changes, sharing=edits))
    ranked = sorted([*found.rows, *more], key=lambda row: (not row.fits, order_of(row)))
    allowed = [row for row in ranked if row in more and row.allowed and not row.lacks]
    taken = next((row for word in ("fits", "tight") for row in allowed if row.verdict(cards) == word), found.chosen)
    return Found(ranked, taken, found.own)


def own(case: Case, cards: tuple[Card, ...]) -> Row:
    """The job as it is, without a search. Raises SkipCheck where there is no bill."""
    return Search(case, cards, ()).own()


def plan_edits(case: Case, row: Row) -> tuple[Edit, ...]:
    """What turns the job into that plan, in its files."""
    edits: list[Edit] = []
    for key, value in row.changes.items():
        if key == "distributed_type":
            edits += row.sharing
        elif key == "gradient_accumulation_steps":
            why = "as many samples a step as before"
            edits += [Edit(file, place, value, why) for file, place in accumulation_places(case.job)]
        else:
            value = value if not isinstance(value, tuple) else ", ".join(map(str, value))
            edits.append(Edit("train", (key,), value, f"the plan: {row.label}"))
    return tuple(edits)


def quicker(found: Found, written: Iterable[str]) -> Row | None:
    """The plan that is to be taken though the job as it is fits: it is faster, and changes nothing that the training
    file itself says (`written`: its keys)."""
    own, keys = found.own, frozenset(written)
    if found.chosen is None or found.chosen is own or not order_of(own):
        return None
    rows = [row for row in found.rows if order_of(row) and row.allowed and not keys & row.changes.keys()]
    best = min((row for row in rows if row.fits), key=order_of, default=None)
    return best if best is not None and order_of(best) < SAME * order_of(own) else None


def of_case(case: Case) -> tuple[Card, ...]:
    """The visible card of each rank of this machine, within --gpu-limit."""
    if case.job.use_cpu:
        return ()
    limit, ranks = case.job.gpu_limit, case.job.local_processes
    found = selected(case.facts.gpus or (), case.facts.environment, case.job.gpu_ids)
    if not found:
        return (Card("", limit, limit),) * ranks if limit else ()
    made = [Card(one.name, one.memory_total, min(one.memory_free, limit or one.memory_free)) for one in found]
    return tuple(made[rank % len(made)] for rank in range(ranks))


def under(case: Case, limit: int) -> Row | None:
    """The plan that would be taken on these cards if each had no more than so many bytes."""
    cards = tuple(Card(card.name, card.total, min(card.limit, limit)) for card in of_case(case))
    visible = selected(case.facts.gpus or (), case.facts.environment, case.job.gpu_ids)
    return search(case, cards, visible).chosen if cards else None


def known(case: Case) -> Found | None:
    """The plans on the visible cards; None where there is no bill, or no card."""
    if not _LATEST or _LATEST[0][0] is not case:
        _LATEST[:] = [(case, _known(case))]
    return _LATEST[0][1]


_LATEST: list[tuple[Case, Found | None]] = []
"""Of the case that was asked last: eight cards that are too small ask for one plan, and a case never changes."""


def _known(case: Case) -> Found | None:
    job = case.job
    if job.train is None or job.use_cpu or not job.bundled or job.local_processes > MOST_RANKS:
        return None
    try:
        cards = of_case(case)
        visible = selected(case.facts.gpus or (), case.facts.environment, case.job.gpu_ids)
        return search(case, cards, visible) if cards else None
    except (SkipCheck, OSError):
        return None
