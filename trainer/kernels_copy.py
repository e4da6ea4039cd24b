"""Many small matrices copied in one launch, into rows that lie apart."""

import torch
import triton
import triton.language as tl
from xflux_trainer.pointwise import Copy

_BLOCK = 2048
_Key = tuple[tuple[int, int], ...]


@triton.jit
def _scatter(table, scales, like, BLOCK: tl.constexpr):
    """Each row of the table is a copy: where from, where to, columns, elements, and how far apart rows lie there."""
    own = tl.program_id(1)
    table += own * 6
    count = tl.load(table + 3)
    first = tl.program_id(0) * BLOCK
    if first < count:
        of = tl.load(table).to(tl.pointer_type(tl.float32))
        to = tl.load(table + 1).to(like.dtype)
        columns = tl.load(table + 2).to(tl.int32)
        at = first + tl.arange(0, BLOCK)
        row, column = (at // columns).to(tl.int64), at % columns
        value = tl.load(of + row * tl.load(table + 4) + column, mask=at < count, other=0.0) * tl.load(scales + own)
        tl.store(to + row * tl.load(table + 5) + column, value.to(like.dtype.element_ty), mask=at < count)


class Scatter:
    """Keeps where everything lies on the device: a recorded launch reads it at every replay."""

    def __init__(self) -> None:
        self._tables: dict[_Key, tuple[torch.Tensor, torch.Tensor]] = {}

    def __call__(self, copies: list[Copy]) -> None:
        """All of one format, on one device."""
        key = tuple((copy.to.data_ptr(), copy.of.data_ptr()) for copy in copies)
        if key not in self._tables:
            self._tables[key] = _table(copies)
        table, scales = self._tables[key]
        most = max(copy.of.numel() for copy in copies)
        _scatter[(triton.cdiv(most, _BLOCK), len(copies))](table, scales, copies[0].to, _BLOCK)


def _table(copies: list[Copy]) -> tuple[torch.Tensor, torch.Tensor]:
    device = copies[0].to.device
    rows = [(of.data_ptr(), to.data_ptr(), of.shape[1], of.numel(), of.stride(0), to.stride(0)) for to, of, _ in copies]
    scales = torch.tensor([copy.scale for copy in copies], dtype=torch.float32)
    return torch.tensor(rows, dtype=torch.int64).to(device), scales.to(device)
