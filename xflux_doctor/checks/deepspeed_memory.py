"""LA: the memory that DeepSpeed takes and saves, by what is trained."""

from __future__ import annotations

from collections.abc import Iterator

from xflux_trainer import memory

from xflux_doctor import bill, xflux_bill
from xflux_doctor.check import Case, SkipCheck, check
from xflux_doctor.checks.deepspeed import file_of, name_of, needs_deepspeed, number, on_file
from xflux_doctor.checks.words import devices
from xflux_doctor.finding import Edit, Finding, warning

GIB, MIB = 1 << 30, 1 << 20
_BUCKET = 500_000_000
"""DeepSpeed's own reduce_bucket_size (zero/config.py, 0.8.0 to 0.19.8)."""
_LARGE = 100_000_000


def _trained(case: Case) -> int | None:
    """Trained parameters of the bundled trainer's job, or of X-Flux's LoRA; None where another script trains."""
    if case.job.train is not None:
        return int(memory.adapter_parameters(case.job.train, bill.spec_of(case)))
    found = case.job.xflux
    return xflux_bill.TRAINED["lora"] if found is not None and found.script.kind == "lora" else None


@check("LA316", "DeepSpeed's bucket has the size of what is trained", needs=("accelerate",))
def bucket_fits(case: Case) -> Iterator[Finding]:
    """ZeRO 1 and 2 allocate reduce_bucket_size elements, twice with overlap_comm, however little is trained."""
    file_of(case)
    size, trained = number(case.job.zero_block.get("reduce_bucket_size")), _trained(case)
    if trained is None or size is None or case.job.zero_stage not in (1, 2):
        raise SkipCheck("no bucket is named, or it is not known what is trained")
    right = max(trained, 1 << 20)
    if size < _LARGE or size <= 2 * right:
        return
    buckets = 2 if case.job.zero_block.get("overlap_comm") is True else 1
    cost = int(size) * 2 * buckets
    change = Edit(
        "deepspeed", ("zero_optimization", "reduce_bucket_size"), right, f"{trained:,} parameters are trained"
    )
    yield warning(
        f"reduce_bucket_size is {int(size):,} in {name_of(case)}, and {trained:,} parameters are trained.",
        f"DeepSpeed allocates about {cost / MIB:.0f} MiB on each GPU for gradients of {trained * 2 / MIB:.0f} MiB.",
        f"{right:,} is enough. --take LA316 writes it.",
        offers=on_file(case, change),
    )


@check("LA317", "the memory is not expected from ZeRO", needs=("accelerate", "gpus"))
def zero_saves_little(case: Case) -> Iterator[Finding]:
    """ZeRO 1 and 2 share out a LoRA's optimizer states, which are small; each GPU holds the whole frozen model."""
    needs_deepspeed(case)
    if case.job.use_cpu or case.job.num_processes < 2:
        raise SkipCheck("the job runs on the CPU, or on one rank")
    trained = _trained(case)
    other = case.job.train is not None and case.job.train.mode != "lora"  # whose states are what ZeRO is there for
    if trained is None or other or case.job.zero_stage not in (1, 2):
        raise SkipCheck("no LoRA is trained under ZeRO 1 or 2")
    wanted, bar = _need(case)
    short = [gpu for gpu in (devices(case) or ())[: case.job.local_processes]
             if min(gpu.memory_total, case.job.gpu_limit or gpu.memory_total) < wanted * (1 + bar)]  # fmt: skip
    if not short:
        return
    ranks = case.job.num_processes
    shared = trained * 12 * (ranks - 1) // ranks
    what = "Turn gradient_checkpointing on, set quantization, lower img_size or train_batch_size, or use a larger card."
    if case.job.xflux is not None:
        what = "Lower img_size, or use a larger card: X-Flux's script recomputes nothing. The bundled trainer does "
        what += "(gradient_checkpointing), and needs half of that."
    bucket = ""
    if not case.job.bundled and case.job.zero_block.get("reduce_bucket_size") is None:
        bucket = f" DeepSpeed's bucket takes {_BUCKET * 2 / MIB:.0f} MiB more, unless a DeepSpeed file names a "
        bucket += f"reduce_bucket_size ({max(trained, 1 << 20):,} is enough)."
    yield warning(
        f"The job needs about {wanted / GIB:.1f} GiB on each GPU, and GPU {short[0].index} ({short[0].name}) is short "
        f"of it. ZeRO on {ranks} ranks takes {shared / MIB:.0f} MiB off each.",
        f"It shares out the states of {trained:,} parameters; every rank holds the whole frozen model and its "
        f"activations. More GPUs need no less memory each.{bucket}",
        what,
    )


def _need(case: Case) -> tuple[float, float]:
    if case.job.train is not None:
        forecast = bill.need(case)
        return float(forecast.gpu_total), forecast.error_bar
    return float(xflux_bill.gpu_bytes(case, xflux_bill.of(case))), xflux_bill.ERROR_BAR
