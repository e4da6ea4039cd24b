"""NE: how fast the all-reduce is, beside what others measured on cards like these."""

from __future__ import annotations

import re
from collections.abc import Iterator

import msgspec

from xflux_doctor.check import Case, SkipCheck, check
from xflux_doctor.finding import Finding, warning

_SHARE = 0.5
"""Of the public number: sizes, clocks and NCCL releases differ, and half of it is no longer one of these."""


class Floor(msgspec.Struct, frozen=True):
    """Bus bandwidth that somebody published, as nccl-tests counts it."""

    card: str
    """A regular expression over the card's name."""
    ranks: tuple[int, int]
    """Fewest and most."""
    linked: bool
    """Whether the cards' NVLinks are up."""
    bytes: int
    """The least size that it is held against: below it latency counts."""
    busbw: float
    """GB/s at a size of gigabytes."""
    source: str


_LEAST = 1 << 28
FLOORS: tuple[Floor, ...] = (
    Floor(r"H100 80GB HBM3|NVIDIA H200$", (8, 8), True, _LEAST, 460.0,
          "https://docs.alayanew.com/en/docs/tech-blog/2026-05-06-nccl-tests (8 × H100 SXM5, 460–480)"),
    Floor(r"A100-SXM", (8, 8), True, _LEAST, 200.0,
          "https://github.com/NVIDIA/nccl-tests/issues/149 (8 × A100-SXM4-80GB, about 200; 232 in issue 175)"),
    Floor(r"H100 PCIe", (2, 2), True, _LEAST, 115.0,
          "https://github.com/NVIDIA/nccl-tests/issues/194 (2 × H100 PCIe by an NVLink bridge, 115)"),
    Floor(r"RTX 5090", (2, 8), False, _LEAST, 28.0,
          "https://github.com/NVIDIA/nccl/issues/1639 (8 × RTX 5090 on PCIe 5.0, 28; 4 of them 35)"),
)  # fmt: skip
"""Public numbers, none measured by us. A800 is left out: its NVLink is cut down."""


@check("NE105", "the all-reduce is as fast as cards like these can be", needs=("allreduce", "torch"))
def fast_enough(case: Case) -> Iterator[Finding]:
    """`check --deep` times it; less than half of a public number for such cards is a warning (busbw of nccl-tests)."""
    result, torch = case.facts.allreduce, case.facts.torch
    assert result and torch
    if not result.bandwidth:
        raise SkipCheck("it failed (NE101)" if not result.ok else "it was not timed (check --deep)")
    if result.backend != "nccl":
        raise SkipCheck("bandwidth is judged on GPUs; CPU ranks are timed and not judged")
    largest = max(result.bandwidth, key=lambda one: one.bytes)
    names = sorted(set(torch.devices[: result.ranks]))
    links = [gpu.nvlinks for gpu in case.facts.gpus or ()]
    floor = _floor(names, result.ranks, linked=bool(links) and all(links))
    if floor is None:
        raise SkipCheck(f"no public number is known for {result.ranks} × {' and '.join(names)} linked as these are")
    if largest.bytes < floor.bytes:
        raise SkipCheck(
            f"only {largest.bytes >> 20} MiB were timed; the number is for {floor.bytes >> 20} MiB and more"
        )
    if largest.busbw < _SHARE * floor.busbw:
        yield warning(
            f"An all-reduce of {largest.bytes >> 20} MiB over {result.ranks} × {names[0]} runs at "
            f"{largest.busbw:.0f} GB/s bus bandwidth; {floor.busbw:.0f} GB/s was measured on such cards.",
            "Every step waits for it where gradients are large: a link is down, or one of the slower ways is taken.",
            "See `nvidia-smi nvlink -s` and `nvidia-smi topo -m`, unset NCCL_P2P_DISABLE and its like, and compare "
            "with nccl-tests' all_reduce_perf.",
            docs=floor.source.partition(" ")[0],
        )


def _floor(names: list[str], ranks: int, *, linked: bool) -> Floor | None:
    if len(names) != 1:
        return None
    for floor in FLOORS:
        if re.search(floor.card, names[0]) and floor.ranks[0] <= ranks <= floor.ranks[1] and floor.linked is linked:
            return floor
    return None
