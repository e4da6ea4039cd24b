"""The report for a terminal: what is wrong first in words, the verdict line last."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

import click

from xflux_doctor import topology
from xflux_doctor.finding import Change, Comment, Edit, Finding, Nest, Remove, Status, Verdict
from xflux_doctor.pins import GOOD
from xflux_doctor.report.summary import Summary

_MARKS: dict[Status, tuple[str, str]] = {
    "ok": ("✓", "green"),
    "warning": ("!", "yellow"),
    "error": ("✗", "red"),
    "skipped": ("-", "bright_black"),
    "crashed": ("✗", "magenta"),
}
_WIDTH = 100


def render(summary: Summary, *, verbose: bool = False) -> str:
    """All findings; with `verbose` also what passed, what was skipped and why, with times."""
    shown = [v for v in summary.verdicts if verbose or v.status not in ("ok", "skipped")]
    blocks = [
        [_stack_line(summary)],
        _packages(summary) if verbose else [],
        topology.lines(summary.facts.topology) if verbose else [],
        _launch(summary, verbose),
        _gpus(summary),
        _bandwidth(summary),
        [line for v in shown for line in _verdict(v, verbose)],
    ]
    blocks.append([_last_line(summary, verbose)])
    return "\n\n".join("\n".join(block) for block in blocks if block) + "\n"


def _stack_line(summary: Summary) -> str:
    if summary.stack:
        return f"xflux-doctor {summary.version}: stack {summary.stack} ({summary.because})"
    return f"xflux-doctor {summary.version}"


def _packages(summary: Summary) -> list[str]:
    """The stack's packages, one a line: name, installed, verdict, and the pin where it differs."""
    lines = []
    for name, installed, wanted, word in summary.packages:
        pin = "" if word == "exact" else f", the stack has {wanted}"
        lines.append(click.style(f"  {name:<16} {installed or '-':<16} {word}{pin}", dim=word in GOOD))
    return lines


def _launch(summary: Summary, verbose: bool) -> list[str]:
    """The launch plan: its headline, and every rank where a person asks, the launch is wrong or the files are not all
    that decides."""
    wrong = any(v.check.startswith("LA") and v.status in ("error", "warning") for v in summary.verdicts)
    overridden = bool(summary.placement and summary.placement["overrides"])
    return list(summary.launch) if verbose or wrong or overridden else list(summary.launch[:1])


def _gpus(summary: Summary) -> list[str]:
    """What each GPU did in the deep level: its rates on one line, its attentions on the next."""
    lines = []
    for probe in summary.facts.gpu_probes or ():
        rates = [f"{one.kind} {max(one.rates.values()):,.0f} TFLOP/s" for one in probe.products if one.rates]
        for words, value in (("copies", probe.copy_gbs), ("from the host", probe.h2d_gbs), ("to it", probe.d2h_gbs)):
            rates += [f"{words} {value:,.0f} GB/s"] if value else []
        lines.append(f"device {probe.device}, {probe.name or 'no context'} [{probe.seconds:.0f} s]: {', '.join(rates)}")
        right = sorted((one for one in probe.attention if one.ok), key=lambda one: one.forward + one.backward)
        times = [f"{one.name} {1000 * (one.forward + one.backward):.2f} ms" for one in right]
        lines += [f"  attention, {probe.shapes}: {', '.join(times)}"] if times else []
        lines += [f"  failed: {stage}: {why}" for stage, why in probe.failed.items()]
        lines += [f"  left out: {stage}: {why}" for stage, why in probe.skipped.items()]
    return lines


def _bandwidth(summary: Summary) -> list[str]:
    """The timed sweep of the deep level, a size a line."""
    result = summary.facts.allreduce
    if result is None or not result.bandwidth:
        return _nccl_tests(summary)
    lines = [f"all-reduce over {result.ranks} {result.backend} ranks, bus bandwidth as nccl-tests counts it:"]
    for one in result.bandwidth:
        lines.append(f"  {one.bytes / 1024:>9,.0f} KiB  {one.seconds * 1000:9.3f} ms  {one.busbw:8.2f} GB/s")
    return lines + [f"  {words}" for words in result.skipped] + _nccl_tests(summary)


def _nccl_tests(summary: Summary) -> list[str]:
    """NVIDIA's own figure, below ours."""
    found = summary.facts.nccl_tests
    if found is None or found.busbw is None:
        return []
    words = f"{found.wrong} values wrong" if found.wrong else ""
    rate = f"  {found.bytes / 1024:>9,.0f} KiB  {'':12}  {found.busbw:8.2f} GB/s  {words}".rstrip()
    return [f"nccl-tests itself over {found.ranks} GPUs:", rate]


def _verdict(verdict: Verdict, verbose: bool) -> Iterator[str]:
    mark, color = _MARKS[verdict.status]
    seconds = f" [{verdict.seconds * 1000:.0f} ms]" if verbose else ""
    yield click.style(f"{mark} {verdict.check} {verdict.title}", fg=color, bold=verdict.status == "error") + seconds
    if verdict.status == "crashed":
        yield f"    This check itself failed ({verdict.reason}); please report it with `xflux-doctor facts`."
    elif verdict.reason:
        yield f"    skipped: {verdict.reason}"
    for finding in verdict.findings:
        yield from _finding(finding)


def _wrapped(text: str, first: str, then: str) -> list[str]:
    """An option is not parted at its hyphens: it may be copied."""
    return textwrap.wrap(text, _WIDTH, initial_indent=first, subsequent_indent=then, break_on_hyphens=False)


def _finding(finding: Finding) -> Iterator[str]:
    for text in (finding.seen, finding.because):
        if text:
            yield from _wrapped(text, "    ", "    ")
    if finding.hint:
        yield from _wrapped(finding.hint, "    → ", "      ")
    for edit in finding.edits:
        yield f"    fix: {describe(edit)}"
    for edit in finding.offers:
        yield offer(finding.code, edit)
    for command in finding.commands:
        yield f"    $ {command}"
    if finding.docs:
        yield click.style(f"    {finding.docs}", fg="bright_black")


def offer(code: str, edit: Change) -> str:
    """A change of the training itself, which only the user can want; without a code --take no longer makes it."""
    return f"    offer: {describe(edit)}   ({f'--take {code}' if code else 'by hand now: the files are written'})"


def describe(edit: Change) -> str:
    """One edit in words."""
    key = ".".join(edit.key)
    if isinstance(edit, Edit):
        shown = str(edit.value).lower() if isinstance(edit.value, bool) else edit.value
        text = f"{key}: {shown}"
    elif isinstance(edit, Remove):
        text = f"remove {key}"
    elif isinstance(edit, Comment):
        text = f"comment out {key}"
    elif isinstance(edit, Nest):
        text = f"indent {', '.join(edit.members)} below {key}"
    else:
        text = f"rename {key} to {edit.new}"
    file = "DeepSpeed" if edit.file == "deepspeed" else edit.file
    return f"{text} in the {file} file" + (f" ({edit.reason})" if edit.reason else "")


def _last_line(summary: Summary, verbose: bool) -> str:
    counts = summary.counts
    skipped = f", {counts['skipped']} skipped" + ("" if verbose else " (-v says why)") if counts["skipped"] else ""
    if summary.crashed:
        return click.style(f"xflux-doctor itself failed in {summary.crashed} checks.", fg="magenta")
    if counts["error"]:
        pending = " `xflux-doctor fix` shows the repairs." if summary.repairable else ""
        text = f"{counts['error']} of {len(summary.verdicts)} checks found what stops this job.{pending}"
        return click.style(text, fg="red", bold=True)
    warned = f", {counts['warning']} with warnings" if counts["warning"] else ""
    if summary.exit_code:
        return click.style(f"{counts['warning']} checks warn, and --strict takes that for errors.", fg="red", bold=True)
    text = f"Nothing stops this job: {counts['ok']} checks passed{warned}{skipped}."
    return click.style(text, fg="yellow" if counts["warning"] else "green", bold=True)
