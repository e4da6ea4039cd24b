"""What cards reach in a training step: measured where a source says so, or by data sheets. Torch-free."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import NamedTuple

from xflux_trainer.speed import peak


class Card(NamedTuple):
    """Attained rates of one kind of card; TFLOP/s and GB/s."""

    bf16: float
    """Dense products, 8192³."""
    fp8: float | None
    """The same with both operands in e4m3; None: it has no such products."""
    attention: dict[str, float]
    """Forward and backward together, 24 heads of 128, some 4,600 tokens, by backend."""
    memory: float
    """GB/s that elementwise kernels reach, `REACHED` of the data sheet."""
    link: float
    """GB/s from pinned host memory: 55 was measured on an H200; an H100's is the same PCIe 5, an A100's half of it."""
    bus: float
    """GB/s of an all-reduce within one host: 0.8 of NVLink's one direction, most of PCIe's. Assumed, not measured."""
    error: float
    """Relative error of a step's forecast."""


REACHED = 0.83
"""Share of the data sheet's memory bandwidth that a long elementwise kernel reaches."""
CARDS: tuple[tuple[str, Card | None], ...] = (
    # Cut in power or bandwidth, and never seen by this project.
    ("H200 NVL", None), ("H100 NVL", None), ("H100 PCIE", None),
    # Means of two cards of this name: 788 and 699 in bf16, 645 and 584 in flash-attn-4. fp8: docs/log.md.
    ("H200", Card(744, 1450, {"flash-attn-4": 614, "flash": 295, "cudnn": 535}, 4800 * REACHED, 55, 360, 0.12)),
    # One H100 SXM: 792 in bf16; 596, 289 and 535 in attention. fp8: an H200's, the same chip.
    ("H100", Card(792, 1450, {"flash-attn-4": 596, "flash": 289, "cudnn": 535}, 3350 * REACHED, 55, 360, 0.12)),
    # No step was measured. Products: 0.85 of the data sheet's 312; attention: FlashAttention-2's paper.
    ("A100 80GB PCIE", Card(250, None, {"flash": 190}, 1935 * REACHED, 27, 20, 0.25)),
    ("A100-PCIE-40GB", Card(250, None, {"flash": 190}, 1555 * REACHED, 27, 20, 0.25)),
    ("A100-SXM4-40GB", Card(265, None, {"flash": 190}, 1555 * REACHED, 27, 240, 0.25)),
    ("A100", Card(265, None, {"flash": 190}, 2039 * REACHED, 27, 240, 0.25)),
)  # fmt: skip
"""Names are looked for in this order, as whole words."""


@functools.lru_cache(maxsize=64)
def card_of(name: str) -> Card | None:
    """The card of that name; None for one that is not known, a slice of one, or a relative of another speed."""
    if peak(name, "bf16") is None:
        return None
    words = name.upper()
    return next((card for known, card in CARDS if re.search(rf"\b{known}\b", words)), None)


def measured(card: Card, rates: Mapping[str, float]) -> Card:
    """The card with what was measured on this very one: two of one name differed by 12 % in products.

    `rates` are `matmul_bf16_tflops` (8192³) and `h2d_gbs`; others, and what is missing, change nothing. Attention is
    bound by the same units and goes with the products.
    """
    if not rates:
        return card
    bf16, link = rates.get("matmul_bf16_tflops", card.bf16), rates.get("h2d_gbs", card.link)
    share = bf16 / card.bf16
    return card._replace(
        bf16=bf16, fp8=None if card.fp8 is None else card.fp8 * share, link=link,
        attention={name: rate * share for name, rate in card.attention.items()},
    )  # fmt: skip
