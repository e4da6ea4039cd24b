"""What starts a job of several machines: the command's flags, a rank's environment, and accelerate's own for both."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, XFLUX_ACCELERATE, job
from packaging.version import Version
from test_cluster_variables import ONE, TORCHRUN, step

from xflux_doctor.cluster import port_of, task, under
from xflux_doctor.launch import accelerate_variables, build, build_rank

ASK = Path(__file__).with_name("accelerate_env.py")
FILES = {
    "ddp": "distributed_type: MULTI_GPU\nmixed_precision: BF16\nnum_processes: 2\n",
    "cpu": "distributed_type: MULTI_GPU\nmixed_precision: 'no'\nnum_processes: 2\nuse_cpu: true\n",
    "cards": "distributed_type: MULTI_GPU\ngpu_ids: 1,2\nnum_processes: 2\n",
    "x-flux": XFLUX_ACCELERATE,
    "bare": "distributed_type: DEEPSPEED\nnum_processes: 2\ndeepspeed_config: {}\n",
    "whole": "distributed_type: DEEPSPEED\nnum_processes: 2\nmixed_precision: fp16\ndeepspeed_config:\n"
    "  gradient_accumulation_steps: auto\n  gradient_clipping: AUTO\n  offload_optimizer_device: CPU\n"
    "  offload_param_device: none\n  zero3_init_flag: true\n  zero3_save_16bit_model: false\n  zero_stage: 3\n",
    "file": "distributed_type: DEEPSPEED\nnum_processes: 2\ndeepspeed_config:\n  deepspeed_config_file: /a/ds.json\n",
}
READ = {"FSDP_VERSION", "FSDP_RESHARD_AFTER_FORWARD", "FSDP_OFFLOAD_PARAMS", "FSDP_ACTIVATION_CHECKPOINTING",
        "FSDP_AUTO_WRAP_POLICY", "FSDP_IGNORED_MODULES", "PARALLELISM_CONFIG_DP_REPLICATE_SIZE",
        "PARALLELISM_CONFIG_TP_SIZE", "PARALLELISM_CONFIG_CP_SIZE", "PARALLELISM_CONFIG_SP_SIZE"}  # fmt: skip
"""Variables besides ACCELERATE_* that trainer/ranks.py and fsdp.py read; a test below looks there."""
FSDP = "distributed_type: FSDP\nmixed_precision: bf16\nnum_processes: 2\nfsdp_config:\n"
FSDP_FILES = {
    "fsdp": FSDP + "  fsdp_version: 2\n",
    "first": FSDP + "  fsdp_sharding_strategy: FULL_SHARD\n",
    "whole fsdp": FSDP + "  fsdp_version: 2\n  fsdp_offload_params: True\n  fsdp_reshard_after_forward: FALSE\n"
    "  fsdp_auto_wrap_policy: SIZE_BASED_WRAP\n  fsdp_min_num_params: 1000\n  fsdp_ignored_modules: ff.*\n"
    "  fsdp_activation_checkpointing: true\n",
    "short keys": FSDP + "  version: 2\n  offload_params: true\n",
    "sizes": FSDP + "  fsdp_version: 2\nparallelism_config:\n  parallelism_config_tp_size: 2\n",
}


def test_accelerate_hands_the_same_to_its_ranks(tmp_path: Path) -> None:
    """The installed release's own functions, on each file: every variable that we set, with its value."""
    pytest.importorskip("accelerate")
    pytest.importorskip("deepspeed")
    files = {**FILES, **(FSDP_FILES if Version(version("accelerate")) >= Version("1.12") else {})}
    for name, text in files.items():
        (tmp_path / f"{name}.yaml").write_text("main_process_port: 0\nrdzv_backend: c10d\n" + text)
    names = [f"{name}.yaml" for name in files]
    clean = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, str(ASK), *names], capture_output=True, text=True, cwd=tmp_path, env=clean,
                          timeout=120)  # fmt: skip
    assert done.returncode == 0, done.stderr
    theirs = yaml.safe_load(done.stdout.splitlines()[-1])
    for name, text in files.items():
        ours, env = accelerate_variables(job(text)), theirs[f"{name}.yaml"]["env"]
        # A rank of accelerate's reads use_cpu from ACCELERATE_USE_CPU, which these two functions leave out
        # for DeepSpeed, as build() knows.
        read = {key for key in env if key in READ}
        relevant = read | {key for key in env if key.startswith("ACCELERATE_")} - {
            "ACCELERATE_CONFIG_DS_FIELDS", "ACCELERATE_DYNAMO_BACKEND", "ACCELERATE_DYNAMO_MODE",
            "ACCELERATE_DYNAMO_USE_FULLGRAPH", "ACCELERATE_DYNAMO_USE_DYNAMIC",
            "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION", "ACCELERATE_USE_CPU",
        }  # fmt: skip
        assert {key: ours.get(key) for key in relevant} == {key: env[key] for key in relevant}, name
        assert {key for key in ours if key not in ("ACCELERATE_USE_CPU", "CUDA_VISIBLE_DEVICES")} <= relevant, name
        assert ours.get("CUDA_VISIBLE_DEVICES") == env.get("CUDA_VISIBLE_DEVICES"), name
        # LA409: the file's rdzv_backend and same_network do not reach the launch.
        assert theirs[f"{name}.yaml"]["backend"] == "static" and not theirs[f"{name}.yaml"]["same_network"]


def test_every_variable_of_fsdp_that_the_trainer_reads_is_handed_over() -> None:
    said = "".join((ROOT / "trainer" / name).read_text("utf-8") for name in ("ranks.py", "fsdp.py"))
    found = set(re.findall(r"\"(FSDP_[A-Z_]+)\"", said))
    assert found == {name for name in READ if name.startswith("FSDP_")}


def test_one_launcher_for_each_node() -> None:
    work = under(job(ONE), step(2, 2, 1))
    launch = build("py", work, Path("a.yaml"), Path("t.yaml"), {"NCCL_DEBUG": "INFO", "HOME": "/h"}, ("--x",))
    assert launch.argv == (
        "py", "-m", "accelerate.commands.launch", "--config_file", "a.yaml", "--num_machines", "2", "--machine_rank",
        "1", "--main_process_ip", "n1", "--main_process_port", str(port_of(41, 0)), "--num_processes", "16",
        "-m", "xflux_trainer", "train", "--config", "t.yaml", "--x",
    )  # fmt: skip
    assert launch.env == {"NCCL_DEBUG": "INFO", "HOME": "/h"}


def test_a_file_alone_adds_no_flags() -> None:
    launch = build("py", job(ONE), Path("a.yaml"), Path("t.yaml"), {})
    assert launch.argv[3:7] == ("--config_file", "a.yaml", "-m", "xflux_trainer")


def test_a_rank_of_slurm() -> None:
    environment = step(2, 4, 3, NCCL_DEBUG="INFO", NVSHMEM_DEBUG="x", SLURM_CPUS_PER_TASK="7")
    found = task(environment)
    assert found is not None
    launch = build_rank("py", under(job(XFLUX_ACCELERATE), environment), found, 2, Path("t.yaml"), environment)
    assert launch.argv == ("py", "-m", "xflux_trainer", "train", "--config", "t.yaml")
    ranks = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "n1",
             "MASTER_PORT": str(port_of(41, 0)), "ACCELERATE_USE_DEEPSPEED": "true", "OMP_NUM_THREADS": "7",
             "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}  # fmt: skip
    assert ranks.items() <= launch.added.items() and environment.items() <= launch.env.items()
    bound = build_rank("py", job(ONE), found, 1, Path("t.yaml"), environment)
    assert bound.added["LOCAL_RANK"] == "0"  # one card bound to each task is its device 0


def test_a_rank_of_torchrun_keeps_its_variables() -> None:
    found = task(TORCHRUN)
    assert found is not None
    launch = build_rank("py", job(ONE), found, None, Path("t.yaml"), {**TORCHRUN, "OMP_NUM_THREADS": "3"})
    assert launch.added == {"ACCELERATE_MIXED_PRECISION": "no"} and launch.env["LOCAL_RANK"] == "1"
