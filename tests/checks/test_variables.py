"""EN1: variables that choose the devices, and CUDA's own. Each check fires on the fault and is silent beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from conftest import XFLUX_ACCELERATE, case, findings, gpus, job, machine, packages, verdict

from xflux_doctor.checks import ALL, variables
from xflux_doctor.facts import Driver, Package
from xflux_doctor.finding import Finding
from xflux_doctor.job import Job
from xflux_doctor.known_variables import SWITCHES_LEFT_ALONE
from xflux_doctor.matrix import Matrix

UUIDS = ",".join(gpu.uuid for gpu in gpus(count=2))
EN = [item for item in ALL if item.code.startswith("EN")]


def found(matrix: Matrix, check: Any, environment: dict[str, str], work: Job | None = None, **facts: Any) -> str:
    """Everything that the check says, as one text; empty when it is content."""
    subject = case(matrix, machine(matrix, environment=environment, **{"count": 2, **facts}), work or job())
    return " ".join(" ".join((f.severity, f.seen, f.because, f.hint, *f.commands)) for f in findings(subject, check))


@pytest.mark.parametrize("value", ["0;1", "0 1", "0.", '0"'])
def test_an_entry_is_read_up_to_the_first_other_character(matrix: Matrix, value: str) -> None:
    text = found(matrix, variables.entries_whole, {"CUDA_VISIBLE_DEVICES": value})
    assert "only 0 is read" in text and "by commas" in text


@pytest.mark.parametrize("value", ["0,1", " 0, 1 ", UUIDS, "", "-1", "0,x", "all"])
def test_what_is_read_whole_or_judged_elsewhere(matrix: Matrix, value: str) -> None:
    assert found(matrix, variables.entries_whole, {"CUDA_VISIBLE_DEVICES": value}) == ""


def test_deepspeed_takes_int_of_every_entry(matrix: Matrix) -> None:
    there = packages(matrix, "cuda13", deepspeed="0.19.8") | {"nvidia-ml-py": Package("nvidia-ml-py", "13.0")}
    text = found(matrix, variables.deepspeed_reads_devices, {"CUDA_VISIBLE_DEVICES": UUIDS}, packages=there)
    assert f"invalid literal for int() with base 10: '{gpus()[0].uuid}'" in text
    assert "export CUDA_VISIBLE_DEVICES=0,1" in text
    assert "base 10: ''" in found(
        matrix, variables.deepspeed_reads_devices, {"CUDA_VISIBLE_DEVICES": "0,1,"}, packages=there
    )
    assert found(matrix, variables.deepspeed_reads_devices, {"CUDA_VISIBLE_DEVICES": "0, 1"}, packages=there) == ""


def test_an_older_deepspeed_does_not_read_it(matrix: Matrix) -> None:
    old = packages(matrix, "cuda13", deepspeed="0.18.6") | {"nvidia-ml-py": Package("nvidia-ml-py", "13.0")}
    bare = packages(matrix, "cuda13", deepspeed="0.19.8", nvidia_ml_py="")
    for there in (old, bare):
        facts = machine(matrix, environment={"CUDA_VISIBLE_DEVICES": UUIDS}, count=2, packages=there)
        assert verdict(case(matrix, facts, job()), variables.deepspeed_reads_devices).status == "skipped"


def test_gpu_ids_go_beyond_what_is_visible(matrix: Matrix) -> None:
    work = job(XFLUX_ACCELERATE + "gpu_ids: 0,1\n")
    environment = {"CUDA_VISIBLE_DEVICES": "1", "SLURM_JOB_ID": "7"}
    text = found(matrix, variables.gpu_ids_within, environment, work)
    assert "ranks start on GPU 0" in text and "another job of the cluster" in text
    assert found(matrix, variables.gpu_ids_within, {"CUDA_VISIBLE_DEVICES": "0,1"}, work) == ""


@pytest.mark.parametrize(("value", "fires"), [("pci_bus_id", True), ("PCI", True), ("PCI_BUS_ID", False)])
def test_device_order(matrix: Matrix, value: str, fires: bool) -> None:
    text = found(matrix, variables.device_order_known, {"CUDA_DEVICE_ORDER": value})
    assert ("error" in text and "Error 101: invalid device ordinal" in text) == fires


def test_unequal_cards_want_an_order(matrix: Matrix) -> None:
    mixed = (*gpus("L40S", 1), *(msgspec.structs.replace(gpu, index=1) for gpu in gpus("H100", 1)))
    environment = {"CUDA_VISIBLE_DEVICES": "0"}
    text = found(matrix, variables.mixed_cards_ordered, environment, gpus=mixed)
    assert "NVIDIA L40S, NVIDIA H100" in text and "fastest card as 0" in text
    ordered = environment | {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    assert found(matrix, variables.mixed_cards_ordered, ordered, gpus=mixed) == ""
    assert found(matrix, variables.mixed_cards_ordered, {}, gpus=mixed) == ""  # all of them are used
    assert found(matrix, variables.mixed_cards_ordered, environment) == ""


@pytest.mark.parametrize(
    ("check", "name", "bad", "good", "words"),
    [
        (variables.launch_blocking, "CUDA_LAUNCH_BLOCKING", "1", "0", "1.4 to 1.9 times"),
        (variables.lazy_loading, "CUDA_MODULE_LOADING", "EAGER", "LAZY", "1.1 GiB of each card"),
        (variables.no_debugger, "CUDA_DEVICE_WAITS_ON_EXCEPTION", "1", "0", "waits for a debugger"),
        (variables.no_debugger, "CUDA_INJECTION64_PATH", "/opt/nsys/libToolsInjection64.so", "", "every CUDA process"),
    ],
)
def test_variables_that_slow(matrix: Matrix, check: Any, name: str, bad: str, good: str, words: str) -> None:
    text = found(matrix, check, {name: bad})
    assert words in text and f"unset {name}" in text
    assert found(matrix, check, {name: good}) == "" == found(matrix, check, {})


def test_another_libcuda(matrix: Matrix) -> None:
    def text(path: str, card: str = "H100", driver: str = "580.159.04") -> str:
        facts: dict[str, Any] = {"card": card, "driver": driver}
        return found(matrix, variables.own_libcuda, {"LD_LIBRARY_PATH": path}, **facts)

    assert "Error 803" in text("/usr/local/cuda/compat/libcuda.so.530.30.02")
    newer = "/usr/local/cuda/compat/libcuda.so.580.65.06"
    assert "Error 804" in text(newer, "5090", "570.86.15") and "GeForce RTX 5090" in text(newer, "5090", "570.86.15")
    assert text(newer, "H100", "535.54.03") == ""
    assert text("/usr/local/nvidia/lib64/libcuda.so.580.159.04") == ""


def test_other_libraries_before_torchs(matrix: Matrix) -> None:
    there = packages(matrix, "cuda13") | {"nvidia-cudnn-cu13": Package("nvidia-cudnn-cu13", "9.13.0.50")}
    assert "LD_PRELOAD holds /opt/libnccl.so.2.19.3" in found(
        matrix, variables.own_libraries, {"LD_PRELOAD": "/opt/libnccl.so.2.19.3"}
    )
    for version, fires in (("9.1.0", True), ("9.13.0", False)):
        environment = {"LD_LIBRARY_PATH": f"/usr/lib/libcudnn_graph.so.{version}"}
        text = found(matrix, variables.own_libraries, environment, packages=there)
        assert ("SUBLIBRARY_VERSION_MISMATCH" in text) == fires


RENTED = {
    "NVIDIA_VISIBLE_DEVICES": "all",
    "NVIDIA_DRIVER_CAPABILITIES": "compute,utility",
    "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7",
    "CUDA_HOME": "/usr/local/cuda",
    "CUDA_VERSION": "12.8.1",
    "NCCL_VERSION": "2.25.1-1",
    "NCCL_DEBUG": "WARN",
    "NCCL_SOCKET_IFNAME": "^docker,lo",
    "NCCL_IB_HCA": "mlx5",
    "NCCL_TESTS_DEVICE": "0",
    "TORCH_CUDA_ARCH_LIST": "9.0+PTX",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    "OMP_NUM_THREADS": "1",
    "HF_HOME": "/workspace/hf",
    "HF_HUB_ENABLE_HF_TRANSFER": "1",
    "MASTER_ADDR": "10.0.0.2",
    "MASTER_PORT": "29500",
    "WORLD_SIZE": "1",
    "RANK": "0",
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "NVSHMEM_DISABLE_NVLS": "1",
}
"""What a healthy rented container with eight cards has set."""


@pytest.mark.parametrize("stack", ["xflux-2024", "cuda12", "cuda13"])
def test_a_rented_box_is_left_in_peace(matrix: Matrix, stack: str) -> None:
    there = packages(matrix, stack) | {"hf-transfer": Package("hf-transfer", "0.1.9")}
    facts = machine(matrix, environment=RENTED, count=8, packages=there, stack=stack)
    facts = msgspec.structs.replace(
        facts,
        host=msgspec.structs.replace(facts.host, interfaces={"lo": "unknown", "eth0": "up", "docker0": "down"}),
        gpus=tuple(msgspec.structs.replace(gpu, nvlinks=18) for gpu in facts.gpus or ()),
        driver=Driver("580.159.04", "13.0"),
    )
    said: list[Finding] = [f for item in EN for f in verdict(case(matrix, facts, job(), stack), item).findings]
    assert said == []


NONSENSE = (
    "NCCL_ALGO NCCL_PROTO NCCL_BUFFSIZE NCCL_P2P_LEVEL PYTORCH_ALLOC_CONF HF_ENDPOINT GLOO_SOCKET_IFNAME LD_PRELOAD "
    "LD_LIBRARY_PATH PYTHONHOME CUDA_DEVICE_ORDER NCCL_MIN_NCHANNELS NCCL_MAX_NCHANNELS TORCH_DISTRIBUTED_DEBUG"
).split()


def test_no_check_crashes_on_nothing_or_on_nonsense(matrix: Matrix) -> None:
    for value in ("", " ", "x", "0", "1", "-1", "=", ":", ",", "^", "[", "é", "0x1", "999999999999999999999"):
        environment = dict.fromkeys((*RENTED, *NONSENSE), value)
        for facts in (machine(matrix, environment=environment, count=8), machine(matrix, card=None)):
            bare = msgspec.structs.replace(facts, packages=None, host=None, python=None)
            for subject in (facts, bare):
                for work in (job(), job(None), job(cpu=True)):
                    states = [verdict(case(matrix, subject, work), item) for item in EN]
                    assert not [state for state in states if state.status == "crashed"], environment


def test_the_switches_of_nvlink_multicast_are_never_named(matrix: Matrix) -> None:
    """Who set one had a reason that cannot be seen from here."""
    package = Path(variables.__file__).parent
    for path in package.glob("*variables.py"):
        assert not any(name in path.read_text(encoding="utf-8") for name in SWITCHES_LEFT_ALONE)
    for value in ("0", "1", "true", "x"):
        facts = machine(matrix, environment=dict.fromkeys(SWITCHES_LEFT_ALONE, value) | {"NCCL_NVLS_ENABL": "1"})
        said = [f for item in EN for f in verdict(case(matrix, facts, job()), item).findings]
        text = " ".join(" ".join((f.seen, f.because, f.hint, *f.commands)) for f in said)
        assert not any(name in text for name in SWITCHES_LEFT_ALONE), text
