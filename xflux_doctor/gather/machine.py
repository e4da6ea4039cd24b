"""All quick facts of this machine in one value: no child process, no CUDA context, no socket, no torch."""

from __future__ import annotations

import datetime
import importlib
import os
import time
from collections.abc import Container
from typing import Any

from xflux_doctor import __version__
from xflux_doctor.facts import Facts
from xflux_doctor.gather import environment, gpus, host, interpreter, packages


def gather(
    python: str | None = None, package_names: tuple[str, ...] = (), known_torch: Container[tuple[str, str]] = (),
    *, to_run: bool = True, cards: bool = True,
) -> Facts:  # fmt: skip
    """Look at the machine. `python` names the interpreter whose packages count.

    `known_torch`: pairs (version, build) whose GPU architectures the matrix knows. `to_run`: whether something is to
    run here; else nothing is asked that only a start depends on: the kernel's log (the slowest of all on a machine that
    has long been up), compilers, and whether the packages' files are whole. `cards`: whether the driver is asked,
    whose start takes as long as all else where there are several.
    """
    timings: dict[str, float] = {}
    unknown: dict[str, str] = {}
    asked = gpus.visit() if cards else None
    chosen = interpreter.python_facts(python)

    started = time.perf_counter()
    installed = packages.packages(chosen, package_names, os.environ, known_torch, whole=to_run)
    timings["packages"] = time.perf_counter() - started

    nvml = asked.result() if asked else gpus.NvmlReading("the GPUs were not asked for")
    timings["nvml"] = nvml.seconds
    timings["nvml_start"] = nvml.start_seconds
    if nvml.error:
        unknown["gpus"] = nvml.error
    if nvml.driver is None:
        unknown["driver"] = nvml.error

    xids, tools = None, None
    if to_run:
        kernel_log: Any = importlib.import_module("xflux_doctor.gather.kernel_log")
        started = time.perf_counter()
        xids = kernel_log.xids()
        timings["kernel_log"] = time.perf_counter() - started
        toolchain: Any = importlib.import_module("xflux_doctor.gather.toolchain")
        tools = toolchain.toolchain_facts(os.environ, chosen)
    else:
        unknown["toolchain"] = "compilers were not asked for"
    if xids is None:
        unknown["xids"] = "the kernel log cannot be read from here" if to_run else "the kernel log was not asked for"

    default_config = environment.default_accelerate_config(os.environ)
    return Facts(
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        version=__version__,
        python=chosen,
        host=host.host_facts(),
        driver=nvml.driver,
        gpus=nvml.gpus,
        lost_gpus=nvml.lost,
        topology=nvml.topology,
        xids=xids,
        packages=installed,
        environment=environment.environment_facts(os.environ),
        hub_token=environment.has_hub_token(os.environ),
        default_accelerate_config=str(default_config) if default_config else "",
        toolchain=tools,
        unknown=unknown,
        timings=timings,
    )
