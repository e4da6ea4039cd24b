"""The frozen base in fewer bytes: which layers, in which format, while the model is loaded.

The libraries choose scales and round; the product is `frozen.FrozenLinear`'s, because their own layers are made for
inference: quanto's fp8 compiles a kernel with nvcc at its first call, its int4 is unpacked in the backward pass by a
product with the identity matrix, and torchao's weight-only layers leave a dense copy with autograd.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from xflux_trainer import fp8
from xflux_trainer.config import TrainConfig
from xflux_trainer.errors import Unsupported, first_line
from xflux_trainer.frozen import Format, FrozenLinear, Opener, Parts, plain
from xflux_trainer.savings import group_size, is_block, is_modulation, position, streamed_blocks, unit_of
from xflux_trainer.stream import Streamer, remember

PACKAGES = {
    "int8": ("optimum.quanto", "optimum-quanto"),
    "int4": ("optimum.quanto", "optimum-quanto"),
    "fp8": ("optimum.quanto", "optimum-quanto"),
    "torchao-int8": ("torchao.quantization", "torchao"),
    "torchao-fp8": ("torchao.quantization", "torchao"),
    "nf4": ("bitsandbytes.functional", "bitsandbytes"),
    "fp8-dynamic": ("torch", "torch"),
}
"""What each format imports, and the name to install it by."""
PROBE_ERROR = 0.2
"""Relative error at which a kernel is broken: nf4, the coarsest, has 0.09 on normal values."""


def preparer(config: TrainConfig, device: torch.device, blocks: tuple[int, int] = (19, 38)) -> Preparer | None:
    """What `load_transformer` calls for every block that is whole; None: the base stays as it is.

    `blocks` are the base's double and single blocks, over which the streamed ones are spread. Raises `Unsupported`
    where the format's package is missing or does not work on this device: before anything is loaded.
    """
    if config.quantization == "none" and not config.stream_blocks and config.modulation == "keep":
        return None
    return Preparer(config, device, blocks)


def refuse(config: TrainConfig, strategy: str) -> None:
    """Raise `Unsupported` for what a strategy (single, ddp, zero1 … zero3, fsdp) cannot be combined with."""
    streams = config.stream_blocks or config.modulation == "stream"
    if streams and strategy not in ("single", "ddp"):
        key = "stream_blocks" if config.stream_blocks else "modulation: stream"
        seen = f"{key} keeps weights in the host's memory, and {strategy} wants to place them itself."
        raise Unsupported(seen, "Launch without DeepSpeed and FSDP, or set stream_blocks to 0 and modulation to keep.")
    if config.quantization != "none" and strategy in ("zero3", "fsdp"):
        seen = f"quantization is {config.quantization}, and {strategy} cannot cut a quantised base into parts."
        raise Unsupported(seen, "Launch without it, or set quantization: none.")


class Preparer:
    """Quantises and streams block after block, in place: a block's own weights are gone when it is done."""

    def __init__(self, config: TrainConfig, device: torch.device, blocks: tuple[int, int]) -> None:
        self._config = config
        self._form = form(config.quantization, device) if config.quantization != "none" else None
        self._streamed = frozenset(streamed_blocks(*blocks, config.stream_blocks))
        self.streamer = Streamer(device) if self._streamed or config.modulation == "stream" else None

    def __call__(self, name: str, module: nn.Module) -> None:
        """`name` is that of a block, such as `single_transformer_blocks.7`; anything else is left as it is."""
        if not is_block(name):
            return
        leaving: dict[str, list[tuple[str, FrozenLinear]]] = {}
        for path, linear in list(module.named_modules()):
            if not isinstance(linear, nn.Linear) or isinstance(linear, FrozenLinear):
                continue
            how, streams = self._decide(name, path)
            if how is None and not streams:
                continue
            layer = FrozenLinear(linear, how or plain)
            layer.train(linear.training)
            owner, _, leaf = path.rpartition(".")
            setattr(module.get_submodule(owner), leaf, layer)
            linear._parameters.clear()  # whoever still holds the old layer holds no weights
            if streams:
                leaving.setdefault(unit_of(path), []).append((path, layer))
                if is_modulation(path):
                    remember(module.get_submodule(owner), layer)
        if self.streamer and leaving:
            parts = (sorted(layers, key=lambda layer: position(layer[0])) for layers in leaving.values())
            self.streamer.take([[layer for _, layer in layers] for layers in parts])

    def _decide(self, block: str, path: str) -> tuple[Format | None, bool]:
        """The format of one linear layer (None: as it is), and whether it is streamed."""
        if is_modulation(path):
            how = self._form if self._config.modulation == "quantize" else None
            return how, block in self._streamed or self._config.modulation == "stream"
        return self._form, block in self._streamed


def form(name: str, device: torch.device) -> Format:
    """The format of that name, tried on this device. Raises `Unsupported` with the line that installs it."""
    module, package = PACKAGES[name]
    try:
        import_module(module)
    except Exception as error:  # a package for another torch raises anything
        absent = isinstance(error, ModuleNotFoundError) and module.startswith(error.name or "?")
        how = "is not installed" if absent else f"cannot be imported: {first_line(error)}"
        raise Unsupported(f"quantization {name} needs {package}, which {how}.", _install(package)) from error
    made: Format = _FORMATS[name]
    try:
        weight = torch.linspace(-0.05, 0.04, 64 * 128, device=device).sin().view(64, 128).bfloat16()
        parts, opener = made(weight)
        error_ = (opener(parts)().float() - weight.float()).norm() / weight.float().norm()
    except Exception as error:  # whatever it raises: this package cannot do it here
        seen = f"{package} cannot quantise to {name} on {device.type}: {first_line(error)}."
        raise Unsupported(seen, _install(package)) from error
    if not error_ < PROBE_ERROR:
        seen = f"{package}'s {name} is wrong on {device.type}: a weight came back with an error of {error_:.0%}."
        raise Unsupported(seen, "Take another quantization, or another release of the package.")
    return made


def _install(package: str) -> str:
    old = tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 5)
    pin = {"torchao": "==0.9.0", "optimum-quanto": "==0.2.4"}.get(package, "") if old else ""
    return f"Install it with `pip install {package}{pin}`, or set another quantization."


def _quanto_bytes(kind: str) -> Format:
    def make(weight: Tensor) -> tuple[Parts, Opener]:
        """One scale for each output channel, so that its largest weight is the largest number of the format."""
        from optimum import quanto

        qtype = getattr(quanto, kind)
        scale = _nonzero(quanto.AbsmaxOptimizer()(weight, _told(quanto.AbsmaxOptimizer, qtype), 0))  # (out, 1)
        # Divided in fp32: bf16 has no room for the fractions of 127, and some would be rounded to the wrong side.
        data = torch.ops.quanto.quantize_symmetric(weight.float(), dtype=qtype.dtype, axis=0, scale=scale.float())
        return {"data": data, "scale": scale}, _open_bytes

    return make


def _told(optimizer: type, qtype: Any) -> Any:
    """What an optimizer is told of a format: its largest number or its bits until quanto 0.2.4, itself since then."""
    named = inspect.signature(optimizer.__call__).parameters
    return next((getattr(qtype, name) for name in ("qmax", "bits") if name in named), qtype)


def _open_bytes(parts: Parts) -> Callable[[], Tensor]:
    data, scale = parts["data"], parts["scale"]
    if data.dtype.is_floating_point:  # torch multiplies fp8 with nothing
        return lambda: data.to(scale.dtype).mul_(scale)
    return lambda: data * scale


def _quanto_int4(weight: Tensor) -> tuple[Parts, Opener]:
    """Groups of 128 inputs, each with its scale and its smallest value."""
    from optimum import quanto

    groups = weight.reshape(-1, group_size(weight.shape[1]))
    scale, shift = quanto.MaxOptimizer()(groups, _told(quanto.MaxOptimizer, quanto.qint4), 0)  # (groups, 1) each
    scale = _nonzero(scale)
    data = torch.ops.quanto.quantize_affine(
        groups.float(), bits=4, axis=0, group_size=None, scale=scale.float(), shift=shift.float()
    )
    half = -(-len(data) // 2)
    data[: len(data) - half] |= data[half:] << 4  # the second half of the groups lies in the upper four bits
    shape = tuple(weight.shape)
    return {"data": data[:half], "scale": scale, "shift": shift}, lambda parts: _open_int4(parts, shape)


def _open_int4(parts: Parts, shape: tuple[int, ...]) -> Callable[[], Tensor]:
    data, scale, shift = parts["data"], parts["scale"], parts["shift"]

    def dense() -> Tensor:
        out = torch.empty(len(scale), data.shape[1], dtype=scale.dtype, device=data.device)
        out[: len(data)] = data & 15
        out[len(data) :] = data[: len(scale) - len(data)] >> 4
        return out.mul_(scale).sub_(shift).view(shape)

    return dense


def _nonzero(scale: Tensor) -> Tensor:
    """A row of zeros has the scale 0, and 0 / 0 is not a number."""
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def _torchao(kind: str) -> Format:
    def make(weight: Tensor) -> tuple[Parts, Opener]:
        """torchao's own weight-only tensor, taken apart into the plain tensors in it."""
        from torchao import quantization

        settings: Any = getattr(quantization, f"{kind.title()}WeightOnlyConfig", None)
        settings = settings or getattr(quantization, f"{kind}_weight_only")  # up to 0.8
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        quantization.quantize_(linear, settings())
        parts: Parts = {}
        rebuild = _take_apart(linear.weight.data, "", parts)
        empty = weight.abs().amax(1, keepdim=True) == 0
        for key, part in parts.items():  # 0.18 makes fp8 of 0 / 0
            if part.shape == weight.shape:
                part.view(torch.uint8).masked_fill_(empty, 0)
            elif part.is_floating_point():
                parts[key] = _nonzero(part)
        return parts, lambda found: _open_torchao(rebuild(found))

    return make


def _open_torchao(tensor: Any) -> Callable[[], Tensor]:
    def dense() -> Tensor:
        with torch.no_grad():
            made: Tensor = tensor.dequantize()
        return made

    return dense


def _take_apart(tensor: Any, prefix: str, parts: Parts) -> Callable[[Parts], Any]:
    """Collect the plain tensors that a tensor subclass is made of; returns what makes it of them again."""
    if not hasattr(tensor, "__tensor_flatten__"):
        parts[prefix] = tensor
        return lambda found: found[prefix]
    names, meta = tensor.__tensor_flatten__()
    inner = {name: _take_apart(getattr(tensor, name), f"{prefix}.{name}", parts) for name in names}
    kind, size, stride = type(tensor), tensor.size(), tensor.stride()
    return lambda found: kind.__tensor_unflatten__({n: make(found) for n, make in inner.items()}, meta, size, stride)


def _nf4(weight: Tensor) -> tuple[Parts, Opener]:
    """bitsandbytes' 4-bit normal floats: groups of 64, whose scales are themselves held in 8 bits."""
    from bitsandbytes import functional

    data, state = functional.quantize_4bit(
        weight.contiguous(), blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    outer = state.state2
    parts = {
        "data": data, "absmax": state.absmax, "code": state.code, "offset": state.offset,
        "outer_absmax": outer.absmax, "outer_code": outer.code,
    }  # fmt: skip
    sizes = state.shape, state.dtype, outer.blocksize

    def opener(found: Parts) -> Callable[[], Tensor]:
        shape, dtype, blocksize = sizes
        scales = functional.QuantState(
            absmax=found["outer_absmax"], code=found["outer_code"], blocksize=blocksize, dtype=torch.float32
        )
        state = functional.QuantState(
            absmax=found["absmax"], shape=shape, code=found["code"], blocksize=64, quant_type="nf4", dtype=dtype,
            offset=found["offset"], state2=scales,
        )  # fmt: skip
        dense: Callable[[], Tensor] = lambda: functional.dequantize_4bit(found["data"], state)  # noqa: E731
        return dense

    return parts, opener


_FORMATS: dict[str, Format] = {
    "int8": _quanto_bytes("qint8"),
    "fp8": _quanto_bytes("qfloat8_e4m3fn"),
    "int4": _quanto_int4,
    "torchao-int8": _torchao("int8"),
    "torchao-fp8": _torchao("float8"),
    "nf4": _nf4,
    "fp8-dynamic": fp8.hold,
}
