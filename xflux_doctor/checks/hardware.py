"""HW: the driver and the cards themselves."""

from __future__ import annotations

import re
from collections.abc import Iterator

from packaging.specifiers import SpecifierSet

from xflux_doctor.bill import fused
from xflux_doctor.check import Case, SkipCheck, check
from xflux_doctor.choose import driver_need
from xflux_doctor.finding import Edit, Finding, error, warning
from xflux_doctor.matrix import has_kernels
from xflux_doctor.refused import fp8_lacks
from xflux_doctor.versions import version_of
from xflux_doctor.visible import selected

_RELOAD = "sudo rmmod nvidia_uvm nvidia_drm nvidia_modeset nvidia && sudo modprobe nvidia"


@check("HW101", "the NVIDIA driver answers")
def driver_answers(case: Case) -> Iterator[Finding]:
    """NVML, the driver's own library, starts and lists the GPUs."""
    if case.job.use_cpu:
        raise SkipCheck("the job runs on the CPU")
    if case.facts.gpus is not None:
        return
    why = case.facts.unknown.get("gpus", "NVML was not asked")
    hint, commands = _way_back(case, why)
    yield error(f"No GPU can be seen: {why}.", "A GPU job cannot start here.", hint, commands=commands)


def _way_back(case: Case, why: str) -> tuple[str, tuple[str, ...]]:
    """What to do next, by the reason that the gatherer gives."""
    host = case.facts.host
    inside = bool(host and host.container)
    if "without a reboot" in why:
        hint = "Reboot the machine, or reload the nvidia kernel modules; reinstalling packages does not help."
        return hint, () if inside else (_RELOAD,)
    if "did not answer" in why:
        hint = "Look for Xid lines in the kernel log; such a machine usually needs a reset or a reboot."
        return hint, ("dmesg | grep -i xid",)
    if "Unknown Error" in why and inside:
        return (
            "The container has lost its right to the devices, as after `systemctl daemon-reload` on the host: start it "
            "anew. Nothing inside can change it."
        ), ()
    if "no permission" in why or "Unknown Error" in why:
        return "This user may not open the driver's device files: see HW108.", ("ls -l /dev/nvidia*",)
    if "not loaded" in why:
        return "Load the kernel module, on the host.", () if inside else (
            "sudo modprobe nvidia",
            "dmesg | grep -i nvrm",
        )
    if inside:
        asked = case.facts.environment.get("NVIDIA_VISIBLE_DEVICES")
        named = f"NVIDIA_VISIBLE_DEVICES is {asked!r}" if asked is not None else "NVIDIA_VISIBLE_DEVICES is not set"
        return f"Start the container again with `--gpus all` ({named}). To train on the CPU give --cpu.", ()
    return "Run on a GPU machine with NVIDIA's driver installed. To train on the CPU give --cpu.", ()


@check("HW102", "the driver is new enough for the stack", needs=("driver", "stack", "gpus"))
def driver_new_enough(case: Case) -> Iterator[Finding]:
    """CUDA 12 wheels want driver 525 or newer, CUDA 13 wheels 580; newer drivers run older CUDA."""
    assert case.stack and case.facts.driver and case.facts.gpus is not None
    if case.job.use_cpu or case.stack.is_cpu:
        raise SkipCheck("the job runs on the CPU")
    need = driver_need(case.stack, case.facts.gpus)
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
    torch = (case.facts.packages or {}).get("torch")
    whose, archs = case.stack.name, case.stack.gpu_archs
    if torch and torch.archs:
        whose, archs = f"the installed torch {torch.version}", torch.archs
    for gpu in selected(case.facts.gpus, case.facts.environment, case.job.gpu_ids):
        if not has_kernels(archs, gpu.capability):
            major, minor = gpu.capability
            yield error(
                f"GPU {gpu.index} is a {gpu.name} (sm_{major}{minor}); {whose} ships kernels for {' '.join(archs)}.",
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


@check("HW107", "the driver's library and its kernel module are of one version", needs=("driver",))
def one_driver(case: Case) -> Iterator[Finding]:
    """After an upgrade the old module stays loaded until a reboot; CUDA then answers 803 or 804 (CUDA driver API)."""
    driver = case.facts.driver
    assert driver
    if case.job.use_cpu:
        raise SkipCheck("the job runs on the CPU")
    if not driver.module or not driver.library:
        raise SkipCheck("one of the two versions is not shown here")
    if driver.module != driver.library:
        inside = bool(case.facts.host and case.facts.host.container)
        yield error(
            f"The loaded kernel module is {driver.module}, the library that programs take is {driver.library}.",
            "CUDA refuses to start: 'system has unsupported display driver / cuda driver combination'.",
            "Reboot the machine, or reload the kernel modules; reinstalling packages does not help."
            + (" This container then has to be started anew." if inside else ""),
            commands=() if inside else (_RELOAD,),
        )


@check("HW108", "the driver's device files can be opened", needs=("host",))
def device_files(case: Case) -> Iterator[Finding]:
    """CUDA opens nvidiactl, nvidia-uvm and one file for each card; NVML does without some of them."""
    assert case.facts.host
    if case.job.use_cpu:
        raise SkipCheck("the job runs on the CPU")
    host, nodes = case.facts.host, case.facts.host.device_nodes
    if host.wsl or not nodes:
        raise SkipCheck("there are none" if not host.wsl else "WSL2 has /dev/dxg in their place")
    own = {name: state for name, state in nodes.items() if re.fullmatch(r"nvidia(ctl|-uvm|\d+)", name)}
    denied = [name for name, state in own.items() if state == "denied"]
    if denied:
        yield error(
            f"This user may not open {', '.join(f'/dev/{name}' for name in denied)}.",
            "CUDA finds no device there: 'no CUDA-capable device is detected', or answers 999.",
            "Join the group that owns them, or have the container started with them (a sandbox may forbid it).",
            commands=("ls -l /dev/nvidia*", "id"),
        )
    # On a plain host nvidia-modprobe makes what is missing at the first start of CUDA; in a container nobody does.
    cards, there = len(case.facts.gpus or ()), sum(name[-1].isdigit() for name in own)
    missing = [f"/dev/{name}" for name in ("nvidiactl", "nvidia-uvm") if name not in own]
    if there < cards:
        missing.append(f"/dev/nvidiaN of {cards - there} of {cards} GPUs")
    if host.container and cards and missing:
        yield error(
            f"The driver lists {cards} GPUs and this container lacks {', '.join(missing)}.",
            "CUDA does not start, or sees fewer GPUs than nvidia-smi.",
            "Start the container again with `--gpus all`, or hand it those files with `--device`.",
            docs="https://docs.nvidia.com/datacenter/cloud-native/container-toolkit/latest/",
        )


@check("HW109", "fp8 is asked of cards that have it", needs=("gpus", "accelerate"))
def fp8(case: Case) -> Iterator[Finding]:
    """fp8 needs compute capability 8.9, Ada or Hopper (NVIDIA Transformer Engine).

    The bundled trainer does not go by accelerate's precision: what its own quantization asks of a card is HW124's.
    """
    assert case.facts.gpus is not None
    if case.job.use_cpu or str(case.job.get("mixed_precision", "no")).lower() != "fp8":
        raise SkipCheck("fp8 is not asked for")
    for gpu in selected(case.facts.gpus, case.facts.environment, case.job.gpu_ids):
        if gpu.capability < (8, 9):
            value = "bf16" if gpu.capability >= (8, 0) else "fp16"
            make = error if case.job.train is None else warning
            yield make(
                f"mixed_precision is fp8 in accelerate's file; GPU {gpu.index} ({gpu.name}) has compute capability "
                f"{gpu.capability[0]}.{gpu.capability[1]}.",
                "No library runs fp8 below 8.9."
                + (" The bundled trainer goes by the training file, so nothing comes of it." if case.job.train else ""),
                f"Write {value}.",
                edits=(Edit("accelerate", ("mixed_precision",), value, "fp8 wants capability 8.9"),),
                docs="https://docs.nvidia.com/deeplearning/transformer-engine/user-guide/",
            )
            return


@check("HW124", "the cards multiply in the training file's fp8", needs=("train", "trainer", "gpus"))
def fp8_products(case: Case) -> Iterator[Finding]:
    """quantization fp8-dynamic multiplies in fp8: capability 8.9, torch 2.5, on Ada 2.12 (trainer/fp8.py).

    The other formats, fp8 among them, only store the frozen base, on any card.
    """
    train = case.job.train
    assert train is not None and case.facts.gpus is not None
    if case.job.use_cpu or train.quantization != "fp8-dynamic":
        raise SkipCheck("products in fp8 are not asked for")
    for gpu in selected(case.facts.gpus, case.facts.environment, case.job.gpu_ids):
        lack = fp8_lacks(gpu.capability, version_of(case.facts, "torch"))
        if lack is None:
            continue
        whose = f"GPU {gpu.index} ({gpu.name}) has {lack}"
        make = error if fused(case) else warning
        yield make(
            f"quantization is fp8-dynamic; {whose.replace('has torch', 'computes by torch')}.",
            "Its products fail." if fused(case) else "diffusers' blocks compute here, and multiply dense copies.",
            "Set quantization to fp8, which stores the base in as many bytes (by optimum-quanto).",
            edits=(Edit("train", ("quantization",), "fp8", "as many bytes, and products in 16 bits"),),
        )
        return
