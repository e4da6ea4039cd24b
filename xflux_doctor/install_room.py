"""Where pip's downloads, cache and packages find room. pip itself finds out after minutes, by Errno 28.

pip holds the wheels three times while it works: in a folder of TMPDIR until all are there, in its own cache, and
unpacked among the packages; what goes into the cache is written to TMPDIR once more, a wheel at a time (pip 23.2,
_internal/operations/prepare.py and _vendor/cachecontrol/filewrapper.py). On rented machines TMPDIR and the cache lie on
a small container disk, the venv on a volume.
"""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30
_LARGEST = GIB
"""Bytes of the largest wheel: torch's and cuDNN's have 0.7 to 0.9 GiB."""


@dataclass(frozen=True)
class Disk:
    """A folder that pip writes to, and the free bytes of its file system.

    Folders with one `device` share them. Some that share a pool have two (btrfs, ZFS, a container's root beside a bind
    mount): then too much is taken to fit, and pip tells.
    """

    path: str
    device: int
    free: int


@dataclass(frozen=True)
class Disks:
    packages: Disk
    temporary: Disk
    cache: Disk | None
    """None where pip's cache is switched off."""


@dataclass(frozen=True)
class Arrangement:
    """What pip is told so that all of it fits."""

    cache: bool = True
    """False: `--no-cache-dir`."""
    temporary: str = ""
    """The folder for TMPDIR; empty: as it is."""


AS_IT_IS = Arrangement()


def arrange(download: int, installed: int, disks: Disks) -> Arrangement | None:
    """The first of four ways that fits: as it is, without a cache, with downloads beside the packages, with both.

    `download` and `installed` are bytes of wheels and of what is unpacked from them. None: there is no room for the
    packages, or none beside them for their downloads.
    """
    for temporary in (disks.temporary, disks.packages):
        for cache in (disks.cache, None):
            spooled = min(download, _LARGEST) if cache else 0
            wanted = [(disks.packages, installed), (temporary, download + spooled)]
            # On a disk of its own a full cache does no harm: pip goes on without it.
            if cache and cache.device in (disks.packages.device, temporary.device):
                wanted.append((cache, download))
            if all(sum(b for d, b in wanted if d.device == disk.device) <= disk.free for disk, _ in wanted):
                elsewhere = temporary.path if temporary is not disks.temporary else ""
                return Arrangement(cache is not None or disks.cache is None, elsewhere)
    return None


def shortage(download: int, installed: int, disks: Disks) -> str:
    """What is missing where, of the leanest of those ways. Empty where something fits."""
    if arrange(download, installed, disks):
        return ""
    packages, temporary = disks.packages, disks.temporary
    if packages.free < installed:
        return (
            f"{packages.path} is on a disk with {packages.free / GIB:.1f} GiB free; the packages take "
            f"{installed / GIB:.1f} GiB there"
        )
    if packages.device == temporary.device:
        return (
            f"{packages.path} is on a disk with {packages.free / GIB:.1f} GiB free; the packages take "
            f"{installed / GIB:.1f} GiB there and their downloads, in {temporary.path}, {download / GIB:.1f} GiB"
        )
    return (
        f"{temporary.path} is on a disk with {temporary.free / GIB:.1f} GiB free and the downloads take "
        f"{download / GIB:.1f} GiB; {packages.path} has {packages.free / GIB:.1f} GiB, too little for them and for the "
        f"packages' {installed / GIB:.1f} GiB"
    )
