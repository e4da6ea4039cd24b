"""TC: what compiling a CUDA operator needs, looked at only when this job compiles one.

Which versions of nvcc and gcc go together are rows of the matrix (SW105).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from xflux_doctor.check import Case, SkipCheck, check
from xflux_doctor.facts import Toolchain
from xflux_doctor.finding import Edit, Finding, error, warning

_OFFLOAD = ("deepspeed_config", "offload_optimizer_device")


def _compiling(case: Case) -> Toolchain:
    """The toolchain of a job that compiles; every other job skips."""
    assert case.facts.toolchain
    if not case.job.compiled_ops:
        if case.job.bundled and case.job.deepspeed and case.job.offloads:
            raise SkipCheck("no operator is compiled: what is offloaded the bundled trainer steps with torch's AdamW")
        raise SkipCheck("no operator is compiled: only DeepSpeed's offload needs one, and this job has none")
    return case.facts.toolchain


def _no_offload(reason: str) -> tuple[Edit, ...]:
    """The repair that always works: nothing is offloaded, so nothing is compiled."""
    return (Edit("accelerate", _OFFLOAD, "none", reason),)


@check("TC101", "CUDA_HOME is a toolkit", needs=("toolchain",))
def cuda_home(case: Case) -> Iterator[Finding]:
    """CUDA_HOME without bin/nvcc, as in runtime images, stops DeepSpeed's import (deepspeedai/DeepSpeed#4553)."""
    tools = case.facts.toolchain
    assert tools
    if not case.job.deepspeed:
        raise SkipCheck("the job does not use DeepSpeed")
    if tools.cuda_home_from in ("CUDA_HOME", "CUDA_PATH") and not tools.nvcc:
        yield warning(
            f"{tools.cuda_home_from} is {tools.cuda_home} and there is no bin/nvcc below it.",
            "DeepSpeed before 0.19.5 asks it for its version when it is imported on a machine with a GPU: "
            "'FileNotFoundError: … bin/nvcc'.",
            "Install the toolkit there, point the variable at one, or unset it.",
            docs="https://github.com/deepspeedai/DeepSpeed/issues/4553",
        )


@check("TC102", "nvcc is there", needs=("toolchain",))
def nvcc(case: Case) -> Iterator[Finding]:
    """DeepSpeedCPUAdam is compiled with the toolkit's headers (deepspeed/ops/op_builder, TorchCPUOpBuilder)."""
    tools = _compiling(case)
    if case.job.use_cpu:
        raise SkipCheck("CPU ranks compile without CUDA")
    if not tools.cuda_home:
        torch = (case.facts.packages or {}).get("torch")
        cuda = f" {torch.build[2:-1]}.{torch.build[-1]}" if torch and torch.build.startswith("cu") else ""
        yield error(
            f"The job compiles {', '.join(case.job.compiled_ops)} and there is no CUDA toolkit: no CUDA_HOME, no nvcc "
            "on PATH, no /usr/local/cuda.",
            "'MissingCUDAException: CUDA_HOME does not exist, unable to compile CUDA op(s)'.",
            f"Install the CUDA{cuda} toolkit and set CUDA_HOME, or do not offload the optimizer.",
            edits=_no_offload("there is no CUDA toolkit to compile DeepSpeedCPUAdam with"),
        )


@check("TC103", "a C++ compiler is there", needs=("toolchain",))
def compiler(case: Case) -> Iterator[Finding]:
    """torch compiles operators with $CXX or c++ (torch/utils/cpp_extension.py, get_cxx_compiler)."""
    tools = _compiling(case)
    if not tools.cxx:
        yield error(
            f"The job compiles {', '.join(case.job.compiled_ops)} and there is no c++ on PATH.",
            "'RuntimeError: Error building extension' at the first step.",
            "Install a compiler, or do not offload the optimizer.",
            edits=_no_offload("there is no C++ compiler"),
            commands=("sudo apt-get install g++",),
        )
    elif "clang" in Path(tools.cxx).name:
        yield warning(
            f"The C++ compiler is {tools.cxx}.",
            "torch's own wheels are built with GCC; operators built by another compiler may not load.",
            "Set CXX to g++.",
        )


@check("TC104", "ninja is on PATH", needs=("toolchain", "python"))
def ninja(case: Case) -> Iterator[Finding]:
    """torch starts ninja by name; pip puts it into the environment's bin folder (torch/utils/cpp_extension.py)."""
    tools = _compiling(case)
    assert case.facts.python
    if not tools.ninja:
        there = "ninja" in (case.facts.packages or {})
        folder = Path(case.facts.python.executable).parent
        yield error(
            "ninja is not on PATH" + (f", though it is installed in {folder}." if there else "."),
            "'RuntimeError: Ninja is required to load C++ extensions'.",
            "Activate the environment, so that its bin folder is on PATH." if there else "Install ninja.",
            edits=_no_offload("ninja is not on PATH"),
            commands=(f"export PATH={folder}:$PATH",) if there else ("pip install ninja",),
        )


@check("TC105", "Python's headers are there", needs=("toolchain", "python"))
def headers(case: Case) -> Iterator[Finding]:
    """Every operator includes Python.h; distributions ship it in a package of its own."""
    tools = _compiling(case)
    assert case.facts.python
    if not tools.python_headers:
        minor = ".".join(case.facts.python.version.split(".")[:2])
        yield error(
            f"Python.h of Python {minor} is not there.",
            "'fatal error: Python.h: No such file or directory' when the operator is compiled.",
            "Install Python's development package, or do not offload the optimizer.",
            edits=_no_offload("Python.h is missing"),
            commands=(f"sudo apt-get install python{minor}-dev",),
        )


@check("TC106", "libaio is there for NVMe offload", needs=("toolchain",))
def libaio(case: Case) -> Iterator[Finding]:
    """DeepSpeed's async_io links libaio (deepspeed/ops/op_builder/async_io.py)."""
    tools = _compiling(case)
    if "async_io" not in case.job.compiled_ops:
        raise SkipCheck("nothing is offloaded to NVMe")
    if not tools.libaio:
        yield error(
            "The job offloads to NVMe, and libaio.h or libaio.so is missing.",
            "'async_io requires the dev libaio .so object and headers but these were not found'.",
            "Install libaio's development package, or offload to the CPU.",
            commands=("sudo apt-get install libaio-dev",),
        )


@check("TC107", "no build lock of a dead run is left", needs=("toolchain",))
def stale_lock(case: Case) -> Iterator[Finding]:
    """A build that was killed leaves its lock, and the next start waits for it for ever (torch/utils/file_baton.py)."""
    tools = case.facts.toolchain
    assert tools
    old = {path: age for path, age in tools.stale_locks.items() if age > 1800}
    if old and not case.job.compiled_ops:
        raise SkipCheck("there are old locks, and this job compiles no operator")
    for path, age in old.items():
        yield warning(
            f"{path} is {age / 3600:.1f} h old.",
            "torch waits for this lock without a word, for ever, when the operator is loaded.",
            "If no build is running, remove it.",
            commands=(f"rm {path}",),
        )
