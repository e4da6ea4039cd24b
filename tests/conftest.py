"""Machines and jobs to build cases from. Values are made by hand or recorded; nothing of ours is mocked."""

from __future__ import annotations

import fcntl
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from xflux_trainer.config import TrainConfig

from xflux_doctor import matrix as matrices
from xflux_doctor.check import Case, Check, examine
from xflux_doctor.facts import Driver, Facts, Gpu, Host, Package, PythonFacts, to_json
from xflux_doctor.finding import Edit, Finding, Verdict
from xflux_doctor.gather.folders import with_folders
from xflux_doctor.job import Job

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A script without job control starts its background jobs so; all that a test starts would ignore Ctrl-C too.
    signal.signal(signal.SIGINT, signal.default_int_handler)

GIB = 1 << 30
ROOT = Path(__file__).resolve().parent.parent

# The file of X-Flux's README, whose `num_processes: 8` people copy onto machines with one or two cards.
XFLUX_ACCELERATE = """\
compute_environment: LOCAL_MACHINE
debug: false
deepspeed_config:
  gradient_accumulation_steps: 2
  gradient_clipping: 1.0
  offload_optimizer_device: none
  offload_param_device: none
  zero3_init_flag: false
  zero_stage: 2
distributed_type: DEEPSPEED
downcast_bf16: 'no'
enable_cpu_affinity: false
machine_rank: 0
main_training_function: main
mixed_precision: bf16
num_machines: 1
num_processes: 8
rdzv_backend: static
same_network: true
tpu_env: []
tpu_use_cluster: false
tpu_use_sudo: false
use_cpu: false
"""

CARDS = {
    "V100": ("Tesla V100-SXM2-32GB", 32, (7, 0)),
    "T4": ("Tesla T4", 15, (7, 5)),
    "A100": ("NVIDIA A100-SXM4-80GB", 80, (8, 0)),
    "A10": ("NVIDIA A10", 22, (8, 6)),
    "L40S": ("NVIDIA L40S", 45, (8, 9)),
    "H100": ("NVIDIA H100 80GB HBM3", 79, (9, 0)),
    "H200": ("NVIDIA H200", 140, (9, 0)),
    "B200": ("NVIDIA B200", 179, (10, 0)),
    "5090": ("NVIDIA GeForce RTX 5090", 31, (12, 0)),
}

EITHER = (
    "checks/", "explain/", "gather/", "test_attach.py", "test_between.py", "test_bundle.py", "test_cli.py",
    "test_cli_faults.py", "test_cluster_variables.py", "test_command.py", "test_conditions.py", "test_configs.py",
    "test_corpus.py", "test_corpus_deepspeed.py", "test_cstack.py", "test_deepspeed_config.py",
    "test_deepspeed_wins.py", "test_features.py", "test_fix.py", "test_fix_doctor.py", "test_fix_properties.py",
    "test_flattened.py", "test_fleet.py", "test_fleet_reading.py", "test_frame.py", "test_hang.py",
    "test_hub_access.py", "test_imports.py", "test_joint.py", "test_jsontext.py", "test_kill_write.py",
    "test_launch_env.py", "test_machines.py", "test_matrix.py", "test_meeting.py", "test_nodes.py", "test_outlets.py",
    "test_outside.py", "test_package.py", "test_pins.py", "test_placement.py", "test_plan.py", "test_plan_bars.py",
    "test_plan_html.py", "test_plan_json.py", "test_plan_run.py", "test_planner.py", "test_readme.py",
    "test_rejoin.py", "test_repair.py", "test_report.py", "test_retry_signals.py", "test_stack_choice.py",
    "test_supervise.py", "test_topology.py", "test_visible.py", "test_waits.py", "test_xflux.py",
    "test_xflux_bill.py", "test_yamlcomment.py", "test_yamltext.py", "trainer/test_limits_benchmark.py",
    "trainer/test_host_bill.py", "trainer/test_memory_properties.py", "trainer/test_step_benchmark.py",
    "trainer/test_train_buckets.py", "trainer/test_train_config.py", "trainer/test_train_samples.py",
    "trainer/test_train_spec.py", "trainer/test_train_tables.py",
    "trainer/test_train_timing.py",
)  # fmt: skip
"""Files whose outcome is our own code's and Python's, whatever stack is installed beside (some start one, any one):
with --share each of several stacks' runs takes its part of them. `make test-long` runs all of the doctor's on every
Python."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--share", metavar="K/N", help="run the K-th of N parts of the files that need no stack")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    share = config.getoption("--share")
    if not share:
        return
    number, count = map(int, share.split("/"))
    names = {item: item.path.relative_to(ROOT / "tests").as_posix() for item in items}
    either = sorted({name for name in names.values() if name.startswith(EITHER)})
    others = {name for at, name in enumerate(either) if at % count != number - 1}
    config.hook.pytest_deselected(items=[item for item in items if names[item] in others])
    items[:] = [item for item in items if names[item] not in others]


PORTED = ("test_run.py", "test_run_deepspeed.py", "test_preempt.py", "test_deaths.py")
"""Files whose ranks meet on the launcher's own port, 29500, as users' do."""


@pytest.fixture(autouse=True)
def one_at_a_time_on_that_port(request: pytest.FixtureRequest) -> Iterator[None]:
    """Another stack's tests run side by side with these: the older accelerate ends where the port is taken."""
    if request.path.name not in PORTED:
        yield
        return
    with (Path(tempfile.gettempdir()) / "xflux-doctor-tests-29500.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session")
def matrix() -> matrices.Matrix:
    return matrices.load()


def gpus(card: str = "H100", count: int = 1, **changes: Any) -> tuple[Gpu, ...]:
    """Equal cards, all their memory free but for `changes`."""
    name, size, capability = CARDS[card]
    total = size * GIB
    return tuple(
        Gpu(
            **{
                "index": index,
                "uuid": f"GPU-{index:08d}-0000-0000-0000-000000000000",
                "name": name,
                "memory_total": total,
                "memory_free": total - (400 << 20),
                "capability": capability,
                "pci": f"0000000{index}:00:00.0",
                "mig": False,
                "compute_mode": "default",
                **changes,
            }
        )
        for index in range(count)
    )


def packages(matrix: matrices.Matrix, stack: str, **versions: str) -> dict[str, Package]:
    """Every package of the stack, exact; `versions` changes one ("2.5.0") or removes it ("")."""
    found = {
        name: Package(name, pin.version, pin.build if name.startswith("torch") else "", "/venv/site-packages")
        for name, pin in matrix.stack(stack).packages.items()
    }
    found["xflux-doctor"] = Package("xflux-doctor", "0.1.0", "", "/venv/site-packages")
    for name, version in versions.items():
        name = name.replace("_", "-")
        if version:
            number, _, build = version.partition("+")
            found[name] = Package(name, number, build, "/venv/site-packages")
        else:
            found.pop(name, None)
    return found


def machine(
    matrix: matrices.Matrix,
    *,
    card: str | None = "H100",
    count: int = 1,
    stack: str = "cuda13",
    driver: str | Driver = "580.159.04",
    python: str = "3.12.3",
    environment: dict[str, str] | None = None,
    python_facts: PythonFacts | None = None,
    **changes: Any,
) -> Facts:
    """A healthy machine; `changes` replaces any of its facts."""
    facts = Facts(
        python=python_facts or PythonFacts("/venv/bin/python", python, "/venv"),
        host=Host("Linux", "x86_64", "6.8.0", "2.39", 16, 256 * GIB, 200 * GIB, None, 64 * GIB, 64 * GIB),
        driver=(driver if isinstance(driver, Driver) else Driver(driver, "13.0")) if card else None,
        gpus=gpus(card, count) if card else None,
        packages=packages(matrix, stack),
        environment=environment or {},
        hub_token=True,
        unknown={} if card else {"gpus": "there is no NVIDIA driver library", "driver": "no driver"},
    )
    return msgspec.structs.replace(facts, **changes)


def job(accelerate: str | None = XFLUX_ACCELERATE, *, cpu: bool = False, **train: Any) -> Job:
    """A job out of the accelerate file's text and train config values."""
    config = TrainConfig(**{"img_dir": str(ROOT / "examples/demo/photos"), **train})
    return Job(
        train_path=Path("train.yaml"),
        train=config,
        accelerate_path=Path("accelerate_config.yaml") if accelerate is not None else None,
        accelerate=yaml.safe_load(accelerate) if accelerate is not None else None,
        accelerate_text=accelerate or "",
        cpu=cpu,
    )


def case(matrix: matrices.Matrix, facts: Facts, work: Job, stack: str | None = "cuda13", **changes: Any) -> Case:
    chosen = matrix.stack(stack) if stack else None
    return msgspec.structs.replace(Case(facts, work, matrix, chosen), **changes)


def on_this_disk(subject: Case, **environ: str) -> Case:
    """The case with the folders of its job as they are here: the real gatherer, under a home that is not there."""
    environment = {"HOME": "/nowhere", **subject.facts.environment, **environ}
    return msgspec.structs.replace(subject, facts=with_folders(subject.facts, subject.job.train, environment))


def verdict(subject: Case, check: Check) -> Verdict:
    return examine(subject, [check])[0]


def findings(subject: Case, check: Check) -> tuple[Finding, ...]:
    """The findings of one check; a crash or a skip fails the test that expected a judgement."""
    result = verdict(subject, check)
    assert result.status not in ("crashed", "skipped"), result.reason
    return result.findings


def values(finding: Finding) -> list[Any]:
    """What its edits set, in their order."""
    return [edit.value for edit in finding.edits if isinstance(edit, Edit)]


def tree(root: Path, files: dict[str, str]) -> Path:
    """Files below a root, for gatherers that take one in the place of `/`."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A FLUX of random weights in the hub's own layout, made once; nobody writes into it."""
    for needed in ("torch", "diffusers"):
        pytest.importorskip(needed)
    folder = tmp_path_factory.mktemp("model") / "tiny"
    subprocess.run(
        [sys.executable, str(ROOT / "examples/demo/make_tiny_flux.py"), str(folder)], check=True, timeout=300
    )
    return folder


PHOTOS = ROOT / "examples/demo/photos"
TRAIN = f"model_name: flux-dev\ngradient_accumulation_steps: 2\ndata_config:\n  img_dir: {PHOTOS}\n  img_size: 512\n"
"""A training file of X-Flux's form, on the demo's photographs."""


@pytest.fixture
def place(tmp_path: Path, matrix: matrices.Matrix) -> Path:
    """A folder with a job and recorded machines with 0, 1, 2 and 8 devices, for two stacks."""
    (tmp_path / "accelerate.yaml").write_text("# X-Flux's own\n" + XFLUX_ACCELERATE)
    (tmp_path / "train.yaml").write_text(TRAIN)
    for stack in ("xflux-2024", "cuda13"):
        for count in (0, 1, 2, 8):
            facts = machine(matrix, card="H100" if count else None, count=count or 1, stack=stack)
            record(tmp_path / f"{stack}-{count}.json", facts)
    return tmp_path


def record(path: Path, facts: Facts) -> None:
    path.write_text(to_json(facts))
