"""kill -9 at any moment: what is on the disk is whole, and the run that is started again ends with the same bits."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("peft")

from kill_kit import kill_at  # noqa: E402
from steps_kit import CONFIG, make, take  # noqa: E402
from trainer_kit import environment, tiny_flux  # noqa: E402
from xflux_trainer import checkpoint, files  # noqa: E402
from xflux_trainer.checkpoint import Progress  # noqa: E402
from xflux_trainer.ranks import Launch, Ranks  # noqa: E402

RANKS = Ranks(Launch(use_cpu=True))


def kills(folder: Path, ranks: int, count: int, seed: int, seconds: float) -> list[str]:
    """What the killed runs were doing; the program compares the rest."""
    tiny_flux()
    command = [sys.executable, str(Path(__file__).with_name("kill_runs.py")), str(folder), str(ranks), str(count)]
    done = subprocess.run([*command, str(seed)], capture_output=True, text=True, timeout=seconds, env=environment())
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    told = json.loads(done.stdout.splitlines()[-1])["kills"]
    assert len(told) == count and "ended" not in told
    return list(told)


@pytest.mark.parametrize(("ranks", "count"), [(1, 3), (2, 2)])
def test_killed_at_random_moments(tmp_path: Path, ranks: int, count: int) -> None:
    kills(tmp_path, ranks, count, seed=ranks, seconds=280)


@pytest.mark.long
@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_at_many_random_moments(tmp_path: Path, ranks: int) -> None:
    told = kills(tmp_path, ranks, 25, seed=100 + ranks, seconds=3000)
    assert {"caching", "stepping"} <= set(told)


def prepare(folder: Path) -> Callable[[], object]:
    """Two checkpoints, of which the next one drives out the first; returns what saves that one."""
    stepper, _ = make(weight_update="kahan", ema_decay=0.9)
    config = replace(CONFIG, checkpoints_total_limit=2)
    for step in (1, 2):
        take(stepper, step)
        checkpoint.save(folder, stepper, Progress(step=step), config, RANKS, {}, {})
    take(stepper, 3)
    return lambda: checkpoint.save(folder, stepper, Progress(step=3), config, RANKS, {}, {})


def whole(folder: Path) -> list[int]:
    """The steps of the checkpoints there, each compared with its hashes and read to the last tensor."""
    steps = []
    for place in sorted(folder.glob("checkpoint-*")):
        loaded = checkpoint.load(place)
        for name in loaded.shapes:
            assert {"weight", "exp_avg", "exp_avg_sq", "ema", "compensation"} == set(loaded.read(name))
        steps.append(loaded.progress.step)
    return steps


def killed_at_call(act: Callable[[], object], number: int, *, before: bool) -> bool:
    """Run `act` in a child that kills itself at its `number`-th call that makes files last; whether it came to that."""
    pid = os.fork()
    if pid:
        _, status = os.waitpid(pid, 0)
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
        return os.WIFSIGNALED(status)
    calls = 0

    def deadly(real: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object, **more: object) -> object:
            nonlocal calls
            calls += 1
            if calls == number and before:
                os.kill(os.getpid(), signal.SIGKILL)
            found = real(*arguments, **more)
            if calls == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return found

        return call

    code = 1
    try:
        for name in ("fsync", "rename", "replace", "unlink", "rmdir"):
            setattr(os, name, deadly(getattr(os, name)))
        files._exchange = deadly(files._exchange)  # type: ignore[assignment]
        act()
        code = 0
    finally:
        os._exit(code)


@pytest.mark.parametrize("before", [True, False])
def test_killed_at_each_step_of_a_save(tmp_path: Path, before: bool) -> None:
    """Before and after every flush, rename and removal: the last two whole checkpoints are always among those there."""
    act = prepare(tmp_path / "out")
    shutil.copytree(tmp_path / "out", tmp_path / "kept")
    seen = set()
    for number in range(1, 100):
        shutil.rmtree(tmp_path / "out")
        shutil.copytree(tmp_path / "kept", tmp_path / "out")
        killed = killed_at_call(act, number, before=before)
        steps = whole(tmp_path / "out")
        seen.add(tuple(steps))
        assert steps in ([1, 2], [1, 2, 3], [2, 3])
        files.remove_leftovers(tmp_path / "out")
        assert all(path.name.startswith("checkpoint-") for path in (tmp_path / "out").iterdir())
        act()  # the next run saves as if nothing had been
        assert whole(tmp_path / "out") == [2, 3]
        if not killed:
            break
    assert number > 10
    assert seen == {(1, 2), (1, 2, 3), (2, 3)}


@pytest.mark.parametrize("before", [True, False])
def test_killed_while_a_checkpoint_is_replaced(tmp_path: Path, before: bool) -> None:
    """The same step again: at no moment is there none of that name."""
    act = prepare(tmp_path)
    act()
    for number in range(1, 100):
        killed = killed_at_call(act, number, before=before)
        assert whole(tmp_path) == [2, 3]
        files.remove_leftovers(tmp_path)
        if not killed:
            break
    assert number > 10


def at_system_calls(folder: Path, every: int) -> int:
    act = prepare(folder / "out")
    shutil.copytree(folder / "out", folder / "kept")
    number = 1
    while where := kill_at(act, number):
        steps = whole(folder / "out")
        assert steps in ([1, 2], [1, 2, 3], [2, 3]), where
        shutil.rmtree(folder / "out")
        shutil.copytree(folder / "kept", folder / "out")
        number += every
    assert whole(folder / "out") == [2, 3]
    return number


def test_killed_at_some_system_calls_of_a_save(tmp_path: Path) -> None:
    assert at_system_calls(tmp_path, 29) > 100


@pytest.mark.long
def test_killed_at_every_system_call_of_a_save(tmp_path: Path) -> None:
    assert at_system_calls(tmp_path, 1) > 100
