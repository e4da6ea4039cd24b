"""What the bundled trainer refuses under a strategy, in its own words, and which packages a strategy wants. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from packaging.version import Version
from xflux_trainer.config import TrainConfig
from xflux_trainer.memory_terms import narrow

from xflux_doctor.facts import Facts
from xflux_doctor.finding import Change, Edit, Finding, error
from xflux_doctor.versions import version_of

FSDP2 = Version("1.6.0")
"""The first accelerate that hands fsdp_version to its ranks."""
FULLY_SHARD = Version("2.6")
"""Before it torch.distributed.fsdp has no fully_shard."""
BEFORE = "It stops before its first step."


def has_fsdp2(facts: Facts) -> bool:
    """Whether torch and accelerate are there and have FSDP2. What is not known has none."""
    torch, accelerate = version_of(facts, "torch"), version_of(facts, "accelerate")
    return torch is not None and torch >= FULLY_SHARD and accelerate is not None and accelerate >= FSDP2


ALL_OR_NONE = "diffusers' blocks are all recomputed or none"
FP8 = (8, 9)
"""The first compute capability whose tensor cores multiply fp8."""


def fp8_lacks(capability: tuple[int, int], torch: Version | None) -> str | None:
    """What keeps a card from fp8-dynamic's products (trainer/fp8.py, `supported`); None: nothing that is known."""
    if capability < FP8:
        return f"compute capability {capability[0]}.{capability[1]}, and fp8 products need 8.9"
    if torch is not None and torch < Version("2.5"):
        return f"torch {torch}, and fp8 products with a scale for each row need 2.5"
    if capability == FP8 and torch is not None and torch < Version("2.12"):
        return f"torch {torch}, which starts them outside of its streams on such a card; 2.12 does not"
    return None


def refusals(config: TrainConfig, strategy: str, steps: int, plain: tuple[Change, ...] = ()) -> Iterator[Finding]:
    """One finding for each setting that the trainer does not combine with the strategy; `plain` launches without it."""
    if strategy in ("zero1", "zero2", "zero3", "fsdp"):
        yield from _optimizers(config, strategy)
        yield from _bases(config, strategy, plain)
    if strategy in ("zero3", "fsdp"):
        yield from _kernels(config)
    yield from _in_backward(config, strategy, steps)


def _optimizers(config: TrainConfig, strategy: str) -> Iterator[Finding]:
    who = "FSDP" if strategy == "fsdp" else "DeepSpeed"
    if config.optimizer != "adamw" and (config.optimizer, strategy) != ("adamw8bit", "fsdp"):
        yield error(
            f"The optimizer {config.optimizer} wants whole weights, and {who} cuts them up.",
            BEFORE,
            "Set optimizer to adamw, or set distributed_type to MULTI_GPU, where each device holds the whole model.",
            offers=(Edit("train", ("optimizer",), "adamw", f"what {who} steps pieces of weights with"),),
        )
    if (
        config.mode == "finetune"
        and config.weight_update not in ("auto", "master")
        and not (strategy == "fsdp" and narrow(config))
    ):
        yield error(
            f"weight_update is {config.weight_update}, but {who} holds fp32 masters of what is trained.",
            BEFORE,
            "Set weight_update to auto, or set distributed_type to MULTI_GPU, where each device holds the whole model.",
            edits=(Edit("train", ("weight_update",), "auto", f"{who} steps fp32 masters, which lose nothing"),),
        )


def _bases(config: TrainConfig, strategy: str, plain: tuple[Change, ...]) -> Iterator[Finding]:
    if config.stream_blocks or config.modulation == "stream":
        key = "stream_blocks" if config.stream_blocks else "modulation: stream"
        yield error(
            f"{key} keeps weights in the host's memory, and {strategy} wants to place them itself.",
            BEFORE,
            "Launch without DeepSpeed and FSDP, or set stream_blocks to 0 and modulation to keep.",
            offers=plain,
        )
    if config.quantization != "none" and strategy in ("zero3", "fsdp"):
        yield error(
            f"quantization is {config.quantization}, and {strategy} cannot cut a quantised base into parts.",
            BEFORE,
            "Launch without it, or set quantization: none.",
            offers=plain,
        )


def _kernels(config: TrainConfig) -> Iterator[Finding]:
    why = "the model is cut up among the ranks"
    if config.kernels == "fused":
        yield error(
            f"kernels is fused, but {why}.",
            BEFORE,
            "Set kernels to auto, which takes diffusers' code here.",
            edits=(Edit("train", ("kernels",), "auto", "diffusers' blocks compute there"),),
        )
    if config.kernels != "diffusers" and config.checkpointed_blocks is not None and config.gradient_checkpointing:
        yield error(
            f"checkpointed_blocks is {config.checkpointed_blocks}, which fused kernels alone do, and {why}.",
            BEFORE,
            "Set checkpointed_blocks to null.",
            edits=(Edit("train", ("checkpointed_blocks",), None, ALL_OR_NONE),),
        )


def _in_backward(config: TrainConfig, strategy: str, steps: int) -> Iterator[Finding]:
    if not config.step_in_backward:
        return
    off = (Edit("train", ("step_in_backward",), False, "gradients are kept until all are there"),)
    if strategy != "single":
        yield error(
            f"step_in_backward steps before gradients could be exchanged or sharded, and this run is under {strategy}.",
            BEFORE,
            "Set distributed_type to NO and num_processes to 1 in the accelerate config, or step_in_backward to false.",
            offers=off,
        )
    elif steps > 1:
        yield error(
            f"step_in_backward cannot accumulate gradients, and gradient_accumulation_steps is {steps}.",
            BEFORE,
            "Set it to 1 in the train config and the accelerate config, or step_in_backward to false.",
            offers=off,
        )
    elif config.mixed_precision == "fp16":
        yield error(
            "step_in_backward cannot leave out a step whose gradients overflow, and mixed_precision is fp16.",
            BEFORE,
            "Set mixed_precision to bf16, or step_in_backward to false.",
            offers=off,
        )
