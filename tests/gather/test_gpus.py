"""GPUs: the real pynvml and our gatherer over a library that plays broken drivers and cards."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, XFLUX_ACCELERATE

from xflux_doctor.facts import Driver, Facts, Gpu, GpuHealth, LostGpu, from_json

SOURCE = Path(__file__).parent / "fake_nvml" / "nvml.c"
COMPILER = shutil.which("gcc") or shutil.which("cc")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="there is no C compiler to build the fake NVML with")
# Ask in a child: LD_LIBRARY_PATH counts at a program's start.
ASK = """\
import sys
from pathlib import Path
from xflux_doctor.facts import Facts, to_json
from xflux_doctor.gather import gpus
got = gpus.read(float(sys.argv[1]), Path(sys.argv[2]))
unknown = {"gpus": got.error} if got.error else {}
print(to_json(Facts(driver=got.driver, gpus=got.gpus, lost_gpus=got.lost, unknown=unknown)))
"""


@pytest.fixture(scope="session")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of the fake library: of today, and of a driver that lacks what came after 2021."""
    folders = {}
    for kind, flags in (("new", []), ("old", ["-DOLD"])):
        folders[kind] = tmp_path_factory.mktemp(f"nvml-{kind}")
        library = folders[kind] / "libnvidia-ml.so.580.159.04"
        command = [COMPILER or "cc", "-shared", "-fPIC", "-O1", "-Wall", *flags, "-o", library, SOURCE]
        subprocess.run(command, check=True, timeout=60)
        (folders[kind] / "libnvidia-ml.so.1").symlink_to(library.name)
    return folders


def environment(folder: Path, script: str, place: Path) -> dict[str, str]:
    (place / "nvml.txt").write_text(script)
    path = os.environ.get("LD_LIBRARY_PATH", "")
    return {
        **os.environ,
        "LD_LIBRARY_PATH": f"{folder}:{path}".rstrip(":"),
        "FAKE_NVML": str(place / "nvml.txt"),
        "HF_HOME": str(place / "hf"),
    }


def ask(folder: Path, script: str, place: Path, *, deadline: float = 10.0) -> Facts:
    root = place / "root"
    root.mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-c", ASK, str(deadline), str(root)],
        env=environment(folder, script, place), capture_output=True, text=True, timeout=30, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0 and not done.stderr, done.stderr
    return from_json(done.stdout.encode())


def only(facts: Facts) -> Gpu:
    assert facts.gpus is not None and facts.unknown == {}
    (gpu,) = facts.gpus
    return gpu


@needs_compiler
def test_eight_healthy_cards(libraries: dict[str, Path], tmp_path: Path) -> None:
    facts = ask(libraries["new"], "count 8\n", tmp_path)
    assert facts.gpus is not None
    assert [gpu.index for gpu in facts.gpus] == list(range(8))
    assert facts.lost_gpus == () and facts.unknown == {}
    assert facts.driver == Driver("580.159.04", "13.0", "", "580.159.04")
    healthy = GpuHealth(True, True, 0, False, False, None, "none", ("idle",), True, "completed", 16, 16, 32)
    assert facts.gpus[7].health == healthy
    assert facts.gpus[7].nvlinks == 18
    assert facts.gpus[7].pci == "00000000:17:00.0" and facts.gpus[7].mig is False


@needs_compiler
@pytest.mark.parametrize(("code", "words"), [
    (18, "driver and library versions differ (the driver was upgraded without a reboot)"),
    (9, "the NVIDIA kernel module is not loaded"),
    (4, "no permission to talk to the NVIDIA driver"),
    (999, "NVML did not start: Unknown Error"),
    (17, "NVML did not start: The operating system has blocked the request"),
])  # fmt: skip
def test_nvml_does_not_start(libraries: dict[str, Path], tmp_path: Path, code: int, words: str) -> None:
    facts = ask(libraries["new"], f"nvmlInitWithFlags {code}\n", tmp_path)
    assert facts.gpus is None and facts.driver is None
    assert facts.unknown["gpus"].startswith(words)


def test_without_the_driver_s_library_its_bindings_are_not_loaded(tmp_path: Path) -> None:
    """They take 30 ms, which a login node without a card has no use for. A library that is none hides a real one."""
    (tmp_path / "libnvidia-ml.so.1").write_text("no library")
    asked = "import sys; from xflux_doctor.gather import gpus; print(gpus.read().error); print('pynvml' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", asked], env={**os.environ, "LD_LIBRARY_PATH": str(tmp_path)}, capture_output=True,
        text=True, timeout=30, check=True, cwd=ROOT,
    )  # fmt: skip
    error, loaded = done.stdout.splitlines()
    assert error.startswith("there is no NVIDIA driver library") and loaded == "False"


@needs_compiler
def test_a_mismatch_names_both_versions(libraries: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "root/proc/driver/nvidia"
    folder.mkdir(parents=True)
    (folder / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.129.03  Thu Oct 19 2023\n")
    facts = ask(libraries["new"], "nvmlInitWithFlags 18\n", tmp_path)
    assert "without a reboot: library 580.159.04, kernel module 535.129.03" in facts.unknown["gpus"]


@needs_compiler
@pytest.mark.parametrize(("script", "reason", "place"), [
    ("3.nvmlDeviceGetHandleByIndex_v2 15\n", "it has fallen off the bus (GPU is lost)", "0000:13:00.0"),
    ("3.nvmlDeviceGetHandleByIndex_v2 999\n", "the driver says Unknown Error", "0000:13:00.0"),
    ("3.nvmlDeviceGetMemoryInfo 16\n", "it wants a reset (GPU requires reset)", "00000000:13:00.0"),
    ("3.nvmlDeviceGetHandleByIndex_v2 4\n", "denied to this user or container", "0000:13:00.0"),
])  # fmt: skip
def test_one_lost_card_hides_no_other(
    libraries: dict[str, Path], tmp_path: Path, script: str, reason: str, place: str
) -> None:
    for number in range(16, 24):
        (tmp_path / f"root/proc/driver/nvidia/gpus/0000:{number:02x}:00.0").mkdir(parents=True)
    facts = ask(libraries["new"], "count 8\n" + script, tmp_path)
    assert facts.gpus is not None
    assert [gpu.index for gpu in facts.gpus] == [0, 1, 2, 4, 5, 6, 7]
    assert facts.lost_gpus == (LostGpu(3, reason, place),)
    assert facts.unknown == {}


@needs_compiler
def test_two_lost_cards_get_their_places_in_order(libraries: dict[str, Path], tmp_path: Path) -> None:
    for number in range(16, 20):
        (tmp_path / f"root/proc/driver/nvidia/gpus/0000:{number:02x}:00.0").mkdir(parents=True)
    lost = "1.nvmlDeviceGetHandleByIndex_v2 15\n2.nvmlDeviceGetHandleByIndex_v2 15\n"
    facts = ask(libraries["new"], "count 4\n" + lost, tmp_path)
    assert [(card.index, card.pci) for card in facts.lost_gpus] == [(1, "0000:11:00.0"), (2, "0000:12:00.0")]


@needs_compiler
def test_an_old_driver_lacks_calls(libraries: dict[str, Path], tmp_path: Path) -> None:
    """What it does not know is None; what it knows by an older name is there."""
    script = "recovery 99\nretire 1\npid 4000000\npid_used 2147483648\nclocks 0x44\n"
    gpu = only(ask(libraries["old"], script, tmp_path))
    assert gpu.mig is None and gpu.slices == ()
    assert (gpu.health.remap_pending, gpu.health.remap_failed, gpu.health.fabric) == (None, None, "")
    assert gpu.health.recovery_action == ""
    assert gpu.health.retirement_pending is True
    assert gpu.health.throttle == ("sw_power_cap", "hw_thermal")
    assert [(p.pid, p.used) for p in gpu.processes] == [(4000000, 2 << 30)]


@needs_compiler
def test_a_card_without_the_features(libraries: dict[str, Path], tmp_path: Path) -> None:
    calls = (
        "EccMode TotalEccErrors RemappedRows GpuFabricInfoV MigMode PersistenceMode CurrPcieLinkWidth "
        "MaxPcieLinkWidth Temperature CurrentClocksEventReasons CurrentClocksThrottleReasons FieldValues NvLinkState "
        "ComputeMode RetiredPagesPendingStatus ComputeRunningProcesses_v3 ComputeRunningProcesses_v2"
    ).split()
    gpu = only(ask(libraries["new"], "".join(f"nvmlDeviceGet{name} 3\n" for name in calls), tmp_path))
    assert gpu.health == GpuHealth()
    assert (gpu.mig, gpu.nvlinks, gpu.compute_mode, gpu.processes) == (None, None, "", ())


@needs_compiler
def test_bad_news_of_a_card(libraries: dict[str, Path], tmp_path: Path) -> None:
    script = (
        "ecc_errors 3\necc_pending 0\nremap_pending 1\nremap_failed 1\nrecovery 4\nclocks 0xe8\npersistence 0\n"
        "fabric 1\npcie 4\ntemperature 91\ncompute_mode 2\n"
    )
    gpu = only(ask(libraries["new"], script, tmp_path))
    throttle = ("hw_slowdown", "sw_thermal", "hw_thermal", "hw_power_brake")
    assert gpu.health == GpuHealth(
        True, False, 3, True, True, None, "drain_and_reset", throttle, False, "not_started", 4, 16, 91
    )
    assert gpu.compute_mode == "prohibited"


@needs_compiler
@pytest.mark.parametrize(("script", "field", "value"), [
    ("fabric_status 1\n", "fabric", "failed"),
    ("fabric 2\n", "fabric", "in_progress"),
    ("recovery 12\n", "recovery_action", "action 12"),
    ("clocks 0\n", "throttle", ("none",)),
    ("ecc 0\n", "ecc_uncorrected", None),
])  # fmt: skip
def test_single_words(libraries: dict[str, Path], tmp_path: Path, script: str, field: str, value: object) -> None:
    assert getattr(only(ask(libraries["new"], script, tmp_path)).health, field) == value


@needs_compiler
def test_mig_slices_with_a_gap(libraries: dict[str, Path], tmp_path: Path) -> None:
    script = "mig 3\nslice_name NVIDIA H100 80GB HBM3 MIG 2g.20gb\nslice_memory 20937965568\nslice_used 1048576\n"
    gpu = only(ask(libraries["new"], script, tmp_path))
    assert gpu.mig is True
    assert [item.uuid[-1] for item in gpu.slices] == ["0", "2", "3"]
    assert gpu.slices[0].name.endswith("2g.20gb")
    assert gpu.slices[0].memory_free == 20937965568 - 1048576


@needs_compiler
@pytest.mark.parametrize("script", ["nvmlDeviceGetMemoryInfo hang\n", "nvmlInitWithFlags hang\n"])
def test_a_call_that_hangs(libraries: dict[str, Path], tmp_path: Path, script: str) -> None:
    facts = ask(libraries["new"], script, tmp_path, deadline=1.0)
    assert facts.gpus is None
    assert facts.unknown["gpus"] == "NVML did not answer within 1 s: a GPU or the driver hangs"


def check(libraries: dict[str, Path], script: str, place: Path, *codes: int) -> dict[str, Any]:
    """The whole quick check over the fake library: {code: its findings' texts}."""
    (place / "accelerate.yaml").write_text(XFLUX_ACCELERATE)
    command = [sys.executable, "-m", "xflux_doctor.cli", "check", "--quick", "--format", "json"]
    done = subprocess.run(
        [*command, "--accelerate-config", "accelerate.yaml"],
        env={**environment(libraries["new"], script, place), "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=60, cwd=place, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode in codes, done.stdout + done.stderr
    report = json.loads(done.stdout)
    crashed = [verdict for verdict in report["results"] if verdict["status"] == "crashed"]
    assert crashed == []
    return {verdict["check"]: verdict for verdict in report["results"]}


@needs_compiler
@pytest.mark.parametrize(("script", "code", "words"), [
    ("nvmlInitWithFlags 18\n", "HW101", ("without a reboot", "Reboot the machine")),
    ("nvmlInitWithFlags 9\n", "HW101", ("the NVIDIA kernel module is not loaded", "Load the kernel module")),
    ("nvmlInitWithFlags 4\n", "HW101", ("no permission to talk to the NVIDIA driver", "HW108")),
    ("count 8\n3.nvmlDeviceGetHandleByIndex_v2 15\n", "HW106",
     ("Of 8 GPUs 1 does not answer. GPU 3", "fallen off the bus", "Or train on the other cards (0, 1, 2, 4, 5, 6, 7)")),
    ("count 8\n5.recovery 1\n", "HW114",
     ("GPU 5", "asks for a reset of the GPU (gpu_reset)", "Or train on the other cards (0, 1, 2, 3, 4, 6, 7)")),
    ("mig 3\n", "HW118", ("in MIG mode", "Duplicate GPU")),
])  # fmt: skip
def test_what_the_doctor_says(
    libraries: dict[str, Path], tmp_path: Path, script: str, code: str, words: tuple[str, ...]
) -> None:
    verdict = check(libraries, script, tmp_path, 1)[code]
    assert verdict["status"] == "error"
    for word in words:
        assert word in json.dumps(verdict["findings"]), verdict


@needs_compiler
def test_eight_healthy_cards_have_no_finding_of_theirs(libraries: dict[str, Path], tmp_path: Path) -> None:
    # 1 where no stack for these cards is installed beside the tests
    verdicts = check(libraries, "count 8\n", tmp_path, 0, 1)
    bad = {name for name, verdict in verdicts.items() if name.startswith("HW") and verdict["findings"]}
    assert bad <= {"HW102", "HW103", "HW108"}  # a machine with cards of its own has device files of another number


@needs_compiler
def test_a_plan_for_a_card_that_is_named_does_not_wait_for_the_driver(
    libraries: dict[str, Path], tmp_path: Path
) -> None:
    """Its start took a fifth of the answer's time on a host with two cards; and a driver that hangs, ten seconds."""
    (tmp_path / "train.yaml").write_text(json.dumps({"img_dir": str(tmp_path), "img_size": 1024}))
    (tmp_path / "accelerate.yaml").write_text('distributed_type: "NO"\nnum_processes: 1\n')
    command = [sys.executable, "-m", "xflux_doctor.cli", "plan", "--gpu", "A100:80", "--format", "json"]
    started = time.monotonic()
    done = subprocess.run(
        [*command, "--config", "train.yaml", "--accelerate-config", "accelerate.yaml"],
        env={**environment(libraries["new"], "nvmlInitWithFlags hang\n", tmp_path), "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=60, cwd=tmp_path, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0 and json.loads(done.stdout)["plan"], done.stdout + done.stderr
    assert time.monotonic() - started < 9.5


@needs_compiler
@pytest.mark.parametrize("launch", ["torchrun --nproc-per-node=gpu train.py", "deepspeed train.py"])
def test_a_launcher_that_counts_cards_is_told_of_those_here(
    libraries: dict[str, Path], tmp_path: Path, launch: str
) -> None:
    """Though the plan is for cards of another name."""
    (tmp_path / "train.yaml").write_text(json.dumps({"img_dir": str(tmp_path), "img_size": 1024}))
    command = [sys.executable, "-m", "xflux_doctor.cli", "plan", "--gpu", "H100:80", "--format", "json"]
    done = subprocess.run(
        [*command, "--config", "train.yaml", "--launch", launch],
        env={**environment(libraries["new"], "count 8\n", tmp_path), "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=60, cwd=tmp_path, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode in (0, 1) and not done.stderr, done.stderr
    assert len(json.loads(done.stdout)["ranks"]) == 8
