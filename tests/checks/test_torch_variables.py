"""EN3: torch's variables. The words predicted are those that torch 2.4.0 and 2.11.0 said when they were asked."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from conftest import case, findings, job, machine, packages, verdict

from xflux_doctor.checks import torch_variables
from xflux_doctor.job import Job
from xflux_doctor.matrix import Matrix

OLD, NEW = "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"


def found(
    matrix: Matrix, check: Any, environment: dict[str, str], torch: str = "2.11.0", work: Job | None = None, **host: Any
) -> str:
    facts = machine(matrix, count=8, environment=environment, packages=packages(matrix, "cuda13", torch=torch))
    facts = msgspec.structs.replace(facts, host=msgspec.structs.replace(facts.host, **host))
    said = findings(case(matrix, facts, work or job()), check)
    return " ".join(" ".join((f.severity, f.seen, f.because, f.hint, *f.commands)) for f in said)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("expandable_segments:true", "Expected a single True/False argument for expandable_segments"),
        ("expandable_segments=True", "Unrecognized CachingAllocator option: expandable_segments=True"),
        ("expandable_segment:True", "Unrecognized CachingAllocator option: expandable_segment"),
        ("max_split_size_mb:20", "CachingAllocator option max_split_size_mb too small, must be > 20"),
        ("max_split_size_mb:abc", "stoi"),
        ("max_split_size_mb 64", "Unrecognized CachingAllocator option: max_split_size_mb64"),
        ("garbage_collection_threshold:1.5", "garbage_collect_threshold too big, set it 0.0~1.0"),
        ("garbage_collection_threshold:abc", "stod"),
        ("roundup_power2_divisions:3", "For roundups, the divisons has to be power of 2"),
        ("backend:foo", "Unknown allocator backend, options are native and cudaMallocAsync"),
        ("max_non_split_rounding_mb:64", "Unrecognized CachingAllocator option: max_non_split_rounding_mb"),
        ("large_segment_size_mb:64", "Unrecognized CachingAllocator option: large_segment_size_mb"),
    ],
)
def test_what_torch_24_says(matrix: Matrix, value: str, words: str) -> None:
    text = found(matrix, torch_variables.allocator_settings, {OLD: value}, "2.4.0")
    assert f"'{words}'" in text and "torch is 2.4.0" in text


@pytest.mark.parametrize("name", [OLD, NEW])
@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("expandable_segments:true", "in ConfigTokenizer but got 'true'"),
        ("expandable_segments=True", "aborts while it is imported"),
        ("expandable_segments:True;max_split_size_mb:64", "aborts while it is imported"),
        ("expandable_segment:True", "Unrecognized key 'expandable_segment' in CUDA allocator config."),
        ('"expandable_segments:True"', "Unrecognized key '\"expandable_segments' in CUDA allocator config."),
        ("max_split_size_mb:10", "CachingAllocator option max_split_size_mb too small, must be >= 20"),
        ("max_split_size_mb:abc", "stoull"),
        ("garbage_collection_threshold:80", "garbage_collect_threshold is invalid, set it in (0.0, 1.0)"),
        ("roundup_power2_divisions:3", "For roundups, the divisions has to be power of 2"),
        ("backend:foo", "Unknown allocator backend, options are native and cudaMallocAsync"),
    ],
)
def test_what_torch_211_says(matrix: Matrix, name: str, value: str, words: str) -> None:
    assert words in found(matrix, torch_variables.allocator_settings, {name: value})


def test_a_misspelt_key_is_named(matrix: Matrix) -> None:
    text = found(matrix, torch_variables.allocator_settings, {OLD: "expandable_segment:True"})
    assert "Write expandable_segments for expandable_segment." in text


@pytest.mark.parametrize("torch", ["2.4.0", "2.11.0"])
@pytest.mark.parametrize(
    "value",
    [
        "expandable_segments:True",
        " expandable_segments : True ,",
        "max_split_size_mb:512MB",
        "garbage_collection_threshold:0.8,max_split_size_mb:64",
        "roundup_power2_divisions:[64:8,128:4,>:1]",
        "roundup_power2_divisions:[256:1,512:2],expandable_segments:True",
        "backend:cudaMallocAsync",
    ],
)
def test_what_torch_takes(matrix: Matrix, torch: str, value: str) -> None:
    assert found(matrix, torch_variables.allocator_settings, {OLD: value}, torch) == ""


def test_a_key_that_a_newer_torch_may_know(matrix: Matrix) -> None:
    settings = {NEW: "expandable_segments_handle_type:posix_fd,something_new:3"}
    assert found(matrix, torch_variables.allocator_settings, settings, "2.15.0") == ""


def test_no_setting_is_nothing_to_judge(matrix: Matrix) -> None:
    subject = case(matrix, machine(matrix, environment={OLD: ""}), job())
    assert verdict(subject, torch_variables.allocator_settings).status == "skipped"


def test_the_new_name_under_an_old_torch(matrix: Matrix) -> None:
    check, value = torch_variables.allocator_variable, "expandable_segments:True"
    text = found(matrix, check, {NEW: value}, "2.9.1")
    assert "does nothing, without a word" in text and f"export PYTORCH_CUDA_ALLOC_CONF={value}" in text
    assert found(matrix, check, {NEW: value, OLD: value}, "2.9.1") == ""
    assert found(matrix, check, {NEW: value}, "2.10.0") == ""
    assert "two names of one thing" in found(matrix, check, {NEW: value, OLD: "max_split_size_mb:64"})
    assert found(matrix, check, {NEW: value, OLD: f" {value},"}) == ""


def test_expandable_segments(matrix: Matrix) -> None:
    check = torch_variables.expandable_segments
    assert "this is WSL2" in found(matrix, check, {OLD: "expandable_segments:True"}, wsl=True)
    assert found(matrix, check, {OLD: "expandable_segments:False"}, wsl=True) == ""
    assert found(matrix, check, {OLD: "expandable_segments:True"}) == ""
    text = found(matrix, check, {NEW: "backend:cudaMallocAsync,expandable_segments:True"})
    assert "cudaMallocAsync ignores expandable_segments." in text


def test_no_memory_cache(matrix: Matrix) -> None:
    check, name = torch_variables.caching_on, "PYTORCH_NO_CUDA_MEMORY_CACHING"
    assert "about twice as long" in found(matrix, check, {name: "1"})
    assert found(matrix, check, {name: "0"}) == ""


def test_distributed_debug(matrix: Matrix) -> None:
    check, name = torch_variables.distributed_debug, "TORCH_DISTRIBUTED_DEBUG"
    assert "must be OFF, INFO, or DETAIL." in found(matrix, check, {name: "1"})
    assert "every step waits" in found(matrix, check, {name: "detail"})
    assert found(matrix, check, {name: "info"}) == ""


def test_error_handling(matrix: Matrix) -> None:
    check = torch_variables.errors_end_the_job
    for name in ("TORCH_NCCL_ASYNC_ERROR_HANDLING", "NCCL_ASYNC_ERROR_HANDLING"):
        assert "without a word" in found(matrix, check, {name: "0"})
        assert found(matrix, check, {name: "1"}) == ""
    assert "no longer overlap" in found(matrix, check, {"TORCH_NCCL_BLOCKING_WAIT": "true"})


def test_torch_nccl_names_and_values(matrix: Matrix) -> None:
    check = torch_variables.torch_nccl_known
    text = found(matrix, check, {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "foo"})
    assert "Invalid value for environment variable: TORCH_NCCL_ASYNC_ERROR_HANDLING" in text
    assert "Write 1 or 0." in found(matrix, check, {"TORCH_NCCL_BLOCKING_WAIT": "on"})
    assert "Did you mean TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC?" in found(
        matrix, check, {"TORCH_NCCL_HEARTBEAT_TIMEOUT": "60"}
    )
    good = {"TORCH_NCCL_BLOCKING_WAIT": "f", "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": "600", "TORCH_NCCL_NEW_THING": "1"}
    assert found(matrix, check, good, "2.15.0") == ""
