"""HW: each check fires on the fault and stays silent beside it."""

from __future__ import annotations

import msgspec
import pytest
from conftest import XFLUX_ACCELERATE, case, findings, gpus, job, machine, packages, verdict
from packaging.version import Version

from xflux_doctor.check import Case
from xflux_doctor.checks import hardware
from xflux_doctor.facts import Driver, GpuProcess, Host
from xflux_doctor.finding import Edit
from xflux_doctor.matrix import Matrix
from xflux_doctor.refused import fp8_lacks


def test_driver_answers(matrix: Matrix) -> None:
    (finding,) = findings(case(matrix, machine(matrix, card=None), job()), hardware.driver_answers)
    assert "there is no NVIDIA driver library" in finding.seen
    assert findings(case(matrix, machine(matrix), job()), hardware.driver_answers) == ()


def test_version_mismatch_says_reboot_and_not_reinstall(matrix: Matrix) -> None:
    why = "driver and library versions differ (the driver was upgraded without a reboot)"
    facts = machine(matrix, card=None, unknown={"gpus": why})
    (finding,) = findings(case(matrix, facts, job()), hardware.driver_answers)
    assert finding.hint.startswith("Reboot")


BOX = Host("Linux", "x86_64", container="docker")
BARE = Host("Linux", "x86_64")


@pytest.mark.parametrize(("why", "host", "hint", "command"), [
    ("driver and library versions differ (the driver was upgraded without a reboot)", BARE, "Reboot", "rmmod"),
    ("driver and library versions differ (the driver was upgraded without a reboot)", BOX, "Reboot", ""),
    ("NVML did not answer within 10 s: a GPU or the driver hangs", BARE, "Look for Xid", "dmesg"),
    ("NVML did not start: Unknown Error", BOX, "The container has lost its right to the devices", ""),
    ("NVML did not start: Unknown Error", BARE, "This user may not open", "ls -l"),
    ("no permission to talk to the NVIDIA driver", BARE, "This user may not open", "ls -l"),
    ("the NVIDIA kernel module is not loaded", BARE, "Load the kernel module", "modprobe"),
    ("there is no NVIDIA driver library (libnvidia-ml.so.1) on this machine or in this container", BOX,
     "Start the container again with `--gpus all` (NVIDIA_VISIBLE_DEVICES is 'void')", ""),
    ("there is no NVIDIA driver library (libnvidia-ml.so.1) on this machine or in this container", BARE,
     "Run on a GPU machine", ""),
])  # fmt: skip
def test_the_way_back(matrix: Matrix, why: str, host: Host, hint: str, command: str) -> None:
    environment = {"NVIDIA_VISIBLE_DEVICES": "void"}
    facts = machine(matrix, card=None, unknown={"gpus": why}, host=host, environment=environment)
    (finding,) = findings(case(matrix, facts, job()), hardware.driver_answers)
    assert why in finding.seen and finding.hint.startswith(hint)
    assert "reinstall" not in finding.hint or "does not help" in finding.hint
    assert command in " ".join(finding.commands) and bool(finding.commands) == bool(command)


def test_cpu_job_needs_no_driver(matrix: Matrix) -> None:
    assert verdict(case(matrix, machine(matrix, card=None), job(cpu=True)), hardware.driver_answers).status == "skipped"


def test_driver_against_stack(matrix: Matrix) -> None:
    old = machine(matrix, driver="550.127.05")
    (finding,) = findings(case(matrix, old, job()), hardware.driver_new_enough)
    assert "The driver is 550.127.05; stack cuda13 wants" in finding.seen
    assert findings(case(matrix, old, job(), "cuda12"), hardware.driver_new_enough) == ()


def test_blackwell_wants_a_newer_driver(matrix: Matrix) -> None:
    facts = machine(matrix, card="B200", driver="550.127.05")
    assert len(findings(case(matrix, facts, job(), "cuda12"), hardware.driver_new_enough)) == 1
    newer = machine(matrix, card="B200", driver="570.86.15")
    assert findings(case(matrix, newer, job(), "cuda12"), hardware.driver_new_enough) == ()


def test_newer_driver_runs_older_cuda(matrix: Matrix) -> None:
    facts = machine(matrix, driver="595.58.03")
    assert findings(case(matrix, facts, job(), "xflux-2024"), hardware.driver_new_enough) == ()


def test_kernels(matrix: Matrix) -> None:
    (finding,) = findings(case(matrix, machine(matrix, card="5090"), job(), "xflux-2024"), hardware.kernels_for_cards)
    assert "sm_120" in finding.seen and "sm_90" in finding.seen
    # 8.9 runs code for 8.6
    assert findings(case(matrix, machine(matrix, card="L40S"), job(), "xflux-2024"), hardware.kernels_for_cards) == ()


def test_kernels_of_hidden_cards_do_not_matter(matrix: Matrix) -> None:
    mixed = (*gpus("H100", 1), *gpus("V100", 1, index=1, uuid="GPU-1"))
    facts = machine(matrix, gpus=mixed, environment={"CUDA_VISIBLE_DEVICES": "0"})
    assert findings(case(matrix, facts, job()), hardware.kernels_for_cards) == ()
    assert len(findings(case(matrix, machine(matrix, gpus=mixed), job()), hardware.kernels_for_cards)) == 1


def test_the_installed_torch_knows_its_own_kernels_best(matrix: Matrix) -> None:
    facts = machine(matrix, card="5090")
    assert facts.packages is not None
    torch = msgspec.structs.replace(facts.packages["torch"], version="2.7.0", archs=("sm_90", "sm_100", "sm_120"))
    own = msgspec.structs.replace(facts, packages={**facts.packages, "torch": torch})
    assert findings(case(matrix, own, job(), "xflux-2024"), hardware.kernels_for_cards) == ()
    old = msgspec.structs.replace(torch, archs=("sm_80", "sm_90"))
    other = msgspec.structs.replace(facts, packages={**facts.packages, "torch": old})
    (finding,) = findings(case(matrix, other, job(), "cuda13"), hardware.kernels_for_cards)
    assert "the installed torch 2.7.0 ships kernels for sm_80 sm_90" in finding.seen


def test_precision(matrix: Matrix) -> None:
    (finding,) = findings(case(matrix, machine(matrix, card="V100"), job(), "cuda12"), hardware.precision_supported)
    edits = tuple(Edit(n, ("mixed_precision",), "fp16", "bf16 wants capability 8.0") for n in ("train", "accelerate"))
    assert finding.edits == edits
    # what accelerate's file says alone changes nothing: the trainer goes by its own
    half = job(XFLUX_ACCELERATE.replace("mixed_precision: bf16", "mixed_precision: fp16"))
    assert findings(case(matrix, machine(matrix, card="V100"), half, "cuda12"), hardware.precision_supported)
    fp16 = job(mixed_precision="fp16")
    assert findings(case(matrix, machine(matrix, card="V100"), fp16, "cuda12"), hardware.precision_supported) == ()
    assert findings(case(matrix, machine(matrix, card="A100"), job()), hardware.precision_supported) == ()


def test_compute_mode(matrix: Matrix) -> None:
    closed = machine(matrix, gpus=gpus("H100", 1, compute_mode="prohibited"))
    assert findings(case(matrix, closed, job()), hardware.compute_mode)[0].severity == "error"
    held = machine(
        matrix, gpus=gpus("H100", 1, compute_mode="exclusive_process", processes=(GpuProcess(4711, 1 << 30),))
    )
    assert "process 4711 holds it" in findings(case(matrix, held, job()), hardware.compute_mode)[0].seen
    alone = machine(matrix, gpus=gpus("H100", 1, compute_mode="exclusive_process"))
    assert findings(case(matrix, alone, job()), hardware.compute_mode) == ()


def test_one_driver(matrix: Matrix) -> None:
    both = msgspec.structs.replace(
        machine(matrix, host=BARE), driver=Driver("580.95.05", "13.0", "580.95.05", "580.159.04")
    )
    (finding,) = findings(case(matrix, both, job()), hardware.one_driver)
    assert "module is 580.95.05, the library that programs take is 580.159.04" in finding.seen
    assert finding.hint.startswith("Reboot") and "reinstalling packages does not help" in finding.hint
    assert finding.commands
    inside = msgspec.structs.replace(both, host=BOX)
    (finding,) = findings(case(matrix, inside, job()), hardware.one_driver)
    assert finding.commands == () and "started anew" in finding.hint
    same = msgspec.structs.replace(both, driver=Driver("580.95.05", "13.0", "580.95.05", "580.95.05"))
    assert findings(case(matrix, same, job()), hardware.one_driver) == ()
    assert verdict(case(matrix, machine(matrix), job()), hardware.one_driver).status == "skipped"


NODES = {"nvidiactl": "ok", "nvidia-uvm": "ok", "nvidia-uvm-tools": "ok", "nvidia-modeset": "denied"}


def with_nodes(matrix: Matrix, nodes: dict[str, str], host: Host = BOX, count: int = 2) -> Case:
    return case(matrix, machine(matrix, count=count, host=msgspec.structs.replace(host, device_nodes=nodes)), job())


def test_device_files(matrix: Matrix) -> None:
    whole = {**NODES, "nvidia0": "ok", "nvidia1": "ok"}
    assert findings(with_nodes(matrix, whole), hardware.device_files) == ()
    (finding,) = findings(with_nodes(matrix, {**whole, "nvidia1": "denied"}), hardware.device_files)
    assert "/dev/nvidia1" in finding.seen and "modeset" not in finding.seen
    (finding,) = findings(with_nodes(matrix, {**NODES, "nvidia3": "ok"}), hardware.device_files)
    assert "lacks /dev/nvidiaN of 1 of 2 GPUs" in finding.seen
    bare = {name: state for name, state in whole.items() if name != "nvidia-uvm"}
    (finding,) = findings(with_nodes(matrix, bare), hardware.device_files)
    assert "lacks /dev/nvidia-uvm" in finding.seen
    # on a plain host the driver's helper makes it when CUDA first starts
    assert findings(with_nodes(matrix, bare, BARE), hardware.device_files) == ()


def test_device_files_that_say_nothing(matrix: Matrix) -> None:
    assert verdict(with_nodes(matrix, {}), hardware.device_files).status == "skipped"
    linux_on_windows = msgspec.structs.replace(BARE, wsl=True)
    assert verdict(with_nodes(matrix, {"dxg": "ok"}, linux_on_windows), hardware.device_files).status == "skipped"


def test_device_files_denied_explain_a_silent_driver(matrix: Matrix) -> None:
    nodes = {**NODES, "nvidiactl": "denied", "nvidia0": "denied"}
    host = msgspec.structs.replace(BARE, device_nodes=nodes)
    facts = machine(matrix, card=None, host=host, unknown={"gpus": "no permission to talk to the NVIDIA driver"})
    (finding,) = findings(case(matrix, facts, job()), hardware.device_files)
    assert "/dev/nvidiactl, /dev/nvidia0" in finding.seen


def test_fp8(matrix: Matrix) -> None:
    asked = XFLUX_ACCELERATE.replace("mixed_precision: bf16", "mixed_precision: fp8")
    (finding,) = findings(case(matrix, machine(matrix, card="A100", count=2), job(asked)), hardware.fp8)
    assert finding.severity == "warning" and "capability 8.0" in finding.seen
    assert finding.edits == (Edit("accelerate", ("mixed_precision",), "bf16", "fp8 wants capability 8.9"),)
    own = msgspec.structs.replace(job(asked), train=None)
    (finding,) = findings(case(matrix, machine(matrix, card="V100"), own), hardware.fp8)
    assert finding.severity == "error" and "fp16" in finding.hint
    assert findings(case(matrix, machine(matrix, card="L40S"), job(asked)), hardware.fp8) == ()
    assert verdict(case(matrix, machine(matrix, card="A100"), job()), hardware.fp8).status == "skipped"


SEVERAL = XFLUX_ACCELERATE.replace("DEEPSPEED", "MULTI_GPU")


@pytest.mark.parametrize(("card", "torch", "train", "severity", "words"), [
    ("H100", "2.11.0", {}, None, ""),
    ("B200", "2.11.0", {}, None, ""),
    ("A100", "2.11.0", {}, "error", "GPU 0 (NVIDIA A100-SXM4-80GB) has compute capability 8.0"),
    ("A100", "2.11.0", {"kernels": "diffusers"}, "warning", "has compute capability 8.0"),
    ("H100", "2.4.0", {}, "error", "computes by torch 2.4.0"),
    ("L40S", "2.11.0", {}, "error", "2.12 does not"),
    ("L40S", "2.12.0", {}, None, ""),
    ("A100", "2.11.0", {"quantization": "fp8"}, "skipped", ""),
])  # fmt: skip
def test_fp8_products(
    matrix: Matrix, card: str, torch: str, train: dict[str, str], severity: str | None, words: str
) -> None:
    facts = machine(matrix, card=card, packages=packages(matrix, "cuda13", torch=torch))
    work = job(SEVERAL, **{"quantization": "fp8-dynamic", **train})
    if severity == "skipped":
        assert verdict(case(matrix, facts, work), hardware.fp8_products).status == severity
        return
    found = findings(case(matrix, facts, work), hardware.fp8_products)
    assert [finding.severity for finding in found] == ([severity] if severity else [])
    for finding in found:
        assert words in finding.seen
        assert finding.edits == (Edit("train", ("quantization",), "fp8", "as many bytes, and products in 16 bits"),)


@pytest.mark.parametrize("torch", ["2.4.0", "2.5.0", "2.11.0", "2.12.0"])
@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (12, 0)])
def test_fp8_products_as_the_trainer_asks_for_them(
    monkeypatch: pytest.MonkeyPatch, torch: str, capability: tuple[int, int]
) -> None:
    """What the trainer's own question would answer before it tries the product."""
    lib = pytest.importorskip("torch")
    fp8 = pytest.importorskip("xflux_trainer.fp8")
    monkeypatch.setattr(lib, "__version__", torch)
    monkeypatch.setattr(lib.version, "hip", None)
    monkeypatch.setattr(lib.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(lib.cuda, "get_device_name", lambda _: "a card")
    monkeypatch.setattr(fp8, "_probe", lambda _: 0.0)
    asked = fp8.supported.__wrapped__(lib.device("cuda"))
    assert (asked is None) == (fp8_lacks(capability, Version(torch)) is None)
