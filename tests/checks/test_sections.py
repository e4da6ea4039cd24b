"""The sections of accelerate's file, by values; what accelerate itself says of each is asked of the installed one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, XFLUX_ACCELERATE, case, job, machine
from packaging.version import Version

from xflux_doctor.accelerate_keys import accepted_keys, distributed_types, in_section, section_of
from xflux_doctor.accelerate_sections import Span, flag_of, known_flags
from xflux_doctor.check import examine
from xflux_doctor.checks import ALL
from xflux_doctor.facts import Package
from xflux_doctor.finding import Comment, Edit, Finding, Rename
from xflux_doctor.gather.environment import default_accelerate_config
from xflux_doctor.job import Job
from xflux_doctor.matrix import Matrix
from xflux_doctor.plan import make

OURS = [check for check in ALL if check.code[:3] == "LA2" or check.code in ("LA103", "LA104", "LA113")]
STACKS = {"cuda13": "1.15.0", "xflux-2024": "0.30.1"}
ONE = "distributed_type: 'NO'\nnum_processes: 1\nnum_machines: 1\n"
TWO = "distributed_type: MULTI_GPU\nnum_processes: 2\nnum_machines: 1\n"
FSDP = "distributed_type: FSDP\nnum_processes: 2\nnum_machines: 1\nmixed_precision: bf16\n"


def fsdp(**keys: str) -> str:
    return FSDP + "fsdp_config:\n" + "".join(f"  fsdp_{key}: {value}\n" for key, value in keys.items())


def found(matrix: Matrix, text: str, stack: str = "cuda13", **facts: Any) -> list[Finding]:
    """What the checks of accelerate's file find; a crash fails the test."""
    work = Job(accelerate_path=Path("a.yaml"), accelerate=yaml.safe_load(text), accelerate_text=text)
    verdicts = examine(case(matrix, machine(matrix, count=2, stack=stack, **facts), work, stack), OURS)
    assert not [verdict for verdict in verdicts if verdict.status == "crashed"], verdicts
    return [finding for verdict in verdicts for finding in verdict.findings]


def shown(finding: Finding) -> str:
    """The edits, short: `key=value`, `key>new`, `#key`."""
    words = []
    for edit in finding.edits:
        path = ".".join(edit.key)
        if isinstance(edit, Edit):
            words.append(f"{path}={edit.value}")
        elif isinstance(edit, Rename):
            words.append(f"{path}>{edit.new}")
        else:
            assert isinstance(edit, Comment)
            words.append(f"#{path}")
    return " ".join(words)


@dataclass(frozen=True)
class Row:
    """A file, what each stack finds in it (`code edits`, empty: nothing), and what accelerate itself says to it."""

    text: str
    new: str
    old: str
    says_new: str = ""
    says_old: str = ""


def same(text: str, finds: str, says: str = "") -> Row:
    return Row(text, finds, finds, says, says)


_UPPER = "'bool' object has no attribute 'upper'"
_SYNC = "set `--fsdp_sync_module_states` to `True`"
_UNKNOWN = "had unknown keys (['{}'])"
S = "fsdp_config.fsdp_"
ROWS = {
    # LA201: keys of sections
    "misspelt": same(fsdp(sharding_stategy="FULL_SHARD"), f"LA201 {S}sharding_stategy>fsdp_sharding_strategy"),
    "nothing near": same(fsdp(wishes="many"), "LA201 "),
    "bare keys": same(FSDP + "fsdp_config:\n  sharding_strategy: 2\n  min_num_params: 2000\n", ""),
    "old prefetch": Row(fsdp(backward_prefetch_policy="BACKWARD_PRE"),
                        f"LA201 {S}backward_prefetch_policy>fsdp_backward_prefetch", ""),
    "bare dynamo": Row(TWO + "dynamo_config:\n  backend: INDUCTOR\n", "",
                       "LA201 dynamo_config.backend>dynamo_backend"),
    "mpirun_ccl": same(TWO + "mpirun_config:\n  mpirun_ccl: '1'\n", ""),
    # LA202: other releases
    "fsdp 2": Row(fsdp(version="2"), "", "LA202 "),
    "fsdp 1": same(fsdp(version="1"), ""),
    "checkpointing": Row(fsdp(activation_checkpointing="true"), "", "LA202 "),
    "no checkpointing": same(fsdp(activation_checkpointing="false"), ""),
    "fp8 unused": Row(TWO + "fp8_config:\n  backend: TE\n", "LA212 ", "LA202 #fp8_config", "",
                      _UNKNOWN.format("fp8_config")),
    "sizes": Row(FSDP + "fsdp_config:\n  fsdp_version: 2\nparallelism_config:\n  parallelism_config_dp_shard_size: 2\n",
                 "", "LA202  LA202 ", "", _UNKNOWN.format("parallelism_config")),
    "ipex": Row(TWO + "ipex_config:\n  ipex: true\n", "LA202 #ipex_config", "", _UNKNOWN.format("ipex_config")),
    "affinity": same(TWO + "enable_cpu_affinity: true\n", "LA209 "),
    "TPU": same("distributed_type: TPU\nnum_processes: 8\n", "LA104 distributed_type=XLA LA208 ",
                "'TPU' is not a valid DistributedType"),
    "MPS": same("distributed_type: MPS\nnum_processes: 1\n", "LA104 distributed_type=NO",
                "'MPS' is not a valid DistributedType"),
    "TP": same(TWO.replace("MULTI_GPU", "TP"), "LA202 ", "'TP' is not a valid DistributedType"),
    "HPU": Row(TWO.replace("MULTI_GPU", "MULTI_HPU"), "", "LA202 ", "", "'MULTI_HPU' is not a valid DistributedType"),
    "NPU": same(TWO.replace("MULTI_GPU", "MULTI_NPU"), ""),
    # LA203: words
    "dynamo NO": same(TWO + "dynamo_config:\n  dynamo_backend: NO\n", "LA203 dynamo_config.dynamo_backend=no", _UPPER),
    "dynamo NO at the top": same(TWO + "dynamo_backend: NO\n", "LA203 dynamo_backend=no", _UPPER),
    "dynamo at the top": same(TWO + "dynamo_backend: INDUCTOR\n", ""),
    "dynamo number": same(TWO + "dynamo_config:\n  dynamo_backend: 1\n", "LA203 ",
                          "'int' object has no attribute 'upper'"),
    "dynamo word": same(TWO + "dynamo_config:\n  dynamo_backend: induct\n",
                        "LA203 dynamo_config.dynamo_backend=INDUCTOR", "Unknown dynamo backend: INDUCT"),
    "dynamo renamed": same(TWO + "dynamo_config:\n  dynamo_backend: AOT_CUDAGRAPHS\n",
                           "LA203 dynamo_config.dynamo_backend=CUDAGRAPHS", "Unknown dynamo backend: AOT_CUDAGRAPHS"),
    "dynamo IPEX": Row(TWO + "dynamo_config:\n  dynamo_backend: ipex\n", "LA203 ", "", "Unknown dynamo backend: IPEX"),
    "mode null": same(ONE + "dynamo_config:\n  dynamo_mode:\n", "LA203 #dynamo_config.dynamo_mode",
                      "expected str, bytes or os.PathLike object, not NoneType"),
    "mode unused": same(TWO + "dynamo_config:\n  dynamo_mode: fast\n", ""),
    "mode": same(TWO + "dynamo_config:\n  dynamo_backend: eager\n  dynamo_mode: fast\n", "LA203 "),
    "sharding 5": same(fsdp(sharding_strategy="5"), ""),
    "sharding 6": same(fsdp(sharding_strategy="6"), "LA203 ", "6 is not a valid ShardingStrategy"),
    "sharding lower": Row(fsdp(sharding_strategy="full_shard"), "", f"LA203 {S}sharding_strategy=FULL_SHARD",
                          "", "'full_shard' is not in list"),
    "sharding ZeRO": same(fsdp(sharding_strategy="ZERO3"), f"LA203 {S}sharding_strategy=FULL_SHARD", "ZERO3"),
    "sharding true": same(fsdp(sharding_strategy="true"), "LA203 "),
    "sharding null": same(fsdp(sharding_strategy=""), f"LA203 #{S}sharding_strategy"),
    "prefetch no": same(fsdp(backward_prefetch="no"), f"LA203 {S}backward_prefetch=NO_PREFETCH"),
    "prefetch 1": Row(fsdp(backward_prefetch="1"), "", f"LA203 {S}backward_prefetch=BACKWARD_PRE", "",
                      "'1' is not in list"),
    "old prefetch 1": Row(fsdp(backward_prefetch_policy="1"),
                          f"LA201 {S}backward_prefetch_policy>fsdp_backward_prefetch",
                          f"LA203 {S}backward_prefetch_policy=BACKWARD_PRE", "", "'1' is not in list"),
    "two for one": same(fsdp(sharding_strateg="1", sharding_strategyy="2"),
                        f"LA201 {S}sharding_strateg>fsdp_sharding_strategy LA201 "),
    "prefetch null": same(fsdp(backward_prefetch=""), ""),
    "wrap": Row(fsdp(auto_wrap_policy="TRANSFORMER"), f"LA203 {S}auto_wrap_policy=TRANSFORMER_BASED_WRAP",
                f"LA203 {S}auto_wrap_policy=TRANSFORMER_BASED_WRAP",
                "Invalid auto wrap policy: TRANSFORMER"),
    "state": same(fsdp(state_dict_type="SHARDED"), f"LA203 {S}state_dict_type=SHARDED_STATE_DICT", "SHARDED"),
    "switch": same(fsdp(offload_params="maybe"), "LA203 ", "invalid truth value maybe"),
    "switch null": same(fsdp(offload_params=""), f"LA203 #{S}offload_params", "invalid truth value none"),
    "switch as text": same(fsdp(offload_params="'True'"), ""),
    "unused section": same(TWO + "fsdp_config:\n  fsdp_sharding_strategy: 9\n", "LA212 "),
    # LA204: types
    "section text": Row(FSDP + "fsdp_config: FULL_SHARD\n", "LA204 ", "LA204 ", "", "string indices must be integers"),
    "section empty list": same(TWO + "fsdp_config: []\n", "LA204 #fsdp_config"),
    "port text": same(TWO + "main_process_port: '29501'\n", "LA204 main_process_port=29501"),
    "port 70000": same(TWO + "main_process_port: 70000\n", "LA204 "),
    "port 0": same(TWO + "main_process_port: 0\n", ""),
    "debug text": same(TWO + "debug: 'false'\n", "LA204 debug=False"),
    "use_cpu null": Row(ONE + "use_cpu:\n", "LA204 #use_cpu", "", "invalid truth value none"),
    "1e8": same(fsdp(auto_wrap_policy="SIZE_BASED_WRAP", min_num_params="1e8"), f"LA204 {S}min_num_params=100000000",
                "invalid literal for int() with base 10: '1e8'"),
    "layers": same(fsdp(transformer_layer_cls_to_wrap="[A, B]"), f"LA204 {S}transformer_layer_cls_to_wrap=A,B"),
    # LA205: FSDP
    "ram": same(fsdp(cpu_ram_efficient_loading="true", sync_module_states="false"),
                f"LA205 {S}sync_module_states=True", _SYNC),
    "sync alone": same(fsdp(sync_module_states="false"), f"LA205 {S}cpu_ram_efficient_loading=False", _SYNC),
    "neither": same(fsdp(cpu_ram_efficient_loading="false", sync_module_states="false"), ""),
    "2 with a word": Row(fsdp(version="2", reshard_after_forward="FULL_SHARD"),
                         f"LA205 {S}reshard_after_forward=True", "LA202 ", "invalid truth value full_shard"),
    "2 with a strategy": Row(fsdp(version="2", sharding_strategy="SHARD_GRAD_OP"),
                             f"LA205 {S}reshard_after_forward=False", "LA202 "),
    "2 local": Row(fsdp(version="2", state_dict_type="LOCAL_STATE_DICT"), "LA205 ", "LA202 ",
                   "FSDP2 does not support LOCAL_STATE_DICT"),
    "1 reshards": same(fsdp(version="1", reshard_after_forward="SHARD_GRAD_OP"),
                       f"LA205 {S}sharding_strategy=SHARD_GRAD_OP"),
    "1 as ever": same(fsdp(version="1", reshard_after_forward="FULL_SHARD"), ""),
    "size": Row(fsdp(auto_wrap_policy="SIZE_BASED_WRAP"), "", f"LA205 {S}min_num_params=100000000",
                "", "invalid literal for int() with base 10: '100000000.0'"),
    "offload": Row(fsdp(activation_checkpointing_offload="true"), "LA205 ", "LA202 ",
                   "requires `activation_checkpointing=True`"),
    # LA206 to LA211
    "product": Row(fsdp(version="2") + "parallelism_config:\n  parallelism_config_dp_shard_size: 4\n", "LA206 ",
                   "LA202  LA202 ", "does not match num_processes"),
    "cp and sp": Row(fsdp(version="2") + "parallelism_config:\n  parallelism_config_cp_size: 2\n"
                     "  parallelism_config_sp_size: 2\n", "LA206 ", "LA202  LA202 ", "mutually exclusive"),
    "attention": Row(fsdp(version="2") + "parallelism_config:\n  parallelism_config_sp_size: 2\n"
                     "  parallelism_config_dp_shard_size: 1\n  parallelism_config_sp_attn_implementation: eager\n",
                     "LA206  LA206 ", "LA202  LA202 ", "Invalid sp_attn_implementation: eager"),
    "text size": Row(fsdp(version="2") + "parallelism_config:\n  parallelism_config_cp_size: '2'\n",
                     "LA204 parallelism_config.parallelism_config_cp_size=2", "LA202  LA202 ", "'>' not supported"),
    "fp8": Row(TWO + "mixed_precision: fp8\n", "LA207 ", "LA207 ", "FP8 is not available on this machine"),
    "megatron": same(TWO.replace("MULTI_GPU", "MEGATRON_LM"), "LA208 "),
    "rendezvous": same(TWO.replace("num_machines: 1", "num_machines: 2") + "rdzv_backend: c10d\n", ""),
    "rendezvous alone": same(TWO + "rdzv_backend: c10d\nsame_network: true\ndowncast_bf16: no\n", ""),
    "hostfile empty": same(ONE + "mpirun_config:\n  mpirun_hostfile: ''\n", "LA210 #mpirun_config.mpirun_hostfile"),
    "fp16": same(TWO + "fp16: true\n", ""),
    "fp16 and no": same(TWO + "fp16: true\nmixed_precision: 'no'\n", "LA211 "),
    "two dynamos": same(TWO + "dynamo_backend: 'NO'\ndynamo_config:\n  dynamo_backend: INDUCTOR\n", "LA211 "),
    # LA103: the top
    "stray": same(TWO + "learning_rate: 1e-4\n", "LA103 #learning_rate", _UNKNOWN.format("learning_rate")),
    "stray section": same(TWO + "my_config:\n  a: 1\n", "LA103 ", _UNKNOWN.format("my_config")),
    "out of its section": same(FSDP + "fsdp_offload_params: true\n",
                               "LA103 fsdp_config.fsdp_offload_params=True #fsdp_offload_params",
                               _UNKNOWN.format("fsdp_offload_params")),
    "two values": same(FSDP + "fsdp_config:\n  fsdp_offload_params: false\nfsdp_offload_params: true\n", "LA103 ",
                       _UNKNOWN.format("fsdp_offload_params")),
    "of DeepSpeed's section": same(TWO + "zero_stage: 2\n", "LA103 #zero_stage", _UNKNOWN.format("zero_stage")),
    "of a section, a list": same(
        "distributed_type: [FSDP]\nnum_processes: 2\nzero_stage: 2\n",
        "LA103 deepspeed_config.zero_stage=2 #zero_stage LA104 distributed_type=FSDP",
    ),
    # values that look like numbers and words
    "superscript": same(TWO.replace("processes: 2", "processes: ²"), "LA104 num_processes=2"),
    "5000 digits": same(TWO.replace("processes: 2", f"processes: '{'9' * 5000}'"), "LA104 num_processes=2"),
    "superscript size": same(fsdp(auto_wrap_policy="SIZE_BASED_WRAP", min_num_params="²"), "LA204 ",
                             "invalid literal for int()"),
    "size with _": same(fsdp(auto_wrap_policy="SIZE_BASED_WRAP", min_num_params="'1_000_000'"), ""),
    "precision with a space": same(TWO + "mixed_precision: 'bf16 '\n", "LA104 mixed_precision=bf16"),
    "no environment": same(TWO + "compute_environment:\n", "LA104 compute_environment=LOCAL_MACHINE", "unknown keys"),
}  # fmt: skip


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("name", ROWS)
def test_what_is_found(matrix: Matrix, name: str, stack: str) -> None:
    row = ROWS[name]
    got = " ".join(f"{finding.code} {shown(finding)}" for finding in found(matrix, row.text, stack))
    assert got == (row.new if stack == "cuda13" else row.old)


@pytest.fixture(scope="module")
def accelerate_says(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    pytest.importorskip("accelerate")
    folder = tmp_path_factory.mktemp("rows")
    paths = {name: folder / f"{at}.yaml" for at, name in enumerate(ROWS)}
    for name, path in paths.items():
        path.write_text(ROWS[name].text)
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests/corpus_loader.py")], input="\n".join(map(str, paths.values())), cwd=folder,
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    return {name: said[str(path)].get("error", "") for name, path in paths.items()}


@pytest.mark.parametrize("name", ROWS)
def test_the_installed_accelerate_says_so(name: str, accelerate_says: dict[str, str]) -> None:
    """Where a row claims an error of accelerate's, the installed one gives it; where nothing is found, none."""
    import accelerate

    old = Version(accelerate.__version__) < Version("1.0")
    row, said = ROWS[name], accelerate_says[name]
    assert (row.says_old if old else row.says_new) in said
    if not (row.old if old else row.new):
        assert said == ""


def test_every_check_but_the_accepted_has_a_row() -> None:
    words = " ".join(f"{row.new} {row.old}" for row in ROWS.values())
    assert {check.code for check in OURS if check.code[:3] == "LA2"} <= set(words.split())


@pytest.mark.parametrize("value", [None, True, 5, 1.5, "x", [], ["a"], {}, {"a": 1}, {1: [2]}])
def test_no_check_crashes_on_odd_values(matrix: Matrix, value: Any) -> None:
    for key in sorted(accepted_keys(Version("1.15.0")) | accepted_keys(Version("0.30.1")) | {"tp_config", "x"}):
        for kind in ("FSDP", "MULTI_GPU", "NO"):
            data = {"distributed_type": kind, "num_processes": 2, "mixed_precision": "bf16", key: value}
            for stack in STACKS:
                found(matrix, yaml.safe_dump(data), stack)
    for section in ("fsdp_config", "dynamo_config", "fp8_config", "parallelism_config", "mpirun_config"):
        for flag in known_flags(section, Version("1.15.0")):
            data = {"distributed_type": "FSDP", "num_processes": 2, "mixed_precision": "fp8", section: {flag: value}}
            for stack in STACKS:
                found(matrix, yaml.safe_dump(data), stack)


def test_a_healthy_job_has_none(matrix: Matrix) -> None:
    for stack in STACKS:
        subject = case(matrix, machine(matrix, count=8, stack=stack), job(XFLUX_ACCELERATE), stack)
        assert all(verdict.status in ("ok", "skipped") for verdict in examine(subject, OURS))


def test_fp8_with_its_library(matrix: Matrix) -> None:
    text = TWO + "mixed_precision: fp8\nfp8_config:\n  backend: TE\n  fp8_format: HYBRID\n  amax_history_length: 16\n"
    packages = {**(machine(matrix).packages or {}), "transformer-engine": Package("transformer-engine", "2.9.0")}
    (finding,) = found(matrix, text, packages=packages)
    assert shown(finding) == "fp8_config.amax_history_length>amax_history_len"
    (wrong,) = found(matrix, text.replace("amax_history_length", "amax_history_len").replace("HYBRID", "E3M4"),
                     packages=packages)  # fmt: skip
    assert wrong.code == "LA203" and "must be one of HYBRID or E4M3 or E5M2" in wrong.because


def test_the_stack_that_has_it_is_named(matrix: Matrix) -> None:
    (finding,) = found(matrix, fsdp(version="2"), "xflux-2024")
    assert "0.30.1 is installed" in finding.seen and "accelerate 1.6.0 and newer" in finding.hint
    assert finding.commands == ("xflux-doctor fix --install --stack cuda13",) and not finding.edits
    (gone,) = found(matrix, TWO.replace("MULTI_GPU", "TP"))
    assert gone.commands == ("python -m pip install 'accelerate>=1.4.0,<1.10.0'",)


def test_a_switch_for_the_older_release(matrix: Matrix) -> None:
    (finding,) = found(matrix, fsdp(activation_checkpointing="true"), "xflux-2024")
    assert finding.severity == "warning" and finding.commands == ("export FSDP_ACTIVATION_CHECKPOINTING=true",)


def test_a_misspelt_key_is_not_missing(matrix: Matrix) -> None:
    """0.30.1 needs fsdp_min_num_params with SIZE_BASED_WRAP: what was written is kept, not accelerate's default."""
    text = fsdp(auto_wrap_policy="SIZE_BASED_WRAP", min_num_param="20000000")
    work = Job(accelerate_path=Path("a.yaml"), accelerate=yaml.safe_load(text), accelerate_text=text)
    subject = case(matrix, machine(matrix, count=2, stack="xflux-2024"), work, "xflux-2024")
    plan = make(subject, lambda mended: examine(mended, OURS))
    assert plan.job.section("fsdp_config")["fsdp_min_num_params"] == 20_000_000 and not plan.blockers


def test_the_default_file(tmp_path: Path) -> None:
    """accelerate never reads a default_config.json: its name for that file is default_config.yaml as well."""
    folder = tmp_path / "accelerate"
    folder.mkdir()
    (folder / "default_config.json").write_text("{}")
    assert default_accelerate_config({"HF_HOME": str(tmp_path)}) is None
    (folder / "default_config.yaml").write_text(TWO)
    assert default_accelerate_config({"HF_HOME": str(tmp_path)}) == folder / "default_config.yaml"
    pytest.importorskip("accelerate")
    (folder / "default_config.yaml").unlink()
    code = "from accelerate.commands.config import config_args; print(config_args.default_config_file)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120,
                          env={**os.environ, "HF_HOME": str(tmp_path)})  # fmt: skip
    assert done.stdout.strip() == str(folder / "default_config.yaml"), done.stderr


def test_another_program_s_file_is_told_in_one_sentence(matrix: Matrix) -> None:
    """Tens of thousands of keys: no list of findings, no edit, no wait."""
    began = time.monotonic()
    (finding,) = found(matrix, TWO + "".join(f"key{number}: 1\n" for number in range(50_000)))
    assert finding.code == "LA103" and not finding.edits and time.monotonic() - began < 30
    assert finding.seen == "accelerate 1.15.0 does not know 50000 keys of this file, 'key0' to begin with."


def test_a_long_value_is_shown_by_its_beginning(matrix: Matrix) -> None:
    (finding,) = found(matrix, TWO.replace("MULTI_GPU", "x" * 100_000))
    assert finding.code == "LA104" and "xxx" in finding.seen and len(finding.seen + finding.because) < 3000


def test_tables() -> None:
    assert Span("1.0", "2.0").has(Version("1.9")) and not Span("1.0", "2.0").has(Version("2.0"))
    assert flag_of("fsdp_config", "sharding_strategy", Version("0.11.0")) == "sharding_strategy"
    assert flag_of("fsdp_config", "sharding_strategy", Version("0.30.1")) == "fsdp_sharding_strategy"
    assert flag_of("dynamo_config", "backend", Version("0.30.1")) == "backend"
    assert flag_of("dynamo_config", "backend", Version("1.15.0")) == "dynamo_backend"
    assert "TPU" in distributed_types(Version("0.27.0")) and "TPU" not in distributed_types(Version("0.28.0"))
    assert section_of("zero_stage") == "deepspeed_config" and section_of("num_processes") == ""
    assert in_section("fp8_config", "margin") and not in_section("fsdp_config", "num_processes")
