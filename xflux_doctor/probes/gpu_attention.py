"""Stage of `gpu.py`: one attention, forward and backward, at the job's shapes and in the layouts of the model.

The gradient of the output comes in two layouts: behind a single block it is a slice of a wider tensor (attention and
MLP go through one product), behind a double block it is dense. A backend that remembers the first layout and reads the
second by it is right on each alone. Both are tried, in the order in which the model's backward pass meets them.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any

TOLERANCE = 0.02
"""Relative error at which a backend is wrong, as the trainer has it: bf16 has 0.005 to 0.01 on normal values."""
LONG = 8192
"""Tokens above which one head is held against the formula, which keeps L x L numbers of each."""
LAYOUTS = ("single", "double")
Pass = Callable[[Any, Any, Any, Any], tuple[Any, Any, Any, Any]]
"""(q, k, v, dout) as (B, L, H, C) to (out, dq, dk, dv) of the same shape."""


class Absent(Exception):
    """That attention is not to be had here."""


def attention(gpu: Any, name: str) -> dict[str, Any]:
    """One attention by its name: `trainer …`, `torch …` or a package."""
    found: dict[str, Any] = {"name": name, "ok": False, "errors": {}}
    try:
        both = _made(gpu, name)
    except Absent as error:
        return {"attention": {**found, "absent": True, "detail": str(error)[:300]}}
    torch, shape = gpu.torch, _shape(gpu, name)
    inputs = _inputs(gpu, shape)
    kept = sorted({0, shape[2] - 1}) if shape[1] <= LONG else [0]
    true = _reference(torch, inputs, kept)
    for number, layout in enumerate(LAYOUTS):
        q, k, v = (each.detach() for each in inputs[:3])
        forward, backward = both(q, k, v)
        found["errors"] |= _errors(torch, (forward(), *backward(inputs[3 + number])), true[number], kept, layout)
        del forward, backward
    wrong = {key: value for key, value in found["errors"].items() if not value < TOLERANCE}
    found["ok"] = not wrong
    if wrong:
        worst = max(wrong, key=lambda key: wrong[key] if math.isfinite(wrong[key]) else math.inf)
        found["detail"] = f"its {worst} is wrong by {wrong[worst]:.0%}" if math.isfinite(wrong[worst]) else (
            f"its {worst} has values that are no numbers"
        )  # fmt: skip
        found["errors"] = {key: value if math.isfinite(value) else 1e9 for key, value in found["errors"].items()}
        return {"attention": found}
    forward, backward = both(*inputs[:3])
    found["forward"] = gpu.timed(forward, gpu.ask["timed"] / 4, warm=1)
    forward()
    found["backward"] = gpu.timed(lambda: backward(inputs[3]), gpu.ask["timed"] / 4, warm=1)
    return {"attention": found}


def _shape(gpu: Any, name: str) -> tuple[int, int, int, int]:
    """(B, L, H, C); plain sums keep L x L numbers a head and several of them, so they are tried on a short L."""
    batch, tokens, heads, channels = gpu.ask["shape"]
    if name == "torch math" and gpu.cuda:
        room = (gpu.free() or 0) // 2
        most = int(math.sqrt(room / (batch * heads * 24)))
        tokens = min(tokens, max(256, most // 64 * 64))
    return batch, tokens, heads, channels


def _inputs(gpu: Any, shape: tuple[int, ...]) -> tuple[Any, ...]:
    """q, k (dense), v (a slice of a block's first product), and the output's gradient in both layouts."""
    torch = gpu.torch
    batch, tokens, heads, channels = shape
    width, dtype = heads * channels, getattr(torch, gpu.ask["dtype"])

    def random(*sizes: int) -> Any:
        return torch.randn(*sizes, device=gpu.device, dtype=torch.float32 if not gpu.cuda else dtype).to(dtype)

    wide, catted = random(batch, tokens, 3 * width), random(batch, tokens, 5 * width)
    q, k, dense = (random(batch, tokens, heads, channels) for _ in range(3))
    heads_apart = (heads, channels)
    return (
        q, k, wide[..., 2 * width :].unflatten(-1, heads_apart), catted[..., :width].unflatten(-1, heads_apart), dense,
    )  # fmt: skip


def _reference(torch: Any, inputs: tuple[Any, ...], kept: list[int]) -> list[tuple[Any, ...]]:
    """The formula in float32 on the kept heads: (out, dq, dk, dv) for each gradient."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        q, k, v = (each[:, :, kept].transpose(1, 2).float().requires_grad_() for each in inputs[:3])
        out = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), -1) @ v
        made = []
        for dout in inputs[3:]:
            grads = torch.autograd.grad(out, (q, k, v), dout[:, :, kept].transpose(1, 2).float(), retain_graph=True)
            made.append(tuple(each.detach().transpose(1, 2) for each in (out, *grads)))
        return made
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _errors(torch: Any, got: tuple[Any, ...], true: tuple[Any, ...], kept: list[int], layout: str) -> dict[str, float]:
    """Relative errors on the kept heads; infinite where any number of any head is none."""
    found = {}
    for name, mine, right in zip(("out", "dq", "dk", "dv"), got, true):  # noqa: B905 (of one length)
        error = float((mine[:, :, kept].float() - right).norm() / right.norm())
        whole = bool(torch.isfinite(mine.sum(dtype=torch.float32)))
        key = name if name == "out" else f"{name} behind a {layout} block"
        found[key] = error if whole and math.isfinite(error) else math.inf
    return found


Both = Callable[[Any, Any, Any], tuple[Callable[[], Any], Callable[[Any], tuple[Any, Any, Any]]]]
"""(q, k, v) to forward() → out and backward(dout) → (dq, dk, dv); forward is called first."""


def _made(gpu: Any, name: str) -> Both:
    kind, _, rest = name.partition(" ")
    if kind == "trainer":
        return _trainers(gpu, rest)
    if kind == "torch":
        return _torchs(gpu, rest)
    return _packages(gpu, name)


def _trainers(gpu: Any, name: str) -> Both:
    """The trainer's own passes, which it calls by hand."""
    try:
        module = importlib.import_module("xflux_trainer.attention")
        errors = importlib.import_module("xflux_trainer.errors")
        model = importlib.import_module("xflux_trainer.model")
    except Exception as error:
        raise Absent(f"the trainer cannot be imported here: {error}") from error
    torch = gpu.torch
    model.steady_attention(gpu.device)  # as every run of it begins
    try:
        made, _ = module.choose(name, gpu.device, getattr(torch, gpu.ask["dtype"]), gpu.ask["shape"][3])
    except errors.Unsupported as error:
        # What does not work here is passed over by `auto`, which takes the next; what broke CUDA ends that too, and
        # behind sdpa there is none.
        if "broke this process" in str(error) or name in (gpu.ask["attention"], "sdpa"):
            raise
        raise Absent(str(error)) from error

    def both(q: Any, k: Any, v: Any) -> tuple[Callable[[], Any], Callable[[Any], tuple[Any, Any, Any]]]:
        kept: dict[str, Any] = {}
        room = q.new_empty(*q.shape[:2], 3 * q.shape[2] * q.shape[3])
        dv = room[..., 2 * q.shape[2] * q.shape[3] :].unflatten(-1, q.shape[2:])

        def forward() -> Any:
            with torch.no_grad():
                kept["out"], kept["more"] = made.forward(q, k, v)
            return kept["out"]

        def backward(dout: Any) -> tuple[Any, Any, Any]:
            with torch.no_grad():
                dq, dk = made.backward(dout, q, k, v, kept["out"], kept["more"], dv)
            return dq, dk, dv

        return forward, backward

    return both


def _torchs(gpu: Any, name: str) -> Both:
    """torch's own call under one backend, or with all of them, as diffusers' and X-Flux's blocks call it."""
    torch = gpu.torch
    names = {"flash": "FLASH_ATTENTION", "efficient": "EFFICIENT_ATTENTION", "cudnn": "CUDNN_ATTENTION", "math": "MATH"}
    backends = torch.nn.attention.SDPBackend
    if name not in ("choice", *names):
        raise Absent(f"torch has no attention of the name {name}")
    if name in names and not hasattr(backends, names[name]):
        raise Absent(f"this torch has no {name} attention")
    gpu.allow_cudnn(True)  # the trainer's stages turn it off

    def attend(q: Any, k: Any, v: Any) -> Any:
        call = torch.nn.functional.scaled_dot_product_attention
        heads_first = [each.transpose(1, 2) for each in (q, k, v)]
        if name == "choice":
            return call(*heads_first).transpose(1, 2)
        with torch.nn.attention.sdpa_kernel([getattr(backends, names[name])]):
            return call(*heads_first).transpose(1, 2)

    _must_work(gpu, attend)
    return _by_autograd(torch, attend)


def _packages(gpu: Any, name: str) -> Both:
    """xformers and FlashAttention 2 and 3, where they are installed."""
    try:
        if name == "xformers":
            attend = importlib.import_module("xformers.ops").memory_efficient_attention
        elif name == "flash-attn-2":
            attend = importlib.import_module("flash_attn").flash_attn_func
        else:
            module = importlib.import_module("flash_attn_interface")

            def attend(q: Any, k: Any, v: Any) -> Any:
                made = module.flash_attn_func(q, k, v)
                return made[0] if isinstance(made, tuple) else made
    except (ImportError, AttributeError) as error:
        raise Absent(f"it cannot be imported: {error}") from error
    if not gpu.cuda:
        raise Absent("it is for CUDA")
    return _by_autograd(gpu.torch, attend)


def _must_work(gpu: Any, attend: Callable[[Any, Any, Any], Any]) -> None:
    """Raise `Absent` where torch says at once that this backend is not for this device or type."""
    dtype = getattr(gpu.torch, gpu.ask["dtype"])
    small = gpu.torch.zeros(1, 64, 1, gpu.ask["shape"][3], device=gpu.device, dtype=dtype)
    try:
        attend(small, small, small)
    except RuntimeError as error:
        if "No available kernel" in str(error) or "No viable backend" in str(error):
            raise Absent("torch has no such kernel for this device and type") from error
        raise


def _by_autograd(torch: Any, attend: Callable[[Any, Any, Any], Any]) -> Both:
    def both(q: Any, k: Any, v: Any) -> tuple[Callable[[], Any], Callable[[Any], tuple[Any, Any, Any]]]:
        leaves = [each.detach().requires_grad_() for each in (q, k, v)]
        kept: dict[str, Any] = {}

        def forward() -> Any:
            kept["out"] = attend(*leaves)
            return kept["out"].detach()

        def backward(dout: Any) -> tuple[Any, Any, Any]:
            dq, dk, dv = torch.autograd.grad(kept["out"], leaves, dout, retain_graph=True)
            return dq, dk, dv

        return forward, backward

    return both
