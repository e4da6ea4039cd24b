"""`plan`'s neighbors of a job: the graded ones between keeping all and recomputing all, fp8 where it can be had."""

from __future__ import annotations

import dataclasses

import pytest
from xflux_trainer.config import TrainConfig

from xflux_doctor.commands.plan import variants

KEPT = TrainConfig("x", img_size=1024, gradient_checkpointing=False)
GRADED = "1024 px, recomputing the first 20 blocks (checkpointed_blocks)"


def test_a_graded_row_stands_between_the_job_and_its_neighbors() -> None:
    rows = variants(KEPT, 20)
    assert [label for label, _ in rows[:3]] == ["as it is", GRADED, "768 px, keeping every activation"]
    changed = rows[1][1]
    assert (changed.gradient_checkpointing, changed.checkpointed_blocks) == (True, 20)
    assert [label for label, _ in variants(KEPT)] == [label for label, _ in rows if label != GRADED]
    # Not the job itself once more.
    assert GRADED not in [label for label, _ in variants(changed, 20)]


def test_every_block_is_every_block() -> None:
    some = dataclasses.replace(KEPT, gradient_checkpointing=True, checkpointed_blocks=20)
    found = dict(variants(some))
    assert found["1024 px, recomputing every block"].checkpointed_blocks is None
    assert found["1024 px, base in int8"].checkpointed_blocks is None


@pytest.mark.parametrize(("fp8", "mode", "there"), [(True, "lora", True), (False, "lora", False),
                                                    (True, "finetune", False)])  # fmt: skip
def test_products_in_fp8(fp8: bool, mode: str, there: bool) -> None:
    config = dataclasses.replace(KEPT, mode=mode)
    found = dict(variants(config, fp8=fp8))
    assert ("1024 px, base and products in fp8" in found) == there
    if there:
        changed = found["1024 px, base and products in fp8"]
        assert (changed.quantization, changed.modulation) == ("fp8-dynamic", "quantize")
        kept = found["1024 px, base and products in fp8, keeping every activation"]
        assert kept == dataclasses.replace(changed, gradient_checkpointing=False)
