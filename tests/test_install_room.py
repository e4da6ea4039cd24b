"""Where pip's downloads, cache and packages go on disks that are short of room, by values."""

from __future__ import annotations

import pytest

from xflux_doctor.install_room import AS_IT_IS, GIB, Arrangement, Disk, Disks, arrange, shortage

DOWNLOAD, INSTALLED = 3 * GIB, 8 * GIB


def disks(packages: float, temporary: float | None = None, cache: float | None = None, *, cached: bool = True) -> Disks:
    """Free GiB of the venv's disk, of /tmp's and of the cache's; None: the same disk as the one before."""
    venv = Disk("/volume/venv", 1, int(packages * GIB))
    tmp = Disk("/tmp", 1, venv.free) if temporary is None else Disk("/tmp", 2, int(temporary * GIB))
    kept = Disk("/cache/pip", tmp.device, tmp.free) if cache is None else Disk("/cache/pip", 3, int(cache * GIB))
    return Disks(venv, tmp, kept if cached else None)


@pytest.mark.parametrize(("place", "expected"), [
    (disks(15), AS_IT_IS),  # one disk: packages, wheels in /tmp and in the cache, one more on its way there
    (disks(14.9), Arrangement(cache=False)),
    (disks(11), Arrangement(cache=False)),
    (disks(10.9), None),
    (disks(11, cached=False), AS_IT_IS),
    (disks(8, 7), AS_IT_IS),  # the venv on a volume, the rest on the container's disk
    (disks(8, 6.9), Arrangement(cache=False)),
    (disks(8, 3), Arrangement(cache=False)),
    (disks(11, 2.9), Arrangement(cache=False, temporary="/volume/venv")),
    (disks(12, 2.9, 3), Arrangement(temporary="/volume/venv")),
    (disks(11, 2.9, 3), Arrangement(cache=False, temporary="/volume/venv")),
    (disks(10.9, 2.9), None),
    (disks(7.9, 100, 100), None),
    (disks(8, 4, 0), AS_IT_IS),  # a full cache on a disk of its own ends nothing
    (disks(8, 3.9, 0), Arrangement(cache=False)),
])  # fmt: skip
def test_the_first_way_that_fits(place: Disks, expected: Arrangement | None) -> None:
    assert arrange(DOWNLOAD, INSTALLED, place) == expected
    assert bool(shortage(DOWNLOAD, INSTALLED, place)) == (expected is None)


def test_what_is_missing_is_named_with_its_place() -> None:
    assert shortage(DOWNLOAD, INSTALLED, disks(7.9, 100, 100)) == (
        "/volume/venv is on a disk with 7.9 GiB free; the packages take 8.0 GiB there"
    )
    assert shortage(DOWNLOAD, INSTALLED, disks(10)) == (
        "/volume/venv is on a disk with 10.0 GiB free; the packages take 8.0 GiB there and "
        "their downloads, in /tmp, 3.0 GiB"
    )
    assert shortage(DOWNLOAD, INSTALLED, disks(10, 2)) == (
        "/tmp is on a disk with 2.0 GiB free and the downloads take 3.0 GiB; /volume/venv has 10.0 GiB, too little for "
        "them and for the packages' 8.0 GiB"
    )


def test_wheels_from_a_folder_are_not_fetched() -> None:
    assert arrange(0, INSTALLED, disks(8, 0, 0)) == AS_IT_IS
