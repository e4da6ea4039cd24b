"""Train in forked children, kill them with -9 at random moments, start them again, and compare with a run left alone.

A program: `kill_runs.py FOLDER RANKS KILLS SEED`. It imports everything once and forks, so that a start takes a moment;
the trainer itself is what the command line starts. Ends with a line of JSON; any difference is a traceback.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import signal
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from trainer_kit import squares, write_config
from xflux_trainer import checkpoint, cli, files

STEPS, EVERY = 6, 2
DEADLINE = 120


def configure(folder: Path, name: str) -> Path:
    (folder / name).mkdir(parents=True)
    return write_config(
        folder / name, img_dir=str(folder / "images"), cache_dir=None, max_train_steps=STEPS, heldout_samples=1,
        checkpointing_steps=EVERY, checkpoints_total_limit=2, resume_from_checkpoint="latest", ema_decay=0.9,
        gradient_accumulation_steps=2, lr_scheduler="linear", lr_warmup_steps=3, caption_dropout=0.0,
    )  # fmt: skip


def start(config: Path, ranks: int) -> list[int]:
    """One child for each rank, as a launcher would start it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    sys.stdout.flush()
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            log = os.open(config.with_suffix(f".{rank}.log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            if ranks > 1:
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
                               "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
            code = 70
            try:
                code = cli.main(["train", "--config", str(config)])
            finally:
                config.with_suffix(".modules").write_text(json.dumps(list(sys.modules)))
                sys.stdout.flush()
                os._exit(code)
        children.append(pid)
    return children


def wait(children: list[int], seconds: float) -> dict[int, int]:
    """The exit codes of those that have ended by then."""
    ended: dict[int, int] = {}
    until = time.monotonic() + seconds
    while len(ended) < len(children) and time.monotonic() < until:
        for pid in set(children) - set(ended):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                ended[pid] = os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    return ended


def finish(config: Path, ranks: int) -> float:
    began = time.monotonic()
    children = start(config, ranks)
    ended = wait(children, DEADLINE)
    for pid in set(children) - set(ended):  # it hangs, and must not outlive the test
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    logs = "".join(config.with_suffix(f".{rank}.log").read_text() for rank in range(ranks))
    assert sorted(ended.values()) == [0] * ranks, f"{ended}\n{logs}"
    return time.monotonic() - began


def kill(config: Path, ranks: int, moment: float, dice: random.Random) -> str:
    """Kill a run that many seconds after its start: one rank first, the others a little later. What it was doing."""
    children = start(config, ranks)
    ended = wait(children, moment)
    dice.shuffle(children)
    for pid in children:
        if pid not in ended:
            os.kill(pid, signal.SIGKILL)
            time.sleep(dice.random() * 0.05 if ranks > 1 else 0)
    for pid in children:
        if pid not in ended:
            os.waitpid(pid, 0)
    assert set(ended.values()) <= {0}, config.with_suffix(".0.log").read_text()
    return "ended" if len(ended) == ranks else look(config.parent / "out")


def look(out: Path) -> str:
    """Where a killed run stood. Whatever has a checkpoint's name must be a whole one."""
    for folder in out.glob("checkpoint-*"):
        checkpoint.load(folder)  # compares every hash
    for name in ("metrics.json", "config.yaml"):
        if (out / name).exists():
            assert (out / name).read_text().endswith("\n")
    if list(out.glob(f"{files.TEMPORARY}*")):
        return "saving"
    if not (out / "metrics.jsonl").exists():
        return "caching"
    return "stepping"


def result(out: Path) -> dict[str, Any]:
    """What a run leaves that must not depend on how often it was killed."""
    last = out / f"checkpoint-{STEPS}"
    pieces = {path.name: load_file(path) for path in last.glob("*.safetensors")}
    pieces["adapter"] = load_file(out / "pytorch_lora_weights.safetensors")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["status"] == "finished"
    names = sorted(path.name for path in out.iterdir() if path.name.startswith(("checkpoint", ".xflux", "previous")))
    return {
        "bytes": {name: {key: value.numpy().tobytes() for key, value in held.items()} for name, held in pieces.items()},
        "losses": [(line["step"], line["loss"], line["grad_norm"]) for line in lines],
        "heldout": metrics["heldout_loss"],
        "mean": metrics["loss"],
        "names": names,
    }


def main(folder: Path, ranks: int, kills: int, seed: int) -> None:
    import torch
    import xflux_trainer.train  # noqa: F401 (imported once, for all children)

    torch.set_num_threads(1)
    squares(folder / "images")
    dice = random.Random(seed)
    alone = configure(folder, "alone")
    span = finish(alone, ranks)
    expected = result(alone.parent / "out")
    # What that child has imported on its way is imported here, so that those that follow do not wait for it.
    began = time.monotonic()
    for name in json.loads(alone.with_suffix(".modules").read_text()):
        if name not in sys.modules and name.split(".")[0] in ("diffusers", "transformers", "peft", "xflux_trainer"):
            with suppress(Exception):  # a name that stands for another module
                importlib.import_module(name)
    span = max(span - (time.monotonic() - began), span / 4)
    told: list[str] = []
    rounds = late = 0
    while len(told) < kills:
        config = configure(folder, f"round-{rounds}")
        rounds += 1
        for nth in range(min(dice.randint(1, 3), kills - len(told))):
            moment = dice.random() * span
            doing = kill(config, ranks, moment, dice)
            if doing == "ended":  # started again, it has nothing left to be killed at
                late += 1
                if nth == 0:  # a whole run takes less than was thought
                    span = moment
                break
            told.append(doing)
        finish(config, ranks)
        found = result(config.parent / "out")
        for key, value in expected.items():
            assert found[key] == value, f"{key} of {config.parent.name} after {told}"
    print(json.dumps({"kills": told, "late": late, "rounds": rounds, "seconds": span}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *(int(value) for value in sys.argv[2:5]))
