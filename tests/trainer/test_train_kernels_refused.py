"""What the fused kernels cannot be: said in a sentence, before anything is encoded or loaded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from trainer_kit import keep_signals, write_config  # noqa: E402
from xflux_trainer import cli, fast, fsdp, run  # noqa: E402
from xflux_trainer.config import TrainConfig, load, load_with_notes  # noqa: E402
from xflux_trainer.errors import ConfigError, Unsupported  # noqa: E402
from xflux_trainer.ranks import Launch, Ranks  # noqa: E402
from xflux_trainer.spec import FLUX_DEV  # noqa: E402

__all__ = ["keep_signals"]  # a fixture, used by being here

CPU = torch.device("cpu")


def config(**changes: Any) -> TrainConfig:
    return TrainConfig("images", **changes)


@pytest.mark.parametrize(("changes", "words"), [
    ({"kernels": "fused", "attention": "flash-attn-4"}, "attention is flash-attn-4, which does not work here"),
    ({"checkpointed_blocks": 1}, "checkpointed_blocks is 1, which fused kernels alone do, and there is no CUDA"),
])  # fmt: skip
def test_a_run_stops_before_it_encodes(
    tmp_path: Path, changes: dict[str, Any], words: str, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    file = write_config(tmp_path, cache_dir=str(tmp_path / "cache"), **changes)
    assert cli.main(["train", "--config", str(file)]) == 1
    assert words in capsys.readouterr().err
    assert not list((tmp_path / "cache").glob("*.safetensors"))


def test_under_fsdp_diffusers_blocks_compute_a_fine_tune() -> None:
    """It is cut up as it is loaded, by hooks around diffusers' modules."""
    ranks = Ranks(Launch(fsdp=True, use_cpu=True))
    try:
        fsdp._fully_shard()
    except Unsupported:  # said before anything is loaded
        with pytest.raises(Unsupported, match="has no FSDP2"):
            run._block_preparer(config(mode="finetune"), FLUX_DEV, ranks)
        return
    assert run._block_preparer(config(mode="finetune"), FLUX_DEV, ranks)[1]
    with pytest.raises(Unsupported, match="kernels is fused, but the model is cut up among the ranks"):
        run._block_preparer(config(mode="finetune", kernels="fused"), FLUX_DEV, ranks)
    with pytest.raises(Unsupported, match="The optimizer adafactor wants whole weights"):
        run._block_preparer(config(mode="finetune", optimizer="adafactor"), FLUX_DEV, ranks)
    assert not run._block_preparer(config(mode="finetune"), FLUX_DEV, Ranks(Launch(use_cpu=True)))[1]


@pytest.mark.parametrize("stage", [1, 2])
def test_deepspeed_is_refused_streamed_blocks_before_the_model_is_loaded(
    stage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", str(stage))
    with pytest.raises(Unsupported, match=f"zero{stage} wants to place them itself"):
        run._block_preparer(config(stream_blocks=2), FLUX_DEV, Ranks(Launch(deepspeed=True, use_cpu=True)))


def test_a_card_without_fp8_products_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would hold the weights all the same, and die in the first step."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    card = torch.device("cuda", 7)  # answers are remembered by the device: nobody else asks for this one
    wanted = config(quantization="fp8-dynamic", kernels="fused")
    with pytest.raises(Unsupported, match=r"compute capability 8\.9, and NVIDIA A100 has 8\.0"):
        fast.refuse(wanted, card, 128, cut=False)
    fast.refuse(replace(wanted, kernels="diffusers"), card, 128, cut=False)
    fast.refuse(wanted, CPU, 128, cut=False)


def test_an_attention_that_nobody_takes_is_told() -> None:
    for changes in ({}, {"kernels": "diffusers"}):
        made, notes = fast.build(torch.nn.Module(), config(attention="sdpa", **changes), CPU)
        assert made is None
        assert notes == ["attention is sdpa, and diffusers' own blocks choose theirs."]
        assert fast.build(torch.nn.Module(), config(**changes), CPU) == (None, [])


@pytest.mark.parametrize("attention", ["flash-attn-4", "cudnn"])
def test_deterministic_needs_an_attention_that_is(tmp_path: Path, attention: str) -> None:
    with pytest.raises(ConfigError, match="deterministic is on"):
        load(write_config(tmp_path, attention=attention, deterministic=True))
    load(write_config(tmp_path, attention="flash", deterministic=True))


@pytest.mark.parametrize(("changes", "words"), [
    ({"kernels": "diffusers"}, "with kernels diffusers it saves memory only"), ({"stream_blocks": 4}, "in bf16"),
])  # fmt: skip
def test_blocks_that_fp8_does_not_multiply_are_told(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    more: dict[str, Any] = {"quantization": "fp8-dynamic", "mixed_precision": "bf16"}
    assert not load_with_notes(write_config(tmp_path, **more))[1]
    (note,) = load_with_notes(write_config(tmp_path, **more, **changes))[1]
    assert words in note
