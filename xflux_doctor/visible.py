"""Which GPUs a process would see under CUDA_VISIBLE_DEVICES, by torch's own parsing rules.

Source: pytorch v2.13.0 torch/cuda/__init__.py, `_parse_visible_devices` and `_device_count_nvml`: a list of
numbers ends at the first value that is none (or negative), a repeated number empties it, a number past the
last GPU cuts it there; a list of UUIDs ends at the first entry without the prefix.
"""

from __future__ import annotations

import re

from xflux_doctor.facts import Gpu


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
        number = int(match[1])
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


def visible(gpus: tuple[Gpu, ...], value: str | None) -> tuple[Gpu, ...]:
    """The GPUs left by a value of CUDA_VISIBLE_DEVICES (`None`: unset), in torch's order for equal cards."""
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
        chosen.append(matches[0])
    return tuple(chosen)


def selected(gpus: tuple[Gpu, ...], environment: dict[str, str], gpu_ids: str | None) -> tuple[Gpu, ...]:
    """The GPUs that the job's ranks share out. `gpu_ids` of the accelerate file overrides the variable.

    Source: accelerate 0.30.1 and 1.15.0, utils/launch.py: `current_env["CUDA_VISIBLE_DEVICES"] = gpu_ids`.
    """
    if gpu_ids is not None and gpu_ids != "all":
        return visible(gpus, gpu_ids)
    return visible(gpus, environment.get("CUDA_VISIBLE_DEVICES"))
