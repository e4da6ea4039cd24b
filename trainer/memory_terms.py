"""The terms of a bill that no step changes: weights, what is trained, samples, the disk. Bytes of one rank, each with
its reason. What the passes of a step take is `memory_fused`'s where this trainer's own blocks compute, otherwise
`memory_diffusers`'s.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from xflux_trainer.config import TrainConfig
from xflux_trainer.savings import block_of, held, is_block, is_modulation
from xflux_trainer.spec import FluxSpec, image_tokens
from xflux_trainer.trained import Trained, trained

MIB = 1 << 20
CUBLAS = 32 * MIB
"""A workspace of cuBLAS or cuBLASLt on Hopper, as torch sets it: each stream has both."""
BUCKET = 1 << 27
"""Most gradients that DeepSpeed reduces together here: twice FLUX's largest weight, 256 MiB in bf16."""

ADAM, MASTERS, SHARDS, TRANSFORMER = "Adam", "Adam and fp32 weights", "fp32 shards", "transformer"
GRADIENTS, ONE_STEP, WHOLE = "gradients", "one tensor's step", "whole blocks"
WITH_SHARDS = (GRADIENTS, ONE_STEP, "compensation", "moving average")
"""What lies beside FSDP2's parts, on the host where these wait there."""
OPTIMIZER = (ADAM, MASTERS)
"""Terms that an offloaded optimizer takes to the host."""


class Term(NamedTuple):
    """One item of the bill: what it is, how many bytes, in which phase of the run, and why that many. A plan's search
    makes ten thousand."""

    name: str
    bytes: int
    phase: str
    why: str
    passing: bool = False
    """Whether it is gone when the optimizer steps."""


PHASES = ("cache", "load", "train", "sample")


class Part(NamedTuple):
    """Some of a bill's terms, which follow from few settings, and their bytes in each of the `PHASES`.

    A plan's search wants the sums of hundreds of bills, whose parts are the same ones over and over.
    """

    terms: tuple[Term, ...]
    sizes: tuple[int, ...]


def part(terms: Iterable[Term]) -> Part:
    own = tuple(terms)
    totals = dict.fromkeys(PHASES, 0)
    for term in own:
        totals[term.phase] += term.bytes
    return Part(own, tuple(totals.values()))


def width(config: TrainConfig) -> int:
    """Bytes of a number of the computation."""
    return 4 if config.mixed_precision == "no" else 2


def weights(
    config: TrainConfig, spec: FluxSpec, world_size: int, strategy: str, phases: Iterable[str], *, reshard: bool = True
) -> list[Term]:
    """The frozen or trained transformer as it lies on the device in these phases. `reshard`: whether FSDP2's blocks are
    cut up again after the forward pass."""
    size = width(config)
    base = held(config, spec, size)
    total, why = base.device, f"{spec.transformer_parameters:,} parameters, {size} bytes each"
    if config.quantization != "none":
        kept = "" if config.modulation == "quantize" else ", not the modulation"
        why = f"{spec.transformer_parameters:,} parameters, the blocks' layers in {config.quantization}{kept}"
    if base.host:
        why += f"; {base.host / MIB:,.0f} MiB wait in host memory, {base.slots / MIB:,.0f} are room for what arrives"
    if strategy not in ("zero3", "fsdp") or world_size == 1:
        return [Term(TRANSFORMER, total, phase, why) for phase in phases]
    lying = Term(TRANSFORMER, total, "", why)
    return [
        term for phase in phases for term in _cut_up(config, spec, world_size, strategy, phase, lying, reshard=reshard)
    ]


def _cut_up(
    config: TrainConfig, spec: FluxSpec, world_size: int, strategy: str, phase: str, lying: Term, *, reshard: bool
) -> Iterator[Term]:
    """Of what lies there in one phase a rank's share, and what is whole while it computes."""
    size, total, why = width(config), lying.bytes, lying.why
    if strategy == "fsdp" and phase == "load" and config.mode == "finetune" and not cut_as_loaded(config):
        yield Term(TRANSFORMER, total, phase, f"{why}; whole until all of it is there, since a part is trained")
        return
    why += f"; 1/{world_size} of them on each rank"
    whole, blocks = 2 * block_parameters(spec) * size, ", two blocks while they compute"
    if strategy == "fsdp":  # the group around the blocks stays whole until the backward pass is over
        whole, blocks = whole + end_parameters(spec) * size, f"{blocks}, and what is before and behind the blocks"
    if strategy == "fsdp" and not reshard and phase != "load":
        whole, blocks = spec.transformer_parameters * size, ", all blocks until the backward pass is over"
    if strategy == "fsdp" and phase == "train":
        yield Term(TRANSFORMER, math.ceil(total / world_size), phase, why)
        yield Term(WHOLE, whole, phase, f"gathered from all ranks{blocks}", passing=True)
    else:
        yield Term(TRANSFORMER, math.ceil(total / world_size) + whole, phase, f"{why}; whole{blocks}")


@functools.lru_cache(maxsize=16)
def block_parameters(spec: FluxSpec) -> int:
    """Parameters of the linear layers of the model's largest block."""
    sizes: dict[str, int] = {}
    for linear in spec.linears():
        block = ".".join(linear.name.split(".")[:2])
        if is_block(block):
            sizes[block] = sizes.get(block, 0) + (linear.inputs + 1) * linear.outputs
    return max(sizes.values(), default=0)


@functools.lru_cache(maxsize=16)
def end_parameters(spec: FluxSpec) -> int:
    """Parameters of the linear layers outside of the blocks."""
    linears = [linear for linear in spec.linears() if not block_of(linear.name)]
    return sum((linear.inputs + 1) * linear.outputs for linear in linears)


def states(
    config: TrainConfig, spec: FluxSpec, world_size: int, strategy: str, *, at_once: int = 0, in_place: bool = False
) -> Iterator[Term]:
    """What is trained, its gradients and the optimizer, as if all of it were there all the time: see `at_its_peak`.

    `at_once`: gradients that are there before the first is stepped, if more than the largest tensor's. `in_place`:
    Triton's kernels step 16-bit weights where they lie.
    """
    what = trained(config, spec)
    first = max(what.largest, at_once)
    if strategy.startswith("zero"):
        yield from _deepspeed(config, what, world_size, strategy)
        return
    if strategy == "fsdp" and config.mode != "lora":  # adapters stay whole on every rank
        yield from _fsdp(config, spec, what, world_size, in_place=in_place)
        return
    own, count = what.parameters, f"{what.parameters:,} trained parameters"
    each = moments(config)
    if config.mode == "lora" or width(config) == 4:
        if config.mode != "finetune":
            name = "adapters" if config.mode == "lora" else "ControlNet"
            yield Term(name, own * 4, "train", f"{count} in fp32")
        grads = first if config.step_in_backward else own
        yield Term(GRADIENTS, grads * 4, "train", "fp32; under DDP they are views of its buckets")
    else:
        yield from _bf16_states(config, what, first, count, in_place=in_place)
    if each:
        yield Term(ADAM, math.ceil(own * each), "train", f"two moments, {each:g} bytes a parameter")
    if config.ema_decay:
        yield Term("moving average", own * 4, "train", "fp32")


def narrow(config: TrainConfig) -> bool:
    """Whether weights that are cut up stay in the 16 bits that the model computes with, and every step rounds them."""
    asked = config.weight_update in ("stochastic", "kahan", "nearest")
    return asked and config.mode == "finetune" and config.mixed_precision == "bf16"


def cut_as_loaded(config: TrainConfig) -> bool:
    """Whether FSDP2 cuts up each block as soon as it is loaded. Where a part of the weights is trained, which of them
    are to be fp32 is not known by then."""
    return config.mode != "finetune" or not config.train_parameters or narrow(config)


def _fsdp(
    config: TrainConfig, spec: FluxSpec, what: Trained, world_size: int, *, in_place: bool
) -> Iterator[Term]:  # fmt: skip
    """What is trained is cut up, in fp32 unless it is `narrow`, and AdamW steps each rank's part; a block is whole
    while it computes."""
    own = math.ceil(what.parameters / world_size)
    count = f"{what.parameters:,} trained parameters, 1/{world_size} of them on each rank"
    size = 2 if narrow(config) else 4
    already = width(config) if config.mode == "finetune" else 0
    if already < size:
        more = f", {size - already} bytes more than the transformer counts" if already else ""
        yield Term(SHARDS, own * (size - already), "train", f"{count}{more}")
    yield Term(GRADIENTS, own * size, "train", f"of this rank's part, {size} bytes each")
    if world_size > 1:
        whole = min(block_parameters(spec), what.parameters)
        why = "of one block, and in fp32 of the one before, which are being summed up"
        yield Term("gradients on their way", whole * (width(config) + 4), "train", why, passing=True)
    each = moments(config)
    why = f"two moments, {each:g} bytes a parameter, 1/{world_size} of them on each rank"
    yield Term(ADAM, math.ceil(own * each), "train", why)
    if narrow(config) and config.weight_update == "kahan":
        yield Term("compensation", own * 2, "train", "what the last rounding lost of each weight")
    if narrow(config) and not in_place:
        largest = math.ceil(what.largest / world_size)
        yield Term(ONE_STEP, largest * 4 * 3, "train", "each part is stepped in fp32 and rounded back")
    if config.ema_decay:
        yield Term("moving average", own * 4, "train", f"fp32, 1/{world_size} of it on each rank")


def moments(config: TrainConfig) -> float:
    """Bytes of the optimizer's moments for each trained parameter."""
    # Adafactor's are a row and a column for each matrix; 8-bit ones have a scale for each block of 256.
    return {"adamw": 8.0, "adamw8bit": 2 * (1 + 4 / 256), "adafactor": 0.0}[config.optimizer]


def _bf16_states(config: TrainConfig, what: Trained, first: int, count: str, *, in_place: bool) -> Iterator[Term]:
    """Weights that the model computes with in 16 bits; those of a fine-tune are the transformer's own."""
    own = what.parameters
    if config.mode == "controlnet":
        yield Term("ControlNet", own * 2, "train", f"{count}, 2 bytes each")
    update = config.weight_update
    if update == "auto":
        update = "stochastic" if config.mode == "finetune" and not config.train_parameters else "master"
    grads = min(first, own) if config.step_in_backward else own
    reason = f"of the largest {'block' if first > what.largest else 'tensor'}: each is freed once it was stepped"
    reason = reason if grads != own else count
    yield Term(GRADIENTS, grads * 2, "train", f"16 bits, {reason}")
    if update == "master":
        yield Term("fp32 weights", own * 4, "train", "what the optimizer steps; the model computes with 16-bit copies")
    elif update == "kahan":
        yield Term("compensation", own * 2, "train", "what the last rounding lost of each weight")
    if not in_place:
        yield Term(ONE_STEP, what.largest * 4 * 3, "train", "each tensor is stepped in fp32 and rounded back")


def _deepspeed(config: TrainConfig, what: Trained, world_size: int, strategy: str) -> Iterator[Term]:
    count = f"{what.parameters:,} trained parameters"
    share = math.ceil(what.parameters / world_size)
    own = share if strategy == "zero3" else what.parameters
    if config.mode != "finetune":
        yield Term("adapters" if config.mode == "lora" else "ControlNet", own * 2, "train",
                   f"{count}; DeepSpeed computes with bf16 copies")  # fmt: skip
    grads = own if strategy == "zero1" else share
    yield Term(GRADIENTS, own * 2 + grads * 4, "train", "bf16, and the fp32 of this rank's part")
    yield Term(MASTERS, share * 12, "train", f"1/{world_size} of them on each rank")
    bucket = min(what.parameters, BUCKET)
    yield Term("reduce buckets", bucket * 4, "train", f"two of {bucket:,} gradients, as reduce_bucket_size is set")
    if config.ema_decay:
        yield Term("moving average", share * 4, "train", f"fp32, 1/{world_size} of it on each rank")


def dense(config: TrainConfig, spec: FluxSpec) -> Iterator[Term]:
    """Of a base in fewer bits the largest layer, made dense for its product."""
    if config.quantization == "none":
        return
    largest = _largest(spec, config.modulation == "quantize")
    # torchao widens fp8 to fp32, and scales that into another.
    each = 8 if config.quantization == "torchao-fp8" else width(config)
    yield Term("a weight in 16 bits", largest * each, "train", "made anew for each product")


@functools.lru_cache(maxsize=16)
def _largest(spec: FluxSpec, modulation: bool) -> int:
    """Numbers in the largest layer that is quantised. `modulation`: whether its layers are."""
    return max(one.inputs * one.outputs for one in spec.linears() if modulation or not is_modulation(one.name))


QUANTISED = {"int8": 2, "int4": 2, "fp8": 2, "torchao-fp8": 3, "torchao-int8": 1, "fp8-dynamic": 1}
"""Tensors of the largest layer's size in fp32 that quantising it holds at once, measured as it was loaded."""
MADE_AT_LOAD = (
    "adapters", "ControlNet", "fp32 weights", SHARDS, "compensation", "adapters' copies", "adapters beside weights",
)  # fmt: skip
"""Terms that are there when the model is loaded; gradients and moments come with the first step."""


def loaded(stays: Iterable[Term]) -> Iterator[Term]:
    """Of what stays, what is there beside the transformer at the end of the load."""
    for term in stays:
        if term.name in MADE_AT_LOAD:
            yield Term(term.name, term.bytes, "load", term.why, term.passing)


def quantising(config: TrainConfig, spec: FluxSpec) -> Iterator[Term]:
    """What a layer's quantisation takes on its way."""
    copies = QUANTISED.get(config.quantization, 0)
    if copies:
        yield Term("one layer on its way", copies * spec.largest_tensor * 4, "load", "quantised from fp32 copies of it")


def sampling(config: TrainConfig, spec: FluxSpec) -> Iterator[Term]:
    """Drawing images between steps."""
    tokens = image_tokens(config.sample_width, config.sample_height) + config.max_text_tokens
    one = 14 * tokens * spec.hidden * width(config)
    yield Term("one block forward", one, "sample", "no gradients are kept")
    yield Term("VAE", spec.vae_parameters * 2, "sample", "bf16, loaded for the samples only")
    tile = min(config.sample_width, 512) * min(config.sample_height, 512)
    yield Term("VAE activations", 6 * 256 * tile * 2, "sample", "decoded in tiles of 512 px")


# The disk ------------------------------------------------------------------------------------------------


def checkpoints(config: TrainConfig) -> int:
    """How many a run writes; one at the least where its length is in passes over the images."""
    if config.max_train_steps is None:
        return 1
    return math.ceil(config.max_train_steps / config.checkpointing_steps) - (not config.final_checkpoint)


def disk(config: TrainConfig, spec: FluxSpec, samples: int, strategy: str = "single") -> Iterator[Term]:
    """What the run writes: cache, checkpoints, results."""
    what = trained(config, spec)
    tokens = sum(image_tokens(size, size) for size in config.sizes) * (2 if config.random_flip else 1)
    latents = tokens * spec.in_channels * 4
    text = (config.max_text_tokens * spec.text_dim + spec.pooled_dim) * 2
    # Canny's edges have one channel; files may have three.
    channels = 0 if config.mode != "controlnet" else 1 if config.control_type == "canny" else 3
    edges = sum(size**2 for size in config.sizes) * channels
    known = f"{samples} images and captions" if samples else "the number of images is not known"
    yield Term("cache", samples * (latents + text + edges), "cache", known)
    written = checkpoints(config)
    kept = min(written, config.checkpoints_total_limit or written)
    full = config.mode == "finetune" and not config.train_parameters
    rounded = full and config.mixed_precision != "fp16" and config.weight_update in ("auto", "stochastic", "nearest")
    rounded &= strategy in ("single", "ddp") or (strategy == "fsdp" and narrow(config))
    one = (width(config) if rounded else 4) + moments(config) + (4 if config.ema_decay else 0)
    reason = f"{what.parameters:,} trained parameters, {one:g} bytes each with the optimizer"
    at_once = min(written, kept + 1)
    held = f"{kept} kept and one being written" if at_once > kept else f"{kept} kept"
    if at_once:
        yield Term("checkpoints", math.ceil(at_once * what.parameters * one), "train", f"{held}: {reason}")
    if config.mode == "lora":
        yield Term("adapter files", what.parameters * 4 * len(config.formats), "train", ", ".join(config.formats))
    elif config.mode == "controlnet":
        yield Term("ControlNet files", what.parameters * 2 * 2, "train", "X-Flux's file and diffusers' folder, bf16")
    else:
        yield Term("transformer", spec.transformer_parameters * 2, "train", "diffusers' folder, bf16")
