"""Stages of `gpu.py`: the forecast's memory, matrix products, and how fast bytes move."""

from __future__ import annotations

import contextlib
import fcntl
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

GIB = 1 << 30
LARGE = 8192
"""The side of the square product that cards are compared by."""
ROUNDING = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7, "float8_e4m3fn": 2.0**-7}
"""Twice the unit roundoff of what is written; products in fp8 are written in bf16."""
SUMMING = {"float32": 2.0**-20, "float16": 2.0**-20, "bfloat16": 2.0**-20, "float8_e4m3fn": 2.0**-10}
"""The same of the sums, as a share of the sum of absolute values: tensor cores cut bits off, in fp8 after the 13th."""


def memory(gpu: Any, _: str) -> dict[str, Any]:
    """The job's forecast, in one piece and then in pieces as the trainer takes them, half of them freed and taken
    again as others. Nothing of it stays."""
    wanted = int(gpu.ask["forecast"])
    found: dict[str, Any] = {"wanted": wanted, "free": gpu.free(), "taken": 0}
    if not wanted:
        return found
    full = (gpu.torch.OutOfMemoryError if hasattr(gpu.torch, "OutOfMemoryError") else RuntimeError, MemoryError)
    try:
        gpu.torch.empty(wanted, dtype=gpu.torch.uint8, device=gpu.device).fill_(1)
        gpu.settle()
        found["whole"] = True
    except full as error:
        found |= {"whole": False, "said": str(error)[:300]}
    gpu.drop()
    try:
        found["taken"] = _in_pieces(gpu, wanted)
        found["pieces"] = True
    except full as error:
        held = gpu.torch.cuda.memory_allocated(gpu.device) if gpu.cuda else 0
        found |= {"pieces": False, "taken": int(held), "said": str(error)[:300]}
    gpu.drop()
    found["free_after"] = gpu.free()
    return found


def _in_pieces(gpu: Any, wanted: int) -> int:
    """Bytes that were held at the end: weights, then activations that come, go and come again in other sizes."""
    sizes, weights = gpu.ask["pieces"], gpu.ask["weights"]
    kept = [_fill(gpu, size) for size in _parts(sizes["weights"], min(weights, wanted))]
    room = max(0, wanted - weights)
    passing = [_fill(gpu, size) for size in _parts(sizes["activations"], room)]
    del passing[::2]  # what is freed lies between what is kept
    left = wanted - sum(part.numel() for part in (*kept, *passing))
    passing += [_fill(gpu, size) for size in _parts(sizes["again"], left)]
    gpu.settle()
    return sum(part.numel() for part in (*kept, *passing))


def _fill(gpu: Any, size: int) -> Any:
    return gpu.torch.empty(size, dtype=gpu.torch.uint8, device=gpu.device).fill_(1)


def _parts(sizes: list[int], whole: int) -> Iterator[int]:
    """Pieces of these sizes in turn, the last one cut, that are `whole` bytes together."""
    turn = 0
    while whole > 0:
        part = min(whole, sizes[turn % len(sizes)])
        yield part
        whole -= part
        turn += 1


def products(gpu: Any, _: str) -> dict[str, Any]:
    """Each type against float64 with random values, several times over, and its rate."""
    found = []
    for kind in gpu.ask["products"]:
        if kind.startswith("float8") and (why := _no_fp8(gpu)):
            found.append({"kind": kind, "absent": why})
            continue
        one = _checked(gpu, kind)
        gpu.drop()
        timed = {}
        for m, n, k in gpu.ask["shapes"]:
            a, b = _operands(gpu, kind, m, n, k)
            seconds = _rate(gpu, kind, a, b, told=kind == gpu.ask["products"][0] and f"{m}x{n}x{k}")
            timed[f"{m}x{n}x{k}"] = 2e-12 * m * n * k / seconds
            del a, b
        found.append({"kind": kind, "rates": timed, **one})
        gpu.drop()
    return {"products": found}


def _rate(gpu: Any, kind: str, a: Any, b: Any, *, told: str | bool) -> float:
    """Seconds of one product. While the device is busy already the parent is told to look at its clocks."""

    def call() -> Any:
        return _multiply(gpu.torch, kind, a, b)

    one = gpu.timed(call, gpu.ask["timed"] / 10)
    for _ in range(int(gpu.ask["timed"] / 3 / one) if gpu.cuda else 0):
        call()  # not waited for
    if told:
        print("\n" + json.dumps({"stage": "products", "loaded": told}), flush=True)
    seconds: float = gpu.timed(call, gpu.ask["timed"], warm=0)
    return seconds


def _no_fp8(gpu: Any) -> str:
    """Why products in fp8 are not to be had; empty: they are."""
    if not gpu.cuda or gpu.torch.cuda.get_device_capability(gpu.device) < (8, 9):
        return "wants compute capability 8.9"
    return "" if hasattr(gpu.torch, "float8_e4m3fn") and hasattr(gpu.torch, "_scaled_mm") else "torch is too old"


def _operands(gpu: Any, kind: str, m: int, n: int, k: int) -> tuple[Any, Any]:
    """(M, K), and (K, N) with its columns in rows, as a layer's weight is multiplied."""
    torch, dtype = gpu.torch, getattr(gpu.torch, kind)
    a, b = (torch.randn(rows, k, device=gpu.device, dtype=torch.bfloat16 if gpu.cuda else torch.float32).to(dtype)
            for rows in (m, n))  # fmt: skip
    return a, b.t()


def _multiply(torch: Any, kind: str, a: Any, b: Any) -> Any:
    if not kind.startswith("float8"):
        return a @ b
    one = torch.ones((), device=a.device, dtype=torch.float32)
    made = torch._scaled_mm(a, b, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=False)
    return made[0] if isinstance(made, tuple) else made  # before torch 2.5 with its largest value


def _checked(gpu: Any, kind: str) -> dict[str, Any]:
    """The worst element's error as a share of what rounding may do, and whether all repetitions gave the same bits."""
    torch = gpu.torch
    if gpu.cuda:  # parts of a sum that are rounded before they are added would be neither right nor wrong
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    m, n, k = gpu.ask["checked"]
    worst, same = 0.0, True
    for _ in range(gpu.ask["rounds"]):
        a, b = _operands(gpu, kind, m, n, k)
        first = _multiply(torch, kind, a, b)
        same = same and all(torch.equal(first, _multiply(torch, kind, a, b)) for _ in range(4))
        wide = [each.double() for each in (a, b)]
        true = wide[0] @ wide[1]
        allowed = ROUNDING[kind] * true.abs() + SUMMING[kind] * (wide[0].abs() @ wide[1].abs())
        share = (first.double() - true).abs_().div_(allowed)
        share = torch.nan_to_num_(share, nan=1e9, posinf=1e9)
        worst = max(worst, float(share.max()))
    return {"error": worst, "repeated": bool(same)}


def bandwidth(gpu: Any, _: str) -> dict[str, Any]:
    """GB/s of a copy on the device: each byte is read and written."""
    size = int(gpu.ask["copied"])
    free = gpu.free()
    size = size if free is None else min(size, free // 4)
    source = gpu.torch.empty(size, dtype=gpu.torch.uint8, device=gpu.device).fill_(1)
    target = gpu.torch.empty_like(source)
    seconds = gpu.timed(lambda: target.copy_(source), gpu.ask["timed"] / 2)
    return {"copy_gbs": 2 * size / seconds / 1e9}


def link(gpu: Any, _: str) -> dict[str, Any]:
    """GB/s between pinned host memory and the device, one GPU of the machine at a time."""
    if not gpu.cuda:
        return {}
    torch, size = gpu.torch, int(gpu.ask["linked"])
    host = torch.ones(size, dtype=torch.uint8).pin_memory()
    there = torch.empty(size, dtype=torch.uint8, device=gpu.device)
    with _alone(gpu.ask["lock"], gpu.ask["waits"]):
        down = gpu.timed(lambda: there.copy_(host, non_blocking=True), gpu.ask["timed"] / 2)
        up = gpu.timed(lambda: host.copy_(there, non_blocking=True), gpu.ask["timed"] / 2)
    return {"h2d_gbs": size / down / 1e9, "d2h_gbs": size / up / 1e9}


@contextlib.contextmanager
def _alone(path: str, seconds: float) -> Iterator[None]:
    """While no other GPU's probe is here, for which it waits so long; the kernel frees what a dead one held."""
    with Path(path).open("a") as file:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                time.sleep(0.01)
        yield
