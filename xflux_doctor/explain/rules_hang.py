"""Causes: a run that stood still and was ended by the doctor, in the doctor's own words (see `hang.py`).

They stand above what the ranks print on their way out: the doctor looked at the processes themselves.
"""

from __future__ import annotations

from xflux_doctor.explain.rule import Rule, Sign

_STACKS = "The run folder's stacks/rankN.txt show where every thread stood."

RULES: tuple[Rule, ...] = (
    Rule(
        "rank-stopped",
        "a rank was stopped by a signal",
        (Sign("xflux-doctor: rank-stopped: "),),
        "SIGSTOP, Ctrl-Z or a debugger held its process; the others waited for it.",
        "Find out who stopped it; the run goes on from its last checkpoint.",
        level="machine",
    ),
    Rule(
        "rank-lost",
        "a rank's process was gone, and its launcher did not notice",
        (Sign("xflux-doctor: rank-lost: "),),
        "The others waited in a collective call for a process that no longer exists.",
        "Look at the end of that rank's log and at the kernel's (dmesg); go on from the last checkpoint.",
        level="machine",
    ),
    Rule(
        "loader-stuck",
        "a rank waited for data that did not come",
        (Sign("xflux-doctor: loader-stuck: "),),
        "A file or a disk of the data or the cache does not answer: a pipe among the images, a network disk that is "
        "away.",
        f"Read the file that the stack names by hand (`timeout 10 head -c1 FILE`), and look at the mount. {_STACKS}",
        ("df -h .", "mount | grep -e nfs -e lustre -e fuse"),
        level="machine",
    ),
    Rule(
        "storage-stuck",
        "a rank waited in the kernel for a disk or a driver",
        (Sign("xflux-doctor: storage-stuck: "),),
        "It, or a process that reads for it, waited all the time for a file system that is away or for a driver that "
        "hangs.",
        f"Look at the mount, at its server and at dmesg; such a process ends only when the kernel lets it. {_STACKS}",
        ("mount | grep -e nfs -e lustre -e fuse", "dmesg | tail -50"),
        level="machine",
    ),
    Rule(
        "rank-stuck",
        "a rank did not go on",
        (Sign("xflux-doctor: rank-stuck: "),),
        "It waited for no other rank, and its record did not change: a lock, an endless loop, or a call that never "
        "returns.",
        f"{_STACKS} If it only was slow, set --hang-after.",
        level="machine",
    ),
    Rule(
        "collective-stuck",
        "all ranks waited for each other in a collective call",
        (Sign("xflux-doctor: collective-stuck: "),),
        "The network or the cards between them stopped carrying data, or the ranks do not make the same calls.",
        f"Run `xflux-doctor check --deep`, which tests the all-reduce between the ranks. {_STACKS}",
        ("xflux-doctor check --deep",),
        level="machine",
    ),
)
