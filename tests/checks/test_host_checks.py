"""HO, TC and LA112: each check fires on the fault and stays silent beside it."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from conftest import GIB, XFLUX_ACCELERATE, case, findings, job, machine, packages, verdict

from xflux_doctor.check import Case, Check
from xflux_doctor.checks import hardware, host, launch, toolchain
from xflux_doctor.facts import Listener, Toolchain
from xflux_doctor.finding import Edit, Finding
from xflux_doctor.job import Job
from xflux_doctor.matrix import Matrix

MIB = 1 << 20
OFFLOAD = XFLUX_ACCELERATE.replace("offload_optimizer_device: none", "offload_optimizer_device: cpu")
NVME = XFLUX_ACCELERATE.replace("offload_optimizer_device: none", "offload_optimizer_device: nvme")
TWO_MACHINES = XFLUX_ACCELERATE.replace("num_machines: 1", "num_machines: 2")
DDP = XFLUX_ACCELERATE.replace("distributed_type: DEEPSPEED", "distributed_type: MULTI_GPU")
TOOLS = Toolchain("/usr/local/cuda", "/usr/local/cuda", "/usr/local/cuda/bin/nvcc", "13.0", "/usr/bin/c++", "13",
                  "/usr/bin/ninja", True, True)  # fmt: skip


def on(matrix: Matrix, work: Job | None = None, **values: Any) -> Case:
    """A healthy machine with eight cards, 64 cores, and these values of its host."""
    facts = machine(matrix, count=8)
    assert facts.host
    healthy = {"cpus": 64, "limits": {"memlock": None, "nofile": 1 << 20, "stack": 8 << 20, "nproc": 1 << 20},
               "interfaces": {"lo": "unknown", "eth0": "up"}, **values}  # fmt: skip
    facts = msgspec.structs.replace(facts, host=msgspec.structs.replace(facts.host, **healthy))
    return case(matrix, facts, work or job())


def limits(**values: int | None) -> dict[str, int | None]:
    return {"memlock": None, "nofile": 1 << 20, "stack": 8 << 20, "nproc": 1 << 20, **values}


FIRES: list[tuple[Check, Job | None, dict[str, Any], str]] = [
    (host.system, None, {"system": "Darwin", "machine": "arm64"}, "Darwin on arm64"),
    (host.kernel, None, {"kernel": "4.15.0-213-generic"}, "4.15.0"),
    (host.shared_memory, None, {"shm_total": 64 * MIB, "shm_free": 64 * MIB}, "64 MiB in all; 8 ranks"),
    (host.shared_memory, None, {"shm_total": 64 * GIB, "shm_free": 10 * MIB}, "10 MiB free"),
    (host.locked_memory, job(TWO_MACHINES), {"infiniband": ("mlx5_0",), "limits": limits(memlock=8 * MIB)}, "8 MiB"),
    (host.open_files, None, {"limits": limits(nofile=256)}, "may open 256 files"),
    (host.cores, None, {"cpus": 8, "cpu_quota": 7.5}, "8 ranks share 8 cores (the container's quota: 7.5)"),
    (host.swapping, None, {"swap_total": 16 * GIB, "swap_free": 8 * GIB, "memory_available": 2 * GIB}, "8.0 GiB lie"),
    (host.threads, None, {"pids_limit": 512}, "pids.max is 512"),
    (host.threads, None, {"limits": limits(nproc=1024)}, "nproc is 1024"),
    (host.interfaces, None, {"interfaces": {"eth0": "up"}}, "loopback interface is missing"),
    (host.interfaces, job(TWO_MACHINES), {"interfaces": {"lo": "unknown", "eth0": "down"}}, "eth0 down"),
]


@pytest.mark.parametrize(
    ("check", "work", "values", "words"), FIRES, ids=lambda v: v.code if isinstance(v, Check) else ""
)
def test_host_fires(matrix: Matrix, check: Check, work: Job | None, values: dict[str, Any], words: str) -> None:
    found = findings(on(matrix, work, **values), check)
    assert len(found) == 1 and words in found[0].seen and found[0].hint and found[0].because


@pytest.mark.parametrize("check", sorted({row[0] for row in FIRES}, key=lambda c: c.code), ids=lambda c: c.code)
@pytest.mark.parametrize("work", [job(), job(TWO_MACHINES)], ids=["one machine", "two"])
def test_healthy_host(matrix: Matrix, check: Check, work: Job) -> None:
    result = verdict(on(matrix, work, infiniband=("mlx5_0",)), check)
    assert result.status in ("ok", "skipped"), result


@pytest.mark.parametrize(("check", "values"), [
    (host.kernel, {"kernel": "6.8.0-1021-aws"}),
    (host.kernel, {"kernel": "5.15.0"}),
    (host.locked_memory, {"limits": limits(memlock=8 * MIB)}),  # no InfiniBand: NVLink and PCIe need no locked memory
    (host.swapping, {"swap_total": 16 * GIB, "swap_free": 8 * GIB}),  # idle pages in swap, memory to spare
    (host.shared_memory, {"shm_total": None, "shm_free": None}),
    (host.interfaces, {"interfaces": {}}),
])  # fmt: skip
def test_no_false_alarm(matrix: Matrix, check: Check, values: dict[str, Any]) -> None:
    assert verdict(on(matrix, **values), check).status in ("ok", "skipped")


def test_stack_limit_hurts_old_nccl_only(matrix: Matrix) -> None:
    subject = on(matrix, limits=limits(stack=None))
    old = msgspec.structs.replace(subject.facts, packages=packages(matrix, "xflux-2024", nvidia_nccl_cu12="2.20.5"))
    (finding,) = findings(case(matrix, old, job(), "xflux-2024"), host.stack_limit)
    assert "NCCL is 2.20.5" in finding.seen
    assert findings(subject, host.stack_limit) == ()  # cuda13 has 2.28.9
    assert findings(on(matrix), host.stack_limit) == ()


def test_container_without_gpus(matrix: Matrix) -> None:
    """The library is there, as in a CUDA image, and lists nothing."""
    facts = machine(matrix, card=None, environment={"NVIDIA_VISIBLE_DEVICES": "void"}, gpus=(), unknown={})
    assert facts.host
    inside = msgspec.structs.replace(facts, host=msgspec.structs.replace(facts.host, container="docker"))
    (finding,) = findings(case(matrix, inside, job()), host.container_has_gpus)
    assert "NVIDIA_VISIBLE_DEVICES is 'void'" in finding.seen and "--gpus all" in finding.hint
    closed = msgspec.structs.replace(inside.host, device_nodes={"nvidia0": "denied", "nvidiactl": "ok"})
    assert findings(case(matrix, msgspec.structs.replace(inside, host=closed), job()), host.container_has_gpus) == ()
    assert verdict(case(matrix, facts, job()), host.container_has_gpus).status == "skipped"


def test_a_container_without_the_driver_is_told_once(matrix: Matrix) -> None:
    facts = machine(matrix, card=None, environment={"NVIDIA_VISIBLE_DEVICES": "void"})
    assert facts.host
    inside = msgspec.structs.replace(facts, host=msgspec.structs.replace(facts.host, container="docker"))
    (finding,) = findings(case(matrix, inside, job()), hardware.driver_answers)
    assert "--gpus all" in finding.hint and "NVIDIA_VISIBLE_DEVICES is 'void'" in finding.hint
    assert "see HW101" in verdict(case(matrix, inside, job()), host.container_has_gpus).reason


def compiling(matrix: Matrix, accelerate: str = OFFLOAD, **values: Any) -> Case:
    """accelerate's file alone: some trainer that lets DeepSpeed offload. The bundled one does not."""
    work = msgspec.structs.replace(job(accelerate), train=None)
    return case(matrix, machine(matrix, toolchain=msgspec.structs.replace(TOOLS, **values)), work)


def found(subject: Case, check: Check) -> Finding:
    (finding,) = findings(subject, check)
    return finding


@pytest.mark.parametrize(("check", "values", "words"), [
    (toolchain.nvcc, {"cuda_home": "", "cuda_home_from": "", "nvcc": ""}, "there is no CUDA toolkit"),
    (toolchain.compiler, {"cxx": ""}, "there is no c++ on PATH"),
    (toolchain.ninja, {"ninja": ""}, "ninja is not on PATH, though it is installed in /venv/bin"),
    (toolchain.headers, {"python_headers": False}, "Python.h of Python 3.12"),
])  # fmt: skip
def test_toolchain(matrix: Matrix, check: Check, values: dict[str, Any], words: str) -> None:
    finding = found(compiling(matrix, **values), check)
    assert words in finding.seen and finding.severity == "error"
    (edit,) = finding.edits
    assert isinstance(edit, Edit) and (edit.key[-1], edit.value) == ("offload_optimizer_device", "none")
    assert findings(compiling(matrix), check) == ()
    # nothing is compiled, so nothing is asked for
    assert verdict(compiling(matrix, XFLUX_ACCELERATE, **values), check).status == "skipped"
    assert verdict(compiling(matrix, DDP.replace("device: none", "device: cpu"), **values), check).status == "skipped"


def test_the_bundled_trainer_compiles_nothing(matrix: Matrix) -> None:
    """It notes that offload is not used: a missing compiler must not stop its run."""
    bare = machine(matrix, toolchain=Toolchain())
    for check in (toolchain.nvcc, toolchain.compiler, toolchain.ninja, toolchain.headers):
        assert verdict(case(matrix, bare, job(OFFLOAD)), check).status == "skipped"


def test_the_toolkit_that_torch_wants_is_named(matrix: Matrix) -> None:
    assert "Install the CUDA 13.0 toolkit" in found(compiling(matrix, cuda_home="", nvcc=""), toolchain.nvcc).hint


def test_clang(matrix: Matrix) -> None:
    assert found(compiling(matrix, cxx="/usr/bin/clang++-18"), toolchain.compiler).severity == "warning"


def test_libaio_only_for_nvme(matrix: Matrix) -> None:
    assert "libaio.h" in found(compiling(matrix, NVME, libaio=False), toolchain.libaio).seen
    assert verdict(compiling(matrix, OFFLOAD, libaio=False), toolchain.libaio).status == "skipped"
    assert findings(compiling(matrix, NVME), toolchain.libaio) == ()


def test_cuda_home(matrix: Matrix) -> None:
    bad = compiling(matrix, XFLUX_ACCELERATE, cuda_home="/opt/none", cuda_home_from="CUDA_HOME", nvcc="")
    assert "CUDA_HOME is /opt/none" in found(bad, toolchain.cuda_home).seen
    assert findings(compiling(matrix, XFLUX_ACCELERATE), toolchain.cuda_home) == ()
    assert verdict(compiling(matrix, DDP), toolchain.cuda_home).status == "skipped"


def test_stale_lock(matrix: Matrix) -> None:
    path = "/home/me/.cache/torch_extensions/py311_cu121/cpu_adam/lock"
    finding = found(compiling(matrix, stale_locks={path: 90000.0}), toolchain.stale_lock)
    assert "25.0 h old" in finding.seen and finding.commands == (f"rm {path}",)
    assert findings(compiling(matrix, stale_locks={path: 60.0}), toolchain.stale_lock) == ()
    assert verdict(compiling(matrix, DDP, stale_locks={path: 90000.0}), toolchain.stale_lock).status == "skipped"


def test_port(matrix: Matrix) -> None:
    taken = (Listener(29500, "0.0.0.0", 4711, "python3", 7200.0), Listener(29501, "0.0.0.0"))
    facts = machine(matrix, count=8, listeners=taken, packages=packages(matrix, "xflux-2024"))
    finding = found(case(matrix, facts, job(), "xflux-2024"), launch.port_free)
    assert finding.seen == "Port 29500 is in use by process 4711 (python3, 2.0 h old)."
    assert finding.commands == ("ps -fp 4711", "kill 4711")
    assert finding.edits == (Edit("accelerate", ("main_process_port",), 29502, "port 29500 is taken"),)
    other = msgspec.structs.replace(facts, listeners=(Listener(29500, "::"),))
    assert "another user's process" in found(case(matrix, other, job(), "xflux-2024"), launch.port_free).seen
    # accelerate 1.15 looks for a free one by itself, but only on one machine
    newer = machine(matrix, count=8, listeners=taken)
    assert findings(case(matrix, newer, job()), launch.port_free) == ()
    assert len(findings(case(matrix, newer, job(TWO_MACHINES)), launch.port_free)) == 1
    # another port, one process, nothing known
    elsewhere = job(XFLUX_ACCELERATE + "main_process_port: 29600\n")
    assert findings(case(matrix, facts, elsewhere, "xflux-2024"), launch.port_free) == ()
    one = job(XFLUX_ACCELERATE.replace("num_processes: 8", "num_processes: 1"))
    assert verdict(case(matrix, facts, one, "xflux-2024"), launch.port_free).status == "skipped"
    assert verdict(case(matrix, machine(matrix), job()), launch.port_free).status == "skipped"


def test_port_when_the_next_ones_are_taken_too(matrix: Matrix) -> None:
    """Nothing free was seen: the finding stays, without an edit."""
    taken = tuple(Listener(29500 + number, "0.0.0.0") for number in range(16))
    facts = machine(matrix, count=8, listeners=taken, packages=packages(matrix, "xflux-2024"))
    finding = found(case(matrix, facts, job(), "xflux-2024"), launch.port_free)
    assert finding.edits == () and finding.severity == "error"


@pytest.mark.parametrize("stack", ["xflux-2024", "cuda13"])
def test_aarch64(matrix: Matrix, stack: str) -> None:
    """No stack was tested there (SW101 refuses all), so none is recommended."""
    facts = machine(matrix)
    assert facts.host
    arm = msgspec.structs.replace(facts, host=msgspec.structs.replace(facts.host, machine="aarch64"))
    finding = found(case(matrix, arm, job(), stack), host.system)
    assert "Linux on aarch64" in finding.seen and "cuda13" not in finding.hint
