"""Any accelerate file on any machine: no check crashes, and what the plan repairs it does not repair again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from conftest import XFLUX_ACCELERATE, case, job, machine
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from xflux_doctor import matrix as matrices
from xflux_doctor.accelerate_keys import DISTRIBUTED_TYPES, KEYS, PRECISIONS, SECTION_KEYS
from xflux_doctor.check import Case, examine
from xflux_doctor.checks import ALL
from xflux_doctor.facts import Facts, from_json
from xflux_doctor.meaning import difference
from xflux_doctor.plan import make
from xflux_doctor.yamlnodes import CannotEdit
from xflux_doctor.yamltext import apply

MATRIX = matrices.load()
RECORDED = [from_json(path.read_bytes()) for path in sorted((Path(__file__).parent / "machines").glob("*.json"))]
ODD: list[Any] = [
    None, True, False, 0, 1, 2, 8, -1, 3.5, 1e30, float("inf"), float("nan"), 10**30, "", " ", "no", "yes", "true",
    "auto", "8", "2.0", "0,1", "0,1,9", "none", "null", "bf16", "NO", "x\ny", "ü", "/no/file.json", [], [1, "a"],
    {}, {"a": 1}, {1: {2: None}}, [None], b"\x00", yaml.safe_load("2024-01-01"), yaml.safe_load("2024-01-01 10:00:00"),
]  # fmt: skip
RIGHT: dict[str, list[Any]] = {
    "compute_environment": ["LOCAL_MACHINE", "LOCAL_MACHINE", "AMAZON_SAGEMAKER", "local_machine"],
    "distributed_type": [*DISTRIBUTED_TYPES, "DEEPSPEED", "FSDP", "MULTI_GPU", "multi-gpu", "DDP"],
    "mixed_precision": list(PRECISIONS),
    "num_processes": [1, 2, 4, 8, 16, "2"],
    "num_machines": [1, 1, 2, 4],
    "machine_rank": [0, 0, 1, 7],
    "gpu_ids": ["all", "0", "0,1", [0, 1], 3, "8"],
    "main_process_port": [29500, 0, 70000],
    "main_process_ip": ["10.0.0.1", "node-1"],
    "rdzv_backend": ["static", "c10d"],
    "use_cpu": [True, False, False],
    "zero_stage": [0, 1, 2, 3, 4, "2"],
    "offload_optimizer_device": ["none", "cpu", "nvme", "CPU"],
    "offload_param_device": ["none", "cpu", "nvme"],
    "gradient_accumulation_steps": [1, 2, "auto", 10**9],
    "deepspeed_config_file": ["/no/such/ds.json", "ds.json"],
    "fsdp_sharding_strategy": [1, "FULL_SHARD", "1", "HYBRID_SHARD"],
    "fsdp_version": [1, 2, "2"],
}
SECTIONS = [key for key in SECTION_KEYS if key in KEYS]


def values(key: str) -> st.SearchStrategy[Any]:
    right = RIGHT.get(key)
    return st.sampled_from(ODD) | st.sampled_from(right) if right else st.sampled_from(ODD)


@st.composite
def mappings(draw: st.DrawFn) -> dict[Any, Any]:
    """A file that is right, or nothing, with some of accelerate's keys, misspelt and foreign ones set to anything."""
    data: dict[Any, Any] = yaml.safe_load(XFLUX_ACCELERATE) if draw(st.booleans()) else {}
    top = st.sampled_from([*KEYS, *RIGHT, "num_procesess", "zero_stage", "foo", 12, None, True, "a b"])
    for key in draw(st.lists(top, max_size=6, unique=True)):
        data[key] = draw(values(str(key)))
    for name in draw(st.lists(st.sampled_from(SECTIONS), max_size=2, unique=True)):
        keys = st.sampled_from([*sorted(SECTION_KEYS[name]), "foo", "zero_stag", 3])
        section = {key: draw(values(str(key))) for key in draw(st.lists(keys, max_size=5, unique=True))}
        known = data.get(name)
        data[name] = {**known, **section} if isinstance(known, dict) and draw(st.booleans()) else section
    for key in draw(st.lists(st.sampled_from(sorted(map(str, data))), max_size=2)) if data else []:
        data.pop(key, None)
    return data


@st.composite
def machines(draw: st.DrawFn) -> tuple[Facts, str | None]:
    stack = draw(st.sampled_from(["cuda13", "xflux-2024"]))
    if draw(st.integers(0, 3)) == 0:
        return draw(st.sampled_from(RECORDED)), stack
    count = draw(st.sampled_from([0, 1, 2, 3, 4, 8]))
    card = draw(st.sampled_from(["H100", "V100", "5090"])) if count else None
    environment = draw(st.sampled_from([{}, {}, {"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": ""}]))
    return machine(MATRIX, card=card, count=count or 1, stack=stack, environment=environment), stack


class _Plain(yaml.SafeDumper):
    def ignore_aliases(self, _data: Any) -> bool:
        return True


def dump(data: dict[Any, Any]) -> str:
    """Without anchors, which the dumper makes of values that are one object."""
    return yaml.dump(data, Dumper=_Plain, sort_keys=False, allow_unicode=True)


REFUSED = ("text of several lines", "a tag or an anchor")
"""What no edit touches: the plan does not know how its values are written."""


def judged(subject: Case) -> tuple[Any, ...]:
    verdicts = examine(subject, ALL)
    crashed = [(verdict.check, verdict.reason) for verdict in verdicts if verdict.status == "crashed"]
    assert not crashed, crashed
    return verdicts


def settles(data: dict[Any, Any], facts: Facts, stack: str | None, cpu: bool) -> None:
    text = dump(data)
    work = job(text, cpu=cpu, gradient_accumulation_steps=2)
    subject = case(MATRIX, facts, work, stack)
    plan = make(subject, judged)
    assert plan.conflicts == (), f"taken back: {plan.conflicts}"
    mine = [edit for edit in plan.edits if edit.file == "accelerate"]
    try:
        after = apply(text, mine)
    except CannotEdit as refusal:
        assert any(words in refusal.seen for words in REFUSED), refusal
        return
    read = yaml.safe_load(after)
    where = difference(plan.job.accelerate, read)
    assert where is None, f"the text says something else than the plan at {where}: {plan.edits}"
    written = msgspec.structs.replace(plan.job, accelerate=read, accelerate_text=after)
    again = make(msgspec.structs.replace(subject, job=written), judged)
    assert again.edits == (), f"a second plan has {again.edits}"


ANY = (mappings(), machines(), st.sampled_from([False, False, False, True]))
SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]


@settings(max_examples=100, deadline=None, database=None, suppress_health_check=SLOW)
@given(*ANY)
def test_any_file_settles(data: dict[Any, Any], place: tuple[Facts, str | None], cpu: bool) -> None:
    settles(data, *place, cpu)


@pytest.mark.long
@settings(max_examples=3000, deadline=None, database=None, suppress_health_check=SLOW)
@given(*ANY)
def test_thousands_settle(data: dict[Any, Any], place: tuple[Facts, str | None], cpu: bool) -> None:
    settles(data, *place, cpu)


@pytest.mark.parametrize("value", ODD, ids=repr)
def test_every_key_with_one_odd_value(value: Any) -> None:
    """All keys at once, at the top and in every section: whatever they hold, no check crashes and the plan settles."""
    base = yaml.safe_load(XFLUX_ACCELERATE)
    facts = machine(MATRIX, count=2)
    for data in (
        {**base, **dict.fromkeys(KEYS, value)},
        {**base, **{name: dict.fromkeys(SECTION_KEYS[name], value) for name in SECTIONS}},
        {**base, "distributed_type": "FSDP", **{name: dict.fromkeys(SECTION_KEYS[name], value) for name in SECTIONS}},
    ):
        settles(data, facts, "cuda13", False)


@pytest.mark.long
def test_each_key_with_each_value() -> None:
    facts = machine(MATRIX, count=2)
    base = yaml.safe_load(XFLUX_ACCELERATE)
    for key in KEYS:
        for value in [*ODD, *RIGHT.get(key, [])]:
            settles({**base, key: value}, facts, "cuda13", False)
