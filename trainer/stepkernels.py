"""Optimizer steps in Triton: the weight, its gradient and the moments are read where they lie and written in place.

`fusedsteps` launches them. What they do is what transformers' Adafactor and torchao's AdamW8bit do, in fp32, and the
rounding that `rounding` does, without an fp32 copy of anything. A matrix (m, n) is cut into strips of `span` rows and
tiles of COLS columns; a program has one of each. Sums go over partial ones that are written and read again, not over
atomics, so that a step gives the same bits every time.

`factor` multiplies every gradient, and so does what `scale` points to, where that is not None.
"""

import triton
import triton.language as tl

KINDS = {"fp32": 0, "nearest": 0, "stochastic": 1, "kahan": 2, "master": 3}
"""How a new value is held (`slots.weight_update`): rounded into the weight; the same by dice; in the weight and what
that leaves out; in an fp32 master and the weight. The last two have a second tensor, `other`."""

_STOCHASTIC, _KAHAN, _MASTER = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
_ROUNDS = tl.constexpr(7)  # of Philox 4x32: the fewest that pass BigCrush


@triton.jit
def _factor(factor, scale):
    if scale is not None:
        factor = factor * tl.load(scale)
    return factor


@triton.jit
def _total(partial, count):
    """Sum of `count` values, by every program that wants it."""
    at = tl.arange(0, 256)
    sums = tl.zeros([256], tl.float32)
    for first in range(0, count, 256):
        sums += tl.load(partial + first + at, mask=first + at < count, other=0.0)
    return tl.sum(sums, 0)


@triton.jit
def _value(weight, other, at, inside, KIND: tl.constexpr):
    """The weight at its finest, fp32."""
    if KIND == _MASTER:
        return tl.load(other + at, mask=inside, other=0.0)
    value = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    if KIND == _KAHAN:
        value += tl.load(other + at, mask=inside, other=0.0).to(tl.float32)
    return value


@triton.jit
def _cut(value, more, dtype: tl.constexpr):
    """fp32 to bf16 by cutting off its last 16 bits, after adding `more` to them."""
    bits = (value.to(tl.int32, bitcast=True) + more) & -65536
    return tl.where(tl.abs(value) < float("inf"), bits.to(tl.float32, bitcast=True), value).to(dtype)


@triton.jit
def _nearest(value, dtype: tl.constexpr):
    if dtype == tl.bfloat16:  # the conversion of Triton's interpreter only cuts off
        return _cut(value, 0x7FFF + ((value.to(tl.int32, bitcast=True) >> 16) & 1), dtype)
    return value.to(dtype)


@triton.jit
def _write(weight, other, at, inside, value, dice, KIND: tl.constexpr):
    """The inverse of `_value`. `dice` are 16 random bits for each value, where they are thrown."""
    dtype: tl.constexpr = weight.dtype.element_ty
    if KIND == _STOCHASTIC:
        tl.store(weight + at, _cut(value, dice, dtype), mask=inside)
    else:
        high = _nearest(value, dtype)
        tl.store(weight + at, high, mask=inside)
        if KIND == _KAHAN:
            tl.store(other + at, _nearest(value - high.to(tl.float32), dtype), mask=inside)
        if KIND == _MASTER:
            tl.store(other + at, value, mask=inside)


@triton.jit
def _throw(seed, counter, KIND: tl.constexpr):
    """Four times 32 random bits for each counter, enough for 8 values; zeros where nothing is thrown."""
    if KIND == _STOCHASTIC:
        a, b, c, d = tl.randint4x(seed, counter, _ROUNDS)
        a, b = a.to(tl.int32, bitcast=True), b.to(tl.int32, bitcast=True)
        c, d = c.to(tl.int32, bitcast=True), d.to(tl.int32, bitcast=True)
    else:
        a = (counter * 0).to(tl.int32)
        b, c, d = a, a, a
    return a, b, c, d


@triton.jit
def _lane(a, b, c, d, k: tl.constexpr):
    """The k-th 16 bits of a throw."""
    if k < 2:
        word = a
    elif k < 4:
        word = b
    elif k < 6:
        word = c
    else:
        word = d
    return (word >> 16 * (k % 2)) & 0xFFFF


@triton.jit
def squares(grad, rows, cols, m, n, span, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Sums of the gradient's squares: along each row of a tile, (tiles, m), and each column of a strip, (strips, n)."""
    tile, strip = tl.program_id(0), tl.program_id(1)
    col = tile * COLS + tl.arange(0, COLS)
    sums = tl.zeros([ROWS, COLS], tl.float32)
    for first in range(strip * span, strip * span + span, ROWS):
        row = first + tl.arange(0, ROWS)
        at = row[:, None].to(tl.int64) * n + col[None, :]
        g = tl.load(grad + at, mask=(row < m)[:, None] & (col < n)[None, :], other=0.0).to(tl.float32)
        sums += g * g
        tl.store(rows + tile * m + row, tl.sum(g * g, 1), mask=row < m)
    tl.store(cols + strip * n + col, tl.sum(sums, 0), mask=col < n)


@triton.jit
def _line(
    partial, state, size, count, mean_over, first, beta, fresh, eps, factor, DEEP: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """New second moments of WIDE rows or columns; returns their sum."""
    at = first + tl.arange(0, WIDE)
    sums = tl.zeros([DEEP, WIDE], tl.float32)
    for start in range(0, count, DEEP):
        part = start + tl.arange(0, DEEP)
        where = part[:, None] * size + at[None, :]
        sums += tl.load(partial + where, mask=(part < count)[:, None] & (at < size)[None, :], other=0.0)
    mean = tl.sum(sums, 0) * (factor * factor) / mean_over + eps
    moment = tl.load(state + at, mask=at < size, other=0.0) * beta + mean * fresh
    tl.store(state + at, moment, mask=at < size)
    return tl.sum(tl.where(at < size, moment, 0.0), 0)


@triton.jit
def moments(
    rows, cols, row_state, col_state, row_sums, m, n, tiles, strips, factor, scale, beta, fresh, eps,
    DEEP: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The sums of `squares` into Adafactor's moments, (m,) and (n,), WIDE of them in each program. `row_sums` becomes
    the sums over the rows' new moments, one for each program that has rows."""
    factor = _factor(factor, scale)
    pid = tl.program_id(0)
    row_programs = tl.cdiv(m, WIDE)
    if pid < row_programs:
        total = _line(rows, row_state, m, tiles, n, pid * WIDE, beta, fresh, eps, factor, DEEP, WIDE)
        tl.store(row_sums + pid, total)
    else:
        _line(cols, col_state, n, strips, m, (pid - row_programs) * WIDE, beta, fresh, eps, factor, DEEP, WIDE)


@triton.jit
def update_squares(
    grad, row_state, col_state, row_sums, row_programs, out, m, n, span, factor, scale,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Sum of the squares of Adafactor's update before its clipping, one for each program.

    From the last program to the first: the end of the gradient is what the cache still has from the pass before.
    """
    factor = _factor(factor, scale)
    tiles = tl.num_programs(0)
    last = tiles * tl.num_programs(1) - 1
    pid = last - tl.program_id(1) * tiles - tl.program_id(0)
    tile, strip = pid % tiles, pid // tiles
    row_mean = _total(row_sums, row_programs) / m
    col = tile * COLS + tl.arange(0, COLS)
    down = tl.rsqrt(tl.load(col_state + col, mask=col < n, other=1.0))
    sums = tl.zeros([ROWS, COLS], tl.float32)
    for first in range(strip * span, strip * span + span, ROWS):
        row = first + tl.arange(0, ROWS)
        at = row[:, None].to(tl.int64) * n + col[None, :]
        g = tl.load(grad + at, mask=(row < m)[:, None] & (col < n)[None, :], other=0.0).to(tl.float32) * factor
        across = tl.rsqrt(tl.load(row_state + row, mask=row < m, other=1.0) / row_mean)
        u = across[:, None] * down[None, :] * g
        sums += u * u
    tl.store(out + pid, tl.sum(tl.sum(sums, 0), 0))


@triton.jit
def _clip(square_sum, size, threshold):
    """What an update is divided by. NaN stays NaN."""
    over = tl.sqrt(square_sum / size) / threshold
    return tl.where(over <= 1.0, 1.0, over)


@triton.jit(do_not_specialize=["seed"])
def factored(
    weight, other, grad, row_state, col_state, row_sums, row_programs, update_sums, update_programs, m, n, span,
    size, factor, scale, rate, keep, threshold, seed, KIND: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Adafactor's step of a matrix, with the moments that `moments` made and the sums of `update_squares`.

    Row r has the (r % 8)-th 16 bits of the throw with counter (r // 8) * n + column, whatever the tiles are.
    `size` is m * n.
    """
    factor = _factor(factor, scale)
    tile, strip = tl.program_id(0), tl.program_id(1)
    row_mean = _total(row_sums, row_programs) / m
    by = rate / _clip(_total(update_sums, update_programs), size, threshold)
    col = tile * COLS + tl.arange(0, COLS)
    down = tl.rsqrt(tl.load(col_state + col, mask=col < n, other=1.0))
    for first in range(strip * span, strip * span + span, ROWS * 8):
        group = first // 8 + tl.arange(0, ROWS)
        counter = group[:, None] * n + col[None, :]
        a, b, c, d = _throw(seed, counter, KIND)
        for k in tl.static_range(8):
            row = group * 8 + k
            inside = (row < m)[:, None] & (col < n)[None, :]
            at = row[:, None].to(tl.int64) * n + col[None, :]
            across = tl.rsqrt(tl.load(row_state + row, mask=row < m, other=1.0) / row_mean)
            g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32) * factor
            u = across[:, None] * down[None, :] * g
            value = _value(weight, other, at, inside, KIND) * keep - u * by
            _write(weight, other, at, inside, value, _lane(a, b, c, d, k), KIND)


@triton.jit(do_not_specialize=["seed"])
def unfactored(
    weight, other, grad, state, n, factor, scale, rate, keep, beta, fresh, eps, threshold, seed,
    KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adafactor's step of a vector (n,), in one program."""
    factor = _factor(factor, scale)
    sums = tl.zeros([BLOCK], tl.float32)
    for first in range(0, n, BLOCK):
        at = first + tl.arange(0, BLOCK)
        g = tl.load(grad + at, mask=at < n, other=0.0).to(tl.float32) * factor
        moment = tl.load(state + at, mask=at < n, other=1.0) * beta + (g * g + eps) * fresh
        tl.store(state + at, moment, mask=at < n)
        u = tl.where(at < n, tl.rsqrt(moment) * g, 0.0)
        sums += u * u
    by = rate / _clip(tl.sum(sums, 0), n, threshold)
    tl.debug_barrier()  # the moments are read again
    for first in range(0, n, BLOCK):
        at = first + tl.arange(0, BLOCK)
        g = tl.load(grad + at, mask=at < n, other=0.0).to(tl.float32) * factor
        u = tl.rsqrt(tl.load(state + at, mask=at < n, other=1.0)) * g
        a, b, c, d = _throw(seed, at, KIND)
        value = _value(weight, other, at, at < n, KIND) * keep - u * by
        _write(weight, other, at, at < n, value, _lane(a, b, c, d, 0), KIND)
