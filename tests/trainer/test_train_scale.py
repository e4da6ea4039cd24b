"""Weights cut up among two real ranks on the CPU: ZeRO 2 and 3, FSDP2 and DDP train as one process does.

All cases run in one launch of `scale_child.py`. Its losses are held against a loop of a few lines that knows nothing of
the steppers: in fp32 to 1e-5, the gradients' norms to 1e-4, in bf16 to 1e-2.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("peft")

import scale_child  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from trainer_kit import environment  # noqa: E402
from xflux_trainer import fsdp, zero  # noqa: E402
from xflux_trainer.config import TrainConfig  # noqa: E402
from xflux_trainer.errors import Unsupported  # noqa: E402
from xflux_trainer.optim import PlainStepper  # noqa: E402
from xflux_trainer.ranks import Launch, Ranks  # noqa: E402
from xflux_trainer.sharded import decay_at  # noqa: E402

KINDS = ("lora", "full")


def _has_fsdp() -> bool:
    try:
        fsdp._fully_shard()
    except Unsupported:
        return False
    # The first releases that have it know of nothing but CUDA.
    return tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 6)


STRATEGIES = (
    *(("ddp",) if hasattr(PlainStepper, "pieces") else ()),
    *(("zero1", "zero2", "zero3", "zero3-offload") if importlib.util.find_spec("deepspeed") else ()),
    *(("fsdp", "fsdp-offload") if _has_fsdp() else ()),
)
CASES = [f"{strategy}:full" for strategy in STRATEGIES]
CASES += [f"{strategy}:lora" for strategy in STRATEGIES if strategy in ("ddp", "zero2", "zero3", "fsdp")]
CASES += [f"{strategy}-bf16:lora" for strategy in STRATEGIES if strategy in ("zero3", "fsdp")]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("scale")
    path = str(Path(__file__).parent)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
         str(Path(path) / "scale_child.py"), str(folder), *CASES],
        capture_output=True, text=True, timeout=280, env=environment(CUDA_VISIBLE_DEVICES=""),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads((folder / "results.json").read_text(encoding="utf-8")), folder


@pytest.fixture(scope="module", params=KINDS)
def alone(request: pytest.FixtureRequest) -> dict[str, Any]:
    """One process that accumulates both images, written out: AdamW, clipping, an average."""
    config = scale_child.config_of(f"alone:{request.param}")
    velocity, trained = scale_child.make(config)
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
    average = {name: value.detach().clone() for name, value in trained.items()}
    found: dict[str, Any] = {"kind": request.param, "steps": []}
    for step in range(scale_child.STEPS + 1):
        if step == scale_child.STEPS:
            found["moments"] = {n: optimizer.state[p]["exp_avg"].clone() for n, p in trained.items()}
            found["ema"] = {name: value.clone() for name, value in average.items()}
        losses = [scale_child.batch_loss(velocity, step, k) for k in range(2)]
        (sum(losses) / 2).backward()
        norm = torch.nn.utils.clip_grad_norm_(list(trained.values()), config.max_grad_norm)
        found["steps"].append((float(sum(losses)) / 2, float(norm)))
        optimizer.step()
        optimizer.zero_grad()
        for name, value in trained.items():
            average[name].lerp_(value.detach(), 1 - decay_at(config.ema_decay, step + 1))
    with torch.no_grad():
        found["after"] = float(scale_child.batch_loss(velocity, 9, 0))
        for name, value in trained.items():
            value.copy_(average[name])
        found["average"] = float(scale_child.batch_loss(velocity, 9, 0))
    return found


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_ranks_train_as_one_process_does(strategy: str, told: Any, alone: dict[str, Any]) -> None:
    case = f"{strategy}:{alone['kind']}"
    if case not in CASES:
        pytest.skip("run for the other kind")
    found = told[0][case]
    assert found["strategy"] == strategy.split("-")[0]
    for (loss, norm), (own, own_norm) in zip([*found["steps"], found["next"]], alone["steps"]):  # noqa: B905
        assert loss == pytest.approx(own, rel=1e-5)
        assert norm == pytest.approx(own_norm, rel=1e-4)
    # With the average's weights, and with the trained ones again after it.
    assert found["average"] == pytest.approx(alone["average"], rel=1e-4)
    assert found["after"] == pytest.approx(alone["after"], rel=1e-4)
    assert alone["after"] != pytest.approx(alone["average"], rel=1e-4)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_pieces_are_the_same_whoever_wrote_them(strategy: str, told: Any, alone: dict[str, Any]) -> None:
    case = f"{strategy}:{alone['kind']}"
    if case not in CASES:
        pytest.skip("run for the other kind")
    stored = load_file(told[1] / f"{case}.safetensors")
    assert {name.split("|")[1] for name in stored} == {"weight", "exp_avg", "exp_avg_sq", "ema"}
    assert told[0][case]["scalars"]["steps"] == scale_child.STEPS
    for name, value in alone["moments"].items():
        assert stored[f"{name}|exp_avg"].shape == value.shape
        assert torch.allclose(stored[f"{name}|exp_avg"], value, rtol=1e-3, atol=1e-5), name
    # Where a gradient is nothing but rounding (the bias of a key), Adam makes whole steps of it.
    wrong = [(stored[f"{n}|ema"] - value).abs().flatten() > 1e-4 for n, value in alone["ema"].items()]
    assert float(torch.cat(wrong).float().mean()) < 0.02


@pytest.mark.parametrize("kind", KINDS)
def test_each_goes_on_from_anothers_checkpoint(kind: str, told: Any) -> None:
    results = {case: value for case, value in told[0].items() if "<" in case and case.endswith(kind)}
    assert {case.split(":")[0] for case in results} == {s for s in STRATEGIES if f"{s}:{kind}" in CASES}
    for case, found in results.items():
        source = told[0][case.split("<")[1]]
        assert found["next"] == pytest.approx(source["next"], rel=1e-5), case
        assert found["average"] == pytest.approx(source["average"], rel=1e-4), case


def test_a_base_cut_up_as_it_is_loaded_trains_in_bf16(told: Any, alone: dict[str, Any]) -> None:
    found = {case: value for case, value in told[0].items() if "bf16" in case and case.endswith(alone["kind"])}
    for case, value in found.items():
        losses = [loss for loss, _ in [*value["steps"], value["next"]]]
        assert losses == pytest.approx([loss for loss, _ in alone["steps"]], rel=1e-2), case
        # Adapters step in fp32: most of their values have no bf16 form.
        weights = [v for n, v in load_file(told[1] / f"{case}.safetensors").items() if n.endswith("|weight")]
        exact = torch.cat([(v == v.bfloat16().float()).float().flatten() for v in weights])
        assert float(exact.mean()) < 0.2, case


@pytest.mark.parametrize(("changes", "words"), [
    ({"optimizer": "adafactor"}, "The optimizer adafactor wants whole weights"),
    ({"mode": "finetune", "step_in_backward": True}, "step_in_backward cannot be done under"),
    ({"mode": "finetune", "weight_update": "kahan"}, "holds fp32 masters"),
    ({"quantization": "int8"}, "quantization is int8, and .* cannot cut up"),
    ({"stream_blocks": 4}, "stream_blocks is 4"), ({"modulation": "stream"}, "modulation is stream"),
])  # fmt: skip
def test_what_cannot_be_cut_up_is_refused(changes: dict[str, Any], words: str) -> None:
    config = TrainConfig(img_dir="x", **changes)
    with pytest.raises(Unsupported, match=words):
        zero.deepspeed_settings({"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, config, 2, 1, 10)
    with pytest.raises(Unsupported, match=words):
        fsdp.refuse(config)


def test_zero_2_takes_a_quantised_base() -> None:
    """Where whole weights stay on every device."""
    config = TrainConfig(img_dir="x", quantization="int8")
    settings, _ = zero.deepspeed_settings({"ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}, config, 2, 1, 10)
    assert settings["zero_optimization"]["stage"] == 2


def test_nothing_is_cut_up_early_without_being_asked() -> None:
    ranks = Ranks(Launch(use_cpu=True))
    config = TrainConfig(img_dir="x")
    assert zero.partitioner(config, ranks) is None and fsdp.sharder(config, ranks) is None


@pytest.mark.parametrize(("environ", "first"), [
    ({}, []), ({"FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP"}, ["fsdp_auto_wrap_policy"]),
    ({"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_ACTIVATION_CHECKPOINTING": "false"}, []),
    ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, ["fsdp_activation_checkpointing"]),
])  # fmt: skip
def test_what_is_done_otherwise_is_told(environ: dict[str, str], first: list[str]) -> None:
    assert [note.split()[0] for note in fsdp.notes(environ)] == first


def test_an_older_torch_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.distributed.fsdp, "fully_shard", raising=False)
    with pytest.raises(Unsupported, match="has no FSDP2"):
        fsdp._fully_shard()
