"""Forward and backward of a batch size recorded once as a CUDA graph, and replayed from then on.

A step of FLUX is some 5,000 kernels. Where the host needs longer to launch them than the GPU to compute them (small
images, a slow host) the GPU waits; a recorded step is launched in one call. Everything that a recording reads and
writes keeps its place: inputs are copied into the recording's own, gradients of adapters lie in one flat tensor.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from xflux_trainer.config import TrainConfig
from xflux_trainer.errors import first_line
from xflux_trainer.fast import Fast

Inputs = tuple["Tensor | None", ...]
Key = tuple[Any, ...]
Compute = Callable[..., Tensor]
"""From inputs to a loss, without a look at what the device computes."""
WARM_UP = 2
"""Passes of a size before it is recorded: libraries set themselves up in the first."""
MOST = 32
"""Sizes that are recorded; rarer ones are launched kernel by kernel. A recording takes some 50 MB."""


@dataclass
class _Recording:
    graph: Any
    inputs: Inputs
    loss: Tensor
    rest: dict[nn.Parameter, Tensor]
    """Gradients outside of the flat tensor."""
    held: tuple[Any, ...]
    """What the graph reads and nothing else may hold."""


class Recorder:
    """Recordings by the shapes of their inputs, in one pool of memory: no two of them run at a time."""

    def __init__(
        self, fast: Fast, trained: Iterable[nn.Parameter], accumulation: int, device: torch.device,
        say: Callable[[str], None] = print,
    ) -> None:  # fmt: skip
        """`say` is told once why nothing is recorded any more, should that come to be."""
        self._fast = fast
        self._say = say
        self._trained = list(trained)
        self._accumulation = accumulation
        self._flat, self._views = _flat_grads(fast, device)
        self._sum = torch.zeros_like(self._flat) if accumulation > 1 else self._flat
        self._summed = _like(self._views, self._flat, self._sum)
        self._rest: dict[nn.Parameter, Tensor] = {}
        self._recordings: dict[Key, _Recording] = {}
        self._seen: Counter[Key] = Counter()
        self._pool: Any = None
        self._micro = 0
        self.broken = ""
        """Why nothing is recorded any more."""

    def run(self, compute: Compute, inputs: Inputs) -> Tensor:
        """The loss; its gradients are added to those of the step, divided by the accumulation."""
        key = key_of(inputs)
        recording = self._recordings.get(key)
        if recording is None and self._ripe(key, inputs):
            recording = self._record(key, compute, inputs)
        self._seen[key] += 1
        if recording is None:
            loss, rest = self._launch(compute, inputs)
        else:
            for place, value in zip(recording.inputs, inputs):  # noqa: B905 (of one length)
                if place is not None and place is not value:
                    place.copy_(value, non_blocking=True)
            recording.graph.replay()
            loss, rest = recording.loss.clone(), recording.rest
        self._add(rest)
        return loss

    def grads(self) -> list[Tensor]:
        """All gradients of the step, in few tensors."""
        return [self._sum, *self._rest.values()]

    def publish(self) -> None:
        """Put each parameter's gradient where optimizers look for it; the next pass begins a new step."""
        for parameter, grad in [*self._summed.items(), *self._rest.items()]:
            parameter.grad = grad
        self._micro = 0

    def release(self) -> None:
        """Give the recordings' memory back; steps are recorded anew when they come again."""
        self._recordings.clear()
        self._pool = None
        torch.cuda.empty_cache()

    def _add(self, rest: dict[nn.Parameter, Tensor]) -> None:
        self._micro += 1
        if self._accumulation == 1:
            self._rest = rest
        elif self._micro == 1:
            self._sum.copy_(self._flat)
            self._rest = {parameter: grad.clone() for parameter, grad in rest.items()}
        else:
            self._sum.add_(self._flat)
            for parameter, grad in rest.items():
                self._rest[parameter].add_(grad)

    def _ripe(self, key: Key, inputs: Inputs) -> bool:
        """Whether a size is to be recorded now. Texts of differing lengths (a mask) are left to diffusers' blocks."""
        masked = any(each is not None and each.dtype == torch.bool for each in inputs)
        return not self.broken and not masked and self._seen[key] >= WARM_UP and len(self._recordings) < MOST

    def _launch(self, compute: Compute, inputs: Inputs) -> tuple[Tensor, dict[nn.Parameter, Tensor]]:
        """Kernel by kernel. What the recordings hold is of no use to such a pass: where it lacks memory they go."""
        try:
            return self._compute(compute, inputs)
        except torch.cuda.OutOfMemoryError:
            if not self._recordings:
                raise
        # Not in the handler, in which the failed pass still holds its tensors.
        self.release()
        return self._compute(compute, inputs)

    def _compute(self, compute: Compute, inputs: Inputs) -> tuple[Tensor, dict[nn.Parameter, Tensor]]:
        for parameter in self._trained:
            parameter.grad = None
        loss = compute(*inputs)
        (loss / self._accumulation).backward()
        for parameter, place in self._views.items():
            if parameter.grad is not None:  # by diffusers' blocks, which know of no places
                place.copy_(parameter.grad)
        rest = {each: each.grad for each in self._trained if each.grad is not None and each not in self._views}
        return loss.detach(), rest

    def _record(self, key: Key, compute: Compute, inputs: Inputs) -> _Recording | None:
        # The places of the positions stay the caller's own: the rotation that belongs to them is found by them, and is
        # made before, so that it lies outside of the recordings' memory.
        self._fast.rotation(*(each for each in inputs if each is not None and _is_positions(each)))
        places = tuple(each if each is None or _is_positions(each) else each.clone() for each in inputs)
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        try:
            # Other threads copy batches meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                loss, rest = self._compute(compute, places)
        except RuntimeError as error:
            self.broken = first_line(error)
        if self.broken:
            del graph
            torch.cuda.set_stream(stream)  # torch stays in the recording's where that cannot be ended
            torch.cuda.synchronize()
            # Without them there is as much memory as without recordings.
            self.release()
            self._say(f"note: steps are launched kernel by kernel from here on, none could be recorded: {self.broken}")
            return None
        made = _Recording(graph, places, loss, rest, self._fast.held())
        self._recordings[key] = made
        return made


def recorder(
    module: nn.Module, trained: dict[str, nn.Parameter], config: TrainConfig, device: torch.device, accumulation: int,
    say: Callable[[str], None] = print,
) -> Recorder | None:  # fmt: skip
    """Where a step can be recorded: adapters, by the fused kernels, with all weights on each rank's GPU."""
    fast = getattr(module, "fast", None)
    streams = config.stream_blocks or config.modulation == "stream"
    if not config.cuda_graphs or device.type != "cuda" or not isinstance(fast, Fast) or streams:
        return None
    if config.mode != "lora" or config.mixed_precision != "bf16" or config.step_in_backward:
        return None
    return Recorder(fast, trained.values(), accumulation, device, say)


def _flat_grads(fast: Fast, device: torch.device) -> tuple[Tensor, dict[nn.Parameter, Tensor]]:
    """One tensor for the gradients of all the blocks' adapters, and each parameter's part of it."""
    owners = list(fast.adapters())
    sizes = [(own.width * own.depth, own.height * own.rank) for own in owners]
    flat = torch.zeros(sum(map(sum, sizes)), dtype=torch.float32, device=device)
    views: dict[nn.Parameter, Tensor] = {}
    start = 0
    for own, (down, up) in zip(owners, sizes):  # noqa: B905 (of one length)
        middle, end = start + down, start + down + up
        own.places = flat[start:middle].view(own.depth, own.width), flat[middle:end].view(own.height, own.rank)
        views |= own.split(*own.places)
        start = end
    return flat, views


def _like(views: dict[nn.Parameter, Tensor], one: Tensor, other: Tensor) -> dict[nn.Parameter, Tensor]:
    """The same parts of another tensor."""
    if one is other:
        return views
    return {own: other.as_strided(view.shape, view.stride(), view.storage_offset()) for own, view in views.items()}


def key_of(inputs: Inputs) -> Key:
    """What a recording is found by: shapes and formats and, of positions, which tensors they are. The rotation that
    belongs to them is a part of it, and an image has as many tokens on its side as upright."""
    return tuple(
        None if each is None else (each.shape, each.dtype, id(each) if _is_positions(each) else 0) for each in inputs
    )


def _is_positions(tensor: Tensor) -> bool:
    """(N, 3) of numbers: all that is alike for every batch of a size."""
    return tensor.dim() == 2 and tensor.shape[1] == 3 and tensor.dtype != torch.bool
