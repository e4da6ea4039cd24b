"""fp8 by values: what rows become, what products of them are off by, and the kernels beside their meaning."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from xflux_trainer import fp8, pointwise  # noqa: E402
from xflux_trainer.frozen import FrozenLinear  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent.parent


def normal(*size: int, seed: int = 0, spread: float = 1.0) -> Any:
    """bf16 values of a spread."""
    return (torch.randn(size, generator=torch.Generator().manual_seed(seed)) * spread).bfloat16()


def heavy(rows: int, width: int, seed: int = 0) -> Any:
    """Gradients as they come: every token has its own size, over six powers of ten, and a few channels stand out."""
    made = torch.Generator().manual_seed(seed)
    size = 10 ** (torch.rand(rows, 1, generator=made) * 6 - 9)
    tail = torch.randn(rows, width, generator=made) * torch.exp(torch.randn(rows, width, generator=made))
    return (size * tail).bfloat16()


def weight(rows: int, width: int) -> tuple[Any, Any]:
    """A frozen weight as `quantize` holds it; the channels' sizes differ by a factor of 50."""
    return fp8.quantize_rows(normal(rows, width, seed=9).float() * torch.logspace(-2.5, -0.8, rows)[:, None])


def off(found: Any, wanted: Any) -> float:
    """Relative error of the whole."""
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def test_a_rows_largest_value_is_448_and_zeros_stay_zeros() -> None:
    x = torch.tensor([[1.0, -2.0, 0.5], [0.0, 0.0, 0.0], [3e-8, 0.0, -1e-8], [1e30, -2e30, 3e38]])
    q, s = fp8.quantize_rows(x)
    assert q.dtype == torch.float8_e4m3fn
    assert s.shape == (4, 1)
    assert s.dtype == torch.float32
    assert q[0].float().tolist() == [224.0, -448.0, 112.0]
    assert q[1].float().tolist() == [0.0, 0.0, 0.0]
    assert (s > 0).all()
    assert torch.allclose(q.float().abs().amax(1), torch.tensor([448.0, 0, 448, 448]))
    assert ((q.float() * s - x).abs() <= x.abs() / 16 + s * 2**-10).all()  # half a step, of 8 a doubling or of 2^-9


def test_no_finite_row_becomes_nan_and_a_broken_one_does() -> None:
    x = heavy(512, 256).float()
    x[0, 0], x[1, 0], x[2] = torch.finfo(torch.float32).max, 1e-45, 1e-38
    q, s = fp8.quantize_rows(x)
    assert torch.isfinite(q.float()).all()
    assert torch.isfinite(s).all()
    for broken in (float("nan"), float("inf")):
        x[3, 7] = broken
        q, s = fp8.quantize_rows(x)
        assert not torch.isfinite(q.float() * s)[3].all()
        assert torch.isfinite(q.float() * s)[4:].all()


def test_a_product_is_that_of_the_rounded_values() -> None:
    x, bias = normal(96, 128), normal(64, seed=1)
    data, wscale = weight(64, 128)
    xq, xs = fp8.quantize_rows(x)
    wanted = (xq.double() * xs) @ (data.double() * wscale).t() + bias.double()
    assert off(fp8.product(xq, xs, data, wscale, bias), wanted) < 0.003
    assert off(fp8.product(xq, xs, data, wscale.bfloat16(), None), wanted - bias.double()) < 0.005
    out = torch.empty(96, 64, dtype=torch.bfloat16)
    assert fp8.product(xq, xs, data, wscale, bias, out) is out
    assert off(out, wanted) < 0.003


def test_a_base_quantised_to_fp8_is_multiplied_as_it_lies() -> None:
    pytest.importorskip("optimum.quanto")
    from xflux_trainer import quantize

    held, opener = quantize.form("fp8", torch.device("cpu"))(normal(64, 128, seed=3, spread=0.02))
    x, dy, dense = normal(96, 128), heavy(96, 64), opener(held)().double()
    y = fp8.product(*fp8.quantize_rows(x), held["data"], held["scale"], None)
    dx = fp8.backward(*fp8.quantize_rows(dy, held["scale"]), held["data"])
    assert off(y, x.double() @ dense.t()) < 0.04
    assert off(dx, dy.double() @ dense) < 0.05


def test_the_channels_scales_go_into_the_gradient() -> None:
    dy = heavy(96, 64)
    data, wscale = weight(64, 128)
    wanted = dy.double() @ (data.double() * wscale)
    dx = fp8.backward(*fp8.quantize_rows(dy, wscale), data)
    assert dx.dtype == torch.bfloat16
    assert off(dx, wanted) < 0.05
    assert ((dx.double() - wanted).norm(dim=1) / wanted.norm(dim=1)).max() < 0.1  # the smallest row as well
    assert torch.equal(fp8.transpose(data).float(), data.t().float())


def test_gradients_lose_least_as_e4m3_with_a_scale_a_row() -> None:
    dy = heavy(512, 256)
    data, wscale = weight(256, 128)
    wanted = dy.double() @ (data.double() * wscale)
    folded = dy.float() * wscale.t()
    rows = wanted.norm(dim=1)

    def loss(held: Any) -> float:
        """The rows' mean error."""
        return float(((held.double() @ data.double() - wanted).norm(dim=1) / rows).mean())

    def held(limit: float, kind: Any, largest: Any) -> Any:
        return (folded * (limit / largest)).to(kind).float() * (largest / limit)

    by_row, whole = folded.abs().amax(1, keepdim=True), folded.abs().max()
    chosen = loss(held(448, torch.float8_e4m3fn, by_row))
    assert chosen < 0.025
    assert loss(held(57344, torch.float8_e5m2, by_row)) > 1.8 * chosen
    assert loss(held(57344, torch.float8_e5m2, whole)) > 2.2 * chosen
    assert loss(held(448, torch.float8_e4m3fn, whole)) > 10 * chosen


def test_the_fused_ones_are_pointwise_in_rows() -> None:
    x, y = normal(2, 12, 32), normal(2, 12, 32, seed=1)
    gate, shift, scale = normal(3, 2, 32, seed=2)
    added, *rest = fp8.add_modulate_fp8(x, y, gate, shift, scale, keep=True)
    assert torch.equal(added, pointwise.add_gated(x, y, gate))
    for found, wanted in (
        (fp8.modulate_fp8(x, shift, scale, keep=True), pointwise.modulate(x, shift, scale)),
        (rest, pointwise.modulate(added, shift, scale)),
        (fp8.gelu_fp8(None, x, keep=True), pointwise.gelu(x, torch.empty_like(x))),
        (fp8.gelu_fp8(y, x, keep=True), torch.cat([y, pointwise.gelu(x, torch.empty_like(x))], -1)),
        (fp8.gelu_backward_fp8(None, y, x, None, keep=True), pointwise.gelu_backward(y, x, torch.empty_like(x))),
        (fp8.gated_fp8(x, gate, None, keep=True), pointwise.gated(x, gate)[0]),
    ):
        q, s, kept = found
        assert torch.equal(kept, wanted)
        assert torch.isclose(q.float() * s, wanted.flatten(0, 1).float(), rtol=0.07, atol=1e-3).all()
    assert fp8.modulate_fp8(x, shift, scale)[2] is None


def test_rows_of_the_mlp_lose_little_by_a_scale_that_is_known_before_them() -> None:
    """A few hundred values with heavy tails lose most: the largest, in which such a row lies, is not exact then."""
    h = normal(1, 256, 2048, seed=3, spread=2)
    up, columns = h.float(), torch.logspace(-4, -2, 2048)[:, None]
    for dy, more in ((normal(256, 2048, seed=5, spread=1e-6), 1.05), (heavy(256, 2048), 1.2)):
        exact = (pointwise.gelu_backward(dy[None], up, torch.empty_like(up)) * columns.t())[0]
        errors = [
            ((q.float() * s - exact).norm(dim=1) / exact.norm(dim=1))
            for q, s, *_ in (fp8.gelu_backward_fp8(None, dy[None], h, columns), fp8.quantize_rows(exact))
        ]
        assert errors[0].mean() < more * errors[1].mean()
        assert errors[0].max() < 0.05
    left = normal(1, 256, 512, seed=4)
    # Of GELU itself the largest is known exactly.
    for beside in (None, left):
        q, s, kept = fp8.gelu_fp8(beside, h, keep=True)
        assert torch.allclose(s, kept.float().flatten(0, 1).abs().amax(1, keepdim=True) / 448, rtol=2**-8)
        assert (q.float().abs().amax(1) == 448).all()
    # Only rows that lie in its dip altogether may have less.
    low = fp8.gelu_fp8(None, h.abs() * -1e-3)
    wanted = pointwise.gelu(up.abs() * -1e-3, torch.empty_like(up)).flatten(0, 1)
    assert off(low[0].float() * low[1], wanted) < 0.03


class Opened:
    """A dense weight that multiplies up to two rows itself."""

    def __init__(self, dense: Any) -> None:
        self.dense, self.asked = dense, list[int]()

    def __call__(self) -> Any:
        return self.dense()

    def few(self, x: Any, bias: Any) -> Any:
        self.asked.append(len(x))
        return x @ self.dense().t() + bias if len(x) < 3 else None


def test_a_layer_multiplies_few_rows_as_its_format_does() -> None:
    made: list[Opened] = []

    def form(weight: Any) -> Any:
        parts, opener = fp8.hold(weight)

        def opened(found: Any) -> Opened:
            made.append(Opened(opener(found)))
            return made[-1]

        return parts, opened

    linear = torch.nn.Linear(32, 48).bfloat16().requires_grad_(False)
    layer, plain = FrozenLinear(linear, form), FrozenLinear(linear, fp8.hold)
    for rows in (1, 2, 5):
        x = normal(rows, 32)
        found = []
        for each in (layer, plain):
            own = x.clone().requires_grad_()
            y = each(own)
            y.sum().backward()
            found.append((y, own.grad))
        assert torch.allclose(found[0][0], found[1][0], rtol=0.02, atol=0.02)
        assert torch.equal(found[0][1], found[1][1])
    assert made[-1].asked == [1, 2, 5]
    opened: Any = fp8.open_held(fp8.hold(linear.weight)[0])
    assert opened.few(x, None) is None  # on a CPU


def test_a_cpu_has_no_fp8_products() -> None:
    assert "NVIDIA" in (fp8.supported(torch.device("cpu")) or "")


def test_the_measurement_runs_tiny_and_counts_a_step(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import fp8_products

    assert sum(2 * layer.flop * layer.times for layer in fp8_products.layers(1)) == pytest.approx(119e12, rel=0.01)
    if torch.cuda.is_available():
        pytest.skip("on a card it measures for a minute")
    monkeypatch.setattr("sys.argv", ["fp8_products.py"])
    assert fp8_products.main() == 0
    assert "in a row, fp8 and transpositions" in capsys.readouterr().out


@pytest.fixture(scope="module")
def kernels() -> Any:
    """The kernels, run by Triton's interpreter where there is no card."""
    if find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    if not torch.cuda.is_available():
        if not hasattr(torch, "float8_e8m0fnu"):  # torch 2.7 brought it, and Triton 3.3
            pytest.skip("this Triton's interpreter does not know kernels of modules with postponed annotations")
        if os.environ.get("TRITON_INTERPRET") != "1":
            pytest.skip("no card, and not told to interpret: TRITON_INTERPRET=1")
    elif (reason := fp8.supported(torch.device("cuda"))) is not None:
        pytest.skip(reason)
    from xflux_trainer import kernels_fp8

    return kernels_fp8


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def alike(found: Any, wanted: Any, waits: bool = False) -> None:
    """Scales and rows but for the last bit, which shows more where values wait for their scale in bf16.

    Where rounding up reaches a power of two, Triton's interpreter (3.7) forgets to raise the exponent and makes half of
    what it should be, and it cuts subnormal numbers and bf16 off. The instruction of the cards does neither.
    """
    (q, s, *_), (q_wanted, s_wanted, *_) = found, wanted
    assert torch.allclose(s.cpu(), s_wanted, rtol=2**-7 if waits else 1e-5)
    a, b = q.cpu().float(), q_wanted.float()
    if DEVICE == "cpu":
        a = torch.where((a.frexp()[0].abs() == 0.5) & torch.isclose(a * 2, b, rtol=0.13), a * 2, a)
    assert torch.allclose(a, b, rtol=0.13, atol=2**-8)
    assert ((a != b) & (b.abs() >= 2**-6)).float().mean() < (0.05 if waits else 0.005)


def moved(*parts: Any) -> list[Any]:
    return [part.to(DEVICE) for part in parts]


def test_rows_in_a_kernel(kernels: Any) -> None:
    wide = normal(70, 300, seed=3)
    wide[5] = 0
    wide[6] *= 1e-30
    colscale = torch.rand(208, 1) * 50
    for x in (wide[:, 64:272], wide[:, 64:272].contiguous(), normal(2, 208, 35).mT):
        for columns in (None, colscale, colscale.bfloat16()):
            found = kernels.quantize_rows(*moved(x), None if columns is None else columns.to(DEVICE))
            alike(found, fp8.quantize_rows(x, columns))
    assert found[1].shape == (70, 1)


def test_modulation_in_a_kernel(kernels: Any) -> None:
    x, y = normal(2, 9, 400, seed=3)[..., 16:336], normal(2, 9, 320, seed=4)
    gate, shift, scale = normal(2, 3 * 320, seed=5).chunk(3, dim=1)
    found = kernels.modulate_fp8(*moved(x, shift, scale), keep=True)
    alike(found, fp8.modulate_fp8(x, shift, scale))
    close(found[2], pointwise.modulate(x, shift, scale))
    assert kernels.modulate_fp8(*moved(x, shift, scale), keep=False)[2] is None
    added, *found = kernels.add_modulate_fp8(*moved(x, y, gate, shift, scale), keep=True)
    close(added, pointwise.add_gated(x, y, gate))
    alike(found, fp8.modulate_fp8(added.cpu(), shift, scale))
    close(found[2], pointwise.modulate(added.cpu(), shift, scale))


def close(found: Any, wanted: Any) -> None:
    """bf16 of the same values, in whose last bit the order of sums may show."""
    assert found.dtype == wanted.dtype
    assert found.shape == wanted.shape
    assert torch.allclose(found.cpu().float(), wanted.float(), rtol=2**-7, atol=1e-3)


@pytest.mark.parametrize("left", [True, False])
def test_gelu_in_a_kernel(kernels: Any, left: bool) -> None:
    wide = normal(2, 9, 480, seed=6, spread=3)
    h, dy, o = wide[..., 96:416], normal(2, 9, 400, seed=7)[..., 80:], wide[..., :96] if left else None
    colscale = torch.rand(416 if left else 320, 1) + 0.1
    parts = None if o is None else o.to(DEVICE)
    found = kernels.gelu_fp8(parts, *moved(h), keep=True)
    alike(found, fp8.gelu_fp8(o, h), waits=True)
    close(found[2], fp8.gelu_fp8(o, h, keep=True)[2])
    for columns in (None, colscale):
        found = kernels.gelu_backward_fp8(
            parts, *moved(dy, h), None if columns is None else columns.to(DEVICE), keep=True
        )
        alike(found, fp8.gelu_backward_fp8(o, dy, h, columns), waits=True)
        close(found[2], fp8.gelu_backward_fp8(o, dy, h, columns, keep=True)[2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 8, 16])
def test_few_rows_in_a_kernel(kernels: Any, rows: int, dtype: Any) -> None:
    """Sizes that no tile divides, a view of x, and in bf16 values beyond fp16's."""
    if DEVICE == "cpu" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies the bits of bf16 as if they were numbers")
    from xflux_trainer import kernels_few

    wide = normal(rows, 400, seed=3, spread=1e5 if dtype == torch.bfloat16 else 1).to(dtype)
    x, bias = wide[:, 80:368], normal(104, seed=4).to(dtype)
    parts, _ = fp8.hold(normal(104, 288, seed=5, spread=0.02))
    for own in (bias, None):
        found = kernels_few.few(*moved(x, parts["data"], parts["scale"]), None if own is None else own.to(DEVICE))
        wanted = x.double() @ (parts["data"].double() * parts["scale"]).t() + (0 if own is None else own.double())
        assert found.dtype == x.dtype
        assert found.shape == (rows, 104)
        assert off(found.cpu(), wanted) < 0.003


def test_gates_in_a_kernel(kernels: Any) -> None:
    dx, gate, colscale = normal(2, 9, 320, seed=8, spread=1e-6), normal(2, 640, seed=9)[:, 320:], torch.rand(320)
    found = kernels.gated_fp8(*moved(dx, gate, colscale), keep=True)
    alike(found, fp8.gated_fp8(dx, gate, colscale))
    assert torch.allclose(found[2].cpu().float(), pointwise.gated(dx, gate)[0].float(), rtol=2**-7)


@pytest.mark.parametrize("shape", [(128, 128), (272, 144), (16, 400)])
def test_transposition_in_a_kernel(kernels: Any, shape: tuple[int, int]) -> None:
    data = torch.arange(shape[0] * shape[1]).mul(7919).remainder(251).to(torch.uint8).view(shape)
    out = torch.empty(shape[::-1], dtype=torch.uint8, device=DEVICE)
    kernels.transpose(data.to(DEVICE), out)
    assert torch.equal(out.cpu(), data.t())


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a card")
@pytest.mark.parametrize("rows", [5, 200, 1073])
def test_products_on_a_card_are_those_of_the_cpu(kernels: Any, rows: int) -> None:
    x, dy, bias = normal(rows, 512), heavy(rows, 768), normal(768, seed=1)
    data, wscale = weight(768, 512)
    xq, xs = fp8.quantize_rows(x)
    dq, ds = fp8.quantize_rows(dy, wscale)
    for fast in (True, False):
        y = fp8.product(*moved(xq, xs, data, wscale, bias), fast=fast)
        assert off(y.cpu(), fp8.product(xq, xs, data, wscale, bias)) < 0.01
        dx = fp8.backward(*moved(dq, ds, data), fast=fast)
        assert off(dx.cpu(), fp8.backward(dq, ds, data)) < 0.01
    out = torch.empty_like(y)
    assert fp8.product(*moved(xq, xs, data, wscale, bias), out).data_ptr() == out.data_ptr()
    assert torch.equal(out, fp8.product(*moved(xq, xs, data, wscale, bias)))
