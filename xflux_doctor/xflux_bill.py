"""What X-Flux's own scripts need: GPU memory, host memory and disk, by one model of their code.

Source of the terms: the sizes of FLUX.1 and X-Flux's code at XLabs-AI/x-flux@4749542: three encoders resident, no
recompute, an fp32 copy of the base on the CPU. What its blocks keep for the backward pass was counted on its own
modules (torch's saved_tensors_hooks). Held against runs: on an H100 with the base cast to bf16 and no engine 40.9 and
59.2 GiB were allocated at 512 and 1024 px, 40.9 and 59.1 here; XLabs-AI/x-flux#12, ZeRO-2 at 512 px, shows 42,837 MiB
by nvidia-smi, 42,608 here; with the base in fp32 both sizes ran out of memory there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

import msgspec

from xflux_doctor.check import Case, SkipCheck
from xflux_doctor.verdict import reserved

if TYPE_CHECKING:
    from xflux_doctor.xflux import XFlux

GIB = 1 << 30
GB = 10**9
ERROR_BAR = 0.03
BASE = 11_901_408_320
"""Parameters of FLUX.1-dev's transformer."""
TRAINED = {"lora": 13_172_736, "finetune": 717_500_000, "controlnet": 743_800_000}
"""Parameters that each shipped config trains."""
_ENCODERS = int(9.41 * GIB)
"""T5 and CLIP in bf16, the autoencoder in fp32: on every GPU, all the time."""
_UNIT = 3072 * 2
"""Bytes of a token's hidden state in bf16: what is saved is counted in these."""
_DOUBLE, _SINGLE = 19, 38
_SAVED = {
    "engine": {"double": (14.1, 15.1), "single": (15.06, 24.07)},
    "autocast": {"double": (16.1, 20.1), "single": (16.06, 25.07)},
    "fp32": {"double": (26.1, 28.1), "single": (22.07, 40.09)},
}
"""Units that a block saves for the backward pass: (frozen, with a LoRA). `engine`: all of it in bf16, as DeepSpeed runs
it. `autocast`: LayerNorm computes in fp32, and what an fp32 LoRA adds makes q, k and v fp32."""
_PASSING = 10
"""Units of the gradients in the last block's backward pass, while everything is still saved."""
_TEXT_LAYERS = 3
"""Units of each text token that trained text attention saves more than frozen: its input, and q and k, normalised."""
_CASTS = (_DOUBLE * 24 + _SINGLE * 12) * 3072 * 3072 * 2
"""bf16 copies of the blocks' frozen fp32 weights that autocast keeps for the backward pass."""
_BUCKET_ELEMENTS = 500_000_000
"""DeepSpeed's own reduce_bucket_size (zero/config.py)."""
CONTEXT = 500 << 20
"""What CUDA and its libraries take of the GPU outside of the allocator."""


class Term(msgspec.Struct, frozen=True):
    name: str
    bytes: int


def of(case: Case) -> XFlux:
    """The X-Flux job of the case. Raises SkipCheck where there is none, or nothing of its config is known."""
    found = whole(case)
    if found.config is None:
        raise SkipCheck("the config cannot be read (see XF102)" if found.problem else "no config was given (--config)")
    return found


def whole(case: Case) -> XFlux:
    """The checkout, whatever its config. Raises SkipCheck where none was given."""
    if case.job.xflux is None:
        where = case.job.xflux_nearby
        if where:
            raise SkipCheck(f"the job is judged as the bundled trainer's; --xflux {where} judges it as X-Flux's own")
        raise SkipCheck("no X-Flux checkout was given (--xflux)")
    return case.job.xflux


def precision(case: Case, found: XFlux) -> str:
    """The YAML's mixed_precision, which the script hands to accelerate; null leaves accelerate's own."""
    value = found.get("mixed_precision")
    value = case.job.get("mixed_precision", "no") if value is None else value
    return "no" if value is False else str(value).lower()


def fp32_base(case: Case, found: XFlux) -> bool:
    """Whether the frozen transformer stays fp32 on the GPU: only DeepSpeed's engine casts it back."""
    return found.script.upcasts and not (case.job.deepspeed and precision(case, found) in ("bf16", "fp16"))


def gpu_terms(case: Case, found: XFlux, *, deepspeed: bool | None = None) -> tuple[Term, ...]:
    """Bytes of the tensors on each GPU at the peak of a step, largest first: `torch.cuda.max_memory_allocated`.

    `deepspeed` asks for the other launch than the job's.
    """
    if found.script.kind == "controlnet":
        raise SkipCheck("what the ControlNet script needs is not known here")
    engine = case.job.deepspeed if deepspeed is None else deepspeed
    fp32 = fp32_base(case, found) if deepspeed is None else found.script.upcasts and not deepspeed
    lower = precision(case, found) in ("bf16", "fp16")
    terms = [
        Term("transformer in fp32" if fp32 else "transformer in bf16", BASE * (4 if fp32 else 2)),
        Term("T5, CLIP and the autoencoder", _ENCODERS),
        *_activations(found, "fp32" if not lower else "engine" if engine else "autocast"),
        *(_partitioned(case, found) if engine else _states(found, fp32)),
    ]
    if fp32 and lower:
        terms.append(Term("bf16 copies of frozen weights that autocast keeps", _CASTS))
    return tuple(sorted(terms, key=lambda term: -term.bytes))


def gpu_bytes(case: Case, found: XFlux, *, deepspeed: bool | None = None) -> int:
    """Bytes that each process holds of its GPU, as NVML shows them: what the allocator reserves, and the context."""
    return reserved(sum(term.bytes for term in gpu_terms(case, found, deepspeed=deepspeed))) + CONTEXT


def _blocks(found: XFlux, key: str, count: int) -> tuple[int, ...]:
    """Indices of the blocks that get a LoRA; all where the config does not say."""
    value = found.get(key)
    if value is None:
        return tuple(range(count))
    return tuple(index for index in map(int, re.findall(r"\d+", str(value))) if index < count)


def _trained_blocks(found: XFlux) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Indices of the double and the single blocks that hold what is trained."""
    if found.script.kind != "lora":
        return tuple(range(_DOUBLE)), ()
    return _blocks(found, "double_blocks", _DOUBLE), _blocks(found, "single_blocks", _SINGLE)


def _activations(found: XFlux, mode: str) -> Iterator[Term]:
    """What the blocks save, from the first on that trains anything: no gradient goes further back."""
    text = 256 if "schnell" in str(found.get("model_name", "")) else 512
    tokens = text + (found.img_size // 16) ** 2
    double, single = _trained_blocks(found)
    for kind, count, trained, starts in (
        ("double", _DOUBLE, double, min(double, default=_DOUBLE)),
        ("single", _SINGLE, single, 0 if double else min(single, default=_SINGLE)),
    ):
        frozen, adapted = _SAVED[mode][kind]
        if found.script.kind == "finetune":
            adapted = frozen + _TEXT_LAYERS * text / tokens
        units = (count - starts - len(trained)) * frozen + len(trained) * adapted
        yield Term(f"{kind} blocks' activations", int(units * _UNIT * tokens * found.batch))
    yield Term("gradients that pass through a block", _PASSING * _UNIT * tokens * found.batch)


def trained_parameters(found: XFlux) -> int:
    """What the config trains: a LoRA of its rank in its blocks, or what the script names."""
    if found.script.kind != "lora":
        return TRAINED[found.script.kind]
    rank = found.get("rank")
    rank = rank if isinstance(rank, int) and rank > 0 else 16
    double, single = _trained_blocks(found)
    return rank * 3072 * (len(double) * 12 + len(single) * 10)


def _states(found: XFlux, fp32: bool) -> Iterator[Term]:
    """Without an engine: AdamW's two moments in the weights' own type. A LoRA's weights are fp32 on any base."""
    count, lora = trained_parameters(found), found.script.kind == "lora"
    size = 4 if fp32 or lora else 2
    if lora:
        yield Term("LoRA weights", count * size)
    yield Term("gradients", count * size)
    yield Term("optimizer states", count * 2 * size)


def _partitioned(case: Case, found: XFlux) -> Iterator[Term]:
    """Under DeepSpeed's engine: bf16 weights and gradients, and this rank's part of fp32 weights and two moments."""
    count, ranks = trained_parameters(found), max(1, case.job.num_processes)
    if found.script.kind == "lora":
        yield Term("LoRA weights", count * 2)
    yield Term("gradients", count * 2)
    part = f", 1/{ranks} of them" if ranks > 1 else ""
    yield Term(f"optimizer states and fp32 weights{part}", count * 12 // (ranks if case.job.zero_stage else 1))
    elements = case.job.zero_block.get("reduce_bucket_size")
    if isinstance(elements, bool) or not isinstance(elements, int | float) or elements < 1:
        elements = _BUCKET_ELEMENTS
    yield Term("DeepSpeed's bucket, 2 x reduce_bucket_size", 2 * int(elements))


def host_bytes(found: XFlux) -> int:
    """Per rank while loading: the whole transformer on the CPU, in fp32 where the script makes it so."""
    return BASE * (4 if found.script.upcasts else 2)


def checkpoint_bytes(case: Case, found: XFlux) -> int:
    """One checkpoint-N folder. Trained weights are saved with all frozen ones."""
    trained = TRAINED[found.script.kind]
    ranks = max(1, case.job.num_processes)
    if found.script.kind == "controlnet":
        return trained * (2 + 12 + 2)
    frozen = BASE * (4 if fp32_base(case, found) else 2)
    return frozen + trained * 12 // (ranks if found.script.kind == "finetune" and case.job.deepspeed else 1)
