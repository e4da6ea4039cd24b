"""Files of accelerate as people have them, repaired by the doctor and read by the installed accelerate's own loader.

After `fix --write-config` each file either loads and means what it said but for the edits listed here, or was refused
with a reason and lies there byte for byte. A right file is left alone; a second fix changes nothing.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, machine, record
from packaging.version import Version

from xflux_doctor import matrix as matrices
from xflux_doctor.accelerate_keys import KEYS
from xflux_doctor.accelerate_sections import FLAGS, flag_of
from xflux_doctor.cli import main

accelerate = pytest.importorskip("accelerate")
VERSION = Version(accelerate.__version__)
OLD = Version("1.0") > VERSION
STACK = "xflux-2024" if OLD else "cuda13"
CORPUS = ROOT / "tests/corpus/accelerate"
GONE = "(gone)"
Edits = dict[str, Any]


@dataclass(frozen=True)
class Refused:
    """Nothing is written, for this reason."""

    says: str


RIGHT: Edits = {}
_SHARD = {"fsdp_config.fsdp_sharding_strategy": "SHARD_GRAD_OP"}
_FSDP2 = Refused("LA202 fsdp_config.fsdp_version is 2, a key of accelerate 1.6.0 and newer")
_PARALLEL = Refused("LA202 parallelism_config is a key of accelerate 1.10.0 and newer")
_LOST = "auto_wrap_policy backward_prefetch cpu_ram_efficient_loading forward_prefetch offload_params " \
        "sharding_strategy state_dict_type sync_module_states use_orig_params"  # fmt: skip
_OLD_PREFETCH = {"fsdp_config.fsdp_backward_prefetch_policy": GONE}
_IPEX = {"ipex_config.ipex": GONE}

INDEX: dict[str, Edits | Refused | tuple[Edits | Refused, Edits | Refused]] = {
    # name: what is expected; a pair is for accelerate 1.15.0 and for 0.30.1
    "anchors.yaml": Refused("LA103 accelerate {version} does not know the key 'defaults'"),
    "blog-fsdp-lost-indentation.yaml": {
        **{f"fsdp_config.fsdp_{name}": ... for name in _LOST.split()},
        **{f"fsdp_{name}": GONE for name in _LOST.split()}, "fsdp_config": GONE},
    "blog-one-key-outside.yaml": {
        "fsdp_config.fsdp_state_dict_type": "SHARDED_STATE_DICT", "fsdp_state_dict_type": GONE},
    "custom-section.yaml": Refused("LA103 accelerate {version} does not know the key 'tensor_parallel_config'"),
    "default_config.json": RIGHT,
    "diffusers-flux-readme.yaml": RIGHT,
    "duplicated-key.yaml": Refused("'num_processes' is written more than once, at lines 5 and 7"),
    "dynamo-ipex.yaml": (Refused("LA203 dynamo_config.dynamo_backend is 'IPEX'"), RIGHT),
    "dynamo-unknown-backend.yaml": {
        "dynamo_config.dynamo_backend": "INDUCTOR", "dynamo_config.dynamo_mode": GONE},
    "flow-style.yaml": {"distributed_type": "MULTI_GPU"},
    "fluxgym-single.yaml": RIGHT,
    "fp16-and-mixed-precision.yaml": RIGHT,
    "fp8-no-library.yaml": Refused("LA207 mixed_precision is fp8, and none of"),
    "fsdp-empty-value.yaml": {
        "fsdp_config.fsdp_offload_params": GONE, "fsdp_config.fsdp_sharding_strategy": GONE},
    "fsdp-impossible-number.yaml": Refused("LA203 fsdp_config.fsdp_sharding_strategy is 7"),
    "fsdp-layer-list.yaml": {
        "fsdp_config.fsdp_transformer_layer_cls_to_wrap": "DoubleStreamBlock,SingleStreamBlock"},
    "fsdp-lower-case.yaml": (RIGHT, {
        "fsdp_config.fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "fsdp_config.fsdp_backward_prefetch": "BACKWARD_PRE",
        "fsdp_config.fsdp_sharding_strategy": "FULL_SHARD",
        "fsdp_config.fsdp_state_dict_type": "FULL_STATE_DICT"}),
    "fsdp-ram-without-sync.yaml": {"fsdp_config.fsdp_sync_module_states": True},
    "fsdp-section-is-text.yaml": Refused("LA204 fsdp_config is str 'FULL_SHARD', not keys and values"),
    "fsdp-size-1e8.yaml": {"fsdp_config.fsdp_min_num_params": 100_000_000},
    "fsdp-size-without-number.yaml": (RIGHT, {"fsdp_config.fsdp_min_num_params": 100_000_000}),
    "fsdp-zero-words.yaml": {
        **_SHARD, "fsdp_config.fsdp_backward_prefetch": "NO_PREFETCH",
        "fsdp_config.fsdp_state_dict_type": "SHARDED_STATE_DICT"},
    "fsdp2-old-words.yaml": ({"fsdp_config.fsdp_reshard_after_forward": True}, _FSDP2),
    "gaudi-multi-hpu.yaml": (RIGHT, Refused("LA202 distributed_type is MULTI_HPU")),
    "misspelt-fsdp-keys.yaml": {
        "fsdp_config.fsdp_min_num_param": GONE, "fsdp_config.fsdp_min_num_params": 20_000_000,
        "fsdp_config.fsdp_sharding_stategy": GONE, **_SHARD},
    "misspelt-top-keys.yaml": {
        "mixed_precison": GONE, "mixed_precision": "bf16", "num_process": GONE, "num_processes": 2},
    "mixed-generations.json": (
        {**_OLD_PREFETCH, "fsdp_config.fsdp_backward_prefetch": "BACKWARD_PRE", "ipex_config": GONE},
        {"parallelism_config": GONE}),
    "mpirun-left-empty.yaml": {"mpirun_config.mpirun_hostfile": GONE, "mpirun_config": {}},
    "notepad-bom.yaml": {"num_processes": 2},
    "parallelism-all-one.yaml": (RIGHT, {
        "parallelism_config.parallelism_config_dp_replicate_size": GONE,
        "parallelism_config.parallelism_config_dp_shard_size": GONE}),
    "parallelism-for-eight.yaml": (Refused("LA206 parallelism_config has dp_shard_size 4, tp_size 2"), _PARALLEL),
    "parallelism-text-sizes.yaml": (
        {"parallelism_config.dp_shard_size": GONE, "parallelism_config.parallelism_config_dp_shard_size": 2},
        _PARALLEL),
    "port-as-text.yaml": {"debug": False, "main_process_port": 29501},
    "sagemaker.yaml": Refused("LA114 compute_environment is 'AMAZON_SAGEMAKER'"),
    "simpletuner-docs.yaml": {"dynamo_config.dynamo_backend": "no"},
    "tabs.yaml": Refused("line 4 is indented with a tab; YAML takes only spaces"),
    "tpu-colab.yaml": Refused("LA208 distributed_type is XLA, and torch-xla is not installed"),
    "trainer-keys-inside.yaml": {"learning_rate": GONE, "output_dir": GONE},
    "v0.10-multi-gpu.yaml": RIGHT,
    "v0.11-fsdp-bare-keys.yaml": RIGHT,
    "v0.12-fsdp-numbers.yaml": ({**_OLD_PREFETCH, "fsdp_config.fsdp_backward_prefetch": "BACKWARD_PRE"}, RIGHT),
    "v0.12-mps.yaml": {"distributed_type": "NO"},
    "v0.13-single-fp16-true.yaml": RIGHT,
    "v0.14-megatron.yaml": Refused("LA208 distributed_type is MEGATRON_LM, and megatron-core or megatron-lm is not"),
    "v0.15-dynamo-backend-top.yaml": RIGHT,
    "v0.16-dynamo-no-bare.yaml": {"dynamo_backend": "no"},
    "v0.18-kohya-default.yaml": RIGHT,
    "v0.20-ipex-cpu-leftover.yaml": ({**_IPEX, "ipex_config.use_xpu": GONE}, RIGHT),
    "v0.21-fsdp-llama.yaml": ({**_OLD_PREFETCH, "fsdp_config.fsdp_backward_prefetch": "NO_PREFETCH"}, RIGHT),
    "v0.27-fsdp-peft-docs.yaml": RIGHT,
    "v0.28-multi-cpu-mpirun.yaml": (_IPEX, RIGHT),
    "v0.30-multi-gpu.yaml": RIGHT,
    "v0.31-fsdp-checkpointing.yaml": RIGHT,
    "v0.34-fp8-leftover.yaml": (RIGHT, {"fp8_config.backend": GONE, "fp8_config.fp8_format": GONE}),
    "v0.34-fp8-transformer-engine.yaml": (
        Refused("LA207 mixed_precision is fp8, and none of"),
        Refused("LA202 fp8_config is a key of accelerate 0.34.0")),
    "v1.10-parallelism.yaml": (RIGHT, _PARALLEL),
    "v1.15-everything-empty.yaml": (RIGHT, {"fp8_config": GONE, "parallelism_config": GONE}),
    "v1.15-fsdp1-shard-grad-op.yaml": _SHARD,
    "v1.4-tp-size-one.yaml": {"tp_config.tp_size": GONE},
    "v1.4-tp-two.yaml": Refused("LA202 distributed_type is TP"),
    "v1.6-fsdp2.yaml": (RIGHT, _FSDP2),
    "windows-crlf.yaml": ({"ipex_config": GONE, "mixed_precision": "no", "tp_config": GONE}, {"tp_config": GONE}),
    "wrong-words.yaml": {
        "compute_environment": "LOCAL_MACHINE", "distributed_type": "MULTI_GPU", "mixed_precision": "bf16",
        "num_processes": 2, "use_cpu": False},
}  # fmt: skip
NEVER_READ = frozenset(
    "compute_environment distributed_type mixed_precision fp16 dynamo_backend same_network debug "
    "rdzv_backend enable_cpu_affinity downcast_bf16 tpu_use_sudo tpu_use_cluster gpu_ids".split()
)
"""Top-level keys whose flags are something else, or that no launch takes from a file (see LA209)."""
STRATEGIES = {"FSDP": "use_fsdp", "DEEPSPEED": "use_deepspeed", "MEGATRON_LM": "use_megatron_lm", "XLA": "tpu"}


@dataclass
class Ran:
    """The corpus after one fix, and after a second."""

    folder: Path
    said: dict[str, str] = field(default_factory=dict)
    after: dict[str, bytes] = field(default_factory=dict)
    again: dict[str, bytes] = field(default_factory=dict)
    loaded: dict[str, dict[str, Any]] = field(default_factory=dict)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """Every file fixed twice by the doctor, then all read by accelerate in one child."""
    result = Ran(tmp_path_factory.mktemp("corpus"))
    record(result.folder / "facts.json", machine(matrices.load(), count=2, stack=STACK))
    with _inside(result.folder):
        for name in INDEX:
            Path(name).write_bytes((CORPUS / name).read_bytes())
            result.said[name] = fix(name)
            result.after[name] = Path(name).read_bytes()
            fix(name)
            result.again[name] = Path(name).read_bytes()
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests/corpus_loader.py")],
        input="\n".join(str(result.folder / name) for name in INDEX), cwd=result.folder,
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result.loaded = {Path(path).name: said for path, said in json.loads(done.stdout.splitlines()[-1]).items()}
    return result


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def fix(name: str) -> str:
    """What the doctor says when it repairs the file."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        main(["fix", "--write-config", "--yes", "--accelerate-config", name, "--facts", "facts.json", "--stack", STACK])
    assert "Traceback" not in said.getvalue() and "crashed" not in said.getvalue(), said.getvalue()
    return said.getvalue()


def expected(name: str) -> Edits | Refused:
    entry = INDEX[name]
    return entry[OLD] if isinstance(entry, tuple) else entry


def leaves(data: Any, path: str = "") -> dict[str, Any]:
    """{dotted path: value}; an empty section is a leaf."""
    if not isinstance(data, dict) or (path and not data):
        return {path: data}
    inner: dict[str, Any] = {}
    for key, value in data.items():
        inner |= leaves(value, f"{path}.{key}" if path else str(key))
    return inner


def parse(name: str, text: bytes) -> dict[str, Any]:
    read = json.loads if name.endswith(".json") else yaml.safe_load
    return dict(read(text.decode("utf-8-sig")))


def test_every_file_is_in_the_index() -> None:
    assert {path.name for path in CORPUS.iterdir() if not path.name.startswith("ds-")} == set(INDEX)
    assert len(INDEX) >= 45


@pytest.mark.parametrize("name", INDEX)
def test_a_second_fix_changes_nothing(name: str, ran: Ran) -> None:
    assert ran.again[name] == ran.after[name]


@pytest.mark.parametrize("name", [name for name in INDEX if isinstance(expected(name), Refused)])
def test_refused_with_a_reason_and_left_as_it_is(name: str, ran: Ran) -> None:
    refused = expected(name)
    assert isinstance(refused, Refused)
    assert refused.says.format(version=VERSION) in ran.said[name], ran.said[name]
    assert "→ " in ran.said[name] or "Keep one of them" in ran.said[name]
    assert ran.after[name] == (CORPUS / name).read_bytes()


LOADS = [name for name in INDEX if not isinstance(expected(name), Refused)]


@pytest.mark.parametrize("name", LOADS)
def test_repaired_in_the_listed_keys_alone(name: str, ran: Ran) -> None:
    old = (CORPUS / name).read_bytes()
    wanted = expected(name)
    assert isinstance(wanted, dict)
    if not wanted:
        assert ran.after[name] == old, ran.said[name]
        return
    before, after = leaves(parse(name, old)), leaves(parse(name, ran.after[name]))
    changed = {path: after.get(path, GONE) for path in {**before, **after}
               if path not in after or path not in before or before[path] != after[path]
               or type(before[path]) is not type(after[path])}  # fmt: skip
    # Where an ellipsis stands, the value is the one that stood at the top.
    wanted = {path: before[path.rpartition(".")[2]] if value is ... else value for path, value in wanted.items()}
    assert changed == wanted
    for mark in (b"\r\n", b"\xef\xbb\xbf"):
        assert (mark in old) == (mark in ran.after[name])
    assert b"\r\n" not in old or ran.after[name].count(b"\n") == ran.after[name].count(b"\r\n")


@pytest.mark.parametrize("name", LOADS)
def test_the_installed_accelerate_takes_it_and_means_the_same(name: str, ran: Ran) -> None:
    said = ran.loaded[name]
    assert "error" not in said, said
    args, data = said["args"], parse(name, ran.after[name])
    for key, value in data.items():
        if isinstance(value, dict) and key in FLAGS:
            for inner, wanted in value.items():
                assert str(args[flag_of(key, inner, VERSION)]) == str(wanted), (key, inner)
        elif key not in NEVER_READ and value is not None and not isinstance(value, dict | list):
            assert key in KEYS and str(args[key]) == str(value), key
    kind = str(data["distributed_type"]).upper()
    on = {flag for flag in ("multi_gpu", *STRATEGIES.values()) if args[flag]}
    cpu_or_one = kind in ("NO", "FALSE", "MULTI_CPU")
    assert on == (set() if cpu_or_one else {STRATEGIES.get(kind, "multi_gpu")})
    default = "fp16" if data.get("fp16") and "mixed_precision" not in data else "no"
    assert args["mixed_precision"] == (data.get("mixed_precision") or default)
    if "dynamo_backend" in data:
        assert args["dynamo_backend"] == data["dynamo_backend"]
