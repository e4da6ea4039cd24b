"""How often `xflux-doctor explain` names the true cause of a failure, over a corpus of logs; and how fast it reads one.

    python benchmarks/explain.py --corpus DIR
    python benchmarks/explain.py --megabytes 1000

DIR holds logs and an index.tsv with the columns `path` and `cause`; `none` is a healthy run, of which a diagnosis is a
false alarm. Prints every log that was taken for something else, each cause with what it was taken for, and the share
of true causes. --megabytes writes a log of that size, a healthy run's with a failure at its end, and measures how fast
it is read and in how much memory. Exit 1 below 95 %, at a false alarm, below 100 MB/s or above 300 MB.
"""

from __future__ import annotations

import argparse
import csv
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

LEAST, SPEED, MEMORY = 0.95, 100.0, 300.0
PROGRESS = "steps:  {0:>7}/1000000 [{1}<2:10:11,  2.61it/s, lr=1e-5, step_loss=0.4{2:03}]\r"
FAILURE = (
    "Traceback (most recent call last):\n"
    '  File "/x/train.py", line 3, in <module>\n    loss.backward()\n'
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has a total capacity of 79.11 GiB "
    "of which 812.50 MiB is free. Process 4711 has 78.30 GiB memory in use. Of the allocated memory 76.20 GiB is "
    "allocated by PyTorch, and 1.40 GiB is reserved by PyTorch but unallocated.\n"
)


def told(path: Path) -> str:
    """The cause that is named first; `none` for a log in which none is seen."""
    from xflux_doctor.explain.diagnosis import diagnose_file

    found = diagnose_file(path)
    return found.cause if found else "none"


def corpus(folder: Path) -> bool:
    """Print the table; whether the bars are met."""
    with (folder / "index.tsv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    found = [(row["path"], row["cause"], told(folder / row["path"])) for row in rows]
    right = [cause for _, cause, said in found if cause == said]
    wrong = [(path, cause, said) for path, cause, said in found if cause != said]
    alarms = [path for path, cause, _ in wrong if cause == "none"]
    for path, cause, said in wrong:
        print(f"{path}: {said}, and it was {cause}")
    print("\n| true cause | logs | named | taken for |\n|---|---|---|---|")
    for cause, count in sorted(Counter(cause for _, cause, _ in found).items()):
        others = Counter(said for _, true, said in wrong if true == cause)
        taken = ", ".join(f"{n} x {name}" for name, n in others.items())
        print(f"| {cause} | {count} | {right.count(cause)} | {taken} |")
    healthy = sum(cause == "none" for _, cause, _ in found)
    share = len(right) / max(1, len(found))
    print(f"\n{len(right)} of {len(found)} ({share:.1%}); {len(alarms)} false alarms on {healthy} healthy logs")
    return share >= LEAST and not alarms


def large(megabytes: int) -> bool:
    """Time one log in a process of its own; whether the bars are met."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.log"
        with path.open("w", encoding="utf-8", newline="") as log:
            step = 0
            while log.tell() < megabytes * 1_000_000:
                log.write("".join(PROGRESS.format(step + k, "1:02:03", k) for k in range(1000)) + "\n")
                step += 1000
            log.write(FAILURE)
        size = path.stat().st_size / 1e6
        command = [sys.executable, "-m", "xflux_doctor.cli", "explain", str(path), "--format", "json"]
        started = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ})
        seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1000
    named = '"cuda-oom' in done.stdout
    speed = f"{size:,.0f} MB in {seconds:.1f} s: {size / seconds:.0f} MB/s"
    print(f"{speed}, {peak:.0f} MB of memory; cause named: {named}")
    return named and size / seconds >= SPEED and peak <= MEMORY


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--corpus", type=Path, metavar="DIR", help="logs with an index.tsv")
    parser.add_argument("--megabytes", type=int, metavar="N", help="the size of a log to be timed")
    options = parser.parse_args()
    if options.corpus is None and options.megabytes is None:
        parser.error("give --corpus DIR or --megabytes N")
    good = True
    if options.corpus is not None:
        good = corpus(options.corpus)
    if options.megabytes is not None:
        good = large(options.megabytes) and good
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
