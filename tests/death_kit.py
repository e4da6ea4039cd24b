"""Runs of the demo model on CPU ranks under `xflux-doctor run`, to be hurt from outside: signals, files, limits."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from conftest import ROOT

from xflux_doctor.heartbeat import Beat, beats

ACCELERATE = """\
compute_environment: LOCAL_MACHINE
distributed_type: {kind}
mixed_precision: 'no'
num_machines: 1
num_processes: {ranks}
use_cpu: true
main_process_port: {port}
"""
PATIENCE = 120.0
"""Seconds for whatever is waited for: the machine may be busy."""


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


class Run:
    """One run in a folder of its own. It ends with the block, whatever the test did."""

    def __init__(self, place: Path, model: Path, *, ranks: int = 2, cache: Path | None = None, **changes: Any) -> None:
        self.place, self.out, self.port = place, place / "out", free_port()
        settings = {
            "pretrained_model": str(model), "img_dir": str(ROOT / "examples/demo/photos"), "img_size": 64,
            "output_dir": str(self.out), "cache_dir": str(cache or place / "entries"), "max_train_steps": 100_000,
            "learning_rate": 1e-3, "rank": 4, "max_text_tokens": 16, "mixed_precision": "no",
            "checkpointing_steps": 100_000, "disable_sampling": True, "heldout_samples": 0, "report_to": "none",
            "num_workers": 1, **changes,
        }  # fmt: skip
        (place / "train.yaml").write_text(yaml.safe_dump(settings))
        kind = "NO" if ranks == 1 else "MULTI_GPU"
        (place / "accelerate.yaml").write_text(ACCELERATE.format(kind=kind, ranks=ranks, port=self.port))
        self.ranks = ranks
        self.process: subprocess.Popen[str] | None = None
        self.before: tuple[str, ...] = ()
        self.level: tuple[str, ...] = ("--quick",)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for pid in self.pids():
            os.kill(pid, signal.SIGKILL)

    def command(self, *extra: str) -> list[str]:
        return [*self.before, sys.executable, "-m", "xflux_doctor.cli", "run", "--cpu", "--yes", *self.level,
                "--config",
                "train.yaml", "--accelerate-config", "accelerate.yaml", *extra]  # fmt: skip

    def environment(self, **more: str) -> dict[str, str]:
        own = {"XDG_CACHE_HOME": str(self.place / "cache"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        return {**os.environ, **own, **more}

    def start(self, *extra: str, **how: Any) -> Run:
        """Its output goes to a file, so that nobody need read it."""
        with (self.place / "shown.txt").open("wb") as shown:
            self.process = subprocess.Popen(
                self.command(*extra), cwd=self.place, env=self.environment(),
                **{"stdin": subprocess.DEVNULL, "stdout": shown, "stderr": subprocess.STDOUT, **how},
            )  # fmt: skip
        return self

    @property
    def shown(self) -> str:
        return (self.place / "shown.txt").read_text(errors="replace")

    @property
    def log(self) -> str:
        return "".join(path.read_text(errors="replace") for path in sorted((self.out / "logs").glob("run-*.log")))

    def until(self, what: Callable[[], Any], *, alive: bool = True) -> Any:
        """Wait for it, and give it."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            if found := what():
                return found
            gone = self.process is not None and self.process.poll() is not None
            assert not (alive and gone), f"the run has ended\n{self.shown}"
            time.sleep(0.02)
        raise AssertionError(f"it never came\n{self.shown}\n{self.log[-3000:]}")

    def pids(self) -> list[int]:
        """All processes of this run but the doctor: they name its folder."""
        own, found = str(self.out).encode(), []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                words = (path / "cmdline").read_bytes()
                stat = (path / "stat").read_text(errors="replace")
            except OSError:
                continue
            if own in words and stat.rpartition(")")[2].split()[0] != "Z" and b"--attach" not in words:
                found.append(int(path.name))
        return sorted(found)

    def beats(self) -> dict[int, Beat]:
        """What the ranks say of themselves, in the folder that they were told."""
        for pid in self.pids():
            try:
                words = (Path("/proc") / str(pid) / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            for word in words:
                if word.startswith(b"XFLUX_WATCH="):
                    return beats(Path(word.partition(b"=")[2].decode()))
        return {}

    def training(self, steps: int = 3) -> dict[int, Beat]:
        """Wait until every rank has done so many steps."""

        def there() -> dict[int, Beat]:
            found = self.beats()
            return found if len(found) == self.ranks and all(beat.step >= steps for beat in found.values()) else {}

        return dict(self.until(there))

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def end(self) -> int:
        """The exit code; nobody may be left then."""
        assert self.process is not None
        try:
            code = self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the run does not end\n{self.shown}\n{self.log[-3000:]}") from None
        deadline = time.monotonic() + 5
        while self.pids() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert self.pids() == [], "processes are left"
        return code

    @property
    def result(self) -> dict[str, Any]:
        return dict(json.loads((self.out / "result.json").read_text()))

    @property
    def cause(self) -> str:
        return str((self.result["cause"] or {}).get("cause"))

    def events(self) -> list[dict[str, Any]]:
        path = self.out / "events.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def checkpoints(self) -> list[int]:
        """Steps of the whole ones."""
        return sorted(int(path.parent.name.rpartition("-")[2]) for path in self.out.glob("checkpoint-*/manifest.json"))
