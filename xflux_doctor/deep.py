"""What the deep level asks of each GPU, from the job: its forecast, its shapes, the attentions worth a try. Pure."""

from __future__ import annotations

from xflux_trainer.spec import FLUX_DEV, image_tokens

from xflux_doctor.bill import fused, need, spec_of
from xflux_doctor.check import Case, SkipCheck
from xflux_doctor.probes.each_gpu import Ask
from xflux_doctor.xflux import XFlux

_GIB = 1 << 30
_KINDS = {"no": "float32", "fp16": "float16", "bf16": "bfloat16"}
SQUARE = (8192, 8192, 8192)
"""The product that cards are compared by."""
_FIRST = ("context", "memory", "products", "bandwidth", "link")
_TORCHS = ("attention torch flash", "attention torch efficient", "attention torch math")
_TEXT = 512
"""X-Flux's text tokens."""
TRAPS = ("blocks choice", "attention torch choice")
"""What torch takes by itself, which is cuDNN's attention on Hopper and is known to end its process."""
LAST = ("attention trainer cudnn", "attention torch cudnn")
PACKAGES = {"flash-attn-4": "attention trainer flash-attn-4", "flash-attn": "attention flash-attn-2",
            "flash-attn-3": "attention flash-attn-3", "xformers": "attention xformers"}  # fmt: skip
"""Attentions that come with a package of their own; the first is compiled at its first call, for 16 s."""
PIECE = (160 << 20, 32 << 20, 120 << 20)
"""Bytes of a single block's products, and of a double block's, of one stream: about what weights come in."""


def ask_of(case: Case) -> Ask:
    """What each visible GPU of this job is asked for."""
    config = case.job.train
    if case.job.xflux is not None:
        return _of_xflux(case.job.xflux)
    if config is None:
        return Ask(_FIRST, shapes=(SQUARE,))
    spec = spec_of(case)
    rows = max(1, config.img_size // 16)
    image, text, batch = image_tokens(16 * rows, 16 * rows), config.max_text_tokens, config.train_batch_size
    kind = _KINDS[config.mixed_precision]
    forecast = weights = 0
    try:
        bill = need(case)
        forecast = bill.gpu_allocated
        weights = sum(term.bytes for term in bill.gpu if term.phase == bill.peak_phase and not term.passing)
    except (SkipCheck, OSError):
        pass  # ME101 says why there is no forecast
    tokens = image + text
    one = batch * tokens * spec.hidden * 2
    return Ask(
        _stages(case),
        forecast=forecast,
        weights=min(weights, forecast),
        pieces={"weights": list(PIECE), "activations": [one, 4 * one, one // 2 or 1], "again": [3 * one, one]},
        products=(kind,) if kind == "float32" else (kind, "float8_e4m3fn"),
        shapes=((batch * tokens, spec.mlp, spec.hidden), SQUARE),
        shape=(batch, tokens, spec.heads, spec.head_dim),
        text=text,
        image=(rows, rows),
        dtype=kind,
        attention=config.attention,
    )


def _of_xflux(found: XFlux) -> Ask:
    """X-Flux's scripts call torch's own attention, on FLUX.1's sizes; their bill is XF's."""
    rows, batch = max(1, found.img_size // 16), max(1, found.batch)
    tokens = _TEXT + rows**2
    return Ask(
        (*_FIRST, *_TORCHS, "attention torch choice", "attention torch cudnn"),
        shapes=((batch * tokens, FLUX_DEV.mlp, FLUX_DEV.hidden), SQUARE),
        shape=(batch, tokens, FLUX_DEV.heads, FLUX_DEV.head_dim), image=(rows, rows),
    )  # fmt: skip


def _stages(case: Case) -> tuple[str, ...]:
    """In the order in which they are tried; what there is no time for is at the end."""
    packages = case.facts.packages or {}
    own = [stage for name, stage in PACKAGES.items() if name in packages]
    own.sort(key=lambda stage: "flash-attn-4" in stage)
    blocks = "blocks trainer" if fused(case) else "blocks diffusers"
    known = ("attention trainer flash", *_TORCHS, "attention trainer sdpa")
    return (*_FIRST, *known, *TRAPS, *own, blocks, *LAST)
