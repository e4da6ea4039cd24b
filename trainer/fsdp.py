"""AdamW on weights that FSDP2 (`torch.distributed.fsdp.fully_shard`) has cut up among the ranks, block by block.

What is trained is held in fp32, and all of it is stepped at once. With `weight_update: stochastic`, `kahan` or
`nearest` it is held in 16 bits, and each parameter is stepped by itself, as without FSDP (`parts`); so it is with
moments in 8 bits. A block's weights are whole only while it computes. Adapters are not cut up: they are a thousandth of
the base, and their gradients are exchanged once a step.
"""

from __future__ import annotations

import inspect
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from xflux_trainer import parts, slots
from xflux_trainer.averages import Averages
from xflux_trainer.backward import coefficient
from xflux_trainer.config import TrainConfig
from xflux_trainer.errors import Unsupported
from xflux_trainer.lossscale import LossScale
from xflux_trainer.memory_terms import cut_as_loaded, narrow
from xflux_trainer.model import DTYPES
from xflux_trainer.optim import Piece, Read, refuse_step_in_backward
from xflux_trainer.optimizers import MOMENTS, adamw, set_rate
from xflux_trainer.quantize import refuse as refuse_quantised
from xflux_trainer.ranks import Ranks
from xflux_trainer.sharded import refuse_optimizer, refuse_rounding

BLOCKS = ("transformer_blocks", "single_transformer_blocks")


@dataclass
class Shard:
    """One trained parameter: what the module holds, and this rank's part of it as the optimizer sees it."""

    parameter: nn.Parameter
    local: nn.Parameter
    shape: tuple[int, ...]
    whole: bool
    """Whether every rank has all of it."""

    def bind(self) -> None:
        """FSDP may move its storage at the first forward pass."""
        if not self.whole:
            self.local.data = self.parameter.to_local().detach()  # type: ignore[operator]

    def gradient(self) -> Tensor | None:
        grad = self.parameter.grad
        return grad if grad is None or self.whole else grad.to_local()  # type: ignore[operator,no-any-return]


class FsdpStepper:
    """FSDP2. What is cut up is held in fp32, or in bf16 (`narrow`), and AdamW's moments in fp32 or 8 bits."""

    strategy = "fsdp"

    def __init__(
        self, module: nn.Module, trained: dict[str, nn.Parameter], config: TrainConfig, ranks: Ranks, accumulation: int
    ) -> None:
        refuse(config)
        refuse_step_in_backward(config, self.strategy, accumulation)
        for note in notes(os.environ):
            ranks.say(f"note: {note}")
        self._module, self._ranks, self._accumulation = module, ranks, accumulation
        self._max_norm = config.max_grad_norm
        self._shards = shard(module, trained, config, ranks)
        local = {name: held.local for name, held in self._shards.items()}
        self._each: dict[str, parts.Part] = {}
        """What is stepped one after the other; nothing where all of it is stepped at once."""
        if narrow(config) or config.optimizer != "adamw":
            shapes, whole = self.shapes(), {name for name, held in self._shards.items() if held.whole}
            self._each, self._optimizers = parts.make(local, shapes, whole, config, ranks)
        else:
            self._optimizer = adamw(list(local.values()), config, ranks.device, fused_on_host=True)
            self._optimizers = [self._optimizer]
        self._averages = Averages(local, config.ema_decay)
        self._local = local
        self._scale = LossScale() if config.mixed_precision == "fp16" else None
        self._steps = 0

    def __call__(self, *args: Any, **more: Any) -> Tensor:
        v: Tensor = self._module(*args, **more)
        return v

    def begin(self, learning_rate: float) -> None:
        self._reshard()
        for optimizer in self._optimizers:
            set_rate(optimizer, learning_rate)

    def micro(self, last: bool) -> AbstractContextManager[Any]:
        """Weights that are cut up exchange their gradients in every pass: without that each rank would keep all of
        them, and there would be no room for what FSDP is there for. Adapters' wait for `step`."""
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        loss = loss / self._accumulation
        (loss * self._scale.scale if self._scale else loss).backward()

    def step(self) -> float:
        """Returns the gradients' global norm before clipping. Where it is not finite no step is taken."""
        self._exchange()
        for held in self._shards.values():
            held.bind()
            held.local.grad = held.gradient()
        down = 1 / self._scale.scale if self._scale else 1.0
        norm = self._norm() * down
        if self._scale:
            self._scale.update(overflow=not math.isfinite(norm))
        if math.isfinite(norm):
            self._steps += 1
            factor = coefficient(norm, self._max_norm) * down
            if self._each:
                self._step_each(factor)
            else:
                self._step_all(factor)
        for held in self._shards.values():
            held.local.grad = held.parameter.grad = None
        return norm

    def _step_all(self, factor: float) -> None:
        grads = [part.grad for part in self._local.values() if part.grad is not None]
        if factor != 1.0 and grads:
            torch._foreach_mul_(grads, factor)
        self._optimizer.step()
        self._averages.update_all(self._local, self._steps)

    def _step_each(self, factor: float) -> None:
        """One parameter after the other; a part of no rows has nothing to step."""
        for name, part in self._each.items():
            grad = part.slot.weight.grad
            if grad is not None and grad.numel():
                part.slot.step(grad, factor, self._steps)
            if self._averages.get(name) is not None:
                self._averages.update(name, part.slot.value(), self._steps)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: held.shape for name, held in self._shards.items()}

    def pieces(self, *, result: bool = False) -> Iterator[tuple[str, Piece]]:
        """Every parameter with its moments and average, whole on rank 0's host. Every rank iterates. `result`: what a
        result is made of alone."""
        for name, held in self._shards.items():
            held.bind()
            if self._each:
                yield name, self._each[name].pieces(self._steps, self._averages.get(name), result=result)
                continue
            values = {"weight": held.local.detach()}
            # A part of no rows may have had no gradient; all ranks must name the same keys.
            state = self._optimizer.state.get(held.local, {})
            values |= {key: state.get(key, torch.zeros_like(held.local)) for key in MOMENTS if self._steps}
            average = self._averages.get(name)
            if average is not None:
                values["ema"] = average
            values = slots.of_result(values) if result else values
            whole = {key: self._whole(value, held) for key, value in values.items()}
            yield name, {key: value.to("cpu", copy=True) for key, value in whole.items()} if self._ranks.main else {}

    def scalars(self) -> dict[str, float]:
        """`steps` taken, and fp16's `loss_scale` and `growth_tracker`."""
        return {"steps": float(self._steps), **(self._scale.scalars() if self._scale else {})}

    @torch.no_grad()
    def load(self, read: Read, scalars: dict[str, float]) -> None:
        """Take over what `pieces` and `scalars` of any kind gave; each rank takes its own part of every piece."""
        self._reshard()
        self._steps = int(scalars.get("steps", 0))
        for name, held in self._shards.items():
            held.bind()
            if self._each:
                self._load_part(name, read(name))
                continue
            piece = read(name)
            if not held.whole:
                piece = {key: parts.rows(value, self._ranks) for key, value in piece.items()}
            held.local.copy_(piece["weight"])
            # Where no average was kept, one begins with the weights.
            self._averages.set(name, piece.get("ema", piece["weight"]))
            if self._steps and all(key in piece for key in MOMENTS):
                place = held.local.device if held.local.device.type == "cuda" else torch.device("cpu")
                moments = {key: torch.empty_like(held.local).copy_(piece[key]) for key in MOMENTS}
                self._optimizer.state[held.local] = {"step": torch.tensor(float(self._steps), device=place), **moments}
        if self._scale:
            self._scale.load(scalars)

    def _load_part(self, name: str, piece: Piece) -> None:
        part = self._each[name]
        part.load(piece, self._steps)
        # Where no average was kept, one begins with the weights.
        self._averages.set(name, part.rows(piece["ema"]) if "ema" in piece else part.slot.value())

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The model computes with the average's values inside, and with its own again after it."""
        for held in self._shards.values():
            held.bind()
        self._reshard()
        with self._averages.swapped():
            try:
                yield
            finally:
                self._reshard()

    def _reshard(self) -> None:
        """A forward pass without a backward leaves whole weights behind, which a step does not renew."""
        for module in self._module.modules():
            if hasattr(module, "reshard"):
                module.reshard()  # type: ignore[operator]

    def _exchange(self) -> None:
        """The mean over the ranks of the gradients that FSDP does not see, in one go."""
        if self._ranks.world_size == 1:
            return
        grads = [held.parameter.grad for held in self._shards.values() if held.whole]
        found = [grad for grad in grads if grad is not None]
        if not found:
            return
        flat = torch.cat([grad.flatten() for grad in found])
        dist.all_reduce(flat)
        flat /= self._ranks.world_size
        for grad, mean in zip(found, flat.split([grad.numel() for grad in found])):  # noqa: B905 (of one length)
            grad.copy_(mean.view_as(grad))

    def _norm(self) -> float:
        squares = {True: 0.0, False: 0.0}
        for whole in squares:
            grads = [h.local.grad for h in self._shards.values() if h.whole is whole and h.local.grad is not None]
            if grads:
                norms = torch.stack(torch._foreach_norm(grads, 2, torch.float32))
                squares[whole] = float(norms.double().square().sum())
        return math.sqrt(squares[True] + self._ranks.total([squares[False]])[0])

    def _whole(self, local: Tensor, held: Shard) -> Tensor:
        if held.whole:
            return local.detach().float()
        from torch.distributed.tensor import DTensor

        parameter: Any = held.parameter
        part = local.detach().float().to(self._ranks.device)  # NCCL knows nothing of what waits on the host
        spread = DTensor.from_local(
            part, parameter.device_mesh, parameter.placements, run_check=False, shape=torch.Size(held.shape),
            stride=parameter.stride(),
        )  # fmt: skip
        return spread.full_tensor()


def shard(module: nn.Module, trained: dict[str, nn.Parameter], config: TrainConfig, ranks: Ranks) -> dict[str, Shard]:
    """Cut the module up, in place. Returns the trained parameters' parts by name."""
    owners = {id(p): (m, leaf) for m in module.modules() for leaf, p in m._parameters.items() if p is not None}
    places = {name: owners[id(parameter)] for name, parameter in trained.items()}
    shapes = {name: tuple(parameter.shape) for name, parameter in trained.items()}
    adapters = set(trained.values()) if config.mode == "lora" else set()
    masters = set() if narrow(config) else set(trained.values()) - adapters
    settings = _settings(config, ranks)
    fully_shard = _fully_shard()
    # It warns of sums in place on what a block returns; the transformer makes none.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    blocks = [block for name, block in module.named_modules() if _is_block(name)]
    for part in (*blocks, module):
        if hasattr(part, "reshard"):  # it was cut up as it was loaded
            continue
        for parameter in part.parameters():
            if parameter in masters:
                parameter.data = parameter.data.float()
        fully_shard(part, ignored_params=adapters, **settings)
    shards = {}
    for name, (owner, leaf) in places.items():
        parameter: Any = owner._parameters[leaf]
        whole = trained[name] in adapters
        if parameter is not trained[name]:  # who still holds the one that was cut up shall not hold its numbers
            trained[name].data = trained[name].data.new_empty(0)
        if whole:  # made beside a base that waits on the host, they are there too
            parameter.data = parameter.data.to(ranks.device)
        local = parameter if whole else nn.Parameter(parameter.to_local().detach())
        shards[name] = Shard(parameter, local, shapes[name], whole)
    return shards


def sharder(config: TrainConfig, ranks: Ranks) -> Callable[[str, nn.Module], None] | None:
    """What cuts a block up among the ranks as soon as it is loaded, for `load_transformer(prepare=…)`.

    None where FSDP is not asked for, and where a part of the weights is trained: which are to be fp32 is not known yet.
    """
    if not ranks.launch.fsdp:
        return None
    refuse(config)
    if not cut_as_loaded(config):
        return None
    fully_shard = _fully_shard()
    settings: dict[str, Any] = {}
    widened = config.mode == "finetune" and not narrow(config)

    def cut(name: str, block: nn.Module) -> None:
        if not _is_block(name):  # the ends belong to the module around the transformer
            return
        settings.update({} if settings else _settings(config, ranks))  # the ranks have joined when it is loaded
        if widened:
            block.float()
        fully_shard(block, **settings)

    return cut


def refuse(config: TrainConfig) -> None:
    """Raise `Unsupported` for what does not go with FSDP here."""
    if config.optimizer != "adamw8bit":
        refuse_optimizer(config, "FSDP")
    if not narrow(config):
        refuse_rounding(config, "FSDP")
    refuse_quantised(config, "fsdp")


def notes(environ: Mapping[str, str]) -> list[str]:
    """What the accelerate config says of FSDP and is done otherwise here."""
    said = []
    policy = environ.get("FSDP_AUTO_WRAP_POLICY", "TRANSFORMER_BASED_WRAP").upper()
    if policy not in ("TRANSFORMER_BASED_WRAP", "NONE"):
        said.append(f"fsdp_auto_wrap_policy {policy} is not used: the transformer's blocks are what is cut up.")
    if environ.get("FSDP_ACTIVATION_CHECKPOINTING", "false").lower() == "true":
        said.append("fsdp_activation_checkpointing is not used: gradient_checkpointing of the train config decides.")
    if environ.get("FSDP_IGNORED_MODULES", ""):
        said.append("fsdp_ignored_modules is not used: all frozen weights are cut up.")
    return said


def _settings(config: TrainConfig, ranks: Ranks) -> dict[str, Any]:
    from torch.distributed import fsdp
    from torch.distributed.device_mesh import init_device_mesh

    dtype = None if config.mixed_precision == "no" else DTYPES[config.mixed_precision]
    # Inputs stay as they come: the time must not be rounded on its way to the embedding.
    precision = fsdp.MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    found: dict[str, Any] = {
        "mesh": init_device_mesh(ranks.device.type, (ranks.world_size,)),
        "mp_policy": precision,
        "reshard_after_forward": os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() != "false",
    }
    if os.environ.get("FSDP_OFFLOAD_PARAMS", "false").lower() == "true":
        found["offload_policy"] = fsdp.CPUOffloadPolicy(pin_memory=ranks.device.type == "cuda")
    return found


def _is_block(name: str) -> bool:
    path = name.split(".")
    return len(path) > 1 and path[-2] in BLOCKS and path[-1].isdigit()


def _fully_shard() -> Any:
    from torch.distributed import fsdp

    function = getattr(fsdp, "fully_shard", None)
    if function is None or "ignored_params" not in inspect.signature(function).parameters:
        raise Unsupported(
            f"torch {torch.__version__} has no FSDP2 that leaves adapters whole.",
            "Install a newer stack of the matrix, or set distributed_type to MULTI_GPU or DEEPSPEED.",
        )
    return function
