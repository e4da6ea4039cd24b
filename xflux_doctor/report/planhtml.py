"""The plan as one page that opens anywhere: no other file, no script, light and dark.

Made from `plan --format json`'s own values, so that it can be drawn later and elsewhere.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from xml.etree.ElementTree import Element, SubElement

from xflux_trainer.memory import Bill
from xflux_trainer.memory_terms import Term

from xflux_doctor.plans import Card, Row
from xflux_doctor.report.groups import GROUPS, gib
from xflux_doctor.report.htmlbars import Drawn, Scale, judged, picture, scale_of, tagged
from xflux_doctor.report.htmlparts import add, after, start, table, written
from xflux_doctor.verdict import gpu_entry

_Item = tuple[str, int, str]
"""A term's name, bytes and reason."""


def reasons_of(bill: Bill) -> dict[str, dict[str, str]]:
    """Why each term of the bill is as large as it is, for `page`: {"gpu": {name: why}, "host": {name: why}}."""
    phases = bill.host_phases
    host = max(phases, key=lambda phase: phases[phase])
    return {"gpu": _whys(bill.gpu, bill.peak_phase), "host": _whys(bill.host, host)}


def page(
    document: Mapping[str, Any], *, summary: str = "", cards: Sequence[Card] = (), chosen: Row | None = None,
    reasons: Mapping[str, Mapping[str, str]] | None = None,
) -> str:  # fmt: skip
    """The whole page of `planjson.document`'s dict, or of what `plan --format json` wrote.

    Beyond the document: the job in one `summary`, the `cards`' names and sizes, the `chosen` plan's own terms, and the
    `reasons` of the job's terms. What is not given is not shown.
    """
    card = min(cards, key=lambda card: card.limit, default=None)
    plans = _plans(document, chosen)
    drawn = [plan for plan in plans if plan.gpu is not None]
    reach = scale_of(document, drawn, card)
    html, body = start("Memory plan" + (f": {summary}" if summary else ""))
    add(body, "h1", "Memory plan")
    add(body, "p", summary or _summary(document))
    _choice(body, document, plans, reach)
    if drawn:
        picture(body, drawn, reach, card)
        _alternatives(body, plans)
        _groups(body, drawn)
    _ranks(body, document["ranks"])
    _bill(body, document, reasons or {})
    add(body, "p", f"xflux-doctor {document['version']}", "soft")
    return written(html)


# What is shown -------------------------------------------------------------------------------------------


def _whys(terms: Iterable[Term], phase: str) -> dict[str, str]:
    found: dict[str, list[str]] = {}
    for term in sorted(terms, key=lambda term: -term.bytes):
        if term.phase == phase and term.why not in found.setdefault(term.name, []):
            found[term.name].append(term.why)
    return {name: "; ".join(whys) for name, whys in found.items()}


def _plans(document: Mapping[str, Any], chosen: Row | None) -> list[Drawn]:
    """The chosen one first, the others in the document's order."""
    plan = document["plan"]
    others = [
        Drawn(row["label"], row["changes"], row["lossy"], row["gpu"], row["seconds_per_step"], host=row.get("host"))
        for row in document["alternatives"]
    ]
    if plan is None:
        return others
    gpu = plan.get("gpu")  # a document may have it, and need not
    limits = [entry["gpu"]["limit_bytes"] for entry in document["ranks"] if entry["gpu"]]
    if gpu is None and not plan["changes"]:  # it is the job as it is, on the rank that has least
        gpu = next((entry["gpu"] for entry in document["ranks"] if entry["gpu"]
                    and entry["gpu"]["limit_bytes"] == min(limits)), None)  # fmt: skip
    elif gpu is None and chosen is not None:
        gpu = gpu_entry(chosen.terms, chosen.context, min(limits, default=None), chosen.holes)
    seconds, host = document["seconds_per_step"], plan.get("host")
    return [Drawn(plan["label"], plan["changes"], plan["lossy"], gpu, seconds, chosen=True, host=host), *others]


def _summary(document: Mapping[str, Any]) -> str:
    """What the document itself says of the job."""
    count = len(document["ranks"])
    where = "the CPU" if document["ranks"][0]["gpu"] is None else "a GPU each" if count > 1 else "one GPU"
    return f"{count} rank{'s' if count > 1 else ''} of this machine, on {where}"


def _choice(body: Element, document: Mapping[str, Any], plans: Sequence[Drawn], reach: Scale) -> None:
    """The chosen plan and why, or why there is none."""
    add(body, "h2", "The plan")
    box = SubElement(body, "div", {"class": "card"})
    error = f"What is allocated may be off by ±{document['error_bar']:.0%} of the forecast."
    own = next((plan for plan in plans if plan.chosen), None)
    if own is None:
        if not plans:
            text = "The job runs on the CPU: there is no card to choose for."
        elif reach.limit is None:
            text = "No card is known to hold the job against, so nothing was chosen."
        elif (fitting := [plan for plan in plans if plan.gpu and plan.gpu["verdict"] != "does not fit"]) and all(
            plan.host and plan.host["lacks_bytes"] for plan in fitting
        ):
            text = "What fits this card takes more of the host's memory than there is: see the alternatives."
        elif fitting:
            text = "Nothing fits this card that computes what the job asks for: what does is lossy, or trains on less."
        else:
            text = "Nothing fits this card: a larger one is needed, or several that share the weights."
        add(box, "p", text, "" if not plans or reach.limit is None else "over")
        add(box, "p", error, "soft")
        return
    said = add(box, "p", "")
    add(said, "strong", own.label)
    after(said, f": {document['plan']['why']}.")
    if own.changes:
        _settings(add(box, "p", "Settings: "), own.changes)
    facts = []
    if own.gpu:
        peak, limit = own.gpu["peak_bytes"], own.gpu["limit_bytes"]
        of = f" of {gib(limit)} that it may hold" if limit is not None else ""
        facts.append(f"{gib(own.gpu['device_bytes'])}{of}, with {gib(peak)} ± {gib(peak * reach.error)} allocated")
    if own.seconds is not None:
        facts.append(f"{own.seconds:.2f} s a step")
    if facts:
        add(box, "p", "; ".join(facts), "num")
    add(box, "p", error, "soft")


def _alternatives(body: Element, plans: Sequence[Drawn]) -> None:
    add(body, "h2", "The alternatives")
    heads = ("plan", "verdict", "GPU", "host", "a step", "lossy", "settings that differ")
    rows, _ = table(body, "Each plan as a whole, against the card that has least.", heads, numbers=(2, 3, 4))
    for plan in plans:
        row = _row(rows, plan)
        judged(add(row, "td", "", "verdict"), plan.gpu)
        add(row, "td", gib(plan.gpu["device_bytes"]) if plan.gpu else "not in this file", "num")
        add(row, "td", _hosts(plan.host), "num")
        add(row, "td", "unknown" if plan.seconds is None else f"{plan.seconds:.2f} s", "num")
        add(row, "td", "yes" if plan.lossy else "no")
        _settings(add(row, "td", "" if plan.changes else "none"), plan.changes)
    add(body, "p", "A lossy plan changes the numbers that are computed.", "soft")


def _hosts(host: Mapping[str, Any] | None) -> str:
    """The first rank's memory of the host, and what is missing of it."""
    if host is None or host["peak_bytes"] is None:
        return "unknown"
    return gib(host["peak_bytes"]) + (f", {gib(host['lacks_bytes'])} too much" if host["lacks_bytes"] else "")


def _groups(body: Element, drawn: Sequence[Drawn]) -> None:
    add(body, "h2", "The bars in numbers")
    names = ("plan", *(group.name for group in GROUPS), "together")
    rows, _ = table(body, "GiB of one GPU at the peak.", names, numbers=range(1, len(names)))
    for plan in drawn:
        row = _row(rows, plan)
        for size in (*plan.sizes, sum(plan.sizes)):
            add(row, "td", f"{gib(size)[:-4]}", "num")


def _ranks(body: Element, ranks: Sequence[Mapping[str, Any]]) -> None:
    """Where there are several: each has a limit of its own."""
    if len(ranks) < 2 or any(rank["gpu"] is None for rank in ranks):
        return
    add(body, "h2", "The ranks")
    rows, _ = table(body, "The job as it is, on the GPU of each rank of this machine.",
                  ("rank", "memory", "limit", "verdict"), numbers=(1, 2))  # fmt: skip
    for number, rank in enumerate(ranks):
        row, gpu = SubElement(rows, "tr"), rank["gpu"]
        add(row, "th", str(number)).set("scope", "row")
        add(row, "td", gib(gpu["device_bytes"]), "num")
        add(row, "td", "unknown" if gpu["limit_bytes"] is None else gib(gpu["limit_bytes"]), "num")
        judged(add(row, "td", "", "verdict"), gpu)


def _bill(body: Element, document: Mapping[str, Any], why: Mapping[str, Mapping[str, str]]) -> None:
    """The terms of the job as it is, largest first; of the first rank, which writes and draws."""
    gpu, host = document["ranks"][0]["gpu"], document["ranks"][0]["host"]
    add(body, "h2", "The bill of the job as it is")
    if gpu is not None:
        own = [(name, size, why.get("gpu", {}).get(name, "")) for name, size in gpu["terms"].items()]
        held = gpu["reserved_bytes"] - gpu["peak_bytes"]
        ends = [("allocated", gpu["peak_bytes"], "torch.cuda.max_memory_allocated"),
                ("allocator's reserve", held, GROUPS[-2].why), ("CUDA context", gpu["context_bytes"], GROUPS[-1].why),
                ("together", gpu["device_bytes"], "as nvidia-smi shows it")]  # fmt: skip
        _terms(body, "GPU memory of each rank at its peak.", own, ends)
    own = [(name, size, why.get("host", {}).get(name, "")) for name, size in host["terms"].items()]
    ends = [("together", host["peak_bytes"], "")]
    several = host["all_ranks_bytes"] != host["peak_bytes"]
    if several:
        ends.append(("all ranks of this machine", host["all_ranks_bytes"], ""))
    limit = host["limit_bytes"]
    word = "is tight" if host["verdict"] == "tight" else host["verdict"]
    against = f" This machine has {gib(limit)}: it {word}." if limit else ""
    _terms(body, f"Host memory of {'the first' if several else 'each'} rank at its peak.{against}", own, ends)


def _terms(body: Element, caption: str, terms: list[_Item], ends: list[_Item]) -> None:
    rows, foot = table(body, caption, ("term", "GiB", "why"), numbers=(1,))
    for name, size, why in sorted(terms, key=lambda term: -term[1]):
        _term(rows, name, size, why)
    for name, size, why in ends:
        _term(foot, name, size, why)


def _term(rows: Element, name: str, size: int, why: str) -> None:
    row = SubElement(rows, "tr")
    add(row, "th", name).set("scope", "row")
    add(row, "td", f"{size / (1 << 30):.3f}", "num")
    add(row, "td", why, "why")


def _settings(place: Element, changes: Mapping[str, Any]) -> None:
    """`key: value`, as in the training file."""
    for number, (key, value) in enumerate(changes.items()):
        if number:
            after(place, ", ")
        add(place, "code", f"{key}: {value if isinstance(value, str) else json.dumps(value)}")


def _row(rows: Element, plan: Drawn) -> Element:
    row = SubElement(rows, "tr", {"class": "chosen"} if plan.chosen else {})
    tagged(SubElement(row, "th", scope="row"), plan)
    return row
