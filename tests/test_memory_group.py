"""A container's memory limit against the forecast: found before the start, and true when it is not heeded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, TRAIN
from group_kit import inside, limited, own_group
from packaging.version import Version
from xflux_trainer import bfl_spec
from xflux_trainer.config import TrainConfig
from xflux_trainer.memory import GIB, MIB, forecast
from xflux_trainer.memory_diffusers import Norms, norms_of
from xflux_trainer.spec import FLUX_DEV


@pytest.fixture(autouse=True)
def no_group_stays_behind() -> Iterator[None]:
    """Of this process: another stack's tests may make theirs meanwhile."""
    yield
    assert [path for path in own_group().iterdir() if path.name.startswith(f"xflux-test-{os.getpid()}-")] == []


def doctor(group: Path, place: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "xflux_doctor.cli", *arguments]
    files = ["--config", "train.yaml", "--accelerate-config", "accelerate.yaml"]
    environ = {**os.environ, "HF_HOME": str(place / "hf"), "XDG_CACHE_HOME": str(place / "cache")}
    return subprocess.run(
        inside(group, *argv, *files), cwd=place, env=environ, capture_output=True, text=True, timeout=120, check=False
    )


def judged(group: Path, place: Path) -> list[dict[str, Any]]:
    report = json.loads(doctor(group, place, "check", "--quick", "--format", "json").stdout)
    (result,) = [one for one in report["results"] if one["check"] == "ME102"]
    assert result["status"] != "skipped", result
    return list(result["findings"])


def installed_norms() -> Norms:
    """Of the stack that the doctor finds here, if there is one."""
    try:
        diffusers, torch = (Version(version(name)).release for name in ("diffusers", "torch"))
    except PackageNotFoundError:
        return "fused"
    return norms_of(diffusers, torch)


def test_a_limit_is_found_before_the_start(tmp_path: Path) -> None:
    """Of two ranks on the CPU: a limit that holds one is too low, and one above both is enough."""
    (tmp_path / "train.yaml").write_text(TRAIN)
    (tmp_path / "accelerate.yaml").write_text((ROOT / "tests" / "configs" / "cpu-ranks.yaml").read_text())
    # As many images as the forecast is asked for change nothing of the host's memory.
    train = TrainConfig(img_dir="x", img_size=512, gradient_accumulation_steps=2)
    made = forecast(train, FLUX_DEV, world_size=2, strategy="zero2", device="cpu", norms=installed_norms())
    need = made.host_together(2)
    low, high = need * 2 // 3 >> 20 << 20, need * 5 // 4 >> 20 << 20
    with limited(low) as group:
        (finding,) = judged(group, tmp_path)
        assert finding["severity"] == "error" and "2 ranks" in finding["seen"]
        assert f"the container's limit is {low / GIB:.1f}".removesuffix(".0") in finding["seen"]
        planned = json.loads(doctor(group, tmp_path, "plan", "--format", "json").stdout)
        host = planned["ranks"][0]["host"]
        assert host["limit_bytes"] == low and host["all_ranks_bytes"] == need and host["verdict"] == "does not fit"
    with limited(high) as group:
        # What is free on this machine, which may be less, is another matter.
        assert all("the container's limit" not in finding["seen"] for finding in judged(group, tmp_path))


def train(group: Path, file: Path) -> subprocess.CompletedProcess[str]:
    argv = inside(group, sys.executable, "-m", "xflux_trainer", "train", "--config", str(file))
    environ = {**os.environ, "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(argv, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=280, check=False)


def test_a_run_lives_a_little_above_its_forecast_and_dies_below(tmp_path: Path, model: Path) -> None:
    pytest.importorskip("transformers")
    settings: dict[str, Any] = {
        "pretrained_model": str(model), "img_dir": str(ROOT / "examples" / "demo" / "photos"), "img_size": 64,
        "output_dir": str(tmp_path / "out"), "cache_dir": str(tmp_path / "cache"), "max_train_steps": 2, "rank": 4,
        "max_text_tokens": 16, "disable_sampling": True, "heldout_samples": 0, "report_to": "none",
    }  # fmt: skip
    file = tmp_path / "train.yaml"
    file.write_text(yaml.safe_dump(settings), encoding="utf-8")
    spec = bfl_spec.read_local(model)
    need = forecast(TrainConfig(**settings), spec, world_size=1, strategy="single", device="cpu").host_per_rank
    # The group also pays for page tables, and for pages of files as they are read.
    with limited(need + 48 * MIB) as group:
        done = train(group, file)
        assert done.returncode == 0, done.stderr[-2000:]
    with limited(need * 3 // 5) as group:
        assert train(group, file).returncode == -9


STARVED = """
import os, sys
child = os.fork()
if not child:
    kept = bytearray()
    while True:
        kept += b"x" * (8 << 20)
os.waitpid(child, 0)
{end}
"""
WATCHED = """
import os, sys
from pathlib import Path
from xflux_doctor.launch import Launch
from xflux_doctor.supervise import Watching, run
run(Launch((sys.executable, "-c", {code!r}), dict(os.environ), {{}}), Path("log"), lambda _: None, Watching(Path(".")))
"""


@pytest.mark.parametrize(("end", "said"), [
    ("os.kill(os.getpid(), 9)", True), ("raise ValueError('another fault')", False), ("", False),
])  # fmt: skip
def test_the_kernels_count_is_told_of_a_run_that_was_killed(tmp_path: Path, end: str, said: bool) -> None:
    """Somebody else of the group may have been the one: a run with a fault of its own keeps that."""
    code = WATCHED.format(code=STARVED.format(end=end))
    with limited(160 * MIB) as group:
        subprocess.run(inside(group, sys.executable, "-c", code), cwd=tmp_path, timeout=60, check=True)
    assert ("oom_kill events" in (tmp_path / "log").read_text()) is said
