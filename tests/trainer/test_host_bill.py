"""The host's part of the bill: what was measured, and what it is made of."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from xflux_trainer import memory_host
from xflux_trainer.config import TrainConfig
from xflux_trainer.memory import GIB, Bill, forecast
from xflux_trainer.memory_terms import Term
from xflux_trainer.spec import FLUX_DEV

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
BASE = TrainConfig(img_dir="x", img_size=1024)
MEASURED = [
    pytest.param(result, row, id=f"{file.stem}-{row['start']}")
    for file in sorted(RESULTS.glob("host_memory-*.json"))
    for result in [json.loads(file.read_text("utf-8"))]
    for row in result["rows"]
]


def bill(device: Any = "cuda", *, encoded: bool = False, **changes: Any) -> Bill:
    config = replace(BASE, **changes)
    return forecast(config, FLUX_DEV, world_size=1, strategy="single", device=device, encoded=encoded)


def named(made: Bill, name: str, phase: str) -> int:
    return sum(term.bytes for term in made.host if (term.name, term.phase) == (name, phase))


@pytest.mark.parametrize(("result", "row"), MEASURED)
def test_what_was_measured_by_phase(result: dict[str, Any], row: dict[str, Any]) -> None:
    """benchmarks/host_memory.py: real runs, encoding and encoded, against today's forecast of the same."""
    double, single = result["layers"]
    config = {"img_dir": "x", **result["config"]}
    start, _, rank = row["start"].partition(", rank ")
    made = forecast(
        TrainConfig(**config), replace(FLUX_DEV, double_blocks=double, single_blocks=single),
        world_size=result.get("ranks", 1), strategy=result.get("strategy", "single"),
        device="cpu" if result["device"] == "cpu" else "cuda", encoded=start == "encoded",
    )  # fmt: skip
    terms = made.host_of_others if rank not in ("", "0") else made.host
    measured = dict(row["measured"])
    phases = {phase: sum(term.bytes for term in terms if term.phase == phase) for phase in measured}
    lora = config.get("mode", "lora") == "lora"
    if lora and result["device"] != "cpu" and terms is made.host:  # adapters were written another way, which took more
        assert phases.pop("train") < measured.pop("train") * 1.05
    if terms is not made.host:
        assert phases.pop("sample") == 0  # the first rank draws, and this one holds what it held before
        assert measured.pop("sample") <= max(measured.values()) * 1.01
    assert phases == pytest.approx(measured, rel=made.host_error_bar)


LIMITS = json.loads((RESULTS / "limits-nvidia-h200-2026-11-30.json").read_text("utf-8"))["rows"]
PAIR = json.loads((RESULTS / "two-gpus-nvidia-h200-2026-11-30.json").read_text("utf-8"))
TUNED = {"mode": "finetune", "final_checkpoint": False}
WHOLE = {"img_dir": "x", "img_size": 1024, "rank": 16, "mixed_precision": "bf16", "disable_sampling": True,
         "max_train_steps": 5, "checkpointing_steps": 10**6}  # fmt: skip
"""Of all that was run at full size."""


@pytest.mark.parametrize("row", [row for row in LIMITS if row.get("host")],
                         ids=lambda row: f"{row['mode']} {row['limit_gib']} {bool(row['allow'])}")  # fmt: skip
def test_what_plans_were_measured_at(row: dict[str, Any]) -> None:
    """benchmarks/limits.py: each of the plans, streaming or not, with a filled cache."""
    own = TUNED if row["mode"] == "finetune" else {"lora_targets": "diffusers"}
    config = settled({**WHOLE, **own, **row["plan"]["changes"]})
    made = forecast(config, FLUX_DEV, world_size=1, strategy="single", device="cuda", encoded=True)
    held(made, made.host, row["host"][0]["phases"], near=0.04)


@pytest.mark.parametrize(("part", "name", "strategy", "own"), [
    ("lora", "one", "single", {}), ("lora", "ddp", "ddp", {}), ("lora", "zero2", "zero2", {}),
    ("finetune", "adamw8bit", "fsdp", {**TUNED, "optimizer": "adamw8bit", "weight_update": "stochastic"}),
    ("fp32", "fp32", "fsdp", TUNED),
])  # fmt: skip
def test_what_two_ranks_were_measured_at(part: str, name: str, strategy: str, own: dict[str, Any]) -> None:
    """benchmarks/two_gpus.py: one card, and each of two, with a filled cache."""
    ranks = PAIR[part]["rows"][name]["host"]
    config = settled({**WHOLE, "gradient_checkpointing": True, **own})
    made = forecast(config, FLUX_DEV, world_size=len(ranks), strategy=strategy, device="cuda", encoded=True)
    for rank, terms in zip(ranks, (made.host, made.host_of_others), strict=False):
        held(made, terms, rank["phases"], near=0.06)


def settled(keys: dict[str, Any]) -> TrainConfig:
    return TrainConfig(**{key: tuple(value) if isinstance(value, list) else value for key, value in keys.items()})


def held(made: Bill, terms: Iterable[Term], measured: dict[str, int], *, near: float) -> None:
    """The phases before training, and the most of all, which comes with it. What libraries take before a model is
    loaded differs by 7 % between hosts."""
    phases: Counter[str] = Counter()
    for term in terms:
        phases[term.phase] += term.bytes
    assert phases.pop("cache") == pytest.approx(measured["cache"], rel=made.host_error_bar)
    assert phases == pytest.approx({"load": measured["load"], "train": measured["overall"]}, rel=near)


def test_what_streaming_was_measured_to_add() -> None:
    """benchmarks/full_size.py on an H200, each row a process of its own: the streamed one beside the same without."""
    rows = json.loads((RESULTS / "full_size-nvidia-h200-2026-11-28.json").read_text("utf-8"))["rows"]
    peaks = {row["row"]: row["host_peak_gib"] for row in rows if row["outcome"] == "measured"}
    for name, plain, config in (
        ("lora-stream-19", "lora", {"stream_blocks": 19}),
        ("lora-nf4-stream", "lora-nf4", {"quantization": "nf4", "modulation": "stream"}),
    ):
        more = named(bill(**config), "streamed blocks", "train") / GIB
        assert more == pytest.approx(peaks[name] - peaks[plain], rel=0.03)


@pytest.mark.parametrize(("form", "targets", "times"), [
    ("diffusers", "diffusers", 0), ("kohya", "diffusers", memory_host.JOINED), ("xlabs", "xflux", 1),
])  # fmt: skip
def test_what_an_adapter_s_file_takes_beside_the_adapters(form: str, targets: str, times: int) -> None:
    """At rank 16; X-Flux's needs as much again for a moment."""
    torch = pytest.importorskip("torch")
    from xflux_trainer import lora_files
    from xflux_trainer.fused import pairs
    from xflux_trainer.trained import trained

    weights = {}
    for one in trained(replace(BASE, rank=16, lora_targets=targets), FLUX_DEV).adapters:
        weights[f"{one.name}.lora_A.weight"] = torch.randn(16, one.inputs)
        weights[f"{one.name}.lora_B.weight"] = torch.randn(one.outputs, 16)
    own = {tensor.untyped_storage().data_ptr(): tensor.nbytes for tensor in weights.values()}
    held = [tensor.untyped_storage() for tensor in lora_files.to_format(pairs(weights), form).values()]
    more = {one.data_ptr(): one.nbytes() for one in held if one.data_ptr() not in own}
    assert sum(more.values()) == pytest.approx(times * sum(own.values()), rel=0.01)


def test_numbers_of_other_modules() -> None:
    pytest.importorskip("torch")
    from xflux_trainer import ahead, fast, readahead

    window = readahead.Window()
    assert window.buffers * window.size == memory_host.STAGING
    assert memory_host.AHEAD == ahead.DEPTH + 1
    source = Path(fast.__file__).read_text("utf-8").partition("class Packed")[2]
    assert all(f".{name}" in source for name in memory_host.PACKED)


def test_streamed_blocks_wait_in_the_host_s_memory() -> None:
    plain, streamed = bill(), bill(stream_blocks=19)
    more = named(streamed, "streamed blocks", "train")
    assert more > 7 << 30
    for phase in ("load", "sample"):
        assert streamed.host_phases[phase] - plain.host_phases[phase] == more
    # No step is recorded, and nothing of recording is let go when adapters are written.
    files = [named(one, "adapter files", "train") for one in (streamed, plain)]
    assert files[0] - files[1] == memory_host.RECORDING
    assert streamed.host_phases["train"] - plain.host_phases["train"] == more + memory_host.RECORDING
    assert streamed.host_phases["cache"] == plain.host_phases["cache"]


def test_on_a_cpu_what_is_used_as_the_file_has_it_costs_nothing() -> None:
    kept, converted = bill("cpu"), bill("cpu", mixed_precision="no")
    assert named(converted, "transformer", "load") == 4 * FLUX_DEV.transformer_parameters
    # q, k, v of 19 blocks for image and text, and of 38 blocks with the first layer of the MLP: 3 + 3 and 7 hidden².
    laid = 2 * (19 * 6 * (3072**2 + 3072) + 38 * 7 * (3072**2 + 3072))
    assert named(kept, "transformer", "load") == laid
    # A full fine-tune writes into those pages, which makes them the process's own.
    tuned = bill("cpu", mode="finetune")
    own = named(tuned, "transformer", "train") + named(tuned, "weights that were stepped", "train")
    assert own == pytest.approx(2 * FLUX_DEV.transformer_parameters, rel=0.001)
    assert named(tuned, "weights that were stepped", "load") == 0


def test_every_term_says_why() -> None:
    for device in ("cuda", "cpu"):
        made = bill(device, stream_blocks=3)
        assert all(term.why and term.bytes >= 0 for term in made.host)
        assert set(made.host_phases) == {"cache", "load", "train", "sample"}


HEAP = """
import sys
from pathlib import Path
from xflux_trainer import heap

def own():
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")) // 1024

if sys.argv[1] == "back":
    heap.give_back()
import ctypes
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
def take(size):
    place = libc.malloc(size)
    ctypes.memset(place, 1, size)
    return place
libc.free(take(31 << 20))  # after which glibc takes everything smaller out of its heap
before = own()
pieces = [take(8 << 20) for _ in range(20)]
last = take(500 << 10)  # above them, so that the heap cannot be cut off at its end
for piece in pieces:
    libc.free(piece)
print(own() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_freed_memory_is_the_system_s_again() -> None:
    held = [
        int(subprocess.run([sys.executable, "-c", HEAP, how], capture_output=True, text=True, check=True).stdout)
        for how in ("keep", "back")
    ]
    assert held[1] < 16
    if held[0] < 100:
        pytest.skip("this C library gives freed memory back by itself")
