"""How many bytes a training run will need: on each GPU, in the host's memory, on the disk. Itemised.

The forecast is of allocated tensors; the CUDA context stands beside it, because the allocator does not count it.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from xflux_trainer import memory_fused, memory_host
from xflux_trainer.config import TrainConfig
from xflux_trainer.kept import kept_by
from xflux_trainer.memory_diffusers import Norms, activations
from xflux_trainer.memory_passes import grow
from xflux_trainer.memory_terms import (
    CUBLAS,
    GRADIENTS,
    ONE_STEP,
    OPTIMIZER,
    PHASES,
    SHARDS,
    TRANSFORMER,
    WITH_SHARDS,
    Part,
    Term,
    block_parameters,
    disk,
    loaded,
    part,
    quantising,
    sampling,
    states,
    weights,
    width,
)
from xflux_trainer.savings import held
from xflux_trainer.spec import FluxSpec
from xflux_trainer.trained import trained

GIB = 1 << 30
MIB = 1 << 20
ERROR_BAR = 0.03
"""What is promised of one process and of DDP: 97 configurations on an H200 were within 1.6 % (benchmarks/memory.py)."""
SHARDED_BAR = 0.05
"""A LoRA under ZeRO-2 and two fine-tunes of all weights under FSDP2, on two H200s once each: 0.5 to 1.2 % over
(benchmarks/two_gpus.py). FSDP2's terms are within 3 % of the storages of steps on the CPU."""
UNMEASURED_BAR = 0.15
"""Everything else of which a rank holds parts, what is offloaded, and the CPU."""
_CALIBRATION = json.loads(Path(__file__).with_name("calibration.json").read_text(encoding="utf-8"))
CUDA_CONTEXT: int = _CALIBRATION["context_bytes"]
"""What NVML shows beside the allocator's memory, once the fused kernels, cuBLAS and flash-attn-4 are loaded: the most
that was measured on the machine that the file names; `benchmarks/memory.py --calibrate` writes it anew."""

HOLE = 28 << 20
"""Bytes for a resident block, little more than a page of an expandable segment: 24 to 34 MiB were measured after FLUX.1
was built, of bf16, fp8 and int8, on an H200 by torch 2.11."""

Device = Literal["cuda", "cpu"]
STRATEGIES = ("single", "ddp", "zero1", "zero2", "zero3", "fsdp")


class Bill(NamedTuple):
    """What a run needs. `gpu` is per rank, `host` is the first rank's, and `disk` is for the whole run."""

    gpu: tuple[Term, ...]
    host: tuple[Term, ...]
    disk: tuple[Term, ...]
    gpu_context: int
    world_size: int
    error_bar: float = ERROR_BAR
    host_error_bar: float = memory_host.ERROR_BAR
    gpu_holes: int = 0
    """What the allocator holds between the resident blocks' weights and cannot use."""

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
        return self.gpu_allocated + self.gpu_holes + self.gpu_context

    @property
    def host_per_rank(self) -> int:
        """The most of the first rank, which writes and draws for all."""
        return max(self.host_phases.values(), default=0)

    @property
    def host_of_others(self) -> tuple[Term, ...]:
        """The terms of any other rank."""
        return tuple(memory_host.of_others(self.host))

    def host_together(self, ranks: int) -> int:
        """So many ranks of one host, the first among them."""
        return self.host_per_rank + (ranks - 1) * max(_phases(self.host_of_others).values(), default=0)

    @property
    def disk_total(self) -> int:
        return sum(term.bytes for term in self.disk)


class Peak(NamedTuple):
    """A bill's sums of its device, in bytes."""

    allocated: int
    holes: int
    context: int


def pinned(config: TrainConfig, spec: FluxSpec) -> int:
    """Bytes of streamed weights that one rank holds of the host's memory, for a GPU."""
    return held(config, spec, width(config)).host


def forecast(
    config: TrainConfig, spec: FluxSpec, *, world_size: int, strategy: str, device: Device, samples: int = 0,
    offload: Collection[str] = (), triton: bool = True, encoded: bool = False, norms: Norms = "fused",
    reshard: bool = True, gpu_only: bool = False,
) -> Bill:  # fmt: skip
    """The bill of one run. `samples` is the number of images, for the cache's size; 0: not known.

    `triton`: whether it works there; without it diffusers' own blocks compute, with `norms` by the releases there.
    `encoded`: nothing is left to encode.
    `offload` names what waits in the host's memory: `optimizer` (DeepSpeed), `param` (ZeRO-3), both for FSDP.
    `reshard`: whether FSDP cuts blocks up again after the forward pass (fsdp_reshard_after_forward).
    `gpu_only`: neither the host nor the disk is asked for; on a CPU they are all the same.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy is {strategy!r}; one of {', '.join(STRATEGIES)}")
    parts = _compute_parts(
        config, spec, world_size, strategy, frozenset(offload), device, triton=triton, norms=norms, reshard=reshard
    )
    terms = tuple(term for one in parts for term in one.terms)
    compute, moved = _split(terms, config, spec, world_size, strategy, offload) if offload else (terms, ())
    on_cpu = device == "cpu"
    host: tuple[Term, ...] = ()
    written: tuple[Term, ...] = ()
    if on_cpu or not gpu_only:
        fused = memory_fused.computes(config, strategy, device, triton=triton)
        recorded = fused and memory_fused.records(config, strategy, device)
        host = tuple(
            memory_host.terms(config, spec, strategy, compute, on_cpu=on_cpu, encoded=encoded, recorded=recorded)
        )
        written = tuple(disk(config, spec, samples, strategy))
    measured = {"single": ERROR_BAR, "ddp": ERROR_BAR}
    if not offload and reshard and not config.train_parameters:
        measured |= {"zero2": SHARDED_BAR} if config.mode == "lora" else {}
        measured |= {"fsdp": SHARDED_BAR} if config.mode == "finetune" else {}
    bar = UNMEASURED_BAR if on_cpu else measured.get(strategy, UNMEASURED_BAR)
    holes = 0 if on_cpu else _holes(config, spec, strategy, triton=triton)
    gpu, context = () if on_cpu else compute, 0 if on_cpu else CUDA_CONTEXT
    return Bill(gpu, (*host, *moved), written, context, world_size, bar, gpu_holes=holes)


def peak(
    config: TrainConfig, spec: FluxSpec, *, world_size: int, strategy: str, offload: Collection[str] = (),
    triton: bool = True, norms: Norms = "fused", reshard: bool = True,
) -> Peak:  # fmt: skip
    """What that bill would say of a GPU, of which a plan's search wants no more."""
    if offload:
        bill = forecast(
            config, spec, world_size=world_size, strategy=strategy, device="cuda", offload=offload, triton=triton,
            norms=norms, reshard=reshard, gpu_only=True,
        )  # fmt: skip
        return Peak(bill.gpu_allocated, bill.gpu_holes, bill.gpu_context)
    parts = _compute_parts(
        config, spec, world_size, strategy, frozenset(), "cuda", triton=triton, norms=norms, reshard=reshard
    )
    allocated = max(map(sum, zip(*[one.sizes for one in parts], strict=True)))
    return Peak(allocated, _holes(config, spec, strategy, triton=triton), CUDA_CONTEXT)


def passing(
    config: TrainConfig, spec: FluxSpec, *, world_size: int, strategy: str, offload: Collection[str] = (),
    triton: bool = True, norms: Norms = "fused", reshard: bool = True,
) -> memory_fused.Curve:  # fmt: skip
    """What of that peak comes and goes with the passes, by how many blocks compute again; of this trainer's own."""
    about = _about(config, spec, world_size, strategy, frozenset(offload), "cuda", triton=triton)
    return memory_fused.curve(config, spec, int(about.each), norms)


def _holes(config: TrainConfig, spec: FluxSpec, strategy: str, *, triton: bool) -> int:
    """Bytes between weights that were moved when adapters came beside them, or that were quantised as they came."""
    if config.mode != "lora" or not memory_fused.computes(config, strategy, "cuda", triton=triton):
        return 0
    return HOLE * max(0, spec.double_blocks + spec.single_blocks - config.stream_blocks)


def adapter_parameters(config: TrainConfig, spec: FluxSpec) -> int:
    """Trained parameters of the run: its adapters', or those of its other modes."""
    return trained(config, spec).parameters


class _Stays(NamedTuple):
    """What is there from the first step to the last, as parts of the bill."""

    all: Part
    """While training, but for what only the end of a step needs where that grows."""
    load: Part
    """Those that are made when the model is loaded."""
    drawing: int
    """Bytes that stay while images are drawn."""
    end: tuple[Term, ...]
    passes: tuple[Term, ...]
    """What ranks send each other: gone when the optimizer steps."""


def _compute_parts(
    config: TrainConfig, spec: FluxSpec, world_size: int, strategy: str, offload: frozenset[str], device: Device,
    *, triton: bool, norms: Norms, reshard: bool,
) -> tuple[Part, ...]:  # fmt: skip
    """The terms of the device that computes, phase by phase."""
    about = _about(config, spec, world_size, strategy, offload, device, triton=triton)
    apart = about.recorded and config.gradient_accumulation_steps > 1
    lying, sent = _placed(config, spec, world_size, strategy, reshard, about.growing)
    # What stands beside quantised weights is the same wherever these lie.
    standing = _beside_whole if config.quantization == "none" else _beside_quantised
    own, beside = about.own, standing(config, spec, strategy, offload, about.fused, apart)
    step = _step(config, spec, about, sent, cut=strategy == "fsdp", norms=norms)
    drawing = () if config.disable_sampling else (_drawing(config, spec, own.drawing + beside.drawing),)
    return (about.encoding, lying, own.all, beside.all, own.load, beside.load, about.quantised, *step, *drawing)


class _About(NamedTuple):
    """How a run computes, and what does not depend on where its weights lie."""

    fused: bool
    recorded: bool
    growing: bool
    """Whether gradients come as activations go."""
    each: float
    """Bytes of a parameter's gradient, where they do."""
    encoding: Part
    own: _Stays
    """What is trained."""
    quantised: Part


def _about(
    config: TrainConfig, spec: FluxSpec, world_size: int, strategy: str, offload: frozenset[str], device: Device,
    *, triton: bool,
) -> _About:  # fmt: skip
    fused = memory_fused.computes(config, strategy, device, triton=triton)
    recorded = fused and memory_fused.records(config, strategy, device)
    on_host = strategy == "fsdp" and "param" in offload  # parts are stepped where they wait
    in_place = triton and device == "cuda" and not on_host
    growing = grow(config, strategy, recorded=recorded) and not on_host
    return _fixed(config, spec, world_size, strategy, offload, fused, recorded, in_place, growing)


@kept_by("img_size", "quantization", "optimizer", "step_in_backward", "weight_update")
def _fixed(
    config: TrainConfig, spec: FluxSpec, world_size: int, strategy: str, offload: frozenset[str], fused: bool,
    recorded: bool, in_place: bool, growing: bool,
) -> _About:  # fmt: skip
    at_once = memory_fused.gradients_at_once(config, spec) if fused and config.step_in_backward else 0
    terms = states(config, spec, world_size, strategy, at_once=at_once, in_place=in_place)
    own = _stays(terms, strategy, offload, growing=growing)
    each = own.end[0].bytes / trained(config, spec).parameters if own.end and own.end[0].bytes else 0.0
    encoding, quantised = part(_encoding(config, spec)), part(quantising(config, spec))
    return _About(fused, recorded, growing, each, encoding, own, quantised)


@kept_by("quantization", "modulation", "stream_blocks", "weight_update")
def _placed(
    config: TrainConfig, spec: FluxSpec, world_size: int, strategy: str, reshard: bool, growing: bool
) -> tuple[Part, tuple[Term, ...]]:
    """The transformer as it lies there; where gradients grow what ranks send each other of it, apart."""
    phases = ("load", "train") if config.disable_sampling else ("load", "train", "sample")
    terms = weights(config, spec, world_size, strategy, phases, reshard=reshard)
    sent = tuple(term for term in terms if term.passing) if growing else ()
    return part([term for term in terms if term not in sent]), sent


def _beside(
    config: TrainConfig, spec: FluxSpec, strategy: str, offload: frozenset[str], fused: bool, apart: bool
) -> _Stays:
    """What stands beside the transformer's weights."""
    return _stays(memory_fused.copies(config, spec, apart=apart) if fused else (), strategy, offload)


_beside_whole = kept_by("stream_blocks")(_beside)
_beside_quantised = kept_by("quantization")(_beside)


def _encoding(config: TrainConfig, spec: FluxSpec) -> Iterator[Term]:
    encoders = (spec.t5_parameters + spec.clip_parameters) * 2
    yield Term("text encoders", encoders, "cache", "T5 and CLIP in bf16; freed before the transformer is loaded")
    # T5's scores, by heads of 64: in bf16, in fp32 for the softmax, and what it adds to them. Measured on an H200.
    scores = 14 * config.max_text_tokens**2 * spec.text_dim // 64
    yield Term("text activations", scores, "cache", "one caption at a time")
    yield Term("cuBLAS", CUBLAS, "cache", "its workspace")
    # The VAE and the text encoders are not there at the same time; the larger of the two makes the peak.
    beyond = encoding_images(config, spec) - encoders - scores
    if beyond > 0:
        yield Term("VAE beyond the text encoders", beyond, "cache", "fp32, images are encoded after captions")


def encoding_images(config: TrainConfig, spec: FluxSpec) -> int:
    """Bytes on a GPU while the VAE encodes one of the largest images, in fp32, cuBLAS' not counted."""
    pixels = max(config.sizes) ** 2
    # Six maps of its first 128 channels, of which one is cuDNN's, beside the picture.
    return spec.vae_parameters * 4 + (6 * 128 + 3) * pixels * 4


def _stays(terms: Iterable[Term], strategy: str, offload: frozenset[str], *, growing: bool = False) -> _Stays:
    own = list(terms)
    end = tuple(term for term in own if growing and term.name in (GRADIENTS, ONE_STEP))
    passes = tuple(term for term in own if growing and term.passing and term not in end)
    own = [term for term in own if term not in end and term not in passes]
    total = sum(term.bytes for term in own if not term.passing and not _leaves(term, strategy, offload))
    return _Stays(part(own), part(loaded(own)), total, end, passes)


@kept_by()
def _drawing(config: TrainConfig, spec: FluxSpec, stays: int) -> Part:
    own = Term("what is trained and its optimizer", stays, "sample", "they stay while images are drawn")
    return part([own, *sampling(config, spec)])


_QUIET = ("img_size", "train_batch_size", "gradient_checkpointing", "quantization", "modulation")


@kept_by(*_QUIET)
def _diffusers(
    config: TrainConfig, spec: FluxSpec, each: float, cut: bool, norms: Norms
) -> tuple[tuple[Part, ...], tuple[Part, ...]]:
    """`memory_fused.moving` and `still`, where diffusers' blocks compute."""
    terms = list(activations(config, spec, growing=each, cut=cut, norms=norms))
    return (part(term for term in terms if term.passing),), (part(term for term in terms if not term.passing),)


def _step(
    config: TrainConfig, spec: FluxSpec, about: _About, sent: tuple[Term, ...], *, cut: bool, norms: Norms
) -> tuple[Part, ...]:
    """What a step takes when most is there: in the backward pass, or where gradients grow at its end."""
    end = about.own.end
    if about.fused:
        moving = memory_fused.moving(config, spec, int(about.each), norms)
        still = memory_fused.still(config, spec, about.recorded)
    else:
        moving, still = _diffusers(config, spec, about.each, cut, norms)
    if passes := (*sent, *about.own.passes):
        moving = (part(passes), *moving)
    if about.growing and sum(term.bytes for term in end) > sum(sum(one.sizes) for one in moving):
        return (*still, part(end))
    return (*moving, *still)


def _split(
    terms: Iterable[Term], config: TrainConfig, spec: FluxSpec, world_size: int, strategy: str, offload: Collection[str]
) -> tuple[tuple[Term, ...], tuple[Term, ...]]:
    """What stays on the device, and what the job asks to wait on the host. Of weights a rank's share goes; the blocks
    that are whole while they compute stay."""
    here: list[Term] = []
    there: list[Term] = []
    for term in terms:
        if _leaves(term, strategy, offload):
            there.append(term)
        elif term.name == TRANSFORMER and "param" in offload:
            apart = strategy == "fsdp" and term.phase == "train" and world_size > 1  # what is whole has its own term
            whole = 0 if apart else min(term.bytes, 2 * block_parameters(spec) * width(config))
            if whole:
                why = "two blocks, whole while they compute; the rest is offloaded"
                here.append(term._replace(bytes=whole, why=why))
            there.append(term._replace(bytes=term.bytes - whole * (world_size > 1), why="this rank's part, offloaded"))
        else:
            here.append(term)
    return tuple(here), tuple(there)


def _leaves(term: Term, strategy: str, offload: Collection[str]) -> bool:
    """Whether a term waits on the host as a whole."""
    if "param" in offload and (term.name == SHARDS or (strategy == "fsdp" and term.name in WITH_SHARDS)):
        return True
    return "optimizer" in offload and term.name in OPTIMIZER


def _phases(terms: tuple[Term, ...]) -> dict[str, int]:
    totals = dict.fromkeys(PHASES, 0)
    for term in terms:
        totals[term.phase] += term.bytes
    return {phase: size for phase, size in totals.items() if size}
