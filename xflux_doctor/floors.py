"""The lowest rates that healthy cards of a kind have, with how that is known. Names are those of `Facts.speeds`."""

from __future__ import annotations

import re

import msgspec


class Floor(msgspec.Struct, frozen=True):
    """The lowest rate that a healthy card of a kind has, and how that is known."""

    cards: str
    """Its name holds this as whole words; its relatives of another speed are left out."""
    speed: str
    value: float
    unit: str
    source: str


_OTHERS = r"(?!.*(?:NVL|PCIE|GH200|MIG))"
FLOORS = (
    Floor(_OTHERS + r".*\bH200\b", "matmul_bf16_tflops", 524, "TFLOP/s",
          "three quarters of 699, the slower of two H200 measured by this project (trainer/timing_cards.py)"),
    Floor(_OTHERS + r".*\bH100\b", "matmul_bf16_tflops", 594, "TFLOP/s",
          "three quarters of 792, one H100 SXM measured by this project (trainer/timing_cards.py)"),
    Floor(_OTHERS + r".*\bA100-SXM4\b", "matmul_bf16_tflops", 187, "TFLOP/s",
          "0.6 of the 312 of the A100's data sheet"),
    Floor(_OTHERS + r".*\bH[12]00\b", "h2d_gbs", 31.5, "GB/s",
          "16 lanes of PCIe 5 carry 63 GB/s and 55 were measured; at half of it no more than 31.5"),
    Floor(_OTHERS + r".*\bA100\b", "h2d_gbs", 15.75, "GB/s",
          "16 lanes of PCIe 4 carry 31.5 GB/s; at half of it no more than 15.75"),
)  # fmt: skip


def floor_of(card: str, speed: str) -> Floor | None:
    """The floor of a card's rate, where one is known."""
    return next((row for row in FLOORS if row.speed == speed and re.match(row.cards, card.upper())), None)
