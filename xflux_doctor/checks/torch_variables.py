"""EN3: the variables of torch: its CUDA allocator, its process group, its debug output."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator

from packaging.version import Version

from xflux_doctor.check import Case, SkipCheck, check
from xflux_doctor.checks.nccl_variables import several_ranks
from xflux_doctor.checks.variables import skip_without_gpus
from xflux_doctor.checks.words import installed
from xflux_doctor.finding import Finding, error, warning
from xflux_doctor.known_variables import (
    TORCH_NCCL_FLAGS,
    TORCH_NCCL_LAST,
    TORCH_NCCL_NUMBERS,
    TORCH_NCCL_SINCE,
)

_CUDA_NAME, _NEW_NAME = "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"
_NEW_PARSER = Version("2.10")
"""First torch whose CUDA library reads PYTORCH_ALLOC_CONF (strings of libc10_cuda.so; pytorch/pytorch#183387)."""
_ALLOC_DOCS = "https://docs.pytorch.org/docs/stable/notes/cuda.html#optimizing-memory-usage-with-pytorch-alloc-conf"
_FLAGS = (
    "expandable_segments",
    "release_lock_on_cudamalloc",
    "pinned_use_cuda_host_register",
    "pinned_use_background_threads",
    "graph_capture_record_stream_reuse",
)
_KEYS = {
    **dict.fromkeys(_FLAGS, "2.4"),
    "graph_capture_record_stream_reuse": "2.10",
    "backend": "2.4",
    "max_split_size_mb": "2.4",
    "garbage_collection_threshold": "2.4",
    "roundup_power2_divisions": "2.4",
    "pinned_num_register_threads": "2.4",
    "max_non_split_rounding_mb": "2.6",
    "pinned_reserve_segment_size_mb": "2.10",
    "per_process_memory_fraction": "2.10",
    "large_segment_size_mb": "2.11",
    "pinned_max_round_threshold_mb": "2.13",
    "pinned_max_cached_size_mb": "2.13",
    "pinned_free_catch_all": "2.13",
    "throw_on_cudamalloc_oom": "2.13",
}
"""Keys by the first of the wheels 2.4.0, 2.6.0, 2.10.0, 2.11.0 and 2.13.0 whose libc10 and libc10_cuda hold it."""
_FLAG_WORDS = frozenset("y yes 1 t true n no 0 f false".split())
"""What torch takes for a switch (torch/csrc/distributed/c10d/Utils.hpp, getCvarBool)."""
_MEGABYTES = ("max_split_size_mb", "max_non_split_rounding_mb")
_NUMBERS = (*_MEGABYTES, "garbage_collection_threshold", "roundup_power2_divisions", "pinned_num_register_threads")


def settings(value: str) -> list[tuple[str, str]] | None:
    """(key, value) pairs as torch cuts them: blanks dropped, commas and colons part, brackets hold together."""
    text = value.replace(" ", "")
    parts = [part for part in re.split(r",(?![^\[]*\])", text) if part]
    pairs = [part.partition(":") for part in parts]
    return None if any(not colon or not rest for _, colon, rest in pairs) else [(key, rest) for key, _, rest in pairs]


def _setting(case: Case) -> tuple[str, str] | None:
    """(name, value) of the variable that this torch's CUDA allocator reads."""
    environment, torch = case.facts.environment, installed(case, "torch")
    if torch is not None and torch >= _NEW_PARSER and environment.get(_NEW_NAME):
        return _NEW_NAME, environment[_NEW_NAME]
    value = environment.get(_CUDA_NAME)
    return (_CUDA_NAME, value) if value else None


@check("EN301", "the CUDA allocator understands its settings", needs=("packages",))
def allocator_settings(case: Case) -> Iterator[Finding]:
    """A bad setting stops the first CUDA call, bad syntax torch's import since 2.10 (seen with 2.4.0 and 2.11.0)."""
    skip_without_gpus(case)
    torch, found = installed(case, "torch"), _setting(case)
    if torch is None or found is None:
        raise SkipCheck("torch is not installed, or no setting is given")
    name, value = found
    old = torch < _NEW_PARSER
    pairs = settings(value)
    if pairs is None or (not old and any(":" in word for _, word in pairs if not word.startswith("["))):
        first = re.split(r"[,:]", value.replace(" ", ""))[0]
        told = (
            f"Unrecognized CachingAllocator option: {first}" if old else "torch aborts while it is imported (SIGABRT)"
        )
    else:
        told = next((words for key, word in pairs if (words := _refusal(key, word, torch))), "")
    if told:
        near = " ".join(_near(key, torch) for key, _ in pairs or () if _near(key, torch))
        yield error(
            f"{name} is {value!r} and torch is {torch}.",
            f"It stops: '{told}'.",
            near
            or "Write key:value pairs with commas between them, True or False with a capital letter, without quotes.",
            commands=(f"unset {name}",),
            docs=_ALLOC_DOCS,
        )


def _near(key: str, torch: Version) -> str:
    known = [name for name, since in _KEYS.items() if torch >= Version(since)]
    near = [] if key in known else difflib.get_close_matches(key.strip("\"'"), known, n=1, cutoff=0.8)
    return f"Write {near[0]} for {key}." if near else ""


def _refusal(key: str, word: str, torch: Version) -> str:
    """torch's own words about one setting; empty where it takes it, or where this torch is too new to be judged."""
    old = torch < _NEW_PARSER
    since = _KEYS.get(key)
    if since is None or torch < Version(since):
        if old:
            return f"Unrecognized CachingAllocator option: {key}"
        # The list of the new parser's keys may have gaps: only a misspelt one is called unknown.
        return f"Unrecognized key '{key}' in CUDA allocator config." if since or _near(key, torch) else ""
    if key in _FLAGS:
        if word in ("True", "False"):
            return ""
        told = f"Expected a single True/False argument for {key}"
        return told if old else f"Expected 'True' or 'False' at index … in ConfigTokenizer but got '{word}'"
    if key == "backend":
        known = word in ("native", "cudaMallocAsync")
        return "" if known else "Unknown allocator backend, options are native and cudaMallocAsync"
    return _bad_number(key, word, old) if key in _NUMBERS and not word.startswith("[") else ""


def _bad_number(key: str, word: str, old: bool) -> str:
    """Numbers are read by stoi and stod: letters behind them are dropped (512MB is 512), letters before are refused."""
    match = re.match(r"[+-]?(\d+\.?\d*|\.\d+)", word)
    if match is None:
        return ("stod" if key.endswith("threshold") else "stoi") if old else "stoull"
    number = float(match[0])
    if key in _MEGABYTES and (number <= 20 if old else number < 20):
        return f"CachingAllocator option {key} too small, must be {'>' if old else '>='} 20"
    if key == "garbage_collection_threshold" and not 0 < number < 1:
        if old:
            return f"garbage_collect_threshold too {'big' if number >= 1 else 'small'}, set it 0.0~1.0"
        return "garbage_collect_threshold is invalid, set it in (0.0, 1.0)"
    if key == "roundup_power2_divisions" and (number < 1 or int(number) & (int(number) - 1)):
        return (
            "For roundups, the divisons has to be power of 2"
            if old
            else "For roundups, the divisions has to be power of 2"
        )
    return ""


@check("EN302", "the allocator's setting stands in the variable that this torch reads", needs=("packages",))
def allocator_variable(case: Case) -> Iterator[Finding]:
    """Up to torch 2.9 CUDA reads PYTORCH_CUDA_ALLOC_CONF alone (libc10_cuda.so of 2.4 to 2.13; pytorch#183387)."""
    skip_without_gpus(case)
    torch, environment = installed(case, "torch"), case.facts.environment
    new, old = environment.get(_NEW_NAME), environment.get(_CUDA_NAME)
    if torch is None or not new:
        raise SkipCheck("torch is not installed, or PYTORCH_ALLOC_CONF is not set")
    if torch < _NEW_PARSER and new != old:
        yield warning(
            f"PYTORCH_ALLOC_CONF is {new!r} and torch is {torch}.",
            "Before torch 2.10 the CUDA allocator does not read that name: the setting does nothing, without a word.",
            "Set PYTORCH_CUDA_ALLOC_CONF.",
            commands=(f"export PYTORCH_CUDA_ALLOC_CONF={new}",),
            docs="https://github.com/pytorch/pytorch/issues/183387",
        )
    elif old and torch >= _NEW_PARSER and old.replace(" ", "").rstrip(",") != new.replace(" ", "").rstrip(","):
        yield warning(
            f"PYTORCH_ALLOC_CONF is {new!r} and PYTORCH_CUDA_ALLOC_CONF is {old!r}.",
            "They are two names of one thing, and only one of them counts.",
            "Keep PYTORCH_ALLOC_CONF.",
            commands=("unset PYTORCH_CUDA_ALLOC_CONF",),
            docs=_ALLOC_DOCS,
        )


@check("EN303", "expandable segments do what they are set for")
def expandable_segments(case: Case) -> Iterator[Finding]:
    """They fail under some WSL2 drivers (pytorch#192330), and cudaMallocAsync ignores them (libc10_cuda.so's words)."""
    skip_without_gpus(case)
    found = _setting(case)
    pairs = dict(settings(found[1]) or ()) if found else {}
    if found and case.facts.host and case.facts.host.wsl and pairs.get("expandable_segments") == "True":
        yield warning(
            f"{found[0]} is {found[1]!r} and this is WSL2.",
            "With some drivers the first allocation fails there: 'CUDA driver error: unknown error'.",
            "Take it out if that happens.",
            docs="https://github.com/pytorch/pytorch/issues/192330",
        )
    ignored = [key for key in pairs if key in ("expandable_segments", "max_split_size_mb", "roundup_power2_divisions",
                                               "garbage_collection_threshold")]  # fmt: skip
    if found and pairs.get("backend") == "cudaMallocAsync" and ignored:
        yield warning(
            f"{found[0]} is {found[1]!r}.",
            f"backend:cudaMallocAsync ignores {', '.join(ignored)}.",
            "Keep the backend or the others.",
            docs=_ALLOC_DOCS,
        )


@check("EN304", "torch keeps freed GPU memory for the next step")
def caching_on(case: Case) -> Iterator[Finding]:
    """PYTORCH_NO_CUDA_MEMORY_CACHING=1 took 2.2 times as long for a FLUX-sized block (H100, torch 2.11)."""
    skip_without_gpus(case)
    value = case.facts.environment.get("PYTORCH_NO_CUDA_MEMORY_CACHING", "")
    if value.strip() not in ("", "0"):
        yield warning(
            f"PYTORCH_NO_CUDA_MEMORY_CACHING is {value!r}.",
            "Every tensor is taken from the driver and given back; a step takes about twice as long.",
            "Unset it; it is for compute-sanitizer.",
            commands=("unset PYTORCH_NO_CUDA_MEMORY_CACHING",),
            docs="https://docs.pytorch.org/docs/stable/cuda_environment_variables.html",
        )


@check("EN305", "torch.distributed's debug level is one that it knows and that is cheap")
def distributed_debug(case: Case) -> Iterator[Finding]:
    """OFF, INFO or DETAIL; another word stops the import (seen, torch 2.11); DETAIL checks every collective."""
    value = case.facts.environment.get("TORCH_DISTRIBUTED_DEBUG", "")
    if value and value.upper() not in ("OFF", "INFO", "DETAIL"):
        yield error(
            f"TORCH_DISTRIBUTED_DEBUG is {value!r}.",
            "The import of torch.distributed stops: 'ValueError: The value of TORCH_DISTRIBUTED_DEBUG must be OFF, "
            "INFO, or DETAIL.'",
            "Unset it.",
            commands=("unset TORCH_DISTRIBUTED_DEBUG",),
        )
    elif value.upper() == "DETAIL" and case.job.num_processes > 1:
        yield warning(
            "TORCH_DISTRIBUTED_DEBUG is 'DETAIL'.",
            "Each collective is preceded by one over gloo that compares the ranks' shapes: every step waits for it.",
            "Unset it, unless ranks fall out of step.",
            commands=("unset TORCH_DISTRIBUTED_DEBUG",),
            docs="https://docs.pytorch.org/docs/stable/distributed.html#torch-distributed-debug",
        )


@check("EN306", "a failed collective ends the job")
def errors_end_the_job(case: Case) -> Iterator[Finding]:
    """With error handling off a dead rank leaves the others waiting for ever (torch: ProcessGroupNCCL.hpp)."""
    several_ranks(case)
    environment = case.facts.environment
    for name in ("TORCH_NCCL_ASYNC_ERROR_HANDLING", "NCCL_ASYNC_ERROR_HANDLING"):
        if environment.get(name, "").strip() == "0":
            yield warning(
                f"{name} is '0'.",
                "When a rank dies, the others wait in their collective without end and without a word.",
                "Unset it: torch's own choice ends the job after the timeout.",
                commands=(f"unset {name}",),
                docs="https://docs.pytorch.org/docs/stable/torch_nccl_environment_variables.html",
            )
    for name in ("TORCH_NCCL_BLOCKING_WAIT", "NCCL_BLOCKING_WAIT"):
        if environment.get(name, "").lower() in ("1", "y", "yes", "t", "true"):
            yield warning(
                f"{name} is {environment[name]!r}.",
                "The CPU waits for every collective: computing and exchanging no longer overlap.",
                "Unset it.",
                commands=(f"unset {name}",),
                docs="https://docs.pytorch.org/docs/stable/torch_nccl_environment_variables.html",
            )


@check("EN307", "torch knows the TORCH_NCCL_ variables that are set")
def torch_nccl_known(case: Case) -> Iterator[Finding]:
    """Names by the strings of libtorch_cuda.so 2.4 to 2.13; a bad value stops the start (torch: Utils.hpp)."""
    several_ranks(case)
    torch = installed(case, "torch")
    for name, value in case.facts.environment.items():
        if not name.startswith("TORCH_NCCL_"):
            continue
        lowered = value.strip().lower()
        flag_bad = name in TORCH_NCCL_FLAGS and lowered not in _FLAG_WORDS
        if flag_bad or (name in TORCH_NCCL_NUMBERS and not re.match(r"[+-]?\d", lowered)):
            yield error(
                f"{name} is {value!r}.",
                f"The process group is not made: 'RuntimeError: Invalid value for environment variable: {name}'.",
                "Write 1 or 0." if flag_bad else "Write a number.",
                commands=(f"unset {name}",),
            )
        elif name not in TORCH_NCCL_SINCE and torch is not None and torch <= Version(TORCH_NCCL_LAST):
            near = difflib.get_close_matches(name, sorted(TORCH_NCCL_SINCE), n=1, cutoff=0.8)
            yield warning(
                f"{name} is set and torch is {torch}.",
                "torch ignores a name that it does not know.",
                f"Did you mean {near[0]}?" if near else "Unset it.",
                docs="https://docs.pytorch.org/docs/stable/torch_nccl_environment_variables.html",
            )
