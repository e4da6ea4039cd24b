"""Weights that are cut up among the ranks: what ZeRO and FSDP have in common, and what does not go with them."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from xflux_trainer.config import TrainConfig
from xflux_trainer.errors import Unsupported
from xflux_trainer.ranks import Ranks

PLAIN = "set distributed_type to MULTI_GPU, where each device holds the whole model"


def refuse_optimizer(config: TrainConfig, who: str) -> None:
    """Raises `Unsupported` for all but AdamW, which alone looks at one number at a time."""
    if config.optimizer != "adamw":
        seen = f"The optimizer {config.optimizer} wants whole weights, and {who} cuts them up."
        raise Unsupported(seen, f"Set optimizer to adamw, or {PLAIN}.")


def refuse_rounding(config: TrainConfig, who: str) -> None:
    """Raises `Unsupported` where weights are to be rounded that are held in fp32."""
    if config.mode == "finetune" and config.weight_update not in ("auto", "master"):
        seen = f"weight_update is {config.weight_update}, but {who} holds fp32 masters of what is trained."
        raise Unsupported(seen, f"Set weight_update to auto, or {PLAIN}.")


def preparer(config: TrainConfig, ranks: Ranks) -> Callable[[str, nn.Module], None] | None:
    """What cuts a block up among the ranks as soon as it is loaded, for `load_transformer(prepare=…)`.

    None where whole weights stay on every device. Raises `Unsupported` for what cannot be cut up.
    """
    if ranks.launch.deepspeed:
        from xflux_trainer.zero import partitioner

        return partitioner(config, ranks)
    if ranks.launch.fsdp:
        from xflux_trainer.fsdp import sharder

        return sharder(config, ranks)
    return None
