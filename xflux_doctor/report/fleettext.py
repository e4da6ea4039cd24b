"""A fleet's report for a terminal: what stops a job first, each line with its nodes and its next step."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Iterator, Sequence

import click

from xflux_doctor.fleet.fields import field
from xflux_doctor.fleet.values import Difference, Fleet

_WIDTH = 100
_MARKS = {"error": ("✗", "red"), "warning": ("!", "yellow")}
_MOST = 12
"""Values that a line shows; the JSON report has all."""


def render(fleet: Fleet) -> str:
    """The whole report."""
    lines = [_first(fleet), *_gone(fleet), *_broken(fleet)]
    for items in _grouped(fleet.differences):
        lines += _difference(items)
    lines += _notes(fleet)
    return "\n".join([*lines, "", _last(fleet)]) + "\n"


def _first(fleet: Fleet) -> str:
    count = len(fleet.nodes)
    if not count:
        return "No node sent a report that could be read."
    of = f" of {len(fleet.expected)} expected by {fleet.expected_by}" if fleet.expected else ""
    return f"{count} node{'s' if count > 1 else ''}{of}: {hosts(fleet.nodes)}"


def _gone(fleet: Fleet) -> Iterator[str]:
    if not fleet.missing:
        return
    count = len(fleet.missing)
    ill = sorted({item.node for item in fleet.broken if item.node})
    yield _mark("error", f"{count} expected node{'s' if count > 1 else ''} sent no report that could be read: "
                f"{hosts(fleet.missing)}")  # fmt: skip
    yield from _hint("See whether the node is up and the doctor runs there (`srun -w NODE xflux-doctor check`)"
                     + (f"; of {hosts(ill)} a part came, see below." if ill else "."))  # fmt: skip


def _broken(fleet: Fleet) -> Iterator[str]:
    for item in fleet.broken[:_MOST]:
        yield _mark("warning", f"{item.source}{f' (of {item.node})' if item.node else ''}: {item.seen}")
        yield from _hint(item.hint)
    if len(fleet.broken) > _MOST:
        yield _mark("warning", f"{len(fleet.broken) - _MOST} more reports could not be read; --format json names them.")
        yield from _hint("Make them anew on their nodes.")


def _grouped(found: Iterable[Difference]) -> list[list[Difference]]:
    """Differences of one group, weight and set of nodes make one line: forty packages of one other image."""
    groups: dict[object, list[Difference]] = {}
    for at, item in enumerate(found):
        nodes = tuple(member.node for member in item.members)
        alone = not item.group or item.kind not in ("differs", "sides")
        key: object = at if alone else (item.group, item.severity, item.kind, nodes)
        groups.setdefault(key, []).append(item)
    return list(groups.values())


def _difference(items: list[Difference]) -> Iterator[str]:
    first = items[0]
    if len(items) == 1:
        yield from _wrapped(first.severity, _one(first))
    else:
        nodes = hosts([member.node for member in first.members])
        several = len({member.node for member in first.members}) > 1
        if first.kind == "sides":
            words = f"{first.group} of {nodes} differ, and there is no majority: "
        else:
            words = (
                f"{first.group}: {first.count} of {first.total} nodes agree; {nodes} {'differ' if several else 'has'} "
            )
        yield from _wrapped(first.severity, words + "; ".join(_short(item) for item in items[:_MOST])
                            + (f" and {len(items) - _MOST} more" if len(items) > _MOST else ""))  # fmt: skip
    if first.because:
        yield from textwrap.wrap(first.because, _WIDTH, initial_indent="    ", subsequent_indent="    ")
    yield from _hint(first.hint)


def _one(item: Difference) -> str:
    title = field(item.field).title
    if item.kind == "sides":
        return f"{title}: no majority: {_values(item)}"
    if item.kind == "finding":
        having = hosts([member.node for member in item.members])
        seen = list(dict.fromkeys(member.value for member in item.members))
        more = f" (the others say alike; {len(seen)} texts)" if len(seen) > 1 else ""
        return f"{item.field}: {item.count} of {item.total} nodes, {having}: {seen[0]}{more}"
    if item.kind == "everywhere":
        return f"{item.field}: all {item.total} nodes: {item.usual}"
    if item.kind == "pair":
        return f"{title}: {item.members[0].value}; others have {item.usual}"
    if item.kind == "slow":
        return f"{title}: {item.usual or 'others'}; {_values(item)}"
    return f"{title}: {item.count} of {item.total} nodes: {item.usual}; {_values(item)}"


def _short(item: Difference) -> str:
    """One of several in a line: what the others have, and the named."""
    title = field(item.field).title
    if item.kind == "sides":
        return f"{title} ({_values(item)})"
    own = list(dict.fromkeys(member.value for member in item.members))
    return f"{title} {', '.join(own[:3])}{' …' if len(own) > 3 else ''} (not {item.usual})"


def _values(item: Difference) -> str:
    """`node017: 570.86; node[020-021]: 550.1`."""
    having: dict[str, list[str]] = {}
    for member in item.members:
        having.setdefault(member.value, []).append(member.node)
    parts = [f"{hosts(nodes)}: {value}" for value, nodes in having.items()]
    return "; ".join(parts[:_MOST]) + (f"; and {len(parts) - _MOST} more values" if len(parts) > _MOST else "")


def _notes(fleet: Fleet) -> Iterator[str]:
    if fleet.again:
        yield f"- {hosts(fleet.again)} sent more than one report ({sum(fleet.again.values())}); the newest counts."
    if fleet.unexpected:
        yield f"- {hosts(fleet.unexpected)} sent a report and was not expected by {fleet.expected_by}."
    if fleet.facts_only:
        nodes = "these nodes" if fleet.facts_only == len(fleet.nodes) else f"{fleet.facts_only} nodes"
        yield f"- Of {nodes} only facts came: `xflux-doctor check --format json` would judge the job there too."


def _last(fleet: Fleet) -> str:
    if not fleet.nodes:
        return click.style("Nothing was compared.", fg="red", bold=True)
    if fleet.exit_code:
        named = {m.node for d in fleet.differences if d.severity == "error" for m in d.members} | set(fleet.missing)
        where = f" Look at {hosts(named)} first." if named and len(named) < len(fleet.nodes) else ""
        return click.style(f"Something here stops a job on these nodes.{where}", fg="red", bold=True)
    if len(fleet.nodes) == 1:
        return click.style("One node was read: there is nothing to compare it with.", fg="yellow", bold=True)
    if any(item.members for item in fleet.differences):
        return click.style("The nodes differ in what stops no job.", fg="yellow", bold=True)
    return click.style(f"The {len(fleet.nodes)} nodes are alike.", fg="green", bold=True)


def _mark(severity: str, words: str) -> str:
    mark, color = _MARKS[severity]
    return f"{click.style(mark, fg=color, bold=severity == 'error')} {words}"


def _wrapped(severity: str, words: str) -> Iterator[str]:
    first, *rest = textwrap.wrap(words, _WIDTH - 2, break_long_words=False, break_on_hyphens=False)
    yield _mark(severity, first)
    yield from (f"    {line}" for line in rest)


def _hint(words: str) -> Iterator[str]:
    yield from textwrap.wrap(words, _WIDTH, initial_indent="    → ", subsequent_indent="      ")


def hosts(names: Iterable[str]) -> str:
    """Slurm's notation: node001 node002 node003 node7 → node[001-003],node7."""
    numbered: dict[tuple[str, int, str], list[int]] = {}
    plain: list[str] = []
    for name in sorted(set(names)):
        found = re.fullmatch(r"(.*?)(\d{1,9})(\D*)", name)
        if found is None or name.replace(".", "").isdigit():
            plain.append(name)
        else:
            numbered.setdefault((found[1], len(found[2]), found[3]), []).append(int(found[2]))
    parts = [_ranges(*key, sorted(numbers)) for key, numbers in sorted(numbered.items())]
    return ", ".join([*parts, *plain])


def _ranges(before: str, width: int, after: str, numbers: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    if len(numbers) == 1:
        return f"{before}{numbers[0]:0{width}d}{after}"
    texts = [f"{a:0{width}d}" if a == b else f"{a:0{width}d}-{b:0{width}d}" for a, b in runs]
    return f"{before}[{','.join(texts)}]{after}"
