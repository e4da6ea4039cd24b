"""One optimizer step: alone or under DDP here, inside DeepSpeed's engine in `zero`, sharded by FSDP in `fsdp`.

All kinds give and take the same values: weights in fp32 where they are held so, and AdamW's moments, by parameter name.
A checkpoint of theirs does not show which of them wrote it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from xflux_trainer import graphs, optimizers, slots
from xflux_trainer.averages import Averages
from xflux_trainer.backward import BackwardSteps, coefficient
from xflux_trainer.config import TrainConfig
from xflux_trainer.errors import Unsupported
from xflux_trainer.lossscale import LossScale
from xflux_trainer.optimizers import MOMENTS, adamw
from xflux_trainer.ranks import Ranks

__all__ = ["MOMENTS", "Piece", "PlainStepper", "Read", "Stepper", "adamw", "learning_rate", "refuse_step_in_backward"]

Piece = dict[str, Tensor]
"""What is saved of one trained parameter: `weight`, the optimizer's tensors, `ema`, `compensation`."""
Read = Callable[[str], Piece]


def learn(stepper: Stepper, compute: Callable[..., Tensor], inputs: tuple[Tensor | None, ...]) -> Tensor:
    """Forward and backward pass of one batch: the loss that `compute(*inputs)` is."""
    recorder = getattr(stepper, "recorder", None)
    if recorder is not None:
        recorded: Tensor = recorder.run(compute, inputs)
        return recorded
    loss = compute(*inputs)
    stepper.backward(loss)
    return loss.detach()


def release(stepper: Stepper) -> None:
    """Give back what is held for steps alone, before something else wants the device's memory."""
    recorder = getattr(stepper, "recorder", None)
    if recorder is not None:
        recorder.release()


class Stepper(Protocol):
    """One optimizer step, whoever carries it out. Every rank calls every method."""

    strategy: str

    def __call__(self, *args: Any, **more: Any) -> Tensor: ...
    def begin(self, learning_rate: float) -> None: ...
    def micro(self, last: bool) -> AbstractContextManager[Any]: ...
    def backward(self, loss: Tensor) -> None: ...
    def step(self) -> float: ...
    def shapes(self) -> dict[str, tuple[int, ...]]: ...
    def pieces(self, *, result: bool = False) -> Iterator[tuple[str, Piece]]: ...
    def scalars(self) -> dict[str, float]: ...
    def load(self, read: Read, scalars: dict[str, float]) -> None: ...
    def averaged(self) -> AbstractContextManager[Any]: ...


def learning_rate(config: TrainConfig, step: int, total: int) -> float:
    """The rate of the step with that number, counted from 0."""
    kind, warm = config.lr_scheduler, config.lr_warmup_steps
    if kind == "constant":
        return config.learning_rate
    if step < warm:
        return config.learning_rate * (step + 1) / warm
    if kind == "constant_with_warmup":
        return config.learning_rate
    progress = min(1.0, (step - warm) / max(1, total - warm))
    falling = 1 - progress if kind == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return config.learning_rate * falling


class PlainStepper:
    """One process, or several under DDP, each with all trained weights and the whole optimizer."""

    def __init__(
        self, module: nn.Module, trained: dict[str, nn.Parameter], config: TrainConfig, ranks: Ranks, accumulation: int
    ) -> None:
        self.strategy = "ddp" if ranks.world_size > 1 else "single"
        refuse_step_in_backward(config, self.strategy, accumulation)
        self._main = ranks.main
        self._trained = trained
        self._accumulation = accumulation
        self._max_norm = config.max_grad_norm
        self._steps = 0
        self._scale = LossScale() if config.mixed_precision == "fp16" else None
        # Adapters are hundreds of small tensors, which one fused call steps together.
        self._together = not config.step_in_backward and all(
            slots.weight_update(config, weight.dtype) == "fp32" for weight in trained.values()
        )
        self._slots, self._optimizers = slots.make(trained, config, ranks.device, together=self._together)
        self._averages = Averages(trained, config.ema_decay)
        self._in_backward: BackwardSteps | None = None
        if config.step_in_backward:
            by_weight = {slot.weight: slot for slot in self._slots}
            self._in_backward = BackwardSteps(
                trained.values(),
                config.backward_clip,
                config.max_grad_norm,
                lambda weight, grad, factor: self._take(by_weight[weight], grad, factor),
                lambda weight, grad: by_weight[weight].measure(grad),
            )
        self._world = ranks.world_size
        self.recorder = None
        if self._together:
            self.recorder = graphs.recorder(module, trained, config, ranks.device, accumulation, ranks.say_own)
        self._model = module
        if self._world > 1 and self.recorder is not None:
            # A pass is recorded without the others, and its few gradient tensors are exchanged once a step.
            for weight in trained.values():
                dist.broadcast(weight.detach(), 0)
        elif self._world > 1:
            self._model = _distribute(module, trained, ranks)

    def __call__(self, *args: Any, **more: Any) -> Tensor:
        v: Tensor = self._model(*args, **more)
        return v

    def micro(self, last: bool) -> AbstractContextManager[Any]:
        """Around forward and backward: gradients are exchanged once, in the last pass of a step."""
        if last or not isinstance(self._model, nn.parallel.DistributedDataParallel):
            return nullcontext()
        quiet: AbstractContextManager[Any] = self._model.no_sync()
        return quiet

    def begin(self, learning_rate: float) -> None:
        for optimizer in self._optimizers:
            optimizers.set_rate(optimizer, learning_rate)

    def backward(self, loss: Tensor) -> None:
        if self._in_backward:
            self._steps += 1  # the number of the step that is being taken
            self._steps -= not self._in_backward.run(loss)
            return
        loss = loss / self._accumulation
        (loss * self._scale.scale if self._scale else loss).backward()

    def step(self) -> float:
        """Returns the gradients' global norm before clipping. Where it is not finite no step is taken."""
        if self._in_backward:
            return self._in_backward.norm
        if self.recorder is not None:
            return self._step_recorded(self.recorder)
        grads = [weight.grad for weight in self._trained.values() if weight.grad is not None]
        down = 1 / self._scale.scale if self._scale else 1.0
        norm = self._clip(grads, down) if self._together else global_norm(grads) * down
        if self._scale:
            self._scale.update(overflow=not math.isfinite(norm))
        if math.isfinite(norm):
            self._steps += 1
            if self._together:
                with optimizers.quietly(self._optimizers[0], self._slots[0].weight.device):
                    self._optimizers[0].step()
                self._averages.update_all(self._trained, self._steps)
            else:
                self._step_each(coefficient(norm, self._max_norm) * down)
        for weight in self._trained.values():
            weight.grad = None
        return norm

    def _step_recorded(self, recorder: graphs.Recorder) -> float:
        """With AdamW all of it is queued before the norm is read: the device has no time to wait for the host."""
        grads = recorder.grads()
        if self._world > 1:
            for grad in grads:
                dist.all_reduce(grad)
            torch._foreach_div_(grads, self._world)
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(grad) for grad in grads]))
        if self._max_norm:
            torch._foreach_mul_(grads, (self._max_norm / (norm + 1e-6)).clamp(max=1.0))
        recorder.publish()
        optimizer: Any = self._optimizers[0]
        if optimizer.defaults.get("fused"):
            optimizer.found_inf = (~norm.isfinite()).float()  # torch's own switch: this step is left out
            optimizer.step()
        elif math.isfinite(float(norm)):
            optimizer.step()
        found = float(norm)
        if math.isfinite(found):
            self._steps += 1
            self._averages.update_all(self._trained, self._steps)
        for weight in self._trained.values():
            weight.grad = None
        return found

    def _step_each(self, factor: float) -> None:
        """One parameter after the other, so that there is one fp32 gradient at a time."""
        for slot in self._slots:
            if slot.weight.grad is not None:
                self._take(slot, slot.weight.grad, factor)
                slot.weight.grad = None

    def _clip(self, grads: list[Tensor], down: float) -> float:
        """Bring gradients in fp32 back to their scale, and below the global norm, where they are."""
        if self._scale:
            torch._foreach_mul_(grads, down)
        return float(nn.utils.clip_grad_norm_(list(self._trained.values()), self._max_norm or math.inf))

    def _take(self, slot: slots.Slot, grad: Tensor, factor: float | Tensor) -> None:
        slot.step(grad, factor, self._steps)
        if self._averages.get(slot.name) is not None:  # else the value, an fp32 copy, is not made
            self._averages.update(slot.name, slot.value(), self._steps)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(parameter.shape) for name, parameter in self._trained.items()}

    def pieces(self, *, result: bool = False) -> Iterator[tuple[str, Piece]]:
        """Every parameter's piece on the host of rank 0, one after the other; all ranks hold the same. `result`: what a
        result is made of alone."""
        for slot in self._slots:
            if not self._main:
                yield slot.name, {}
                continue
            values, average = slot.parts(), self._averages.get(slot.name)
            if average is not None:
                values["ema"] = average
            values = slots.of_result(values) if result else values
            yield slot.name, {key: value.detach().to("cpu", copy=True) for key, value in values.items()}

    def scalars(self) -> dict[str, float]:
        """`steps` taken, fp16's `loss_scale` and `growth_tracker`, and the `previous_norm` that clips the next step."""
        values = {"steps": float(self._steps)}
        if self._scale:
            values |= self._scale.scalars()
        if self._in_backward and self._in_backward.previous is not None:
            values["previous_norm"] = self._in_backward.previous
        return values

    def load(self, read: Read, scalars: dict[str, float]) -> None:
        """Take over what `pieces` and `scalars` of any kind gave. `read` is asked for one parameter at a time."""
        self._steps = int(scalars.get("steps", 0))
        for slot in self._slots:
            piece = read(slot.name)
            slot.load(piece, self._steps)
            # Where no average was kept, one begins with the weights.
            self._averages.set(slot.name, piece["ema"] if "ema" in piece else slot.value())
        if self._scale:
            self._scale.load(scalars)
        if self._in_backward:
            self._in_backward.previous = scalars.get("previous_norm")

    def averaged(self) -> AbstractContextManager[Any]:
        return self._averages.swapped()


def global_norm(grads: list[Tensor]) -> float:
    """The 2-norm of all gradients as one vector, summed up in fp32 whatever they are held in."""
    if not grads:
        return 0.0
    norms = torch.stack([torch.linalg.vector_norm(grad, dtype=torch.float32) for grad in grads])
    return float(torch.linalg.vector_norm(norms))


def refuse_step_in_backward(config: TrainConfig, strategy: str, accumulation: int) -> None:
    """Raise `Unsupported` for what stepping in the backward pass rules out, under whatever strategy: its gradients are
    gone before anybody could add to them."""
    if not config.step_in_backward:
        return
    if strategy != "single":
        raise Unsupported(
            f"step_in_backward steps before gradients could be exchanged or sharded, and this run is under {strategy}.",
            "Set distributed_type to NO and num_processes to 1 in the accelerate config, or step_in_backward to false.",
        )
    if accumulation > 1:
        raise Unsupported(
            f"step_in_backward cannot accumulate gradients, and gradient_accumulation_steps is {accumulation}.",
            "Set it to 1 in the train config and the accelerate config, or step_in_backward to false.",
        )
    if config.mixed_precision == "fp16":
        raise Unsupported(
            "step_in_backward cannot leave out a step whose gradients overflow, and mixed_precision is fp16.",
            "Set mixed_precision to bf16, or step_in_backward to false.",
        )


def _distribute(module: nn.Module, trained: dict[str, nn.Parameter], ranks: Ranks) -> nn.Module:
    """DDP over the trained parameters alone.

    It would send all parameters and buffers of rank 0 to the others at its start; the frozen ones are 24 GB that every
    rank has read from the same files.
    """
    ours = {id(parameter) for parameter in trained.values()}
    tensors = [*module.named_parameters(), *module.named_buffers()]
    frozen = [name for name, tensor in tensors if id(tensor) not in ours]
    ddp = nn.parallel.DistributedDataParallel
    ddp._set_params_and_buffers_to_ignore_for_model(module, frozen)
    ids = [ranks.device.index] if ranks.device.type == "cuda" else None
    return ddp(module, device_ids=ids, gradient_as_bucket_view=True, broadcast_buffers=False)
