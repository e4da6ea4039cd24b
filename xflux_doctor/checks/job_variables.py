"""EN4: variables of the launcher, of Python and of the hub library."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator

from packaging.version import Version

from xflux_doctor.check import Case, SkipCheck, check
from xflux_doctor.checks.words import installed
from xflux_doctor.finding import Finding, error, warning

_HUB_DOCS = "https://huggingface.co/docs/huggingface_hub/package_reference/environment_variables"
_TRUE = ("1", "ON", "YES", "TRUE")
_TRANSFER_GONE = Version("1.0")
"""First huggingface-hub without hf_transfer (0.24.5 and 2.4.0, constants.py and file_download.py)."""
_CACHE_GONE = Version("5.0")


@check("EN401", "OMP_NUM_THREADS is a number, and the ranks' threads fit the cores")
def omp_threads(case: Case) -> Iterator[Finding]:
    """accelerate takes int() of it; each rank starts that many threads (accelerate 0.30.1, 1.15.0: launch.py)."""
    value = case.facts.environment.get("OMP_NUM_THREADS")
    if value is None:
        return
    if not re.fullmatch(r"\s*[+-]?\d+\s*", value):
        yield error(
            f"OMP_NUM_THREADS is {value!r}.",
            f'accelerate launch stops: "ValueError: invalid literal for int() with base 10: {value!r}".',
            "Set it to the cores of one rank, or unset it: accelerate then takes 1.",
            commands=("unset OMP_NUM_THREADS",),
        )
        return
    ranks, cores = case.job.local_processes, case.facts.host.cpus if case.facts.host else None
    if cores is not None and ranks > 1 and int(value) * ranks > 2 * cores:
        yield warning(
            f"OMP_NUM_THREADS is {value.strip()}, {ranks} ranks start and there are {cores} cores.",
            f"{int(value) * ranks} threads push each other off the cores; loading and encoding slow down.",
            f"Set it to {max(1, cores // ranks)}.",
            commands=(f"export OMP_NUM_THREADS={max(1, cores // ranks)}",),
        )


@check("EN402", "no other run's ranks are left in the environment", needs=("accelerate",))
def no_leftover_ranks(case: Case) -> Iterator[Finding]:
    """For one process accelerate hands WORLD_SIZE and RANK on as they are; torchrun sets its own (utils/launch.py)."""
    environment = case.facts.environment
    size = environment.get("WORLD_SIZE", "").strip()
    if case.job.distributed_type != "NO" or "TORCHELASTIC_RUN_ID" in environment:
        raise SkipCheck("the launcher sets its own ranks")
    bad = next((n for n in ("WORLD_SIZE", "RANK", "LOCAL_RANK") if _not_whole(environment.get(n))), "")
    if bad:
        yield error(
            f"{bad} is {environment[bad]!r}.",
            "The process reads its rank from it and stops.",
            "Unset it.",
            commands=("unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE",),
        )
    elif size.isdecimal() and int(size) > 1:
        yield warning(
            f"distributed_type is NO and WORLD_SIZE is {size} in this environment"
            f"{', RANK ' + environment['RANK'] if 'RANK' in environment else ''}.",
            f"The one process takes itself for one of {size} and waits for the others until the timeout.",
            "If they are left over from another run, unset them. If each machine starts one process, go on.",
            commands=("unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT",),
        )


def _not_whole(value: str | None) -> bool:
    return value is not None and not re.fullmatch(r"\s*[+-]?\d+\s*", value)


@check("EN403", "no other run's accelerate settings are left in the environment", needs=("accelerate",))
def no_leftover_settings(case: Case) -> Iterator[Finding]:
    """The launcher sets the switches of its own kind and takes off none of another (accelerate: utils/launch.py)."""
    kinds = {
        "ACCELERATE_USE_DEEPSPEED": "DEEPSPEED",
        "ACCELERATE_USE_FSDP": "FSDP",
        "ACCELERATE_USE_MEGATRON_LM": "MEGATRON_LM",
    }
    for name, kind in kinds.items():
        value = case.facts.environment.get(name, "")
        if value.strip().lower() in ("true", "1", "yes") and case.job.distributed_type != kind:
            yield error(
                f"{name} is {value!r} in this environment and distributed_type is {case.job.distributed_type}.",
                f"The ranks inherit it and set up {kind} as well.",
                "Unset it.",
                commands=(f"unset {name}",),
            )
    value = case.facts.environment.get("ACCELERATE_USE_CPU", "")
    if value.strip().lower() in ("true", "1", "yes") and not case.job.use_cpu and case.job.distributed_type != "NO":
        yield error(
            f"ACCELERATE_USE_CPU is {value!r} in this environment and the job is for GPUs.",
            "For several ranks the launcher does not take it off: they train on the CPU.",
            "Unset it.",
            commands=("unset ACCELERATE_USE_CPU",),
        )


@check("EN404", "the model cache is named by a variable that is read", needs=("packages",))
def cache_variable(case: Case) -> Iterator[Finding]:
    """transformers 5 reads TRANSFORMERS_CACHE no more (huggingface/transformers: MIGRATION_GUIDE_V5.md)."""
    environment, version = case.facts.environment, installed(case, "transformers")
    value = environment.get("TRANSFORMERS_CACHE")
    if value and version and version >= _CACHE_GONE and not {"HF_HOME", "HF_HUB_CACHE"} & set(environment):
        yield warning(
            f"TRANSFORMERS_CACHE is {value!r}, transformers is {version}, and neither HF_HOME nor HF_HUB_CACHE is set.",
            "It is not read any more: weights are looked for, and downloaded, below ~/.cache/huggingface.",
            "Name the folder by HF_HUB_CACHE.",
            commands=(f"export HF_HUB_CACHE={value}",),
            docs=_HUB_DOCS,
        )


@check("EN405", "the hub's fast downloads have their package", needs=("packages",))
def hf_transfer(case: Case) -> Iterator[Finding]:
    """huggingface-hub before 1.0 stops where hf_transfer is asked for and not installed (0.24.5, file_download.py)."""
    assert case.facts.packages is not None
    value, version = case.facts.environment.get("HF_HUB_ENABLE_HF_TRANSFER", ""), installed(case, "huggingface-hub")
    if value.upper() not in _TRUE or version is None or version >= _TRANSFER_GONE:
        return
    if "hf-transfer" not in case.facts.packages:
        yield error(
            f"HF_HUB_ENABLE_HF_TRANSFER is {value!r}, huggingface-hub is {version} and hf_transfer is not installed.",
            "Every download stops: \"ValueError: Fast download using 'hf_transfer' is enabled … but 'hf_transfer' "
            'package is not available in your environment".',
            "Unset it, or install hf_transfer.",
            commands=("unset HF_HUB_ENABLE_HF_TRANSFER",),
            docs=_HUB_DOCS,
        )


@check("EN406", "the hub library understands its variables")
def hub_words(case: Case) -> Iterator[Finding]:
    """Switches are 1, ON, YES or TRUE, all else is off (huggingface_hub: constants.py); HF_ENDPOINT is a URL."""
    environment = case.facts.environment
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_ENABLE_HF_TRANSFER"):
        value = environment.get(name, "")
        if value and value.upper() not in (*_TRUE, "0", "OFF", "NO", "FALSE"):
            yield warning(
                f"{name} is {value!r}.",
                "The hub library takes it for off: only 1, ON, YES and TRUE are on.",
                "Write 1 or 0.",
                docs=_HUB_DOCS,
            )
    endpoint = environment.get("HF_ENDPOINT", "")
    if endpoint and not re.match(r"https?://[^/\s]+", endpoint):
        yield error(
            f"HF_ENDPOINT is {endpoint!r}.",
            "It is no URL: every request to the hub fails.",
            "Write https:// before it, or unset it.",
            commands=("unset HF_ENDPOINT",),
            docs=_HUB_DOCS,
        )
    elif endpoint.startswith("http://") and not re.match(r"http://(localhost|127\.|10\.|192\.168\.)", endpoint):
        yield warning(
            f"HF_ENDPOINT is {endpoint!r}.",
            "Without https the hub token crosses the network in the clear.",
            "Use its https address.",
            docs=_HUB_DOCS,
        )


@check("EN407", "PYTHONHOME does not move the interpreter's library")
def python_home(case: Case) -> Iterator[Finding]:
    """PYTHONHOME makes every Python take its standard library there (Python docs, command line and environment)."""
    value = case.facts.environment.get("PYTHONHOME", "")
    python = case.facts.python
    if not value or python is None:
        return
    homes = [home.rstrip("/") for home in value.split(":")]
    if not any(python.executable.startswith(f"{home}/") for home in homes):
        yield error(
            f"PYTHONHOME is {value!r} and the job's Python is {python.executable}.",
            "That Python looks for its library in the other one's folder: 'ModuleNotFoundError: No module named "
            "encodings', or modules of another release.",
            "Unset it.",
            commands=("unset PYTHONHOME",),
            docs="https://docs.python.org/3/using/cmdline.html#envvar-PYTHONHOME",
        )


@check("EN408", "DeepSpeed's guard against another CUDA is on", needs=("toolchain",))
def cuda_guard_on(case: Case) -> Iterator[Finding]:
    """DS_SKIP_CUDA_CHECK=1 lets another CUDA than torch's build an operator (DeepSpeed: op_builder/builder.py)."""
    toolkit = case.facts.toolchain.cuda_version if case.facts.toolchain else ""
    value = case.facts.environment.get("DS_SKIP_CUDA_CHECK", "")
    torch = case.stack.cuda if case.stack and case.stack.cuda else ""
    if value != "1" or not case.job.compiled_ops or not toolkit or not torch:
        raise SkipCheck("the guard is on, or nothing is compiled")
    if toolkit.split(".")[0] != torch.split(".")[0]:
        yield warning(
            f"DS_SKIP_CUDA_CHECK is 1, nvcc is {toolkit} and torch is built with CUDA {torch}.",
            "The operator links against another major release: it may not load, or fail at its first step.",
            "Install the toolkit of torch's CUDA and unset it.",
            commands=("unset DS_SKIP_CUDA_CHECK",),
        )


_OURS = ("CUDA_VISIBLE_DEVICES", "CUDA_LAUNCH_BLOCKING", "CUDA_DEVICE_ORDER", "CUDA_MODULE_LOADING")


@check("EN409", "CUDA's variables are spelt as CUDA reads them")
def cuda_spelling(case: Case) -> Iterator[Finding]:
    """A misspelt CUDA_VISIBLE_DEVICES hides nothing: the job starts on every card (CUDA programming guide)."""
    for name in case.facts.environment:
        near = difflib.get_close_matches(name, _OURS, n=1, cutoff=0.9)
        if near and name not in _OURS:
            yield warning(
                f"{name} is set and {'so is ' if near[0] in case.facts.environment else 'not '}{near[0]}.",
                "Nothing reads that name.",
                f"Did you mean {near[0]}?",
                docs="https://docs.nvidia.com/cuda/cuda-programming-guide/05-appendices/environment-variables.html",
            )
