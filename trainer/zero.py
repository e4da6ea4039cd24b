"""AdamW inside DeepSpeed's engine: ZeRO 1, 2 and 3, on the device or offloaded to the host.

DeepSpeed keeps the fp32 weights of all parameters end to end, cut into one flat part for each rank, and Adam's moments
of the same shape. Its public calls for them (`safe_get_full_*`) fail before the first step of a run, which is when a
checkpoint is loaded, and know no average; so the parts are addressed here, by the maps that those calls use.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from xflux_trainer import slots
from xflux_trainer.averages import decay_at
from xflux_trainer.config import TrainConfig
from xflux_trainer.errors import Unsupported
from xflux_trainer.model import DTYPES
from xflux_trainer.optim import Piece, Read, refuse_step_in_backward
from xflux_trainer.optimizers import MOMENTS, adamw, set_rate
from xflux_trainer.quantize import refuse as refuse_quantised
from xflux_trainer.ranks import Ranks
from xflux_trainer.zero_settings import deepspeed_settings

__all__ = ["ZeroStepper", "deepspeed_settings", "partitioner"]


class Fragment(NamedTuple):
    """Where this rank's part of one parameter lies."""

    flat: int
    """Number of the flat tensor."""
    offset: int
    """First element there."""
    start: int
    """First element of the parameter, as if it had one dimension."""
    numel: int


class ZeroStepper:
    """DeepSpeed's engine. The trained parameters in the model are copies of its fp32 masters, in bf16 or fp16."""

    def __init__(
        self, module: nn.Module, trained: dict[str, nn.Parameter], config: TrainConfig, ranks: Ranks, accumulation: int
    ) -> None:
        if ranks.device.type == "cpu" and config.mixed_precision == "fp16":
            raise Unsupported("DeepSpeed computes nothing in fp16 on the CPU.", "Set mixed_precision to bf16.")
        deepspeed = _deepspeed(ranks)
        self._gathered = deepspeed.zero.GatheredParameters
        self._trained = trained
        self._device = ranks.device
        # ZeRO-3's own partitioning leaves a shape of nothing behind.
        self._shapes = {name: tuple(getattr(value, "ds_shape", value.shape)) for name, value in trained.items()}
        count = sum(torch.Size(shape).numel() for shape in self._shapes.values())
        settings, notes = deepspeed_settings(os.environ, config, ranks.world_size, accumulation, count)
        for note in notes:
            ranks.say(f"note: {note}")
        self.strategy = f"zero{settings['zero_optimization']['stage']}"
        refuse_step_in_backward(config, self.strategy, accumulation)
        refuse_quantised(config, self.strategy)
        dtype = DTYPES[config.mixed_precision]
        # The engine makes its masters from what it is given, and it wants that in its own format: what is finer
        # (adapters in fp32 on a bf16 model) would be rounded, so it waits on the host.
        finer = {name: value.detach().float().cpu() for name, value in trained.items() if value.dtype != dtype}
        for name in finer:
            trained[name].data = trained[name].data.to(dtype)
        optimizer = adamw(list(trained.values()), config, ranks.device, fused_on_host=True)
        # ZeRO-3 cuts up what is whole when the engine is made, and marks it so.
        with nullcontext() if self.strategy == "zero3" else _unsent(module, trained):
            self._engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings)
        self._zero: Any = self._engine.optimizer
        self._fragments = {name: _fragment(self._zero, value, ranks.rank) for name, value in trained.items()}
        for name, value in finer.items():
            self._write(self._flats, name, value)
            self._publish(name, value)
        self._decay = config.ema_decay
        self._average = [flat.detach().clone() for flat in self._flats] if self._decay else []

    def __call__(self, *args: Any, **more: Any) -> Tensor:
        v: Tensor = self._engine(*args, **more)
        return v

    def begin(self, learning_rate: float) -> None:
        set_rate(self._zero, learning_rate)

    @contextmanager
    def micro(self, last: bool) -> Iterator[None]:
        """The engine counts the passes itself. ZeRO 1 exchanges gradients once a step, 2 and 3 as they come, since
        no rank keeps all of them."""
        yield
        self._engine.step()

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss)

    def step(self) -> float:
        """The engine has stepped at the end of the last pass; this is the norm that it saw."""
        if self._average and self._engine.was_step_applied():
            for mean, flat in zip(self._average, self._flats):  # noqa: B905 (of one length)
                mean.lerp_(flat.detach(), 1 - decay_at(self._decay, self._steps))
        return float(self._engine.get_global_grad_norm() or 0.0)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return dict(self._shapes)

    def pieces(self, *, result: bool = False) -> Iterator[tuple[str, Piece]]:
        """Every parameter with its fp32 master, moments and average, whole on rank 0's host. Every rank iterates.
        `result`: what a result is made of alone."""
        parts = {"weight": self._flats}
        if self._steps:
            parts |= {key: [self._state(flat)[key] for flat in self._flats] for key in MOMENTS}
        if self._average:
            parts["ema"] = self._average
        parts = slots.of_result(parts) if result else parts
        main = dist.get_rank() == 0
        for name in self._trained:
            values = {}
            for key, flats in parts.items():
                whole = self._whole(flats, name, everywhere=False)
                if main:
                    values[key] = whole.cpu()
            yield name, values

    def scalars(self) -> dict[str, float]:
        """The number of steps, and fp16's loss scale with what moves it."""
        return {"steps": float(self._steps), **scaling(getattr(self._zero, "loss_scaler", None))}

    def load(self, read: Read, scalars: dict[str, float]) -> None:
        """Put a checkpoint's values in. Every rank calls it, and each copies its own part."""
        steps = scalars.get("steps", 0.0)
        if steps:
            for flat in self._flats:
                place = flat.device if flat.device.type == "cuda" else torch.device("cpu")
                zeros = {key: torch.zeros_like(flat) for key in MOMENTS}
                self._zero.optimizer.state[flat] = {"step": torch.tensor(steps, device=place), **zeros}
        for name in self._trained:
            values = read(name)
            self._write(self._flats, name, values["weight"])
            self._publish(name, values["weight"])  # the engine renews its copies only after a step
            for key in MOMENTS if steps else ():
                if key in values:  # a parameter without gradients has none
                    self._write([self._state(flat)[key] for flat in self._flats], name, values[key])
            if self._average:
                self._write(self._average, name, values.get("ema", values["weight"]))
        load_scaling(getattr(self._zero, "loss_scaler", None), scalars)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The model computes with the average's values inside, and with the masters' again after it."""
        if not self._average:
            yield
            return
        for name in self._trained:
            self._publish(name, self._whole(self._average, name))
        try:
            yield
        finally:
            for name in self._trained:
                self._publish(name, self._whole(self._flats, name))

    @property
    def _flats(self) -> list[Tensor]:
        """This rank's fp32 masters, by parameter group or, under ZeRO-3, by sub-group."""
        zero = self._zero
        flats: list[Tensor] = (
            zero.fp32_partitioned_groups_flat if self.strategy == "zero3" else zero.single_partition_of_fp32_groups
        )
        return flats

    def _state(self, flat: Tensor) -> dict[str, Tensor]:
        held: dict[str, Tensor] = self._zero.optimizer.state.get(flat, {})
        return held

    @property
    def _steps(self) -> int:
        return int(self._state(self._flats[0]).get("step", 0))

    def _whole(self, flats: list[Tensor], name: str, *, everywhere: bool = True) -> Tensor:
        """One parameter's values on the device, of which every rank has a part or none; else on rank 0 alone."""
        shape = self._shapes[name]
        whole = torch.zeros(torch.Size(shape).numel(), dtype=torch.float32, device=self._device)
        if found := self._fragments[name]:
            flat = flats[found.flat].detach().narrow(0, found.offset, found.numel)
            whole.narrow(0, found.start, found.numel).copy_(flat)
        if everywhere:
            dist.all_reduce(whole)
        else:
            dist.reduce(whole, 0)
        return whole.view(shape)

    def _write(self, flats: list[Tensor], name: str, value: Tensor) -> None:
        """Put this rank's part of `value` where it belongs."""
        if found := self._fragments[name]:
            part = value.flatten().narrow(0, found.start, found.numel)
            flats[found.flat].detach().narrow(0, found.offset, found.numel).copy_(part)

    @torch.no_grad()
    def _publish(self, name: str, value: Tensor) -> None:
        """Give the model the value to compute with. Every rank has the same, and calls it."""
        parameter: Any = self._trained[name]
        if self.strategy != "zero3":
            parameter.data.copy_(value)
            return
        with self._gathered([parameter], modifier_rank=0):
            parameter.data.copy_(value)


def scaling(scaler: Any) -> dict[str, float]:
    """What moves fp16's loss scale; nothing without one. DeepSpeed counts passes, and remembers the last overflow's."""
    if not getattr(scaler, "dynamic", False):
        return {}
    clean = scaler.cur_iter - scaler.last_overflow_iter - 1
    if clean > scaler.scale_window:  # it doubles at every multiple of the window but 0
        clean = (clean - 1) % scaler.scale_window + 1
    values = {"loss_scale": scaler.cur_scale, "growth_tracker": clean, "hysteresis": scaler.cur_hysteresis}
    return {name: float(value) for name, value in values.items()}


def load_scaling(scaler: Any, scalars: Mapping[str, float]) -> None:
    """Put back what `scaling` gave, or what another strategy's scale was."""
    if getattr(scaler, "dynamic", False) and scalars.get("loss_scale"):
        scaler.cur_scale = scalars["loss_scale"]
        scaler.last_overflow_iter, scaler.cur_iter = -1, int(scalars.get("growth_tracker", 0))
        scaler.cur_hysteresis = int(scalars.get("hysteresis", scaler.cur_hysteresis))


def partitioner(config: TrainConfig, ranks: Ranks) -> Callable[[str, nn.Module], None] | None:
    """What cuts a block up among the ranks as soon as it is loaded, for `load_transformer(prepare=…)`.

    None where whole weights stay on every device, which is all but ZeRO-3. With it no device ever holds more of the
    base than its share and one block.
    """
    if not ranks.launch.deepspeed:
        return None
    settings, _ = deepspeed_settings(os.environ, config, ranks.world_size, 1, 1)
    stage = settings["zero_optimization"]["stage"]
    refuse_quantised(config, f"zero{stage}")
    if stage != 3:
        return None
    deepspeed = _deepspeed(ranks)

    def partition(name: str, block: nn.Module) -> None:
        deepspeed.zero.Init(module=block, config_dict_or_path=settings, dtype=DTYPES[config.mixed_precision])

    return partition


@contextmanager
def _unsent(module: nn.Module, trained: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Inside, DeepSpeed takes frozen weights for ZeRO-3's, which it does not send from rank 0 to all at its start.

    Every rank has read the same 24 GB from its files; and where adapters lie among them their rows are apart, which
    NCCL does not send.
    """
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    ours = {id(parameter) for parameter in trained.values()}
    others: list[Any] = [each for each in module.parameters() if id(each) not in ours]
    frozen = [each for each in others if not hasattr(each, "ds_status")]
    for parameter in frozen:
        parameter.ds_status = ZeroParamStatus.NOT_AVAILABLE
    try:
        yield
    finally:
        for parameter in frozen:
            del parameter.ds_status


def _deepspeed(ranks: Ranks) -> Any:
    """The package, quiet, and without what it would compile at its first start."""
    if ranks.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # it would take a GPU that is there, asked for or not
        os.environ.setdefault("LOCAL_SIZE", str(ranks.launch.local_world_size))  # else it runs numactl to count
    import deepspeed

    deepspeed.utils.logger.setLevel("WARNING")
    if ranks.device.type == "cpu":
        # Collectives of its own: minutes, and a compiler, for nothing that gloo does not do.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # It takes the process group that is there; before this call it thinks that it is alone.
    deepspeed.init_distributed("nccl" if ranks.device.type == "cuda" else "gloo", auto_mpi_discovery=False)
    return deepspeed


def _fragment(zero: Any, parameter: Any, rank: int) -> Fragment | None:
    """Where this rank's part of a parameter lies; None where it has none."""
    if hasattr(parameter, "ds_id"):
        flat, offset, padded = zero.grad_position[zero.get_param_id(parameter)]
        start = rank * padded
        numel = min(padded, parameter.ds_numel - start)
        return Fragment(flat, offset, start, numel) if numel > 0 else None
    mapping = getattr(parameter, "_hp_mapping", None)
    if mapping is None:
        return None
    here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
    return Fragment(mapping.param_group_index, there.start, here.start, here.numel)
