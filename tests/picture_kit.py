"""Plans to draw: real forecasts of real jobs on recorded machines."""

from __future__ import annotations

import dataclasses
import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import xflux_kit
from conftest import GIB, XFLUX_ACCELERATE, case, gpus, job, machine
from xflux_trainer.config import TrainConfig
from xflux_trainer.memory import STRATEGIES, Bill, forecast
from xflux_trainer.rules import between
from xflux_trainer.spec import FLUX_DEV

from xflux_doctor import planner, xflux_bill
from xflux_doctor.bill import need
from xflux_doctor.check import Case
from xflux_doctor.commands import plan
from xflux_doctor.matrix import Matrix
from xflux_doctor.plans import Card, Row
from xflux_doctor.report import planjson

ONE = XFLUX_ACCELERATE.replace("DEEPSPEED", "NO").replace("num_processes: 8", "num_processes: 1")
TWO = XFLUX_ACCELERATE.replace("DEEPSPEED", "MULTI_GPU").replace("num_processes: 8", "num_processes: 2")
SMALL = dataclasses.replace(FLUX_DEV, double_blocks=2, single_blocks=2)
"""Which terms there are does not depend on the number of blocks."""


@dataclass(frozen=True)
class Planned:
    """What `plan` has in hand when it comes to showing."""

    case: Case
    bill: Bill
    cards: tuple[Card, ...]
    rows: list[Row]
    chosen: Row | None

    @property
    def document(self) -> dict[str, Any]:
        """As a program reads it."""
        rows = self.rows if self.bill.gpu else []
        document = planjson.document(self.case, self.bill, self.cards, rows, self.chosen)
        made: dict[str, Any] = json.loads(planjson.encode(document))
        return made


def planned(
    matrix: Matrix, *, gpu: str | None = None, free: int | None = None, card: str | None = "H100", launch: str = ONE,
    cpu: bool = False, **train: Any,
) -> Planned:  # fmt: skip
    """A job at 1024 px on a card that is named, or on one with so many GiB free."""
    own = {} if free is None else {"gpus": gpus("H100", 2, memory_free=free * GIB)}
    work = job(launch, cpu=cpu, **{"img_size": 1024, **train})
    subject = case(matrix, machine(matrix, card=card, **own), work)
    cards = plan._cards(subject, gpu)
    bill = need(subject)
    found = planner.search(subject, cards)
    return Planned(subject, bill, cards, found.rows if bill.gpu else [], found.chosen)


def xflux_names(matrix: Matrix, folder: Path) -> set[str]:
    """Every name in the bills of X-Flux's own scripts."""
    made: set[str] = set()
    for script, launch, precision, upcasts in itertools.product(
        ("lora", "finetune"), (ONE, TWO, XFLUX_ACCELERATE), ("bf16", "no"), (True, False)
    ):
        work = xflux_kit.job(folder, script=script, accelerate=launch, mixed_precision=precision)
        assert work.xflux is not None
        own = msgspec.structs.replace(work.xflux, script=msgspec.structs.replace(work.xflux.script, upcasts=upcasts))
        subject = case(matrix, machine(matrix), msgspec.structs.replace(work, xflux=own))
        for engine in (None, True, False):
            made |= {term.name for term in xflux_bill.gpu_terms(subject, own, deepspeed=engine)}
    return made


def trainer_names() -> set[str]:
    """Every name in the bills of the bundled trainer, in any phase: settings that change which terms there are."""
    large = TrainConfig("x", img_size=2048)  # images so large that their encoding needs most
    made = {term.name for term in forecast(large, SMALL, world_size=1, strategy="single", device="cuda").gpu}
    full: Any = {"world_size": 1, "strategy": "single", "device": "cuda", "triton": False}
    made |= {term.name for term in forecast(TrainConfig("x", mode="finetune"), SMALL, **full).gpu}
    settings: dict[str, tuple[Any, ...]] = {
        "mode": ("lora", "finetune", "controlnet"),
        "quantization": ("none", "nf4", "fp8-dynamic"),
        "kernels": ("auto", "diffusers"),
        "mixed_precision": ("bf16", "no"),
        "weight_update": ("auto", "kahan", "master"),
        "gradient_checkpointing": (True, False),
        "gradient_accumulation_steps": (1, 2),
    }
    for values in itertools.product(*settings.values()):
        config = TrainConfig("x", ema_decay=0.99, **dict(zip(settings, values, strict=True)))
        if not between(config):
            for strategy in STRATEGIES:
                bill = forecast(config, SMALL, world_size=2, strategy=strategy, device="cuda")
                made |= {term.name for term in bill.gpu}
    return made
