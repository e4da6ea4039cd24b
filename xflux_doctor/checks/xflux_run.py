"""XF: what a run by X-Flux's own scripts would meet: its strategy, memory and disk (--xflux)."""

from __future__ import annotations

from collections.abc import Iterator

from xflux_doctor import xflux_bill
from xflux_doctor.check import Case, SkipCheck, check
from xflux_doctor.checks.words import devices
from xflux_doctor.checks.xflux import REPOSITORY
from xflux_doctor.finding import Change, Edit, Finding, Scalar, error, warning
from xflux_doctor.xflux import XFlux
from xflux_doctor.xflux_bill import ERROR_BAR, GB, GIB


@check("XF110", "X-Flux works under the job's strategy", needs=("accelerate",))
def strategy(case: Case) -> Iterator[Finding]:
    """Under ZeRO-3 and FSDP each rank holds a part: X-Flux saves those parts and samples on rank 0 alone."""
    found = xflux_bill.of(case)
    if case.job.strategy not in ("zero3", "fsdp"):
        return
    edits: tuple[Change, ...] = ()
    if case.job.deepspeed:
        file, key = ("accelerate", ("deepspeed_config", "zero_stage"))
        if case.job.zero_file is not None:
            file, key = "deepspeed", ("zero_optimization", "stage")
        edits = (Edit(file, key, 2, "X-Flux's own recommendation"),)
    yield error(
        f"The accelerate file asks for {'ZeRO stage 3' if case.job.deepspeed else 'FSDP'}.",
        "The saved adapter or weights are rank 0's empty placeholders, and where sampling is on rank 0 waits for the "
        "others for ever."
        if found.script.logs_images
        else "The saved weights are rank 0's empty placeholders.",
        "Use DeepSpeed with zero_stage 2, as X-Flux's README does.",
        edits=edits,
    )


@check("XF111", "X-Flux's fine-tune script gets one image a step")
def one_image(case: Case) -> Iterator[Finding]:
    """It mixes noise with t of shape (B,) against (B, tokens, 64): 64 broadcasts, others fail (x-flux#39, #76)."""
    found = xflux_bill.of(case)
    if not found.script.one_t_per_image:
        raise SkipCheck(f"{found.script.path.name} mixes noise in another way")
    if found.batch == 1:
        return
    crash = f"RuntimeError: The size of tensor a ({found.batch}) must match the size of tensor b (64)"
    silent = "Nothing fails: each image's time is laid over the 64 channels, and the model learns nonsense"
    yield error(
        f"data_config.train_batch_size is {found.batch} for {found.script.path.name}.",
        f"{silent if found.batch == 64 else f'The first step ends in {crash!r}'}.",
        "Train with 1 and raise gradient_accumulation_steps in accelerate's file.",
        edits=(Edit("train", ("data_config", "train_batch_size"), 1, "the script is right for one image only"),),
        docs=f"{REPOSITORY}/issues/39",
    )


@check("XF112", "X-Flux's warm-up happens")
def warm_up(case: Case) -> Iterator[Finding]:
    """diffusers' `constant` schedule takes no warm-up; X-Flux ships constant with 10, which nobody asked for."""
    found = xflux_bill.of(case)
    steps = found.get("lr_warmup_steps")
    if found.get("lr_scheduler") == "constant" and isinstance(steps, int) and steps > 10:
        yield warning(
            f"lr_scheduler is constant and lr_warmup_steps {steps}.",
            f"There is no warm-up: the first step already has the full learning rate {found.get('learning_rate')}.",
            "Set lr_scheduler to constant_with_warmup.",
            edits=(Edit("train", ("lr_scheduler",), "constant_with_warmup", "constant has no warm-up"),),
        )


@check("XF116", "X-Flux's frozen model is not held in fp32", needs=("gpus",))
def base_in_bf16(case: Case) -> Iterator[Finding]:
    """The scripts make it fp32; only DeepSpeed's engine casts it back (engine.py of 0.14.4; x-flux#24)."""
    found = xflux_bill.of(case)
    if case.job.use_cpu:
        raise SkipCheck("the job runs on the CPU")
    if not xflux_bill.fp32_base(case, found):
        return
    wanted, other = xflux_bill.gpu_bytes(case, found), xflux_bill.gpu_bytes(case, found, deepspeed=True)
    cards = (devices(case) or ())[: case.job.local_processes]
    smallest = min(cards, key=lambda card: card.memory_total, default=None)
    size = min(smallest.memory_total, case.job.gpu_limit or smallest.memory_total) if smallest else 0
    fails = smallest is not None and wanted * (1 - ERROR_BAR) > size
    on = f"; GPU {smallest.index} ({smallest.name}) has {size / GIB:.1f}" if smallest else ""
    why = f"distributed_type is {case.job.distributed_type}"
    if case.job.deepspeed:
        why = f"mixed_precision is {xflux_bill.precision(case, found)}"
    yield (error if fails else warning)(
        f"{why}: the transformer stays fp32. A step at {found.img_size} px needs about {wanted / GIB:.1f} GiB{on}.",
        ("It ends in 'CUDA out of memory'. " if fails else "It is slow and wastes memory. ")
        + f"Under DeepSpeed in bf16 it is about {other / GIB:.1f} GiB.",
        "Launch with DeepSpeed, zero_stage 2 and mixed_precision bf16, as X-Flux's README does.",
        edits=_deepspeed(case, found),
        docs=f"{REPOSITORY}/issues/24",
    )


def _deepspeed(case: Case, found: XFlux) -> tuple[Change, ...]:
    """The launch of X-Flux's README; a job without an accelerate file gets it from the template."""
    if case.job.deepspeed:
        return (Edit("train", ("mixed_precision",), "bf16", "DeepSpeed then casts the frozen model"),)
    if case.job.accelerate is None or case.job.distributed_type not in ("NO", "MULTI_GPU"):
        return ()
    steps = found.get("gradient_accumulation_steps", 1)
    reason = "X-Flux's README: its engine casts the frozen model to bf16"
    section: dict[str, Scalar] = {
        "gradient_accumulation_steps": steps if isinstance(steps, int) else 1,
        "gradient_clipping": 1.0,
        "offload_optimizer_device": "none",
        "offload_param_device": "none",
        "zero3_init_flag": False,
        "zero_stage": 2,
    }
    edits = [Edit("accelerate", ("distributed_type",), "DEEPSPEED", reason)]
    edits += [Edit("accelerate", ("deepspeed_config", key), value, reason) for key, value in section.items()]
    return tuple(edits)


@check("XF117", "the GPUs have the memory that X-Flux's script needs", needs=("gpus",))
def gpu_memory(case: Case) -> Iterator[Finding]:
    """Weights, encoders and all activations, nothing recomputed; more ranks need no less each (x-flux#12)."""
    found = xflux_bill.of(case)
    if case.job.use_cpu or xflux_bill.fp32_base(case, found):
        raise SkipCheck("the job runs on the CPU" if case.job.use_cpu else "the base is held in fp32 (see XF116)")
    wanted = xflux_bill.gpu_bytes(case, found)
    limit = case.job.gpu_limit
    for gpu in (devices(case) or ())[: case.job.local_processes]:
        total, free = min(gpu.memory_total, limit or gpu.memory_total), min(gpu.memory_free, limit or gpu.memory_free)
        if free >= wanted * (1 + ERROR_BAR):
            continue
        seen = (
            f"{found.script.path.name} at {found.img_size} px, batch {found.batch}, needs about "
            f"{wanted / GIB:.1f} GiB; GPU {gpu.index} has {free / GIB:.1f} of {total / GIB:.1f} GiB free."
        )
        if free >= wanted * (1 - ERROR_BAR):
            yield warning(seen, "It is tight: it may run out of memory.", "Lower data_config.img_size.")
        elif total < wanted * (1 - ERROR_BAR):
            hint = "Lower data_config.img_size; the bundled trainer recomputes activations and needs less."
            yield error(seen, "It ends in 'CUDA out of memory', with any number of ranks.", hint)
        else:
            held = (
                ", ".join(f"process {p.pid} {p.name}".strip() for p in gpu.processes) or "held outside this container"
            )
            yield error(
                seen,
                f"It ends in 'CUDA out of memory' although the card is large enough ({held}).",
                "End what holds it if it is yours (the doctor never does), or choose another GPU.",
            )


@check("XF118", "the host has the memory that X-Flux's ranks load into", needs=("host",))
def host_memory(case: Case) -> Iterator[Finding]:
    """Every rank builds its own fp32 copy on the CPU, 47.6 GB each (x-flux#12, #84: exit code -9)."""
    assert case.facts.host
    found, host, ranks = xflux_bill.of(case), case.facts.host, case.job.local_processes
    wanted = xflux_bill.host_bytes(found) * ranks
    limit = host.memory_limit or 0
    if host.memory_total and limit > host.memory_total:
        limit = 0
    load = "ranks load" if ranks > 1 else "rank loads"
    seen = f"{ranks} {load} {wanted / GB:.0f} GB ({wanted / GIB:.0f} GiB) on the host"
    killed = "The kernel kills ranks while they load: 'exitcode: -9', SIGKILL, without a word."
    fits = int((limit or host.memory_total) // xflux_bill.host_bytes(found))
    hint = f"Start {fits} rank{'s' if fits > 1 else ''}, or give it more memory." if fits else "Give it more memory."
    docs = f"{REPOSITORY}/issues/84"
    if limit and wanted > limit:
        yield error(f"{seen}; the container's limit is {limit / GIB:.0f} GiB.", killed, hint, docs=docs)
    elif host.memory_total and wanted > host.memory_total:  # it may be small now and grow: no error
        yield warning(f"{seen}; the host has {host.memory_total / GIB:.0f} GiB.", killed, hint, docs=docs)
    elif host.memory_available and wanted > host.memory_available:
        seen = f"{seen}; {host.memory_available / GIB:.0f} GiB are available now."
        yield warning(seen, killed, "End what you do not need before the start, or start fewer ranks.", docs=docs)


@check("XF119", "the disk holds X-Flux's checkpoints")
def disk(case: Case) -> Iterator[Finding]:
    """Each checkpoint holds all frozen weights, 23.8 GB beside an adapter of 50 MB (accelerate.save_state)."""
    found = xflux_bill.of(case)
    folder = (case.facts.folders or {}).get("output")
    free = folder.free if folder and found.output and folder.path == str(found.output) else found.free
    every, steps, limit = (found.get(k) for k in ("checkpointing_steps", "max_train_steps", "checkpoints_total_limit"))
    if free is None or not isinstance(every, int) or every < 1:
        raise SkipCheck("how much is written where is not known")
    count = steps // every if isinstance(steps, int) else 1
    kept = min(len(found.checkpoints) + count, max(limit, len(found.checkpoints)) if isinstance(limit, int) else 10**6)
    new, each = max(0, kept - len(found.checkpoints)), xflux_bill.checkpoint_bytes(case, found)
    if new * each <= free:
        return
    holds = free // each
    keeps = isinstance(limit, int) and 1 <= len(found.checkpoints) + holds < limit
    edits: tuple[Change, ...] = ()
    if keeps:
        value = len(found.checkpoints) + holds
        edits = (Edit("train", ("checkpoints_total_limit",), value, "as many as the disk holds"),)
    yield error(
        f"The run writes {new} checkpoints of {each / GB:.1f} GB, {new * each / GB:.0f} GB; {free / GB:.0f} GB are "
        f"free at {found.output}.",
        f"'No space left on device' at step {every * (holds + 1)}, in the middle of a checkpoint.",
        f"Keep fewer (checkpoints_total_limit), or choose an output_dir with {new * each / GB:.0f} GB."
        if holds
        else "Choose an output_dir on a larger disk: not even one checkpoint fits.",
        edits=edits,
    )
