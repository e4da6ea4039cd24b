"""A run's story for a terminal: one page of lines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from xflux_doctor.report.story import when

GIB = 1 << 30
_BARS = "▁▂▃▄▅▆▇█"
_WIDE = 60


def render(story: Mapping[str, Any]) -> str:
    """The document of `story.tell` as text."""
    lines: list[str] = [f"Run {story['folder']}"]
    for title, body in sections(story):
        lines += ["", title, *(f"  {line}" for line in body)]
    return "\n".join(lines) + "\n"


def sections(story: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """Titles with their lines; what there is nothing to say of is left out."""
    loss = [*_loss(story)]
    made = [
        ("What ran", [*_ran(story)]),
        ("What was changed, and why", [*_changed(story)]),
        ("Memory and speed", [*memory(story), *speed(story)]),
        ("Loss", [*loss, *([curve(story["loss"]["points"])] if story["loss"]["points"] else [])]),
        ("What happened", [f"{one['time'] or '-':<25} {one['what']}" for one in story["timeline"]]),
        ("How it ended", [*ended(story)]),
        ("Checkpoints", [*checkpoints(story)]),
        ("What to do next", list(story["next"])),
        ("Not found in this folder", list(story["missing"])),
    ]
    return [(title, body) for title, body in made if body]


def _ran(story: Mapping[str, Any]) -> Iterator[str]:
    ran = story["ran"]
    ranks = f"{ran['ranks']} x " if ran["ranks"] else ""
    where = ran["device"] or ", ".join(ran["cards"])
    if where:
        driver = f", driver {ran['driver']}" if ran["driver"] else ""
        yield f"{ranks}{where}{driver}{', ' + ran['strategy'] if ran['strategy'] else ''}"
    if ran["versions"]:
        yield ", ".join(f"{name} {value}" for name, value in ran["versions"].items())
    if ran["stack"] or ran["hash"]:
        yield f"stack {ran['stack'] or 'unknown'}, xflux-doctor {ran['doctor'] or '?'}, hash {ran['hash'] or '?'}"
    if story["config"]:
        yield ", ".join(f"{key}: {value}" for key, value in story["config"].items())
    if ran["command"]:
        yield f"$ {ran['command']}"


def _changed(story: Mapping[str, Any]) -> Iterator[str]:
    for one in story["changed"]:
        yield f"{one['what']}{': ' + one['why'] if one['why'] else ''}"
    for one in story["added"]:
        yield f"{one['name']}={one['value']} was added to the launch{': ' + one['why'] if one['why'] else ''}"
    for code in story["accepted"]:
        yield f"{code} was accepted (--accept)"
    for warning in story["warnings"]:
        yield f"warning {warning}"


def size(value: float | None) -> str:
    """Bytes in words."""
    if value is None:
        return "unknown"
    return f"{value / GIB:.2f} GiB" if value >= GIB / 10 else f"{value / (1 << 20):.1f} MiB"


def memory(story: Mapping[str, Any]) -> Iterator[str]:
    for row in story["memory"]:
        off = f" ({row['off']:+.1%})" if row["off"] is not None else ""
        yield f"{row['where']}: forecast {size(row['forecast'])}, measured {size(row['measured'])}{off}"


def speed(story: Mapping[str, Any]) -> Iterator[str]:
    found = story["speed"]
    if found["measured"] is None and found["forecast"] is None:
        return
    forecast, measured = (
        f"{value:.3f} s" if value is not None else "unknown" for value in (found["forecast"], found["measured"])
    )
    off = f" ({found['off']:+.1%})" if found["off"] is not None else ""
    more = [f"{found['samples_per_second']:.3g} samples/s"] if found["samples_per_second"] else []
    more += [f"{found['peak_share']:.0%} of the card's peak"] if found["peak_share"] else []
    more += [f"{found['data_wait']:.0%} waiting for data"] if found["data_wait"] is not None else []
    yield f"a step: forecast {forecast}, measured {measured}{off}{'; ' + ', '.join(more) if more else ''}"


def _loss(story: Mapping[str, Any]) -> Iterator[str]:
    loss, heldout = story["loss"], story["heldout"]
    if loss["last"] is not None and loss["first"] is not None:
        yield f"first {loss['first']:.4f}, last {loss['last']:.4f}"
    if heldout["before"] is not None and heldout["after"] is not None:
        change = f" ({heldout['after'] / heldout['before'] - 1:+.1%})" if heldout["before"] else ""
        yield f"held out: {heldout['before']:.4f} before, {heldout['after']:.4f} after{change}"
    if story["samples"]:
        yield f"samples: {', '.join(story['samples'])}"


def curve(points: list[list[float]]) -> str:
    """A line of bars, the first step on the left."""
    width = max(1, -(-len(points) // _WIDE))
    groups = [points[start : start + width] for start in range(0, len(points), width)]
    values = [sum(value for _, value in group) / len(group) for group in groups]
    low, high = min(values), max(values)
    bars = "".join(_BARS[round((value - low) / (high - low) * 7) if high > low else 0] for value in values)
    return f"{high:.3g} {bars} {low:.3g}"


def ended(story: Mapping[str, Any]) -> Iterator[str]:
    end = story["ended"]
    steps = f"{end['steps']:.0f}" if end["steps"] is not None else ""
    of = f" of {end['of']:.0f}" if steps and end["of"] is not None else ""
    code = f"exit code {end['exit_code']}" if end["exit_code"] is not None else ""
    parts = [end["status"] or end["phase"], f"{steps}{of} steps" if steps else "", code]
    if any(parts):
        yield ", ".join(filter(None, parts))
    if end["cause"] and end["cause"] != "none":
        known = ", ".join(str(one) for one in (end["cause"], end["code"]) if one)
        sure = f"; confidence {end['confidence']}" if end["confidence"] else ""
        yield f"✗ {end['title'] or end['cause']} ({known}{sure})"
        yield from (f"  {line}" for line in (*end["evidence"], end["because"]) if line)


def checkpoints(story: Mapping[str, Any]) -> Iterator[str]:
    for one in story["checkpoints"]:
        state = "" if one["whole"] else ", not whole (no manifest)"
        yield f"{one['name']}: {size(one['bytes'])}, {when(one['written'])}{state}"
