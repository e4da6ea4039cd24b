"""A run as one document: what ran, what was changed, forecast and measured, its curves, what happened, what is next.

Read from the run folder alone. Whatever a file does not say is None and stands under `missing`; secrets are taken out.
"""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

from xflux_doctor import __version__
from xflux_doctor.redact import Redactor
from xflux_doctor.report.runfiles import RunFiles, at, items, number, word

SCHEMA = 1
_POINTS = 600
"""Points of a curve."""
_CONFIG = (
    "mode", "model_name", "pretrained_model", "rank", "quantization", "optimizer", "learning_rate", "max_train_steps",
    "train_batch_size", "gradient_accumulation_steps", "mixed_precision", "seed",
)  # fmt: skip


def tell(folder: Path) -> dict[str, Any]:
    """The document of a run folder, of any state."""
    files = RunFiles(folder)
    launch, facts, metrics = (files.document(f"{name}.json") for name in ("launch", "facts", "metrics"))
    findings, result = files.document("findings.json"), files.document("result.json")
    plan, diagnosis = files.document("plan.json", wanted=False), files.document("diagnosis.json", wanted=False)
    retries, history = files.lines("retries.jsonl"), files.lines("history.jsonl")
    steps, heldout = files.lines("metrics.jsonl", wanted=True), files.lines("heldout.jsonl")
    cause = diagnosis if diagnosis else at(result, "cause") or {}
    document = {
        "schema": SCHEMA,
        "version": __version__,
        "folder": str(folder),
        "ran": _ran(launch, facts, metrics, findings),
        "config": _config(files),
        "changed": [
            {"what": _edit(edit), "why": word(at(edit, "reason"))} for edit in items(launch.get("edits"))
        ],
        "added": [
            {"name": word(name), "value": word(value), "why": word(at(launch, "added_because", name))}
            for name, value in (launch.get("added_environment") or {}).items()
        ] if isinstance(launch.get("added_environment"), dict) else [],
        "accepted": [word(code) for code in items(launch.get("accepted"))],
        "warnings": _warnings(findings),
        "memory": _memory(plan, metrics, retries),
        "speed": _speed(plan, metrics),
        "loss": {**{key: number(at(metrics, "loss", key)) for key in ("first", "last", "mean")},
                 "points": _points(steps, "loss")},
        "heldout": {"before": number(at(metrics, "heldout_loss", "before")),
                    "after": number(at(metrics, "heldout_loss", "after")), "points": _points(heldout, "mean")},
        "samples": [str(path.relative_to(folder)) for path in files.images()],
        "timeline": _timeline(history, retries, metrics),
        "ended": _ended(result, metrics, cause, steps),
        "checkpoints": files.checkpoints(),
        "logs": files.logs(),
    }  # fmt: skip
    document["next"] = _next(document)
    document["missing"] = files.faults
    told: dict[str, Any] = Redactor().tree(document)
    return told


def _ran(launch: Any, facts: Any, metrics: Any, findings: Any) -> dict[str, Any]:
    versions = at(metrics, "versions") or {n: at(p, "version") for n, p in (at(facts, "packages") or {}).items()
                                           if n in ("torch", "accelerate", "diffusers", "deepspeed")}  # fmt: skip
    return {
        "command": word(at(launch, "command")),
        "hash": word(at(launch, "hash")),
        "stack": word(at(launch, "stack") or at(findings, "stack")),
        "doctor": word(at(facts, "version")),
        "facts_of": word(at(facts, "created")),
        "strategy": word(at(metrics, "strategy")),
        "ranks": at(metrics, "world_size"),
        "device": word(at(metrics, "device")),
        "cards": [word(at(gpu, "name")) for gpu in items(at(facts, "gpus"))],
        "driver": word(at(facts, "driver", "version")),
        "versions": {word(k): word(v) for k, v in versions.items()} if isinstance(versions, dict) else {},
    }


def _config(files: RunFiles) -> dict[str, str]:
    """Lines of the effective config that a person asks for first. Its own form, a key a line, is all that is read."""
    data = files.bytes_of(files.folder / "train.yaml", 1 << 20)
    if data is None:
        files.faults.append("train.yaml is not there")
        return {}
    found = {}
    for line in data.decode("utf-8", "replace").splitlines():
        key, colon, value = line.strip().partition(":")
        if colon and key in (*_CONFIG, "img_size", "img_dir") and value.strip() and key not in found:
            found[key] = word(value.strip().strip("'\""))
    return found


def _edit(edit: Any) -> str:
    key, value = ".".join(map(str, items(at(edit, "key")))), at(edit, "value")
    kind = word(at(edit, "type")) if value is None else ""
    shown = f"{key}: {word(value) if not isinstance(value, bool) else str(value).lower()}" if value is not None else key
    return f"{kind + ' ' if kind else ''}{shown} in the {word(at(edit, 'file'))} file"


def _warnings(findings: Any) -> list[str]:
    return [
        f"{word(at(finding, 'code'))}: {word(at(finding, 'seen') or at(finding, 'message'))}"
        for verdict in items(at(findings, "results"))
        for finding in items(at(verdict, "findings"))
    ]


def _memory(plan: Any, metrics: Any, retries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Forecast against measured, in bytes: per GPU what is allocated, and each rank's host memory."""
    first = " (forecast: before the retries)" if retries else ""
    rows = []
    for where, forecast, measured in (
        (f"GPU, allocated{first}", number(at(plan, "ranks", 0, "gpu", "peak_bytes")),
         number(at(metrics, "peak_device_bytes", "overall"))),
        ("host, each rank", number(at(plan, "ranks", 0, "host", "peak_bytes")),
         number(at(metrics, "peak_host_bytes", "overall"))),
    ):  # fmt: skip
        if forecast is not None or measured is not None:
            off = measured / forecast - 1 if forecast and measured else None
            rows.append({"where": where, "forecast": forecast, "measured": measured, "off": off})
    return rows


def _speed(plan: Any, metrics: Any) -> dict[str, float | None]:
    forecast, measured = number(at(plan, "seconds_per_step")), number(at(metrics, "seconds_per_step"))
    more = {key: number(at(metrics, key)) for key in ("samples_per_second", "tflops", "peak_share", "data_wait")}
    off = measured / forecast - 1 if forecast and measured else None
    return {"forecast": forecast, "measured": measured, "off": off, **more}


def _points(lines: list[dict[str, Any]], key: str) -> list[list[float]]:
    """[step, value], thinned to the means of neighbours."""
    read = ((number(line.get("step")), number(line.get(key))) for line in lines)
    found = [(step, value) for step, value in read if step is not None and value is not None]
    size = max(1, -(-len(found) // _POINTS))
    groups = [found[start : start + size] for start in range(0, len(found), size)]
    return [[sum(one[axis] for one in group) / len(group) for axis in (0, 1)] for group in groups]


def _timeline(history: list[Any], retries: list[Any], metrics: Any) -> list[dict[str, str]]:
    found = []
    for line in history:
        if line.get("event") == "start":
            found.append((word(line.get("time")), f"started, log {word(line.get('log'))}"))
        elif line.get("event") == "end":
            cause = word(line.get("cause"))
            why = f": {cause}" if cause not in ("", "none") else ""
            spent = _duration(number(line.get("seconds")))
            found.append((word(line.get("time")), f"ended with {word(line.get('exit_code'))} after {spent}{why}"))
        elif line.get("event") == "no retry":
            found.append((word(line.get("time")), f"no retry: {word(line.get('why'))}"))
    for line in retries:
        spent = _duration(number(line.get("seconds")))
        what = f"retry {word(line.get('retry'))} after {spent}: {word(line.get('words'))}"
        found.append((word(line.get("time")), what))
    found += [("", f"note: {word(note)}") for note in items(at(metrics, "notes"))]
    return [{"time": time, "what": what} for time, what in sorted(found, key=lambda one: (not one[0], one[0]))]


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "an unknown time"
    if seconds < 7200:
        return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def _ended(result: Any, metrics: Any, cause: Any, steps: list[Any]) -> dict[str, Any]:
    reached = max((int(step) for line in steps if (step := number(line.get("step"))) is not None), default=None)
    told = word(at(cause, "cause"))
    return {
        "phase": word(at(result, "phase")),
        "status": word(at(metrics, "status")),
        "exit_code": at(result, "exit_code"),
        "signal": at(result, "signal"),
        "steps": number(at(metrics, "steps")) if reached is None else reached,
        "of": number(at(metrics, "max_steps")),
        "cause": told or None,
        "code": at(cause, "code"),
        "confidence": at(cause, "confidence"),
        "title": word(at(cause, "title")),
        "because": word(at(cause, "because")),
        "evidence": [word(at(item, "text")) for item in items(at(cause, "evidence"))],
        "hint": word(at(cause, "remedy", "hint")),
        "commands": [word(command) for command in items(at(cause, "remedy", "commands"))],
    }


def _next(document: dict[str, Any]) -> list[str]:
    """What a person would do with this run now."""
    ended, whole = document["ended"], [one for one in document["checkpoints"] if one["whole"]]
    code, folder = ended["exit_code"], document["folder"]
    if code == 0 and ended["phase"] == "train":
        return ["It is done: look at the samples, then use the files that it wrote."]
    steps = [f"{ended['hint']}"] if ended["hint"] else []
    steps += [f"$ {command}" for command in ended["commands"]]
    if ended["phase"] == "gate":
        return [*steps, "Nothing was started: `xflux-doctor fix` shows the repairs."]
    if ended["cause"] == "unknown":
        steps.append(f"For a bug report: $ xflux-doctor explain {folder} --bundle xflux-doctor-bundle.tar.gz")
    if code is None and (document["logs"] or ended["steps"] is not None):
        steps.append("There is no word of its end: it runs still, or was killed with all that watched it.")
        if document["logs"]:
            steps.append(f"$ xflux-doctor explain {folder}")
    if whole:
        steps.append(f"Set resume_from_checkpoint: latest and start again: it goes on after step {whole[-1]['step']}.")
    elif document["logs"]:
        steps.append("There is no whole checkpoint: a new start begins at step 0.")
    return steps or ["This folder holds no run that could be told of."]


def when(stamp: float | None) -> str:
    """Seconds since 1970 as UTC."""
    if stamp is None:
        return ""
    return datetime.datetime.fromtimestamp(stamp, datetime.timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
