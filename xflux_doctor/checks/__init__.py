"""All checks, in the order in which they are run and reported. The list is explicit: grep finds every one."""

from __future__ import annotations

from xflux_doctor.check import Check
from xflux_doctor.checks import data, hardware, launch, memory, network, software, weights, words

ALL: tuple[Check, ...] = (
    software.stack_fits,
    software.python_in_range,
    software.pins,
    software.shadowed,
    software.rules,
    software.torch_imports,
    software.torch_sees_gpus,
    hardware.driver_answers,
    hardware.driver_new_enough,
    hardware.kernels_for_cards,
    hardware.precision_supported,
    hardware.compute_mode,
    launch.accelerate_readable,
    launch.train_readable,
    words.keys_known,
    words.values_known,
    launch.ranks_have_devices,
    launch.chosen_devices_exist,
    launch.cpu_ranks,
    launch.idle_gpus,
    launch.accumulation_agrees,
    launch.trainer_installed,
    launch.strategy_done,
    memory.gpu_memory,
    memory.host_memory,
    data.dataset,
    data.output_writable,
    weights.folder_complete,
    weights.hub_access,
    network.all_reduce,
)
