"""What a run cost: time, memory of the device and the host in each phase, and the numbers in metrics.json."""

from __future__ import annotations

import os
import platform
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from xflux_trainer.pulse import PULSE
from xflux_trainer.speed import Rates, Window

PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "deepspeed", "safetensors", "numpy")
WARM_UP = 3
"""Steps that do not count for the time of a step: kernels are chosen and memory is first taken there."""
WINDOW = 1000
"""The newest steps, of which the median is taken: sorting all of them at each step would cost more and more."""
STATUS = Path("/proc/self/status")
STAT = Path("/proc/self/stat")


class HostWatch(threading.Thread):
    """Looks ten times a second at the memory that is this process's own.

    RssAnon and RssShmem: pages of mapped weight files are not counted, because the kernel can drop them.
    """

    def __init__(self) -> None:
        super().__init__(name="host-memory", daemon=True)
        self.peaks: dict[str, int] = {}
        self.phase = "between"
        """What is being done: `list`, `cache`, `load`, `train`, `sample`; `between` is all that has none of its own."""
        self._done = threading.Event()

    def run(self) -> None:
        while not self._done.wait(0.1):
            self.look()

    def look(self) -> None:
        self.peaks[self.phase] = max(self.peaks.get(self.phase, 0), own_memory())

    def stop(self) -> None:
        self._done.set()


def own_memory() -> int:
    """RssAnon + RssShmem in bytes; 0 where the kernel does not say."""
    try:
        lines = STATUS.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("RssAnon:", "RssShmem:")))


def process_age() -> float:
    """Seconds since this process was started; 0 where the kernel does not say."""
    try:
        # The name comes second, in brackets, and may hold blanks; the start is field 22, in ticks since the boot.
        ticks = int(STAT.read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return 0.0


class Meter:
    """Phases, step times and peaks of this rank."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.host = HostWatch()
        self.device_peaks: dict[str, dict[str, int]] = {}
        self.step_seconds: list[float] = []
        self.window = Window()
        self.peak_tflops: float | None = None
        """What the card can do at the most, where that is known: see `speed.peak`."""
        self.started = time.monotonic()
        self.start_seconds: dict[str, float] = {"launch": process_age()}
        """From the process's launch to the end of its first step, by phase: together they are the whole of that time.
        `launch` is all before the meter was made: the interpreter, the imports and the config."""
        self._since = self.started

    def start(self) -> None:
        self.host.start()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Everything in the block counts for this phase; a phase can come more than once, and inside another."""
        outer = self.host.phase
        self._read_device(outer)
        self._book_start()
        self.host.look()
        self.host.phase = name
        told = PULSE.at(name)
        try:
            yield
        finally:
            PULSE.at(told)
            self._read_device(name)
            self._book_start()
            self.host.look()
            self.host.phase = outer

    def _book_start(self) -> None:
        """Book the time since the last booking to the phase that ends, or is interrupted, now."""
        if self.step_seconds:
            return
        now, phase = time.monotonic(), self.host.phase
        self.start_seconds[phase] = self.start_seconds.get(phase, 0.0) + now - self._since
        self._since = now

    def start_line(self) -> dict[str, float] | None:
        """For metrics.json: seconds from the launch to the end of the first step, that step's own (nearly all of which
        are in `train`), and the whole by phase; None before it."""
        if not self.step_seconds:
            return None
        whole = sum(self.start_seconds.values())
        return {"seconds": whole, "first_step": self.step_seconds[0], **self.start_seconds}

    def _read_device(self, name: str) -> None:
        """Book the device's peak since the last reading to a phase."""
        if self.device.type != "cuda":
            return
        peak = self.device_peaks.setdefault(name, {"allocated": 0, "reserved": 0})
        peak["allocated"] = max(peak["allocated"], torch.cuda.max_memory_allocated(self.device))
        peak["reserved"] = max(peak["reserved"], torch.cuda.max_memory_reserved(self.device))
        torch.cuda.reset_peak_memory_stats(self.device)

    def seconds_per_step(self) -> float | None:
        """The median; one slow step does not move it."""
        counted = self.step_seconds[WARM_UP:][-WINDOW:] or self.step_seconds
        return median(counted) if counted else None

    def book(self, seconds: float, images: int, flops: float, waited: float) -> dict[str, float]:
        """A step that is done: see `speed.Window.add`. Returns its line for metrics.jsonl."""
        if len(self.step_seconds) == WARM_UP:
            self.window.clear()
        self._book_start()
        self.step_seconds.append(seconds)
        return self.window.add(seconds, images, flops, waited)

    def rates(self) -> Rates:
        """Over the newest steps, without those of the warm-up where there are others."""
        line = self.window.line()
        return Rates(
            self.seconds_per_step() or 0.0, line["samples_per_second"], line["tflops"], line["data_wait"],
        )  # fmt: skip

    def peak_share(self) -> float | None:
        """Of what the card can do at the most; None where that is not known."""
        return self.rates().tflops / self.peak_tflops if self.peak_tflops and self.step_seconds else None

    def memory(self) -> tuple[int, int] | None:
        """Bytes of the device that tensors took at the most so far, and all that it has; None without a device."""
        if self.device.type != "cuda":
            return None
        self._read_device(self.host.phase)
        peak = max(peak["allocated"] for peak in self.device_peaks.values())
        return peak, torch.cuda.get_device_properties(self.device).total_memory

    def peaks(self) -> dict[str, Any]:
        """This rank's peaks so far, by phase and over all."""
        self._read_device(self.host.phase)
        self.host.look()
        device = dict(self.device_peaks)
        if device:
            device["overall"] = {
                key: max(peak[key] for peak in self.device_peaks.values()) for key in ("allocated", "reserved")
            }
        host = dict(self.host.peaks)
        return {"device": device, "host": {**host, "overall": max(host.values())}}


def merge_peaks(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """The largest of every number over the ranks."""
    merged: dict[str, Any] = {}
    for peaks in ranks:
        for key, value in peaks.items():
            if isinstance(value, dict):
                merged[key] = merge_peaks([merged.get(key, {}), value])
            else:
                merged[key] = max(merged.get(key, 0), value)
    return merged


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    found["torch"] = torch.__version__  # with its build, for example +cu130
    return found


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
