"""EN1: variables that choose the devices, and those that CUDA itself reads."""

from __future__ import annotations

import re
from collections.abc import Iterator

from packaging.version import Version

from xflux_doctor.check import Case, SkipCheck, check
from xflux_doctor.checks.words import installed
from xflux_doctor.finding import Finding, error, warning
from xflux_doctor.visible import selected, visible

CUDA_DOCS = "https://docs.nvidia.com/cuda/cuda-programming-guide/05-appendices/environment-variables.html"
_OFF = ("", "0")
_READS_NUMBERS = Version("0.18.7")
"""First DeepSpeed whose ZeRO 1 and 2 ask `available_memory()` (deepspeed/runtime/zero/stage_1_and_2.py)."""


def chosen(case: Case) -> tuple[str, str] | None:
    """(where, value): what the ranks get as CUDA_VISIBLE_DEVICES; `gpu_ids` of accelerate's file replaces it."""
    if case.job.gpu_ids not in (None, "all"):
        return "gpu_ids", str(case.job.gpu_ids)
    value = case.facts.environment.get("CUDA_VISIBLE_DEVICES")
    return None if value is None else ("CUDA_VISIBLE_DEVICES", value)


def _first_ones(ranks: int) -> str:
    return f"{ranks} ranks take the first ones" if ranks > 1 else "the one rank takes the first"


def skip_without_gpus(case: Case) -> None:
    if case.job.use_cpu:
        raise SkipCheck("the job runs on the CPU")


@check("EN101", "every entry of CUDA_VISIBLE_DEVICES is read whole")
def entries_whole(case: Case) -> Iterator[Finding]:
    """Numbers are read up to the first other character and the list ends there (seen on an H100, torch 2.11)."""
    skip_without_gpus(case)
    found = chosen(case)
    if found is None or found[1].startswith(("GPU-", "MIG-")):
        return
    for entry in found[1].split(","):
        match = re.match(r"\s*\+?(\d+)(.*)$", entry, re.DOTALL)
        if match is None:
            return  # LA105 and LA106 judge what is no number at all
        if match[2].strip():
            yield warning(
                f"{found[0]} is {found[1]!r}: of {entry!r} only {match[1]} is read.",
                f"The rest, {match[2].strip()!r}, is dropped without a word, and GPUs with it.",
                "Part the numbers by commas, without quotes: 0,1,2.",
                docs=CUDA_DOCS,
            )
            return


@check("EN102", "DeepSpeed can read CUDA_VISIBLE_DEVICES", needs=("gpus",))
def deepspeed_reads_devices(case: Case) -> Iterator[Finding]:
    """ZeRO 1 and 2 of DeepSpeed 0.18.7 and newer take int() of each entry (DeepSpeed: cuda_accelerator.py, #5278)."""
    skip_without_gpus(case)
    version, found = installed(case, "deepspeed"), chosen(case)
    packages = case.facts.packages or {}
    if not case.job.deepspeed or version is None or found is None:
        raise SkipCheck("DeepSpeed is not used, or nothing chooses devices")
    if version < _READS_NUMBERS or not {"nvidia-ml-py", "pynvml"} & set(packages):
        raise SkipCheck(f"DeepSpeed {version} does not read it here")
    bad = next((entry for entry in found[1].split(",") if not re.fullmatch(r"\s*[+-]?\d+\s*", entry)), None)
    seen = visible(case.facts.gpus or (), found[1])
    if bad is None or not (seen or bad.startswith("MIG-")):
        return
    numbers = ",".join(str(gpu.index) for gpu in seen)
    yield error(
        f"{found[0]} is {found[1]!r} and DeepSpeed is {version}, with nvidia-ml-py beside it.",
        f'ZeRO stops at its start: "ValueError: invalid literal for int() with base 10: {bad!r}".',
        f"Name the same GPUs by number: {numbers}."
        if seen
        else "Take distributed_type NO or MULTI_GPU for a MIG slice, or uninstall nvidia-ml-py from the job's Python.",
        commands=(f"export CUDA_VISIBLE_DEVICES={numbers}",) if seen and found[0] != "gpu_ids" else (),
        docs="https://github.com/deepspeedai/DeepSpeed/issues/5278",
    )


@check("EN103", "gpu_ids stays within CUDA_VISIBLE_DEVICES", needs=("gpus",))
def gpu_ids_within(case: Case) -> Iterator[Finding]:
    """accelerate replaces the variable by gpu_ids (0.30.1 and 1.15.0, utils/launch.py); both count the host's GPUs."""
    skip_without_gpus(case)
    value = case.facts.environment.get("CUDA_VISIBLE_DEVICES")
    if value is None or case.job.gpu_ids in (None, "all"):
        raise SkipCheck("they are not both set")
    assert case.facts.gpus is not None
    allowed = visible(case.facts.gpus, value)
    others = [gpu for gpu in selected(case.facts.gpus, {}, case.job.gpu_ids) if gpu not in allowed]
    if others and allowed:
        names = ", ".join(str(gpu.index) for gpu in others)
        slurm = "SLURM_JOB_ID" in case.facts.environment
        yield warning(
            f"CUDA_VISIBLE_DEVICES is {value!r} and gpu_ids of accelerate's file is {case.job.gpu_ids!r}.",
            f"accelerate puts gpu_ids in the variable's place: ranks start on GPU {names}, which it leaves out"
            f"{' and which another job of the cluster may have' if slurm else ''}.",
            "Set gpu_ids to all, and choose by the variable alone.",
        )


@check("EN104", "CUDA_DEVICE_ORDER is a word that CUDA knows")
def device_order_known(case: Case) -> Iterator[Finding]:
    """Only FASTEST_FIRST and PCI_BUS_ID, in capitals; another word stops CUDA (seen on an H100, driver 580)."""
    skip_without_gpus(case)
    value = case.facts.environment.get("CUDA_DEVICE_ORDER", "")
    if value and value not in ("FASTEST_FIRST", "PCI_BUS_ID"):
        yield error(
            f"CUDA_DEVICE_ORDER is {value!r}.",
            "CUDA does not start: 'Unexpected error from cudaGetDeviceCount() … Error 101: invalid device ordinal'.",
            "Write PCI_BUS_ID.",
            commands=("export CUDA_DEVICE_ORDER=PCI_BUS_ID",),
            docs=CUDA_DOCS,
        )


@check("EN105", "unequal cards are counted as nvidia-smi counts them", needs=("gpus",))
def mixed_cards_ordered(case: Case) -> Iterator[Finding]:
    """CUDA's own order is fastest first, nvidia-smi's and NVML's is PCI's (CUDA programming guide)."""
    skip_without_gpus(case)
    assert case.facts.gpus is not None
    names = list(dict.fromkeys(gpu.name for gpu in case.facts.gpus))
    if len(names) < 2 or case.facts.environment.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID":
        return
    found = chosen(case)
    by_number = found is not None and not found[1].startswith(("GPU-", "MIG-"))
    if by_number or (found is None and case.job.local_processes < len(case.facts.gpus)):
        how = f"{found[0]} is {found[1]!r}" if found else _first_ones(case.job.local_processes)
        yield warning(
            f"The cards differ ({', '.join(names)}), {how}, and CUDA_DEVICE_ORDER is not PCI_BUS_ID.",
            "CUDA counts the fastest card as 0, nvidia-smi and this report count by PCI: it may be another card.",
            "Set the order that nvidia-smi has.",
            commands=("export CUDA_DEVICE_ORDER=PCI_BUS_ID",),
            docs=CUDA_DOCS,
        )


@check("EN106", "kernels are not launched one by one")
def launch_blocking(case: Case) -> Iterator[Finding]:
    """CUDA_LAUNCH_BLOCKING=1 took 1.4 times as long for a FLUX-sized block, 1.9 for small layers (H100, torch 2.11)."""
    skip_without_gpus(case)
    value = case.facts.environment.get("CUDA_LAUNCH_BLOCKING", "")
    if value.strip() not in _OFF:
        yield warning(
            f"CUDA_LAUNCH_BLOCKING is {value!r}.",
            "The CPU waits for every kernel; a step takes 1.4 to 1.9 times as long. It is for finding a faulty kernel.",
            "Unset it for the training.",
            commands=("unset CUDA_LAUNCH_BLOCKING",),
            docs=CUDA_DOCS,
        )


@check("EN107", "CUDA loads its kernels when they are used")
def lazy_loading(case: Case) -> Iterator[Finding]:
    """CUDA_MODULE_LOADING=EAGER held 1.1 GiB more of every card (H100, torch 2.11); LAZY is CUDA 12's own choice."""
    skip_without_gpus(case)
    if case.facts.environment.get("CUDA_MODULE_LOADING") == "EAGER":
        yield warning(
            "CUDA_MODULE_LOADING is 'EAGER'.",
            "Every process loads all kernels of all libraries at its start: about 1.1 GiB of each card, which the "
            "memory forecast does not have.",
            "Unset it.",
            commands=("unset CUDA_MODULE_LOADING",),
            docs=CUDA_DOCS,
        )


_DEBUGGERS = {
    "CUDA_DEVICE_WAITS_ON_EXCEPTION": "a faulty kernel halts and waits for a debugger: the job hangs and says nothing",
    "CUDA_ENABLE_COREDUMP_ON_EXCEPTION": "a faulty kernel writes the GPU's state to disk before the rank ends",
    "CUDA_INJECTION64_PATH": "its library is loaded into every CUDA process; profilers leave it behind, and it slows",
    "NSIGHT_CUDA_DEBUGGER": "CUDA starts in debugging mode",
    "COMPUTE_PROFILE": "the old profiler is asked for",
    "CUDA_PROFILE": "the old profiler is asked for",
}


@check("EN108", "no debugger or profiler is asked for by a variable")
def no_debugger(case: Case) -> Iterator[Finding]:
    """The list of gpud and DCGM (leptonai/gpud: components/accelerator/nvidia/bad-envs; DCGM: software check)."""
    skip_without_gpus(case)
    for name, why in _DEBUGGERS.items():
        value = case.facts.environment.get(name, "")
        if value.strip() not in _OFF:
            yield warning(
                f"{name} is {value!r}.",
                f"{why[0].upper()}{why[1:]}.",
                "Unset it, unless you are debugging.",
                commands=(f"unset {name}",),
                docs=CUDA_DOCS,
            )


@check("EN109", "the driver's own libcuda is loaded", needs=("driver",))
def own_libcuda(case: Case) -> Iterator[Finding]:
    """A cuda-compat folder in LD_LIBRARY_PATH works on data-center cards only, and only when newer than the driver."""
    skip_without_gpus(case)
    assert case.facts.driver
    files = case.facts.environment.get("LD_LIBRARY_PATH", "").split(":")
    path = next((file for file in files if re.search(r"/libcuda\.so", file)), "")
    number = re.search(r"libcuda\.so\.(\d+\.\d+(?:\.\d+)?)$", path)
    if number is None or number[1] == case.facts.driver.version:
        return
    cards = [gpu.name for gpu in case.facts.gpus or ()]
    older = Version(number[1]) < Version(case.facts.driver.version)
    if older:
        because = "CUDA does not start: 'Error 803: system has unsupported display driver / cuda driver combination'."
    elif any("GeForce" in name for name in cards):
        because = "CUDA does not start: 'Error 804: forward compatibility was attempted on non supported HW'."
    else:
        return
    yield error(
        f"LD_LIBRARY_PATH brings {path}; the driver is {case.facts.driver.version}"
        f"{f' and the card {cards[0]}' if cards and not older else ''}.",
        because,
        "Take that folder off LD_LIBRARY_PATH; the driver has its own libcuda.",
        docs="https://docs.nvidia.com/deploy/cuda-compatibility/forward-compatibility.html",
    )


@check("EN110", "no other CUDA library comes before torch's own")
def own_libraries(case: Case) -> Iterator[Finding]:
    """LD_PRELOAD beats torch's RPATH; cuDNN 9 loads its parts by RUNPATH, LD_LIBRARY_PATH first (pytorch#188892)."""
    skip_without_gpus(case)
    environment = case.facts.environment
    if preloaded := environment.get("LD_PRELOAD", ""):
        yield warning(
            f"LD_PRELOAD holds {preloaded}.",
            "It takes the place of the library that this torch was built and tested with.",
            "Take it off LD_PRELOAD, unless you know that this torch wants it.",
            commands=("unset LD_PRELOAD",),
        )
    wheel = installed(case, "nvidia-cudnn-cu12") or installed(case, "nvidia-cudnn-cu13")
    files = environment.get("LD_LIBRARY_PATH", "").split(":")
    path = next((file for file in files if "libcudnn_graph" in file), "")
    number = re.search(r"\.so\.(\d+\.\d+\.\d+)$", path)
    if wheel and number and Version(number[1]) != Version(".".join(str(part) for part in wheel.release[:3])):
        yield warning(
            f"LD_LIBRARY_PATH brings {path}; torch came with cuDNN {wheel}.",
            "cuDNN loads its parts from there: 'CUDNN_STATUS_SUBLIBRARY_VERSION_MISMATCH' at the first convolution, "
            "which the autoencoder starts with.",
            "Take that folder off LD_LIBRARY_PATH.",
            docs="https://github.com/pytorch/pytorch/issues/188892",
        )
