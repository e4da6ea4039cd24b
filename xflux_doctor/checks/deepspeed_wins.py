"""LA: what accelerate's file, DeepSpeed's file and the training file say about the same thing, and who wins."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from packaging.version import Version
from xflux_trainer.config import RANGES

from xflux_doctor.check import Case, SkipCheck, check
from xflux_doctor.checks.deepspeed import (
    ABSENT,
    file_of,
    name_of,
    needs_deepspeed,
    number,
    on_file,
    precision_of,
    value_at,
)
from xflux_doctor.checks.words import installed
from xflux_doctor.deepspeed_file import SECTION
from xflux_doctor.deepspeed_keys import CLIPS_BY_DEFAULT
from xflux_doctor.finding import Change, Edit, Finding, Remove, error, warning

_STEPS = "gradient_accumulation_steps"
_MICRO, _BATCH = "train_micro_batch_size_per_gpu", "train_batch_size"
_BOUNDARY = Version("1.8.0")
"""First accelerate that tells DeepSpeed when to step (huggingface/accelerate#3630); before, DeepSpeed counts itself."""


def count(value: Any) -> int | None:
    """A whole number of at least 1."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 1 else None


@check("LA311", "the precision is the same in DeepSpeed's file", needs=("accelerate",))
def precision_agrees(case: Case) -> Iterator[Finding]:
    """bf16 and fp16 exclude each other, and a training in one cannot have the other on in the file."""
    zero, wanted, file = file_of(case), precision_of(case), name_of(case)
    inline = case.job.get("mixed_precision") is not None and not case.job.source("mixed_precision")
    if inline and case.job.train is None and case.job.xflux is None:
        raise SkipCheck("accelerate refuses its own mixed_precision beside the file (see LA302)")
    on = {name: _enabled(zero, name) for name in ("bf16", "fp16")}
    active = [name for name, value in on.items() if value is True]
    if case.job.bundled:
        yield from _bundled_precision(case, active, wanted)
    elif len(active) == 2:
        other = {"bf16": "fp16", "fp16": "bf16"}.get(wanted, "")
        yield error(
            f"bf16 and fp16 are both enabled in {file}.",
            f"DeepSpeed: 'bfloat16 and fp16 modes cannot be simultaneously enabled'{_refusal(wanted, active)}.",
            f"Leave {wanted} on." if other else "Leave one of them on.",
            edits=_off(case, other, f"the training is in {wanted}") if other else (),
            offers=() if other else _off(case, "fp16", "bf16 needs no loss scaling"),
        )
    elif wanted in ("bf16", "fp16") and active and active != [wanted]:
        yield error(
            f"{active[0]} is enabled in {file} and the training asks for {wanted}.",
            _refusal(wanted, active)[2:] + ".",
            f"Decide which is meant. --take LA311 writes {wanted} into {file}.",
            offers=(*_off(case, active[0], f"the training is in {wanted}"),
                    *on_file(case, Edit("deepspeed", (wanted, "enabled"), True, f"the training is in {wanted}"))),
        )  # fmt: skip
    elif wanted in ("bf16", "fp16") and on[wanted] is False:
        yield error(
            f"{wanted}.enabled is false in {file} and the training asks for {wanted}.",
            "DeepSpeed then computes in fp32, without a word: twice the memory and a fraction of the speed.",
            f"Decide which is meant. --take LA311 writes {wanted} into {file}.",
            offers=on_file(case, Edit("deepspeed", (wanted, "enabled"), True, f"the training is in {wanted}")),
        )
    elif not active and wanted == "no" and any(value == "auto" for value in on.values()):
        yield warning(
            f'bf16 and fp16 are "auto" or absent in {file}, and nothing names a mixed_precision.',
            "accelerate takes no mixed_precision beside the file and writes false for auto: the training is in fp32, "
            "unless the script itself names one.",
            "Write the precision into the file.",
            offers=on_file(case, Edit("deepspeed", ("bf16", "enabled"), True, "bf16, as FLUX is trained")),
        )


def _enabled(zero: dict[str, Any], name: str) -> Any:
    value = value_at(zero, (name, "enabled"))
    if isinstance(value, str) and value != "auto":
        return value.lower() == "true"
    return value


def _refusal(wanted: str, active: list[str]) -> str:
    other = {"bf16": "fp16", "fp16": "bf16"}.get(wanted)
    if other not in active:
        return ""
    said = f"`--mixed_precision` arg cannot be set to `{wanted}` when `{other}` is set in the DeepSpeed config file."
    return f"; accelerate: '{said}'"


def _off(case: Case, name: str, reason: str) -> tuple[Change, ...]:
    return on_file(case, Edit("deepspeed", (name, "enabled"), False, reason))


def _bundled_precision(case: Case, active: list[str], wanted: str) -> Iterator[Finding]:
    if not active or active == [wanted]:
        return
    edits = [edit for name in active if name != wanted for edit in _off(case, name, f"the training is in {wanted}")]
    if wanted != "no" and wanted not in active:
        edits += on_file(case, Edit("deepspeed", (wanted, "enabled"), True, "the training file's value wins"))
    yield warning(
        f"{' and '.join(active)} {'is' if len(active) == 1 else 'are'} enabled in {name_of(case)}, and mixed_precision "
        f"is {wanted} in the training file.",
        f"{wanted} is what happens: the bundled trainer takes its own file's word.",
        "Write one precision into both.",
        edits=tuple(edits),
    )


@check("LA312", "the batch of DeepSpeed's file is what its ranks make", needs=("accelerate",))
def batch_adds_up(case: Case) -> Iterator[Finding]:
    """train_batch_size must be micro batch x accumulation x ranks; accelerate wants the micro batch to be there."""
    zero, file = file_of(case), name_of(case)
    if case.job.bundled:
        raise SkipCheck("the bundled trainer writes the batch itself, from the training file")
    steps = zero.get(_STEPS, 1)
    steps = 1 if steps is None else steps
    steps = count(case.job.training(_STEPS)) if steps == "auto" else count(steps)
    ranks, total, micro = max(1, case.job.num_processes), zero.get(_BATCH), zero.get(_MICRO)
    if micro is None:
        yield _no_micro(case, total, steps, ranks)
        return
    size = count(case.job.training("train_batch_size")) if micro == "auto" else count(micro)
    if isinstance(total, bool) or not isinstance(total, int) or size is None or steps is None:
        return
    right = size * steps * ranks
    if total != right:
        yield error(
            f"{_BATCH} is {total} in {file}; {size} a rank x {steps} passes x {ranks} ranks make {right}.",
            "DeepSpeed: 'Check batch related parameters. train_batch_size is not equal to micro_batch_per_gpu * "
            f"gradient_acc_step * world_size {total} != {size} * {steps} * {ranks}'.",
            f'Set it to {right}, or to "auto".',
            edits=on_file(case, Edit("deepspeed", (_BATCH,), right, f"{size} x {steps} x {ranks}")),
        )


def _no_micro(case: Case, total: Any, steps: int | None, ranks: int) -> Finding:
    """The total stays where it divides by the ranks."""
    whole, each = count(total), (steps or 0) * ranks
    divides = whole is not None and each > 0 and whole % each == 0
    size: int | str = whole // each if whole is not None and divides else "auto"
    edits: tuple[Change, ...] = (Edit("deepspeed", (_MICRO,), size, "accelerate wants it to be there"),)
    if whole is not None and not divides:
        edits += (Edit("deepspeed", (_BATCH,), "auto", f"{total} does not divide by {ranks} ranks"),)
    return error(
        f"{name_of(case)} has no {_MICRO}.",
        "accelerate multiplies with it and stops: TypeError: unsupported operand type(s) for *: 'NoneType' and 'int'.",
        f"Set it to {size if divides else chr(34) + 'auto' + chr(34)}.",
        edits=on_file(case, *edits),
    )


@check("LA313", "DeepSpeed's file leaves the optimizer to the script", needs=("accelerate",))
def no_optimizer(case: Case) -> Iterator[Finding]:
    """X-Flux and diffusers make a real AdamW; accelerate refuses a second one in the file."""
    zero = file_of(case)
    for name, dummy in (("optimizer", "DummyOptim"), ("scheduler", "DummyScheduler")):
        if name not in zero:
            continue
        seen = f"{name_of(case)} has a block {name} ({value_at(zero, (name, 'type'))!r})."
        seen = seen.replace(f" ({ABSENT!r})", "")
        if case.job.bundled:
            yield warning(seen, "The bundled trainer does not use it: the training file names it.", "Remove it.")
            continue
        because = (f"accelerate: 'You cannot specify a{'n' if name == 'optimizer' else ''} {name} in the config file "
                   "and in the code at the same time.'")  # fmt: skip
        hint = f"Remove it: the script's own is then used. Only a script with accelerate's {dummy} needs it."
        change = on_file(case, Remove("deepspeed", (name,), f"the script has its own {name}"))
        if case.job.xflux is None:
            yield warning(seen, because, hint)
        elif _same_optimizer(case, name, zero[name]):
            yield error(seen, because, hint, edits=change)
        else:
            other = f"Its values differ from the training file's. --take LA313 removes the block. {hint}"
            yield error(seen, because, other, offers=change)


def _same_optimizer(case: Case, name: str, block: Any) -> bool:
    """Whether the block says nothing that the training file does not say."""
    if not isinstance(block, dict):
        return False
    params = block.get("params") or {}
    if not isinstance(params, dict):
        return False
    if name == "scheduler":
        return all(value == "auto" for value in params.values())
    said = {
        "lr": case.job.training("learning_rate"),
        "weight_decay": case.job.training("adam_weight_decay"),
        "eps": case.job.training("adam_epsilon"),
        "betas": [case.job.training("adam_beta1"), case.job.training("adam_beta2")],
    }
    kind = str(block.get("type", "AdamW")).lower()
    return kind == "adamw" and all(value in ("auto", said.get(key, ABSENT)) for key, value in params.items())


@check("LA314", "gradient accumulation is the same in DeepSpeed's file", needs=("accelerate",))
def accumulation_agrees(case: Case) -> Iterator[Finding]:
    """With a DeepSpeed file no inline value reaches the ranks; a file without the key means 1 to accelerate."""
    zero, file = file_of(case), name_of(case)
    theirs, mine = zero.get(_STEPS, ABSENT), count(case.job.training(_STEPS))
    if mine is None or theirs == "auto" or count(case.job.section(SECTION).get(_STEPS)):
        return  # the inline value is LA302's
    if case.job.bundled:
        steps = count(theirs)
        low, high = RANGES[_STEPS]
        if steps is not None and steps != mine and low <= steps <= high:
            yield warning(
                f"{_STEPS} is {steps} in {file} and {mine} in the training file.",
                f"{steps} is what happens, whatever the training file says.",
                "Write one number into both.",
                edits=(Edit("train", (_STEPS,), steps, "the DeepSpeed file's value wins"),),
            )
        return
    steps = 1 if theirs is ABSENT else count(theirs)
    if steps is None or steps == mine:
        return
    version = installed(case, "accelerate")
    late = version is None or version >= _BOUNDARY
    said = f"{_STEPS} is {steps} in {file}" if theirs is not ABSENT else f"{file} names no {_STEPS}, which means 1"
    told = (f"accelerate {version or '1.8 and newer'} steps after the script's {mine} passes, and DeepSpeed divides "
            f"each gradient by {steps}") if late else (
            f"DeepSpeed steps after {steps} passes; the script counts steps, warm-up and log by {mine}")  # fmt: skip
    if late or theirs is ABSENT:
        edits: tuple[Change, ...] = on_file(case, Edit("deepspeed", (_STEPS,), mine, "the training file's number"))
    else:
        edits = (Edit("train", (_STEPS,), steps, "the DeepSpeed file's value wins"),)
    yield (error if theirs is ABSENT else warning)(
        f"{said}, and it is {mine} in the training file.", f"{told}.", "Write one number into both.", edits=edits
    )


@check("LA315", "gradient clipping is the same in every file", needs=("accelerate",))
def clipping_agrees(case: Case) -> Iterator[Finding]:
    """Under DeepSpeed its engine clips, by its own number; the training file's max_grad_norm is not looked at."""
    needs_deepspeed(case)
    mine = number(case.job.training("max_grad_norm"))
    if mine is None:
        raise SkipCheck("the training file's max_grad_norm is not known")
    limit, where = _limit(case)
    if limit is None or limit == mine:
        return
    low, high = RANGES["max_grad_norm"]
    edits: tuple[Change, ...] = ()
    if low <= limit <= high:
        edits = (Edit("train", ("max_grad_norm",), limit, "what happens"),)
    yield warning(
        f"Gradients are clipped at {limit:g} by {where}, and max_grad_norm is {mine:g} in the training file."
        if limit > 0
        else f"Gradients are not clipped, by {where}, and max_grad_norm is {mine:g} in the training file.",
        "Under DeepSpeed max_grad_norm is not looked at.",
        "Write one number into both.",
        edits=edits,
    )


def _limit(case: Case) -> tuple[float | None, str]:
    """The number that DeepSpeed's engine clips at, and who says so; None where that is the training file itself."""
    key, version = "gradient_clipping", installed(case, "deepspeed")
    default = None if version is None else 1.0 if version >= CLIPS_BY_DEFAULT else 0.0
    if case.job.zero_file is not None:
        value = case.job.zero_file.get(key, ABSENT)
        if value is ABSENT and case.job.section(SECTION).get(key) is not None:
            return None, ""  # LA302 moves it
        if value is ABSENT or value is None:
            return (None, "") if case.job.bundled else (default, f"DeepSpeed {version}'s own default")
        if value == "auto":
            return (None, "") if case.job.bundled else (1.0, 'accelerate, for "auto"')
        return number(value), name_of(case)
    value = case.job.section(SECTION).get(key)
    if value is None or value == "auto":
        return (None, "") if case.job.bundled else (1.0, "accelerate's own default")
    limit = number(value)
    if limit == 0 and not case.job.bundled:
        return default, f"DeepSpeed {version}'s own default"
    return limit, "accelerate's file"
