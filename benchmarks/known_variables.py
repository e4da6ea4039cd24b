"""Hold xflux_doctor/known_variables.py against real libraries: what they read that the list lacks, and the other way.

    python benchmarks/known_variables.py …/nvidia/nccl/lib/libnccl.so.2
    python benchmarks/known_variables.py …/torch/lib/libtorch_cuda.so …/torch/lib/libtorch_cpu.so

A name counts as the library's where it stands between two zero bytes, as a C literal does. The constants that NCCL
prints in its messages look the same; they are left out by name. Exits 1 where the list names a variable that a
libnccl of its release does not hold.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from packaging.version import Version

from xflux_doctor.known_variables import NCCL_SINCE, NCCL_UNTIL, TORCH_NCCL_SINCE

_NAME = re.compile(rb"(?<=\0)(?:TORCH_)?NCCL_[A-Z0-9_]+(?=\0)")
_VERSION = re.compile(rb"NCCL version (\d+\.\d+\.\d+)\+cuda")
_NO_VARIABLES = re.compile(
    r"NCCL_(ALL|ALLOC|ALLOC_HOST|BOOTSTRAP|CALL|COLL|DESTROY|ENV|GRAPH|INIT|NVLS|P2P|PROFILE|PROXY|RAS|REG|SHM|SIGNAL|"
    r"SIGNAL_NONE|TUNING|LOG_.*|NET_DEVICE_.*|IPC_(COLLECTIVE|SENDRECV)|.*REG(ULAR)?_BUFFER(_NUM)?|GIN_CONNECTION_.*|"
    r"GIN_TYPE_.*|GIN_IB_.*_TAG|GIN_.*_CONTEXT_(MAX_SIZE|VERSION)|IB_(SL|TC)_DEFAULT|NET_MERGE_POLICY_.*|"
    r"PARAM_(FLAG|TYPE)_.*)"
)


def names(library: Path) -> set[str]:
    return {match.decode() for match in _NAME.findall(library.read_bytes())}


def nccl_version(library: Path) -> Version | None:
    """By the words that the library prints at its start."""
    found = _VERSION.search(library.read_bytes())
    return Version(found[1].decode()) if found else None


def expected(version: Version) -> set[str]:
    """The variables that the list gives to this release of NCCL."""
    gone = {name for name, end in NCCL_UNTIL.items() if version >= Version(end)}
    return {name for name, first in NCCL_SINCE.items() if version >= Version(first)} - gone


def compare(library: Path) -> tuple[set[str], set[str]]:
    """(names that the list lacks, names of the list that the library lacks)."""
    held = names(library)
    version = nccl_version(library) if "nccl" in library.name else None
    if version is None:
        torch = {name for name in held if name.startswith("TORCH_NCCL_")}
        return torch - set(TORCH_NCCL_SINCE), set()
    plain = {name for name in held if name.startswith("NCCL_") and not _NO_VARIABLES.fullmatch(name)}
    return plain - set(NCCL_SINCE), expected(version) - held


if __name__ == "__main__":
    failed = False
    for argument in sys.argv[1:]:
        lacking, not_held = compare(Path(argument))
        print(f"{argument}: not in the list {sorted(lacking)}; not in the library {sorted(not_held)}")
        failed = failed or bool(not_held)
    sys.exit(failed)
