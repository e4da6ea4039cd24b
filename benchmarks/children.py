"""Measurements in processes of their own, each with a deadline, and the files that they are written to."""

from __future__ import annotations

import datetime
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent
RESULTS = REPO / "benchmarks" / "results"
SHARED: dict[str, dict[str, Any]] = {
    "ddp": {"distributed_type": "MULTI_GPU"},
    "zero2": {"distributed_type": "DEEPSPEED", "deepspeed_config": {
        "zero_stage": 2, "gradient_accumulation_steps": 1, "gradient_clipping": 1.0, "offload_optimizer_device": "none",
        "offload_param_device": "none", "zero3_init_flag": False,
    }},
    "fsdp": {"distributed_type": "FSDP", "fsdp_config": {
        "fsdp_version": 2, "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "fsdp_reshard_after_forward": True,
        "fsdp_state_dict_type": "SHARDED_STATE_DICT",
        "fsdp_transformer_layer_cls_to_wrap": "FluxTransformerBlock",
    }},
}  # fmt: skip
"""How ranks share the work, as accelerate's file has it."""
GIB = 1 << 30
Outcome = dict[str, Any]
_TOLD = "told: "
_RAISED = re.compile(r"[\w.]*(Error|Exception)\b")


def numbers(text: str) -> tuple[int, ...]:
    """The numbers of `512,1024`."""
    return tuple(int(part) for part in text.split(","))


def run(argv: list[str], deadline: float, **environment: str) -> Outcome:
    """What `argv --result FILE` wrote to its file, or `{"outcome": …, "why": …}` where it wrote none.

    What it wrote before it was stopped at the deadline, or before it died, is kept: `outcome` then says so. The whole
    process group is ended, so that no rank of a launcher stays behind.
    """
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        found = _run([*argv, "--result", str(result)], deadline, environment)
        return {**(json.loads(result.read_text("utf-8")) if result.exists() else {}), **found}


def told(argv: list[str], deadline: float) -> Iterator[Outcome]:
    """What `argv` tells, each as soon as it is told: see `tell`. Anything else that it prints goes to our stderr.

    At the deadline, and when nobody wants more, its process group is ended.
    """
    process = _start(argv, {})
    timer = threading.Timer(max(0.0, deadline), os.killpg, (process.pid, signal.SIGKILL))
    timer.start()
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(_TOLD):
                yield json.loads(line[len(_TOLD) :])
            elif line.strip():
                print(line, end="", file=sys.stderr, flush=True)
        process.wait()
    finally:
        timer.cancel()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def tell(value: Outcome) -> None:
    """In a process that `told` started."""
    print(f"\n{_TOLD}{json.dumps(value)}", flush=True)


def _start(argv: list[str], environment: dict[str, str]) -> subprocess.Popen[str]:
    base = {"HF_HUB_OFFLINE": "1", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    return subprocess.Popen(
        argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**base, **os.environ, **environment},
        cwd=REPO, start_new_session=True,
    )  # fmt: skip


def _run(argv: list[str], deadline: float, environment: dict[str, str]) -> Outcome:
    process = _start(argv, environment)
    try:
        said, _ = process.communicate(timeout=deadline)
    except subprocess.TimeoutExpired:
        return {"outcome": "too slow", "why": f"not done after {deadline:g} s"}
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    if process.returncode == 0:
        return {}
    lines = [line for line in said.splitlines() if line.strip()] or ["it said nothing"]
    print("\n".join(lines[-20:]), file=sys.stderr, flush=True)
    # Libraries say good-bye after the traceback.
    line = next((line for line in reversed(lines) if _RAISED.match(line)), lines[-1])
    return {"outcome": "failed", "why": f"exit code {process.returncode}: {line[:300]}"}


def host(planned: list[Outcome], ran: list[Outcome]) -> list[Outcome]:
    """Of each rank of a run the host's memory beside what `plan --format json` foretold (its ranks, or for one rank the
    plan that was taken), in bytes."""
    found = []
    for forecast, rank in zip(planned, ran):  # noqa: B905 (a file's ranks may be more than those that run)
        want, peaks = forecast["host"]["peak_bytes"], rank["host"]
        peak = peaks["overall"]
        found.append({"forecast": want, "measured": peak, "error": want / peak - 1, "phases": peaks})
    return found


def write(path: Path, value: Any) -> None:
    """A JSON file, there whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=2) + "\n", "utf-8")
    partial.replace(path)


def save(folder: Path, kind: str, script: str, body: dict[str, Any], of: str = "") -> Path:
    """Write a result with the machine, the versions and the command; a later run of the same day takes its place.

    `of` names the file in the machine's stead.
    """
    from xflux_trainer import meter

    file, date, machine = place(folder, kind, of)
    head = {"benchmark": kind, "date": date, "command": command(script), "machine": machine}
    folder.mkdir(parents=True, exist_ok=True)
    write(file, _nobodys({**head, "versions": meter.versions(), **body}, _folders()))
    return file


def _folders() -> dict[str, str]:
    """Of this machine and this call, and what stands for them in a result: the longest first."""
    given = dict(itertools.pairwise(sys.argv[1:]))
    found = {sys.executable: "python", str(REPO): "REPO"}
    for word, name in (("--work", "DIR"), ("--out", "OUT")):
        if word in given:
            found[str(Path(given[word]).absolute())] = name
    return dict(sorted(found.items(), key=lambda one: -len(one[0])))


def _nobodys(value: Any, folders: dict[str, str]) -> Any:
    """The same with names in the place of folders, which are nobody else's."""
    if isinstance(value, dict):
        return {key: _nobodys(one, folders) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_nobodys(one, folders) for one in value]
    if isinstance(value, str):
        for folder, name in folders.items():
            value = value.replace(folder, name)
    return value


def place(folder: Path, kind: str, of: str = "") -> tuple[Path, str, dict[str, str]]:
    """The file of today's result of this machine, or of what `of` names, the date, and the machine."""
    from full_size_lora import gpu

    machine = gpu()
    name = machine["name"] if machine["name"] != "unknown" else f"{os.cpu_count()}-cores"
    date = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    slug = of or re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return folder / f"{kind}-{slug}-{date}.json", date, machine


def command(script: str) -> str:
    """The command line as it was given, without folders, which are nobody else's."""
    words, shown = iter(sys.argv[1:]), []
    for word in words:
        if word in ("--results", "--xflux", "--work", "--out"):
            next(words, "")
            if word == "--xflux":
                shown += [word, "CHECKOUT"]
        elif not word.startswith(("--results=", "--xflux=", "--work=", "--out=")):
            shown.append(word)
    return " ".join(["python", f"benchmarks/{script}", *shown])
