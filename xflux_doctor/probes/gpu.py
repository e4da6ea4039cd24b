"""Probe: one GPU does what training asks of it, stage by stage; each stage says that it begins and what it found.

    python gpu.py ASK          ASK: a JSON object, as `each_gpu.Ask` writes it

A line of JSON at the beginning of a stage names it, so that a death or a hang is its own. A stage that raises costs
only its own verdict; where CUDA is broken afterwards the process leaves, and another one goes on behind that stage.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

STACK_AT = 0.8
"""Share of a stage's limit at which a stack is written, before the parent kills."""
BROKEN = 3
"""Exit code: CUDA cannot be used any more in this process."""


def say(**values: Any) -> None:
    with contextlib.suppress(OSError, ValueError):  # a library may have closed stdout
        print(f"\n{json.dumps(values)}", flush=True)  # a line of its own, whatever was printed before it


class Gpu:
    """The device under test and what is asked of it."""

    def __init__(self, ask: dict[str, Any]) -> None:
        self.ask = ask
        self.torch: Any = None
        self.device: Any = None
        self.cudnn = False
        """Whether torch by itself allows cuDNN's attention."""

    @property
    def cuda(self) -> bool:
        return bool(self.device.type == "cuda")

    def settle(self) -> None:
        """Wait for everything that was asked of the device, and raise what went wrong."""
        if self.cuda:
            self.torch.cuda.synchronize(self.device)

    def timed(self, call: Callable[[], Any], seconds: float, *, warm: int = 2, least: int = 3) -> float:
        """Seconds of one call, the mean over as many as take about so long."""
        for _ in range(warm):
            call()
        self.settle()
        started = time.perf_counter()
        call()
        self.settle()
        count = max(least, int(seconds / max(1e-6, time.perf_counter() - started)))
        started = time.perf_counter()
        for _ in range(count):
            call()
        self.settle()
        return (time.perf_counter() - started) / count

    def allow_cudnn(self, allowed: bool) -> None:
        """Whether torch may take cuDNN's attention: never, or as it does by itself."""
        if self.cuda and hasattr(self.torch.backends.cuda, "enable_cudnn_sdp"):
            self.torch.backends.cuda.enable_cudnn_sdp(allowed and self.cudnn)

    def free(self) -> int | None:
        """Bytes that CUDA calls free."""
        return int(self.torch.cuda.mem_get_info(self.device)[0]) if self.cuda else None

    def drop(self) -> None:
        """Give back what freed tensors held."""
        if self.cuda:
            self.torch.cuda.empty_cache()


def context(gpu: Gpu, _: str) -> dict[str, Any]:
    """Import torch, make the context, and say which card this really is."""
    import torch

    gpu.torch = torch
    gpu.device = torch.device(gpu.ask["device"])
    torch.manual_seed(0)
    if not gpu.cuda:
        torch.set_num_threads(1)
        return {"name": "cpu", "uuid": "", "pci": "", "total": None}
    started = time.perf_counter()
    gpu.cudnn = bool(getattr(torch.backends.cuda, "cudnn_sdp_enabled", bool)())
    torch.cuda.set_device(gpu.device)
    torch.ones(1, device=gpu.device).add_(1).item()
    free, total = torch.cuda.mem_get_info(gpu.device)
    uuid, pci = _identity(gpu.device.index)
    held = int(torch.cuda.memory_reserved(gpu.device))
    return {
        "name": torch.cuda.get_device_name(gpu.device), "uuid": uuid, "pci": pci, "free": int(free),
        "total": int(total), "reserved": held, "context_seconds": time.perf_counter() - started,
    }  # fmt: skip


def _identity(ordinal: int) -> tuple[str, str]:
    """UUID and PCI address by the driver itself: torch 2.4 does not tell them."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        raw, place = (ctypes.c_ubyte * 16)(), ctypes.create_string_buffer(32)
        named = driver.cuDeviceGetUuid_v2 if hasattr(driver, "cuDeviceGetUuid_v2") else driver.cuDeviceGetUuid
        if named(raw, ordinal) or driver.cuDeviceGetPCIBusId(place, 32, ordinal):
            return "", ""
    except (OSError, AttributeError):
        return "", ""
    digits = bytes(raw).hex()
    words = "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))
    return words, place.value.decode()


def _stages() -> dict[str, Callable[[Gpu, str], dict[str, Any]]]:
    """By the first word of their names. The files lie beside this one, which was started by its path."""
    loads, attention, blocks = (_beside(name) for name in ("gpu_loads", "gpu_attention", "gpu_blocks"))
    return {
        "context": context, "memory": loads.memory, "products": loads.products, "bandwidth": loads.bandwidth,
        "link": loads.link, "attention": attention.attention, "blocks": blocks.blocks,
    }  # fmt: skip


def _beside(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def perform(gpu: Gpu, name: str, call: Callable[[Gpu, str], dict[str, Any]]) -> None:
    """One stage, with its beginning and its end."""
    kind, _, rest = name.partition(" ")
    say(stage=name, begun=True)
    with contextlib.suppress(Exception):  # without a usable stderr there is no stack
        faulthandler.dump_traceback_later(gpu.ask["limits"][name] * STACK_AT)
    started = time.perf_counter()
    try:
        found = call(gpu, rest)
        gpu.settle()
        say(stage=name, done=time.perf_counter() - started, **found)
    except Exception as error:
        words = f"{type(error).__name__}: {error}"[:2000]
        full = type(error).__name__ == "OutOfMemoryError" and kind not in ("context", "memory")
        say(stage=name, **{"skipped" if full else "failed": f"no room on the card: {words[:200]}" if full else words})
        if kind == "context":
            raise SystemExit(1) from error
    faulthandler.cancel_dump_traceback_later()
    with contextlib.suppress(Exception):
        gpu.drop()
    try:
        gpu.settle()
    except Exception as error:
        raise SystemExit(BROKEN) from error


def main(arguments: list[str]) -> int:
    """All stages that are asked for, the context first; leaves without a teardown that may hang."""
    ask = json.loads(arguments[0])
    with contextlib.suppress(Exception):  # without a usable stderr there is no stack, and everything else goes on
        faulthandler.enable()
    # As the trainer asks torch to take the card's memory.
    if not any(os.environ.get(name) for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")) and ask["expand"]:
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    gpu, stages = Gpu(ask), _stages()
    code = 0
    try:
        for name in ask["stages"]:
            perform(gpu, name, stages[name.partition(" ")[0]])
    except SystemExit as end:
        code = int(end.code or 0)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
