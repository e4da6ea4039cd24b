"""How many bytes a training run will need: on each GPU, in the host's memory, on the disk. Itemised.

The forecast is of allocated tensors; the CUDA context stands beside it, because the allocator does not count it.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from xflux_trainer import memory_fused, memory_host
from xflux_trainer.config import TrainConfig
from xflux_trainer.memory_diffusers import Norms, activations
from xflux_trainer.memory_passes import grow
from xflux_trainer.memory_terms import (
    GRADIENTS,
    ONE_STEP,
    OPTIMIZER,
    SHARDS,
    TRANSFORMER,
    WITH_SHARDS,
    Term,
    block_parameters,
    disk,
    loading,
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
PHASES = ("cache", "load", "train", "sample")


@dataclass(frozen=True)
class Bill:
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
    terms = _compute_terms(
        config, spec, world_size, strategy, offload, device, triton=triton, norms=norms, reshard=reshard
    )
    compute, moved = _split(terms, config, spec, world_size, strategy, offload)
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


def _holes(config: TrainConfig, spec: FluxSpec, strategy: str, *, triton: bool) -> int:
    """Bytes between weights that were moved when adapters came beside them, or that were quantised as they came."""
    if config.mode != "lora" or not memory_fused.computes(config, strategy, "cuda", triton=triton):
        return 0
    return HOLE * max(0, spec.double_blocks + spec.single_blocks - config.stream_blocks)


def adapter_parameters(config: TrainConfig, spec: FluxSpec) -> int:
    """Trained parameters of the run: its adapters', or those of its other modes."""
    return trained(config, spec).parameters


def _compute_terms(
    config: TrainConfig, spec: FluxSpec, world_size: int, strategy: str, offload: Collection[str], device: Device,
    *, triton: bool, norms: Norms, reshard: bool,
) -> Iterator[Term]:  # fmt: skip
    """The terms of the device that computes, phase by phase."""
    encoders = (spec.t5_parameters + spec.clip_parameters) * 2
    yield Term("text encoders", encoders, "cache", "T5 and CLIP in bf16; freed before the transformer is loaded")
    yield Term("text activations", 24 * config.max_text_tokens * spec.text_dim * 2, "cache", "one caption at a time")
    pixels = max(config.sizes) ** 2
    # The VAE and the text encoders are not there at the same time; the larger of the two makes the peak.
    vae = spec.encoder_parameters * 4 + 5 * 128 * pixels * 4
    if vae > encoders:
        yield Term("VAE beyond the text encoders", vae - encoders, "cache", "fp32, images are encoded after captions")
    phases = ("load", "train") if config.disable_sampling else ("load", "train", "sample")
    lying = [term for phase in phases for term in weights(config, spec, world_size, strategy, phase, reshard=reshard)]
    fused = memory_fused.computes(config, strategy, device, triton=triton)
    recorded = fused and memory_fused.records(config, strategy, device)
    at_once = memory_fused.gradients_at_once(config, spec) if fused and config.step_in_backward else 0
    on_host = strategy == "fsdp" and "param" in offload  # parts are stepped where they wait
    in_place = triton and device == "cuda" and not on_host
    stays = list(states(config, spec, world_size, strategy, at_once=at_once, in_place=in_place))
    end: list[Term] = []
    if growing := grow(config, strategy, recorded=recorded) and not on_host:
        end = [term for term in stays if term.name in (GRADIENTS, ONE_STEP)]
        stays = [term for term in stays if term not in end]
    # What ranks send each other is gone when the optimizer steps.
    passes = [term for term in (*lying, *stays) if term.passing] if growing else []
    yield from (term for term in lying if term not in passes)
    stays = [term for term in stays if term not in passes]
    if fused:
        stays += memory_fused.copies(config, spec, recorded=recorded)
    each = end[0].bytes / trained(config, spec).parameters if growing and end[0].bytes else 0.0
    if fused:
        backward = list(memory_fused.activations(config, spec, growing=int(each), recorded=recorded, norms=norms))
    else:
        backward = list(activations(config, spec, growing=each, cut=strategy == "fsdp", norms=norms))
    backward = [*passes, *backward]
    step = [term for term in backward if not term.passing] + end
    yield from stays
    yield from loading(config, spec, stays)
    yield from max(backward, step, key=lambda terms: sum(term.bytes for term in terms)) if growing else backward
    if not config.disable_sampling:
        total = sum(term.bytes for term in stays if not term.passing and not _leaves(term, strategy, offload))
        yield Term("what is trained and its optimizer", total, "sample", "they stay while images are drawn")
        yield from sampling(config, spec)


def _split(
    terms: Iterator[Term], config: TrainConfig, spec: FluxSpec, world_size: int, strategy: str, offload: Collection[str]
) -> tuple[tuple[Term, ...], tuple[Term, ...]]:
    """What stays on the device, and what the job asks to wait on the host. Of weights a rank's share goes; the blocks
    that are whole while they compute stay."""
    if not offload:
        return tuple(terms), ()
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
