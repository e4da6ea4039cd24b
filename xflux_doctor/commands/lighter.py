"""After a run that was out of memory: what its bill had foreseen, and the fastest plan that needs clearly less."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from xflux_doctor import matrix as matrices
from xflux_doctor import planner
from xflux_doctor.errors import DoctorError
from xflux_doctor.finding import Edit
from xflux_doctor.inputs import Inputs, build
from xflux_doctor.plans import Row

GIB = 1 << 30
LESS = 0.93
"""Share of the failed plan's memory that the next one may need: the forecast's error to both sides, and a little."""


@dataclass(frozen=True)
class Lighter:
    """The plan that failed, and the next one; None where nothing that may be taken needs less."""

    failed: Row
    next: Row | None
    edits: tuple[Edit, ...] = ()
    """What turns the run folder's files into the next one."""

    @property
    def words(self) -> str:
        """For a person."""
        terms = ", ".join(f"{name} {size / GIB:.1f}" for name, size in [*self.failed.terms.items()][:3])
        said = f"The bill had foreseen {self.failed.device / GIB:.1f} GiB per GPU; the largest terms: {terms}."
        if self.next is None:
            return f"{said} Nothing that may be taken needs clearly less."
        settings = ", ".join(f"{key}: {value}" for key, value in self.next.changes.items())
        time = f", {self.next.seconds:.2f} s a step" if self.next.seconds is not None else ""
        return f"{said} Next: {self.next.label} ({self.next.device / GIB:.1f} GiB{time}): {settings}."

    @property
    def document(self) -> dict[str, Any]:
        """For a program: the bytes that were foreseen, and the next plan's settings."""
        plan = None if self.next is None else {
            "label": self.next.label, "changes": self.next.changes, "device_bytes": self.next.device,
            "seconds_per_step": self.next.seconds,
        }  # fmt: skip
        return {"foreseen_device_bytes": self.failed.device, "terms": self.failed.terms, "plan": plan}


def after(folder: Path) -> Lighter | None:
    """By what the run folder holds of the run: its facts and effective files. None where these are not all there."""
    facts, config = folder / "facts.json", folder / "train.yaml"
    forms = (folder / "accelerate.yaml", folder / "accelerate.json")
    accelerate = next((path for path in forms if path.is_file()), None)
    if accelerate is None or not (facts.is_file() and config.is_file()):
        return None
    inputs = Inputs(config=str(config), accelerate_config=str(accelerate), facts=str(facts))
    try:
        case = build(inputs, matrices.load_with(None))
    except DoctorError:
        return None
    if any(folder.glob("checkpoint-*")) and case.job.train is not None:
        # Another optimizer does not go on from a checkpoint.
        allowed = tuple(name for name in case.job.train.allow if name != "optimizer")
        job = msgspec.structs.replace(case.job, train=dataclasses.replace(case.job.train, allow=allowed))
        case = msgspec.structs.replace(case, job=job)
    found = planner.known(case)
    if found is None:
        return None
    row = planner.under(case, int(LESS * found.own.device))
    return Lighter(found.own, row, planner.plan_edits(case, row) if row is not None else ())
