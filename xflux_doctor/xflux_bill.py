"""What X-Flux's own scripts need: GPU memory, host memory and disk, by one model of their code.

Source of the terms: the sizes of FLUX.1 and X-Flux's code at XLabs-AI/x-flux@4749542 (three encoders resident,
no recompute, an fp32 copy of the base on the CPU). Held against runs: 512 px under DeepSpeed gives 40.8 GiB here,
41.8 (nvidia-smi, with the context) in XLabs-AI/x-flux#12; 1024 px gives 55.9 here, 59.2 were measured on an H100
with the base cast to bf16; without DeepSpeed both sizes ran out of memory there.
"""

from __future__ import annotations

from dataclasses import dataclass

from xflux_doctor.check import Case, SkipCheck
from xflux_doctor.xflux import XFlux

GIB = 1 << 30
GB = 10**9
ERROR_BAR = 0.06
BASE = 11_901_408_320
"""Parameters of FLUX.1-dev's transformer."""
TRAINED = {"lora": 13_172_736, "finetune": 717_500_000, "controlnet": 743_800_000}
"""Parameters that each shipped config trains."""
_ENCODERS = int(9.41 * GIB)
"""T5 and CLIP in bf16, the autoencoder in fp32: on every GPU, all the time."""
_CASTS = 16 * GIB
"""bf16 copies of frozen fp32 weights that autocast keeps for the backward pass."""
_PER_TOKEN = {True: int(6.33 * (1 << 20)), False: int(5.05 * (1 << 20))}
"""Bytes of saved activations for each token of each image, with an fp32 and with a bf16 base."""
_BUCKET = 954 << 20
"""DeepSpeed's reduce_bucket_size of 5e8 elements."""
_CONTEXT = 500 << 20


@dataclass(frozen=True)
class Term:
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
    """Bytes on each GPU at the peak of a step. `deepspeed` asks for the other launch than the job's."""
    if found.script.kind == "controlnet":
        raise SkipCheck("what the ControlNet script needs is not known here")
    engine = case.job.deepspeed if deepspeed is None else deepspeed
    fp32 = fp32_base(case, found) if deepspeed is None else found.script.upcasts and not deepspeed
    autocast = precision(case, found) in ("bf16", "fp16")
    tokens = 512 + (found.img_size // 16) ** 2
    each = _PER_TOKEN[fp32] if autocast else 2 * _PER_TOKEN[False]
    ranks = max(1, case.job.num_processes) if engine else 1
    trained = TRAINED[found.script.kind]
    terms = [
        Term("transformer in fp32" if fp32 else "transformer in bf16", BASE * (4 if fp32 else 2)),
        Term("T5, CLIP and the autoencoder", _ENCODERS),
        Term(f"activations of {found.batch} x {tokens} tokens", each * tokens * found.batch),
        Term("gradients and optimizer states", trained * 2 + trained * 12 // ranks),
        Term("CUDA context", _CONTEXT),
    ]
    if fp32 and autocast:
        terms.append(Term("bf16 copies of frozen weights that autocast keeps", _CASTS))
    if engine:
        terms.append(Term("DeepSpeed's bucket", _BUCKET))
    return tuple(sorted(terms, key=lambda term: -term.bytes))


def gpu_bytes(case: Case, found: XFlux, *, deepspeed: bool | None = None) -> int:
    return sum(term.bytes for term in gpu_terms(case, found, deepspeed=deepspeed))


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
