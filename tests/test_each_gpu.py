"""The stages of one GPU, really run on a CPU at sizes of a few tokens; and faults in them, named with their stages."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import stat
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from conftest import ROOT, case, job, machine
from test_probes import assert_gone

from xflux_doctor import deep
from xflux_doctor.facts import GpuProbe, from_json, to_json
from xflux_doctor.matrix import Matrix
from xflux_doctor.probes import each_gpu
from xflux_doctor.probes.each_gpu import Ask

pytestmark = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs torch")
TINY = Ask(
    ("context", "memory", "bandwidth"), forecast=1 << 22, weights=1 << 21,
    pieces={"weights": [1 << 18], "activations": [1 << 16, 1 << 17], "again": [3 << 15]}, products=("float32",),
    shapes=((64, 128, 32),), checked=(64, 64, 64), rounds=2, shape=(1, 80, 2, 16), text=16, image=(8, 8),
    dtype="float32", timed=0.01, copied=1 << 20, linked=1 << 20,
)  # fmt: skip
NAMES = ("trainer flash", "trainer sdpa", "torch flash", "torch math", "torch choice")


def interpreter(folder: Path) -> str:
    """An executable that is Python with a fault in the probe."""
    path = folder / "python"
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{ROOT / "tests/fault_gpu.py"}" "$@"\n')
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def faulty(
    folder: Path, faults: dict[str, dict[str, Any]], ask: Ask = TINY, seconds: float = 60.0, patience: float = 0.0
) -> dict[str, GpuProbe]:
    """A device a fault, side by side."""
    environment = {**os.environ, "FAULT": json.dumps(faults), "STUB_MARK": str(folder)}
    found = each_gpu.each_gpu(interpreter(folder), tuple(faults), ask, environment, seconds, patience=patience)
    assert_gone(str(folder))
    return dict(zip(faults, found, strict=True))


@pytest.fixture(scope="module")
def tried() -> GpuProbe:
    """Everything that means something on a CPU, once."""
    stages = ("context", "memory", "products", "bandwidth", "link", *(f"attention {name}" for name in NAMES))
    blocks = ("blocks trainer", "blocks diffusers", "blocks choice")
    more = ("attention trainer cudnn", "attention torch cudnn", "attention xformers", "attention flash-attn-3")
    ask = dataclasses.replace(TINY, stages=(*stages, *more, *blocks))
    (probe,) = each_gpu.each_gpu(sys.executable, ("cpu",), ask, os.environ, 90)
    return probe


class TestOnACpu:
    def test_every_stage_ends(self, tried: GpuProbe) -> None:
        assert not tried.failed, tried.failed
        assert {"context", "memory", "products", "bandwidth"} <= set(tried.done)
        assert tried.name == "cpu" and tried.copy_gbs and tried.copy_gbs > 0

    def test_memory_is_really_taken(self, tried: GpuProbe) -> None:
        assert (tried.wanted, tried.taken, tried.whole, tried.pieces) == (1 << 22, 1 << 22, True, True)

    def test_products_are_right(self, tried: GpuProbe) -> None:
        (one,) = tried.products
        assert one.error < 1 and one.repeated and one.rates["64x128x32"] > 0

    def test_attentions_are_right_and_timed(self, tried: GpuProbe) -> None:
        found = {one.name: one for one in tried.attention}
        present = [name for name in NAMES if name in found and not found[name].absent]
        assert set(present) >= {"torch flash", "torch math", "torch choice"}
        if importlib.util.find_spec("diffusers"):
            assert present == list(NAMES)
        for name in present:
            one = found[name]
            assert one.ok and one.forward > 0 and one.backward > 0 and max(one.errors.values()) < 1e-5
            assert {"out", "dq behind a single block", "dq behind a double block"} <= set(one.errors)
        for name in ("trainer cudnn", "torch cudnn", "xformers", "flash-attn-3"):
            assert found[name].absent and found[name].detail

    def test_blocks_agree(self, tried: GpuProbe) -> None:
        if not importlib.util.find_spec("diffusers"):
            assert "blocks trainer" in tried.skipped
            return
        found = {one.name: one for one in tried.blocks}
        assert set(found) == {"trainer", "diffusers", "choice"}
        assert all(one.ok and one.output < 1e-5 and one.gradient < 1e-4 and one.seconds > 0 for one in found.values())
        assert found["trainer"].output > 0  # its own sums, not diffusers'

    def test_it_goes_through_json(self, matrix: Matrix, tried: GpuProbe) -> None:
        facts = machine(matrix, gpu_probes=(tried,), speeds={"copy_gbs": 1.0})
        assert from_json(to_json(facts).encode()) == facts


class TestFaults:
    def test_a_stage_costs_its_own_verdict(self, tmp_path: Path) -> None:
        kinds = ("raise", "kill", "segv", "leave", "garbage")
        faults = {f"cpu:{number}": {"kind": kind, "stage": "memory"} for number, kind in enumerate(kinds)}
        found = faulty(tmp_path, faults)
        words = ("RuntimeError: CUDA error: an illegal memory access", "died by SIGKILL", "died by SIGSEGV",
                 "RuntimeError: CUDA error: unspecified launch failure")  # fmt: skip
        for device, word in zip(faults, words, strict=False):
            probe = found[device]
            assert set(probe.failed) == {"memory"} and probe.failed["memory"].startswith(word), probe
            assert "bandwidth" in probe.done and probe.copy_gbs  # what came behind it was done all the same
        assert not {name for name in found["cpu:4"].failed if name != "memory"} and found["cpu:4"].copy_gbs

    def test_a_hang_is_named_with_its_place(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(each_gpu.LIMITS, "memory", 2.0)
        started = time.monotonic()
        probe = faulty(tmp_path, {"cpu:0": {"kind": "hang", "stage": "memory"}})["cpu:0"]
        assert time.monotonic() - started < 2 + 25
        assert "did not end within 2 s and was killed, in here (fault_gpu.py" in probe.failed["memory"]
        assert probe.copy_gbs and set(probe.failed) == {"memory"}

    def test_no_context_no_stages(self, tmp_path: Path) -> None:
        probe = faulty(tmp_path, {"cpu:0": {"kind": "kill", "stage": "context"}})["cpu:0"]
        assert probe.failed == {"context": "died by SIGKILL"}
        assert set(probe.skipped) == {"memory", "bandwidth"} and "context" in probe.skipped["memory"]

    def test_a_context_that_comes_late_is_one(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Beyond its bound, and all stages' time: it is waited for, and what there is no time for is left out."""
        monkeypatch.setitem(each_gpu.LIMITS, "context", 0.5)
        faults = {"cpu:0": {"kind": "late", "stage": "context", "seconds": 1.0}}
        late = faulty(tmp_path, faults, seconds=0.8, patience=80)["cpu:0"]
        assert late.done["context"] > 1.0 and not late.failed
        # A stage may be through before anybody looks.
        assert all("no time was left" in why for why in late.skipped.values())
        assert {*late.done, *late.skipped} == {"context", "memory", "bandwidth"}

    def test_a_context_that_never_comes_is_none(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(each_gpu.LIMITS, "context", 0.5)
        started = time.monotonic()
        never = faulty(tmp_path, {"cpu:0": {"kind": "hang", "stage": "context"}}, seconds=0.8, patience=2)["cpu:0"]
        assert 2.8 < time.monotonic() - started < 2.8 + 20
        assert "did not end within 3 s and was killed" in never.failed["context"] and not never.done
        assert set(never.skipped) == {"memory", "bandwidth"}

    @pytest.mark.long
    def test_no_time_is_no_fault(self, tmp_path: Path) -> None:
        started = time.monotonic()
        probe = faulty(tmp_path, {"cpu:0": {"kind": "hang", "stage": "memory"}}, seconds=5)["cpu:0"]
        assert time.monotonic() - started < 5 + 5
        assert not probe.failed and set(probe.skipped) >= {"memory", "bandwidth"}
        assert "no time was left" in probe.skipped["memory"]

    def test_a_wrong_product_is_seen(self, tmp_path: Path) -> None:
        ask = dataclasses.replace(TINY, stages=("context", "products"))
        probe = faulty(tmp_path, {"cpu:0": {"kind": "wrong", "stage": ""}}, ask)["cpu:0"]
        assert probe.products[0].error > 100 and not probe.failed

    def test_an_interpreter_that_is_not_there(self) -> None:
        (probe,) = each_gpu.each_gpu("/nowhere/python", ("cpu",), TINY, os.environ, 10)
        assert probe.failed["context"].startswith("could not be started")


class TestAsk:
    def test_of_a_lora_job(self, matrix: Matrix) -> None:
        asked = deep.ask_of(case(matrix, machine(matrix), job(None, img_size=1024)))
        assert asked.shape == (1, 4608, 24, 128) and asked.image == (64, 64) and asked.dtype == "bfloat16"
        assert asked.shapes[0] == (4608, 12288, 3072) and 20 << 30 < asked.weights < asked.forecast < 30 << 30
        assert asked.stages.index("attention torch flash") < asked.stages.index("blocks choice")
        assert {name.partition(" ")[0] for name in asked.stages} <= set(each_gpu.LIMITS)

    def test_packages_bring_attentions(self, matrix: Matrix) -> None:
        facts = machine(matrix)
        packages = {**(facts.packages or {}), "xformers": next(iter((facts.packages or {}).values()))}
        asked = deep.ask_of(case(matrix, machine(matrix, packages=packages), job(None)))
        assert "attention xformers" in asked.stages and "attention flash-attn-2" not in asked.stages

    def test_without_a_job(self, matrix: Matrix) -> None:
        bare = msgspec.structs.replace(job(None), train=None)
        assert deep.ask_of(case(matrix, machine(matrix), bare)).stages[-1] == "link"


def test_auto_passes_over_what_does_not_work_and_a_named_one_is_judged() -> None:
    """A V100 has no flash attention: `auto` takes the next, as the trainer does."""
    torch = pytest.importorskip("torch")
    from xflux_trainer.errors import Unsupported

    from xflux_doctor.probes import gpu_attention

    ask = {"dtype": "int8", "shape": (1, 16, 2, 8), "attention": "auto"}  # no attention is for whole numbers
    gpu = SimpleNamespace(torch=torch, device=torch.device("cpu"), ask=ask)
    with pytest.raises(gpu_attention.Absent):
        gpu_attention._trainers(gpu, "flash")
    gpu.ask["attention"] = "flash"
    with pytest.raises(Unsupported, match="does not work here"):
        gpu_attention._trainers(gpu, "flash")
