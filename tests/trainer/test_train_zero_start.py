"""What DeepSpeed sends around at its start: what is trained, and not the frozen weights that every rank has read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("deepspeed")

from dataclasses import replace  # noqa: E402

from steps_kit import pair  # noqa: E402
from trainer_model import tiny_transformer  # noqa: E402
from xflux_trainer import fast, lora  # noqa: E402
from xflux_trainer.config import TrainConfig  # noqa: E402
from xflux_trainer.model import Velocity  # noqa: E402
from xflux_trainer.ranks import Ranks  # noqa: E402


def start(ranks: Ranks, folder: Path) -> dict[str, Any]:
    """The frozen and the trained weights of a rank whose own were its number, once DeepSpeed has them."""
    os.environ["LOCAL_RANK"] = str(ranks.rank)  # this process is the rank's own
    from xflux_trainer.zero import ZeroStepper

    settings = TrainConfig("images", rank=4, mixed_precision="bf16", kernels="fused")
    net = tiny_transformer().bfloat16()
    trained = lora.attach(net, settings)
    velocity = Velocity(net, guidance=True)
    velocity.fast, _ = fast.build(net, settings, ranks.device)  # lays adapters among the weights
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(ranks.rank + 1)
    apart = sum(not parameter.is_contiguous() for parameter in net.parameters())
    asked = Ranks(replace(ranks.launch, deepspeed=True))
    stepper = ZeroStepper(velocity, trained, settings, asked, 1)
    ours = {id(parameter) for parameter in trained.values()}
    frozen = [parameter for parameter in net.parameters() if id(parameter) not in ours]
    return {
        "apart": apart, "marked": sum(hasattr(parameter, "ds_status") for parameter in frozen),
        "frozen": {float(value) for parameter in frozen for value in (parameter.min(), parameter.max())},
        "stage": stepper.strategy,
    }  # fmt: skip


@pytest.mark.parametrize("stage", [1, 2])
def test_frozen_weights_stay_where_they_are(stage: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that lie apart, as an adapted layer's do, could not be sent by NCCL at all."""
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", str(stage))
    for key in ("OPTIMIZER", "PARAM"):
        monkeypatch.setenv(f"ACCELERATE_DEEPSPEED_OFFLOAD_{key}_DEVICE", "none")
    for rank, found in enumerate(pair(start)):
        assert found["apart"] and not found["marked"] and found["stage"] == f"zero{stage}"
        assert found["frozen"] == {rank + 1.0}
