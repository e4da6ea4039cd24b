"""AdamW's step in Triton with moments in fp32, torch's, or in 8 bits, torchao's, whose small tensors have fp32 too.

A block of 256 moments has a scale, the largest of them, and a code for each: the number of the nearest of 256 values
between -1 and 1 (or 0 and 1) that are dense near 0. In the decade from 10^(i-7) to 10^(i-6), i = 0 .. 6, lie 2^i evenly
spread ones (2^(i+1) without a sign); besides there are 0 and 1. Counted from zero, decade i begins with number 2^i (or
2^(i+1) - 1), so that value and number follow from each other without a table. Searching one for every moment would be
the slowest part of a step.
"""

import triton
import triton.language as tl
from xflux_trainer.stepkernels import _factor, _lane, _throw, _value, _write

BLOCK = 256
"""Moments of one scale."""
_BLOCK = tl.constexpr(BLOCK)
_SMALLEST = tl.constexpr(1e-12)  # scale of a block of zeros


@triton.jit
def _float(whole):
    """int32 below 2^23 to fp32: two instructions at full speed, where a conversion has a sixteenth of it."""
    return (whole | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0


@triton.jit
def decode(codes, SIGNED: tl.constexpr):
    """int32 codes to the values that they stand for, without the scale."""
    number = tl.abs(codes - 127) if SIGNED else codes  # from zero
    bits = (_float(number) + (0.5 if SIGNED else 1.5)).to(tl.int32, bitcast=True)
    middle = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)  # 1 .. 2 within the decade
    decade = (bits >> 23) - (127 if SIGNED else 128)
    power = tl.where((decade & 1) == 0, 1e-6, 1e-5) * tl.where((decade & 2) == 0, 1.0, 100.0)
    power *= tl.where((decade & 4) == 0, 1.0, 10000.0)
    value = tl.where(number == 0, 0.0, (middle * 0.9 - 0.8) * power)
    value = tl.where(codes == 255, 1.0, value)
    return tl.where(codes < 127, -value, value) if SIGNED else value


@triton.jit
def encode(value, SIGNED: tl.constexpr):
    """The int32 codes of the nearest of the values, which are between -1 and 1."""
    size = tl.abs(value)
    lowest = size < 1e-6
    first = tl.where(lowest, 1.0, 2.0)  # the number with which the decade begins
    power = tl.where(lowest, 1e6, 1e5)
    # Between the last value of a decade and the first of the next, half-way is not where the decade ends.
    start = tl.where(lowest, 7 / 36 if SIGNED else 5 / 36, 0.2)
    for k in tl.static_range(5):
        above = size >= 1e5**-1 * 10.0**k
        first = tl.where(above, 4.0 * 2**k, first)
        power = tl.where(above, 1e4 * 0.1**k, power)
    if not SIGNED:
        first *= 2.0
    place = (size * power * (1 / 0.9) + 0.8 / 0.9) * first
    place = tl.where(place < first + start, first - 0.5, tl.minimum(place, 2.0 * first - 0.5))
    number = (place + 8388607.5).to(tl.int32, bitcast=True) - 0x4B000000  # rounded down
    if SIGNED:
        number = tl.where(value >= 0.996484375, 128, number)
        return tl.where(value < 0, 127 - number, 127 + number)
    return tl.where(value >= 0.9982421875, 255, number - 1)


@triton.jit
def _moved(codes, scales, block, at, inside, toward, weight, SIGNED: tl.constexpr):
    """The moment, moved by `weight` of the way to `toward`, in fp32; its codes and scale are written."""
    scale = tl.load(scales + block, mask=inside, other=0.0)[:, None]
    old = decode(tl.load(codes + at, mask=inside[:, None], other=0).to(tl.int32), SIGNED) * scale
    new = old + weight * (toward - old)
    most = tl.maximum(tl.max(tl.abs(new), 1), _SMALLEST)
    coded = encode(new * (1 / most)[:, None], SIGNED)
    tl.store(scales + block, most, mask=inside)
    tl.store(codes + at, coded.to(tl.uint8), mask=inside[:, None])
    return new


@triton.jit(do_not_specialize=["seed"])
def adamw8(
    weight, other, grad, codes1, scales1, codes2, scales2, blocks, factor, scale, rate, keep, to_first, to_second,
    correction, root, eps, seed, KIND: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A step of `blocks` times 256 values. `correction` is 1 / (1 - beta1^step), `root` 1 / sqrt(1 - beta2^step),
    `to_first` and `to_second` are 1 - beta. Block r has the (r % 8)-th 16 bits of the throws whose counters begin at
    r // 8 * 256."""
    factor = _factor(factor, scale)
    col = tl.arange(0, _BLOCK)
    group = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    a, b, c, d = _throw(seed, group[:, None] * _BLOCK + col[None, :], KIND)
    for k in tl.static_range(8):
        block = group * 8 + k
        inside = block < blocks
        at = block[:, None].to(tl.int64) * _BLOCK + col[None, :]
        g = tl.load(grad + at, mask=inside[:, None], other=0.0).to(tl.float32) * factor
        m = _moved(codes1, scales1, block, at, inside, g, to_first, True)
        v = _moved(codes2, scales2, block, at, inside, g * g, to_second, False)
        u = m * correction / (tl.sqrt(v) * root + eps)
        value = _value(weight, other, at, inside[:, None], KIND) * keep - u * rate
        _write(weight, other, at, inside[:, None], value, _lane(a, b, c, d, k), KIND)


@triton.jit(do_not_specialize=["seed"])
def adamw32(
    weight, other, grad, first, second, n, factor, scale, rate, keep, to_first, to_second, correction, root, eps, seed,
    KIND: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """The same with moments in fp32, of (n,) values, eight times SIZE of them in each program."""
    factor = _factor(factor, scale)
    col = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    a, b, c, d = _throw(seed, col, KIND)
    for k in tl.static_range(8):
        at = tl.program_id(0) * 8 * SIZE + k * SIZE + tl.arange(0, SIZE)
        inside = at < n
        g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32) * factor
        m = tl.load(first + at, mask=inside, other=0.0)
        m += to_first * (g - m)
        v = tl.load(second + at, mask=inside, other=0.0)
        v += to_second * (g * g - v)
        tl.store(first + at, m, mask=inside)
        tl.store(second + at, v, mask=inside)
        u = m * correction / (tl.sqrt(v) * root + eps)
        value = _value(weight, other, at, inside, KIND) * keep - u * rate
        _write(weight, other, at, inside, value, _lane(a, b, c, d, k), KIND)
