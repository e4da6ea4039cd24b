"""The bill of X-Flux's own scripts against what was measured of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import xflux_kit as kit
from conftest import GIB, XFLUX_ACCELERATE, case, machine

from xflux_doctor import xflux_bill
from xflux_doctor.check import Case
from xflux_doctor.matrix import Matrix
from xflux_doctor.verdict import fitting

MIB = 1 << 20
PLAIN = "compute_environment: LOCAL_MACHINE\ndistributed_type: 'NO'\nnum_processes: 1\nmixed_precision: bf16\n"


def subject(matrix: Matrix, folder: Path, *, cast: bool = False, job: Any = None, **changes: Any) -> Case:
    """`cast`: a checkout whose script leaves the base in bf16."""
    work = job or kit.job(folder, **changes)
    assert work.xflux is not None
    if cast:
        script = msgspec.structs.replace(work.xflux.script, upcasts=False)
        work = msgspec.structs.replace(work, xflux=msgspec.structs.replace(work.xflux, script=script))
    return case(matrix, machine(matrix), work)


def terms(of: Case) -> dict[str, int]:
    return {term.name: term.bytes for term in xflux_bill.gpu_terms(of, xflux_bill.of(of))}


def device(of: Case) -> int:
    return xflux_bill.gpu_bytes(of, xflux_bill.of(of))


@pytest.mark.parametrize(("px", "measured"), [(512, 40.9), (1024, 59.2)])
def test_cast_to_bf16_without_an_engine(matrix: Matrix, tmp_path: Path, px: int, measured: float) -> None:
    """torch.cuda.max_memory_allocated on an H100, the three encoders resident."""
    found = terms(subject(matrix, tmp_path, cast=True, accelerate=PLAIN, data={"img_size": px}))
    assert sum(found.values()) / GIB == pytest.approx(measured, rel=0.005)
    assert not any("bucket" in name for name in found)


@pytest.mark.parametrize("px", [512, 1024])
@pytest.mark.parametrize("card", [79.18, 80])
def test_an_fp32_base_runs_out_of_memory_on_80_gb(matrix: Matrix, tmp_path: Path, px: int, card: float) -> None:
    """As it did on an H100 at both sizes, and in x-flux#24."""
    of = subject(matrix, tmp_path, accelerate=PLAIN, data={"img_size": px})
    assert fitting(device(of), int(card * GIB)) == "does not fit"
    # 24 and 12 hidden x hidden weights of each double and single block, once more in bf16.
    assert terms(of)["bf16 copies of frozen weights that autocast keeps"] == 16416 * MIB


def test_zero_2_as_nvml_shows_it(matrix: Matrix, tmp_path: Path) -> None:
    """x-flux#12 prints 11.206656 million parameters, double blocks alone, and shows 42,837 MiB by nvidia-smi."""
    of = subject(matrix, tmp_path, single_blocks="")
    assert xflux_bill.trained_parameters(xflux_bill.of(of)) == 11_206_656
    assert device(of) / MIB == pytest.approx(42_837, rel=0.03)
    found = terms(of)
    assert found["DeepSpeed's bucket, 2 x reduce_bucket_size"] == 1_000_000_000
    assert found["optimizer states and fp32 weights"] == 11_206_656 * 12
    assert found["gradients"] == found["LoRA weights"] == 11_206_656 * 2


@pytest.mark.parametrize("named", [100_000_000, 1e8, "auto"])
def test_the_bucket_is_the_one_that_deepspeed_s_file_names(matrix: Matrix, tmp_path: Path, named: Any) -> None:
    block = {"stage": 2, "reduce_bucket_size": named}
    work = msgspec.structs.replace(kit.job(tmp_path), zero_file={"zero_optimization": block})
    wanted = 1_000_000_000 if named == "auto" else 200_000_000
    found = terms(subject(matrix, tmp_path, job=work))
    assert found["DeepSpeed's bucket, 2 x reduce_bucket_size"] == wanted


def test_ranks_share_out_the_states_and_nothing_else(matrix: Matrix, tmp_path: Path) -> None:
    alone = terms(subject(matrix, tmp_path))
    eight = terms(subject(matrix, tmp_path, accelerate=XFLUX_ACCELERATE))
    own = alone.pop("optimizer states and fp32 weights")
    assert eight.pop("optimizer states and fp32 weights, 1/8 of them") == own // 8
    assert eight == alone


def test_what_the_config_trains(matrix: Matrix, tmp_path: Path) -> None:
    """No gradient goes further back than the first LoRA; more rank, blocks, pixels and images need more."""
    own = subject(matrix, tmp_path)
    assert xflux_bill.trained_parameters(xflux_bill.of(own)) == xflux_bill.TRAINED["lora"]
    late = terms(subject(matrix, tmp_path, double_blocks="", single_blocks="37"))
    unit = 3072 * 2 * 1536
    assert late["double blocks' activations"] == 0
    assert late["single blocks' activations"] == pytest.approx(24.07 * unit)
    for more in ({"rank": 32}, {"single_blocks": None}, {"data": {"img_size": 768}}, {"data": {"train_batch_size": 2}}):
        assert device(subject(matrix, tmp_path, **more)) > device(own), more
    tuned = subject(matrix, tmp_path, script="finetune")
    assert terms(tuned)["optimizer states and fp32 weights"] == xflux_bill.TRAINED["finetune"] * 12
