"""Which GPUs a process would see under CUDA_VISIBLE_DEVICES, by torch's own parsing rules.

Source: pytorch v2.13.0 torch/cuda/__init__.py, `_parse_visible_devices` and `_device_count_nvml`: a list of
numbers ends at the first value that is none (or negative), a repeated number empties it, a number past the
last GPU cuts it there; a list of UUIDs ends at the first entry without the prefix or that names no one GPU, and
two names for one GPU empty it. MIG is CUDA's own rule, by NVIDIA's MIG user guide, "CUDA Device Enumeration": a
process gets one slice, and no whole card beside it.
"""

from __future__ import annotations

import re

import msgspec

from xflux_doctor.facts import Gpu, MigSlice


def parse(value: str) -> list[int] | list[str]:
    """The entries of CUDA_VISIBLE_DEVICES that torch would honor, as indices or as UUID prefixes."""
    if not value:
        return []
    if value.startswith(("GPU-", "MIG-")):
        return _prefixed(value, value[:4])
    numbers: list[int] = []
    for part in value.split(","):
        match = re.match(r"\s*\+?(\d+)", part)
        if match is None:
            break
        number = int(match[1][:18])  # no machine has such a card; int() refuses thousands of digits
        if number in numbers:
            return []
        numbers.append(number)
    return numbers


def _prefixed(value: str, prefix: str) -> list[str]:
    names: list[str] = []
    for part in (entry.strip() for entry in value.split(",")):
        if not part.startswith(prefix):
            break
        if part in names:
            return []
        names.append(part)
    return names


def cards(gpus: tuple[Gpu, ...], value: str | None) -> tuple[Gpu, ...]:
    """The cards that a value of CUDA_VISIBLE_DEVICES names (`None`: unset), before MIG is looked at."""
    if value is None:
        return gpus
    chosen: list[Gpu] = []
    for entry in parse(value):
        if isinstance(entry, int):
            if entry >= len(gpus):
                break
            chosen.append(gpus[entry])
            continue
        matches = [gpu for gpu in gpus if gpu.uuid.startswith(entry)]
        if len(matches) != 1:
            break
        if matches[0] in chosen:
            return ()
        chosen.append(matches[0])
    return tuple(chosen)


def visible(gpus: tuple[Gpu, ...], value: str | None) -> tuple[Gpu, ...]:
    """The devices left by a value of CUDA_VISIBLE_DEVICES (`None`: unset), in torch's order for equal cards.

    A MIG slice stands as its card with the slice's name, UUID and memory.
    """
    if value is not None and value.startswith("MIG-"):
        return tuple(as_device(gpu, item) for gpu, item in named_slices(gpus, value)[:1])
    chosen = cards(gpus, value)
    first = next(((gpu, gpu.slices[0]) for gpu in chosen if gpu.slices), None)
    return (as_device(*first),) if first else chosen


def named_slices(gpus: tuple[Gpu, ...], value: str) -> list[tuple[Gpu, MigSlice]]:
    """The slices that a list of MIG names means, up to the first name that means none or several."""
    found: list[tuple[Gpu, MigSlice]] = []
    for entry in parse(value):
        matches = [(gpu, item) for gpu in gpus for item in gpu.slices if item.uuid.startswith(str(entry))]
        if len(matches) != 1:
            break
        found.append(matches[0])
    return found


def as_device(gpu: Gpu, item: MigSlice) -> Gpu:
    return msgspec.structs.replace(
        gpu,
        uuid=item.uuid,
        name=item.name,
        memory_total=item.memory_total,
        memory_free=item.memory_free,
        slices=(),
    )


def selected(gpus: tuple[Gpu, ...], environment: dict[str, str], gpu_ids: str | None) -> tuple[Gpu, ...]:
    """The GPUs that the job's ranks share out. `gpu_ids` of the accelerate file overrides the variable.

    Source: accelerate 0.30.1 and 1.15.0, utils/launch.py: `current_env["CUDA_VISIBLE_DEVICES"] = gpu_ids`.
    """
    return visible(gpus, choice(environment, gpu_ids))


def choice(environment: dict[str, str], gpu_ids: str | None) -> str | None:
    """What the ranks get as CUDA_VISIBLE_DEVICES; None: nothing chooses."""
    if gpu_ids is not None and gpu_ids != "all":
        return gpu_ids
    return environment.get("CUDA_VISIBLE_DEVICES")
