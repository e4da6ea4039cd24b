"""How many bytes a training run will need: on each GPU, in the host's memory, on the disk. Itemised.

The counts of saved activations follow diffusers' blocks as autograd saves them with fused RMSNorm and
flash attention. U below is one (tokens, hidden) tensor: 27 MiB at 1024 px in bf16. The forecast is of
allocated tensors; the CUDA context stands beside it, because the allocator does not count it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from xflux_trainer.config import TrainConfig
from xflux_trainer.spec import Adapter, FluxSpec, adapters_of, image_tokens

GIB = 1 << 30
MIB = 1 << 20
ERROR_BAR = 0.15
"""What is promised. Measured so far at 1024 px, 24.6 and 44.0 GiB on an H100 and 24.9 on an H200: within 2 %."""
CUDA_CONTEXT = 550 * MIB
PYTHON_CUDA = 2_000 * MIB
PYTHON_CPU = 600 * MIB

Device = Literal["cuda", "cpu"]
STRATEGIES = ("single", "ddp", "zero1", "zero2")
PHASES = ("cache", "load", "train", "sample")


@dataclass(frozen=True)
class Term:
    """One item of the bill: what it is, how many bytes, in which phase of the run, and why that many."""

    name: str
    bytes: int
    phase: str
    why: str


@dataclass(frozen=True)
class Bill:
    """What a run needs. `gpu` and `host` are per rank; `disk` is for the whole run."""

    gpu: tuple[Term, ...]
    host: tuple[Term, ...]
    disk: tuple[Term, ...]
    gpu_context: int
    world_size: int
    error_bar: float = ERROR_BAR

    @property
    def gpu_phases(self) -> dict[str, int]:
        """Allocated bytes in each phase."""
        return _phases(self.gpu)

    @property
    def host_phases(self) -> dict[str, int]:
        return _phases(self.host)

    @property
    def peak_phase(self) -> str:
        """The phase that needs most, of the device that computes."""
        phases = self.gpu_phases or self.host_phases
        return max(phases, key=lambda phase: phases[phase])

    @property
    def gpu_allocated(self) -> int:
        """The peak that `torch.cuda.max_memory_allocated` will show."""
        return max(self.gpu_phases.values(), default=0)

    @property
    def gpu_total(self) -> int:
        """The peak that `nvidia-smi` will show, but for what the allocator keeps in reserve."""
        return self.gpu_allocated + self.gpu_context

    @property
    def host_per_rank(self) -> int:
        return max(self.host_phases.values(), default=0)

    @property
    def host_total(self) -> int:
        """All ranks of one host together."""
        return self.host_per_rank * self.world_size

    @property
    def disk_total(self) -> int:
        return sum(term.bytes for term in self.disk)


def forecast(
    config: TrainConfig, spec: FluxSpec, *, world_size: int, strategy: str, device: Device, samples: int = 0
) -> Bill:
    """The bill of one run. `samples` is the number of images, for the cache's size; 0: not known."""
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy is {strategy!r}; one of {', '.join(STRATEGIES)}")
    compute = tuple(_compute_terms(config, spec, world_size, strategy))
    if device == "cuda":
        host: tuple[Term, ...] = tuple(
            Term("Python, torch and CUDA", PYTHON_CUDA, phase, "measured, nearly the same for every model")
            for phase in PHASES
        )
        staging = Term(
            "one tensor on its way",
            spec.largest_tensor * 4,
            "load",
            "weights go to the device tensor by tensor",
        )
        return Bill(compute, (*host, staging), tuple(_disk(config, spec, samples)), CUDA_CONTEXT, world_size)
    python = tuple(Term("Python and torch", PYTHON_CPU, phase, "measured") for phase in PHASES)
    return Bill((), (*python, *compute), tuple(_disk(config, spec, samples)), 0, world_size)


def adapter_parameters(config: TrainConfig, spec: FluxSpec) -> int:
    """Trained parameters of the run's adapters."""
    return sum(adapter.parameters(config.rank) for adapter in _adapted(config, spec))


def _adapted(config: TrainConfig, spec: FluxSpec) -> list[Adapter]:
    return adapters_of(spec.linears(), config.lora_targets, config.single_blocks, config.double_blocks)


def _compute_terms(config: TrainConfig, spec: FluxSpec, world_size: int, strategy: str) -> Iterator[Term]:
    """The terms of the device that computes, phase by phase."""
    width = 4 if config.mixed_precision == "no" else 2
    weights = spec.transformer_parameters * width
    trained = adapter_parameters(config, spec)
    weights_why = f"{spec.transformer_parameters:,} parameters, {width} bytes each"
    encoders = (spec.t5_parameters + spec.clip_parameters) * 2
    yield Term("text encoders", encoders, "cache", "T5 and CLIP in bf16; freed before the transformer is loaded")
    yield Term("text activations", 24 * config.max_text_tokens * spec.text_dim * 2, "cache", "one caption at a time")
    pixels = config.img_size**2
    # The VAE and the text encoders are not there at the same time; the larger of the two makes the peak.
    vae = spec.encoder_parameters * 4 + 5 * 128 * pixels * 4
    if vae > encoders:
        yield Term("VAE beyond the text encoders", vae - encoders, "cache", "fp32, images are encoded after captions")
    yield Term("transformer", weights, "load", weights_why)
    yield Term("transformer", weights, "train", weights_why)
    yield from _optimizer(trained, world_size, strategy)
    yield from _activations(config, spec, width)
    if not config.disable_sampling:
        yield Term("transformer", weights, "sample", weights_why)
        yield Term("adapters and optimizer", trained * 16, "sample", "they stay while images are drawn")
        yield from _sampling(config, spec, width)


def _optimizer(trained: int, world_size: int, strategy: str) -> Iterator[Term]:
    """Adapters, gradients, Adam, and what the ranks exchange."""
    count = f"{trained:,} trained parameters"
    if strategy in ("single", "ddp"):
        yield Term("adapters", trained * 4, "train", f"{count} in fp32")
        yield Term("gradients", trained * 4, "train", "fp32; under DDP they are views of its buckets")
        yield Term("Adam", trained * 8, "train", "two fp32 moments")
        return
    yield Term("adapters", trained * 2, "train", f"{count}; DeepSpeed computes with bf16 copies")
    share = math.ceil(trained / world_size)
    grads = trained if strategy == "zero1" else share
    yield Term("gradients", trained * 2 + grads * 4, "train", "bf16, and the fp32 of this rank's part")
    yield Term("Adam and fp32 weights", share * 12, "train", f"1/{world_size} of them on each rank")
    yield Term("reduce buckets", trained * 4, "train", "reduce_bucket_size is set to the trained parameters")


def _activations(config: TrainConfig, spec: FluxSpec, width: int) -> Iterator[Term]:
    """What the forward pass keeps for the backward pass."""
    tokens = image_tokens(config.img_size, config.img_size) + config.max_text_tokens
    unit = config.train_batch_size * tokens * spec.hidden * width
    saved = list(_saved_per_block(config, spec, tokens, width))
    shape = f"{config.train_batch_size} x {tokens} tokens"
    if config.gradient_checkpointing:
        largest = max(saved, default=0)
        yield Term("block inputs", len(saved) * unit, "train", f"{len(saved)} checkpointed blocks, {shape} each")
        yield Term("one block's activations", largest, "train", "recomputed when its turn comes")
    else:
        yield Term("activations", sum(saved), "train", f"{len(saved)} blocks keep theirs, {shape}")
    yield Term("backward's own", 4 * unit, "train", "the gradient of one feed-forward layer")
    ends = 2 * config.train_batch_size * tokens * (spec.in_channels * 12 + spec.hidden * width)
    yield Term("inputs and loss", ends, "train", "latents, noise and prediction in fp32, and the embedded tokens")


def _saved_per_block(config: TrainConfig, spec: FluxSpec, tokens: int, width: int) -> Iterator[int]:
    """Bytes that autograd saves in each block, from the first one that a gradient passes through."""
    adapters = _adapted(config, spec)
    names = {layer for adapter in adapters for layer in adapter.layers}
    unit = config.train_batch_size * tokens * spec.hidden * width
    # Attention keeps the log-sum-exp of every row, the two QK-norms their scales, in fp32.
    rows = 3 * config.train_batch_size * tokens * spec.heads * 4
    low_rank = config.train_batch_size * tokens * config.rank * width
    ends = ("x_embedder", "context_embedder", "time_text_embed.timestep_embedder.linear_1")
    reached = any(name in names for name in ends)
    kinds = [
        ("transformer_blocks", spec.double_blocks, _double),
        ("single_transformer_blocks", spec.single_blocks, _single),
    ]
    for kind, count, units in kinds:
        for index in range(count):
            prefix = f"{kind}.{index}."
            own = {name.removeprefix(prefix) for name in names if name.startswith(prefix)}
            reached = reached or bool(own)
            if reached:
                yield units(own) * unit + rows + sum(a.name.startswith(prefix) for a in adapters) * low_rank


def _double(own: set[str]) -> int:
    """U that a double block saves: 12 for the gradient to pass through, more for each adapted layer."""
    return (
        12
        + bool(own & {f"attn.{name}" for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")})
        + bool(own & {"ff.net.0.proj", "ff_context.net.0.proj"})
        + 4 * bool(own & {"ff.net.2", "ff_context.net.2"})
        + 4 * bool(own & {"norm1.linear", "norm1_context.linear"})
    )


def _single(own: set[str]) -> int:
    """U that a single block saves: 11 for the gradient to pass through, more for each adapted layer."""
    return (
        11
        + bool(own & {"attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"})
        + 5 * ("proj_out" in own)
        + 2 * ("norm.linear" in own)
    )


def _sampling(config: TrainConfig, spec: FluxSpec, width: int) -> Iterator[Term]:
    tokens = image_tokens(config.sample_width, config.sample_height) + config.max_text_tokens
    yield Term("one block forward", 14 * tokens * spec.hidden * width, "sample", "no gradients are kept")
    yield Term("VAE", spec.vae_parameters * 2, "sample", "bf16, loaded for the samples only")
    tile = min(config.sample_width, 512) * min(config.sample_height, 512)
    yield Term("VAE activations", 6 * 256 * tile * 2, "sample", "decoded in tiles of 512 px")


def _disk(config: TrainConfig, spec: FluxSpec, samples: int) -> Iterator[Term]:
    trained = adapter_parameters(config, spec)
    latents = image_tokens(config.img_size, config.img_size) * spec.in_channels * 4
    text = (config.max_text_tokens * spec.text_dim + spec.pooled_dim) * 2
    known = f"{samples} images and captions" if samples else "the number of images is not known"
    yield Term("cache", samples * (latents + text), "cache", known)
    steps = config.max_train_steps or config.checkpointing_steps
    written = math.ceil(steps / config.checkpointing_steps)
    kept = min(written, config.checkpoints_total_limit or written)
    one = "adapters and Adam's moments in fp32"
    yield Term("checkpoints", (kept + 1) * trained * 12, "train", f"{kept} kept and one being written: {one}")
    yield Term("adapter file", trained * 4, "train", "pytorch_lora_weights.safetensors in fp32")


def _phases(terms: tuple[Term, ...]) -> dict[str, int]:
    totals = {phase: sum(term.bytes for term in terms if term.phase == phase) for phase in PHASES}
    return {phase: size for phase, size in totals.items() if size}
