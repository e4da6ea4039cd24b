"""Probe: one rank of an all-reduce with values that only a right sum can give.

    python allreduce.py BACKEND RANK WORLD STORE_FILE SECONDS

Prints a JSON line as each stage ends, so that the parent knows where a silent rank stands. Rank r gives
(r + 1) · k at place k; the sum is k · n(n+1)/2, exact in both types because every number is a small integer.
An odd length exercises the tail that vector copies leave.
"""

from __future__ import annotations

import datetime
import json
import os
import sys
import time
from pathlib import Path
from typing import Any


def say(stage: str, **more: object) -> None:
    print(json.dumps({"stage": stage, **more}), flush=True)


def main(arguments: list[str]) -> int:
    backend, store_file = arguments[0], arguments[3]
    rank, world, seconds = int(arguments[1]), int(arguments[2]), float(arguments[4])
    try:
        import torch
        import torch.distributed as dist

        say("import")
        limit = datetime.timedelta(seconds=seconds)
        device = torch.device("cpu")
        if backend == "nccl":
            device = torch.device("cuda", rank)
            torch.cuda.set_device(device)
        store = dist.FileStore(store_file, world)
        store.set_timeout(limit)
        say("rendezvous")
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=limit)
        say("init")
        one = torch.ones(1, device=device)
        dist.all_reduce(one)
        if one.item() != world:
            say("failed", detail=f"the sum of {world} ones came out as {one.item()}")
            return 1
        say("tiny")
        wrong = wrong_sums(dist, torch, device, rank, world)
        if wrong:
            say("failed", detail=wrong)
            return 1
        say("values")
        part(Path(store_file), rank, world, seconds)
    except BaseException as error:
        say("failed", detail=f"{type(error).__name__}: {error}"[:2000])
        return 1
    say("done")
    # Straight out: with a FileStore the teardown of torch 2.4's gloo was seen to hang, on most runs of 8 ranks.
    sys.stdout.flush()
    os._exit(0)


def part(store_file: Path, rank: int, world: int, seconds: float) -> None:
    """Wait until every rank has its sums: a rank that left early would break those still at theirs.

    By files, not by a barrier, which would be one more collective to hang in.
    """
    marks = [store_file.with_name(f"rank{other}.done") for other in range(world)]
    marks[rank].touch()
    deadline = time.monotonic() + seconds
    while not all(mark.exists() for mark in marks):
        if time.monotonic() > deadline:
            absent = [other for other, mark in enumerate(marks) if not mark.exists()]
            raise TimeoutError(f"ranks {absent} did not finish their sums")
        time.sleep(0.01)


def wrong_sums(dist: Any, torch: Any, device: Any, rank: int, world: int) -> str:
    """Reduce 1 MiB and an odd length in fp32 and bf16; the first wrong element as a sentence, or empty."""
    for dtype, length, most in ((torch.float32, (1 << 18) + 3, 1000), (torch.bfloat16, 4099, 4)):
        pattern = torch.arange(length, device=device).remainder(most).to(dtype)
        values = pattern * (rank + 1)
        dist.all_reduce(values)
        expected = pattern.double() * (world * (world + 1) // 2)
        if dtype is torch.bfloat16:
            expected = expected.to(dtype).double()
        bad = (values.double() != expected).nonzero()
        if len(bad):
            place = int(bad[0])
            got, want = values[place].item(), expected[place].item()
            return f"{dtype} element {place} of {length} is {got}, must be {want}"
    return ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
