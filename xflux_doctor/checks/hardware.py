"""HW: the driver and the cards themselves."""

from __future__ import annotations

from collections.abc import Iterator

from packaging.specifiers import SpecifierSet

from xflux_doctor.check import Case, SkipCheck, check
from xflux_doctor.finding import Edit, Finding, error, warning
from xflux_doctor.matrix import has_kernels
from xflux_doctor.visible import selected

GIB = 1 << 30


@check("HW101", "the NVIDIA driver answers")
def driver_answers(case: Case) -> Iterator[Finding]:
    """NVML, the driver's own library, starts and lists the GPUs."""
    if case.job.use_cpu:
        raise SkipCheck("the job runs on the CPU")
    if case.facts.gpus is not None:
        return
    why = case.facts.unknown.get("gpus", "NVML was not asked")
    hint = "Run on a GPU machine; in a container start it with --gpus all. To train on the CPU give --cpu."
    if "without a reboot" in why:
        hint = "Reboot the machine, or reload the nvidia kernel modules; reinstalling packages does not help."
    elif "did not answer" in why:
        hint = "Look for Xid lines with `dmesg | grep -i xid`; such a machine usually needs a reset or a reboot."
    yield error(f"No GPU can be seen: {why}.", "A GPU job cannot start here.", hint)


@check("HW102", "the driver is new enough for the stack", needs=("driver", "stack", "gpus"))
def driver_new_enough(case: Case) -> Iterator[Finding]:
    """CUDA 12 wheels want driver 525 or newer, CUDA 13 wheels 580; newer drivers run older CUDA."""
    assert case.stack and case.facts.driver and case.facts.gpus is not None
    if case.job.use_cpu or case.stack.is_cpu:
        raise SkipCheck("the job runs on the CPU")
    blackwell = any(gpu.capability[0] >= 10 for gpu in case.facts.gpus)
    need = (case.stack.driver_blackwell if blackwell else None) or case.stack.driver or ""
    if not SpecifierSet(need).contains(case.facts.driver.version):
        yield error(
            f"The driver is {case.facts.driver.version}; stack {case.stack.name} wants {need}.",
            f"torch for CUDA {case.stack.cuda} refuses to start: 'The NVIDIA driver on your system is too old'.",
            "Upgrade the driver, or choose a stack that takes it: `xflux-doctor matrix list`.",
            docs="https://docs.nvidia.com/deploy/cuda-compatibility/",
        )


@check("HW103", "torch has kernels for every visible card", needs=("gpus", "stack"))
def kernels_for_cards(case: Case) -> Iterator[Finding]:
    """A cubin sm_XY runs on compute capability X.Z with Z >= Y of the same major."""
    assert case.stack and case.facts.gpus is not None
    if case.job.use_cpu or case.stack.is_cpu:
        raise SkipCheck("the job runs on the CPU")
    for gpu in selected(case.facts.gpus, case.facts.environment, case.job.gpu_ids):
        if not has_kernels(case.stack.gpu_archs, gpu.capability):
            major, minor = gpu.capability
            yield error(
                f"GPU {gpu.index} is a {gpu.name} (sm_{major}{minor}); {case.stack.name} ships kernels for "
                f"{' '.join(case.stack.gpu_archs)}.",
                "Every kernel fails: 'no kernel image is available for execution on the device'.",
                "Choose a stack built for this card: `xflux-doctor matrix list`.",
            )


@check("HW104", "the cards compute in the job's precision", needs=("gpus", "accelerate"))
def precision_supported(case: Case) -> Iterator[Finding]:
    """bf16 wants compute capability 8.0; torch's own test says yes on a V100, because it counts emulation."""
    assert case.facts.gpus is not None
    if case.job.use_cpu:
        raise SkipCheck("the job runs on the CPU")
    # The trainer computes in what the training file says, whatever accelerate's says.
    train = case.job.train
    value = train.mixed_precision if train is not None else str(case.job.get("mixed_precision", "no")).lower()
    if value != "bf16":
        return
    names = ("train", "accelerate") if train is not None else ("accelerate",)
    edits = tuple(Edit(name, ("mixed_precision",), "fp16", "bf16 wants capability 8.0") for name in names)
    for gpu in selected(case.facts.gpus, case.facts.environment, case.job.gpu_ids):
        if gpu.capability < (8, 0):
            yield error(
                f"mixed_precision is bf16; GPU {gpu.index} ({gpu.name}) has compute capability "
                f"{gpu.capability[0]}.{gpu.capability[1]}.",
                "Cards before Ampere emulate bf16 many times slower, and torch does not refuse it.",
                "Use fp16 on this card, or an Ampere or newer one.",
                edits=edits,
                docs="https://docs.nvidia.com/cuda/cuda-c-programming-guide/#compute-capabilities",
            )


@check("HW105", "the cards may be shared by this job's ranks", needs=("gpus",))
def compute_mode(case: Case) -> Iterator[Finding]:
    """PROHIBITED refuses every CUDA context, EXCLUSIVE_PROCESS all but the first."""
    assert case.facts.gpus is not None
    if case.job.use_cpu:
        raise SkipCheck("the job runs on the CPU")
    for gpu in selected(case.facts.gpus, case.facts.environment, case.job.gpu_ids):
        if gpu.compute_mode == "prohibited":
            yield error(
                f"GPU {gpu.index} is in compute mode PROHIBITED.",
                "No process may open it: 'CUDA-capable device(s) is/are busy or unavailable'.",
                "Ask its administrator to set the default mode.",
                commands=(f"sudo nvidia-smi -i {gpu.index} -c DEFAULT",),
            )
        elif gpu.compute_mode == "exclusive_process" and gpu.processes:
            holder = gpu.processes[0]
            yield warning(
                f"GPU {gpu.index} is in compute mode EXCLUSIVE_PROCESS and process {holder.pid} holds it.",
                "A second process cannot open it.",
                "End that process, or choose another GPU by CUDA_VISIBLE_DEVICES.",
            )
