"""One rank of several that are not there takes FSDP2's steps of a FLUX of 0.2 billion parameters on the CPU.

    fsdp_memory_child.py WORLD WEIGHT_UPDATE OPTIMIZER

Collectives of torch's fake process group do nothing, and what is gathered and scattered is allocated all the same.
Prints the most bytes of storages that were alive in the second step, and the bill's for a GPU less cuBLAS' workspaces,
as JSON.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import weakref
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from xflux_trainer import evaluate, flow, fsdp, lora, memory
from xflux_trainer.config import TrainConfig
from xflux_trainer.model import Velocity
from xflux_trainer.ranks import Launch, Ranks

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import random_flux

SPEC = random_flux.spec_of((3, 6), 8)
PIXELS, TEXT = 256, 128
HOST = torch.device("cpu")
PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
"""Whose room counts, and not their values: in bf16 they take minutes on a CPU that has no AVX-512."""


def _zeros(first: Tensor, second: Tensor) -> Tensor:
    return torch.zeros(first.shape[0], second.shape[1], dtype=first.dtype)


class Ledger(TorchDispatchMode):
    """Inside, the bytes of all storages that operations made, as they are now: FSDP takes room and gives it back by
    resizing a storage that stays."""

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[int, Any] = {}
        self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = _zeros(*args[-2:]) if func in PRODUCTS else func(*args, **(kwargs or {}))
        for each in tree_leaves((made,)):
            self._take(each)
        sizes = [storage.nbytes() for known in list(self._known.values()) if (storage := known()) is not None]
        self.peak = max(self.peak, sum(sizes))
        return made

    def _take(self, value: Any) -> None:
        inner = getattr(value, "__tensor_flatten__", None)
        if inner is not None:  # a wrapper, whose own storage is none
            for name in inner()[0]:
                self._take(getattr(value, name))
        elif isinstance(value, Tensor):
            storage = value.untyped_storage()
            key = storage._cdata
            self._known.setdefault(key, weakref.ref(storage, lambda _: self._known.pop(key, None)))


class Alone(Ranks):
    """The ranks whose values nobody adds."""

    def total(self, values: list[float]) -> list[float]:
        return values


def take(stepper: fsdp.FsdpStepper, config: TrainConfig, number: int) -> None:
    batch = random_flux.batch(SPEC, PIXELS, 1, number)
    batch = dataclasses.replace(batch, text=batch.text[:, :TEXT].clone())
    dice = lora.generator("step", number)
    t, eps = flow.sample_t(1, 0.63, "uniform", dice), torch.randn(1, (PIXELS // 16) ** 2, 64, generator=dice)
    stepper.begin(1e-5)
    stepper.backward(evaluate.velocity_loss(stepper, config, batch, eps, t, HOST).mean())
    stepper.step()


def main() -> None:
    world, update, optimizer = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    values: dict[str, Any] = {"weight_update": update, "optimizer": optimizer, "max_text_tokens": TEXT}
    config = TrainConfig(
        img_dir="x", mode="finetune", mixed_precision="bf16", img_size=PIXELS, disable_sampling=True, **values
    )
    dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    ranks = Alone(Launch(world_size=world, local_world_size=world, use_cpu=True, fsdp=True))
    with Ledger() as ledger:
        transformer = random_flux.build(SPEC, torch.bfloat16, HOST, fsdp.sharder(config, ranks))
        transformer.enable_gradient_checkpointing()
        trained = dict(transformer.requires_grad_(True).named_parameters())
        stepper = fsdp.FsdpStepper(Velocity(transformer, guidance=True), trained, config, ranks, 1)
        take(stepper, config, 0)
        ledger.peak = 0
        take(stepper, config, 1)
    bill = memory.forecast(config, SPEC, world_size=world, strategy="fsdp", device="cuda", triton=False)
    aside = sum(term.bytes for term in bill.gpu if (term.phase, term.name) == ("train", "cuBLAS"))
    print(json.dumps({"seen": ledger.peak, "bill": bill.gpu_phases["train"] - aside}))


if __name__ == "__main__":
    main()
