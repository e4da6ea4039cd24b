"""ST: each check fires on the fault and stays silent beside it."""

from __future__ import annotations

import dataclasses
from typing import Any

import msgspec
import pytest
from conftest import GIB, XFLUX_ACCELERATE, case, findings, job, machine, packages, verdict

from xflux_doctor import bill
from xflux_doctor.check import Case, Check
from xflux_doctor.checks import room, storage
from xflux_doctor.facts import Folder, HubCache
from xflux_doctor.finding import Finding
from xflux_doctor.job import Job
from xflux_doctor.matrix import Matrix

OFFLOAD = XFLUX_ACCELERATE.replace("offload_optimizer_device: none", "offload_optimizer_device: cpu")
COMPILES = msgspec.structs.replace(job(OFFLOAD), train=None)
"""accelerate's file alone: some trainer that lets DeepSpeed offload, and so compile."""


def place(path: str, **values: Any) -> Folder:
    """A place on a roomy disk of its own."""
    disk = {"mount": "/data", "kind": "ext4", "writable": True, "total": 2000 * GIB, "free": 1000 * GIB,
            "inodes_free": 10**8, "device": "8:1"}  # fmt: skip
    return Folder(path, path, **{**disk, **values})


def on(matrix: Matrix, work: Job | None = None, cached: HubCache | None = None, /, **changed: Folder) -> Case:
    """A machine whose places are all well, but for those that are named."""
    names = ("output", "cache", "images", "model", "temporary", "home", "hub", "torch_extensions", "triton")
    folders = {name: place(f"/data/{name}") for name in names} | changed
    facts = machine(matrix, folders=folders, hub_cache=cached, created="2026-11-24T10:00:00+00:00",
                    packages=packages(matrix, "cuda13", triton="3.6.0"))  # fmt: skip
    return case(matrix, facts, work or job(output_dir="/data/output", cache_dir="/data/cache"))


def one(subject: Case, check: Check) -> Finding:
    (finding,) = findings(subject, check)
    assert finding.hint and finding.because
    return finding


ALL_OF_THEM = [value for module in (room, storage) for value in vars(module).values() if isinstance(value, Check)]


@pytest.mark.parametrize("check", ALL_OF_THEM, ids=lambda check: check.code)
@pytest.mark.parametrize("work", [None, COMPILES, job(cpu=True)], ids=["train", "compiles", "cpu"])
def test_a_well_kept_machine(matrix: Matrix, check: Check, work: Job | None) -> None:
    result = verdict(on(matrix, work), check)
    assert result.status in ("ok", "skipped"), result


def test_a_mount_that_does_not_answer(matrix: Matrix) -> None:
    dead = place("/nfs/runs", mount="/nfs", kind="nfs4", error="it did not answer within 1.5 s")
    finding = one(on(matrix, output=dead, cache=dead), storage.answers)
    assert finding.seen == "/nfs (nfs4): it did not answer within 1.5 s." and finding.severity == "error"
    assert "output_dir, cache_dir" in finding.because


def test_room_is_summed_by_mount(matrix: Matrix) -> None:
    """A small root disk beside a big volume: the download does not fit where the caches are."""
    small: dict[str, Any] = {"mount": "/", "kind": "overlay", "total": 40 * GIB, "free": 20 * GIB, "device": "0:30"}
    empty = HubCache("black-forest-labs/FLUX.1-dev")
    subject = on(matrix, None, empty, hub=place("/home/me/.cache/huggingface/hub", **small))
    finding = one(subject, room.room)
    assert "/ (overlay) has 20.0 GiB free" in finding.seen and "the model's download 31" in finding.seen
    assert finding.hint == "Point HF_HOME at /data, which has 1000 GiB free."
    # what is cached already need not be fetched
    whole = HubCache("black-forest-labs/FLUX.1-dev", snapshot="/home/me/snapshot")
    fine = on(matrix, None, whole, hub=place("/home/me/.cache/huggingface/hub", **small))
    assert findings(fine, room.room) == ()


def test_the_cache_holds_every_size_mirror_image_and_condition(matrix: Matrix) -> None:
    """512 and 1024 px, each mirrored, and edges of each: by bytes and by files, less what is there already."""
    work = job(None, mode="controlnet", img_size=512, resolutions=(1024,), random_flip=True)
    once = {share.purpose: share for share in room.shares(on(matrix, job(None, mode="controlnet", img_size=512)))}
    many = {share.purpose: share for share in room.shares(on(matrix, work))}
    count = once["cache"].files // 3  # latents, caption, condition
    assert many["cache"].files == count * (4 + 1 + 2)
    text = (512 * 4096 + 768) * 2
    latents, edges = 512 * 512 // 256 * 64 * 4, 512 * 512
    assert once["cache"].bytes == count * (text + latents + edges)
    assert many["cache"].bytes == count * (text + 2 * (1 + 4) * latents + (1 + 4) * edges)
    assert "the ControlNet" in many["output"].what and "conditions" in many["cache"].what
    half = room.shares(on(matrix, work, cache=place("/data/cache", entries=2 * count)))
    assert next(share.files for share in half if share.purpose == "cache") == (count - count // 2) * 7


def test_a_filled_cache_spares_the_host_the_encoders(matrix: Matrix) -> None:
    """An entry for each size and mirror image of each photograph: what one lacks is encoded, by a larger process."""
    work = job(None, img_size=512, random_flip=True)
    count = bill.dataset(on(matrix, work)).count
    hosts = [
        bill.need(on(matrix, work, cache=place("/data/cache", entries=entries))).host_per_rank
        for entries in (0, 2 * count - 1, 2 * count)
    ]
    assert count and hosts[0] == hosts[1] > hosts[2] + GIB // 4
    full = on(matrix, work, cache=place("/data/cache", entries=2 * count))
    assert full.job.train is not None
    other = dataclasses.replace(full.job.train, img_size=1024)  # nothing of that size is there
    assert bill.forecast_of(full, other).host_per_rank > hosts[2] + GIB // 4


def test_a_store_that_does_not_tell_its_room_is_no_pass(matrix: Matrix) -> None:
    result = verdict(on(matrix, output=place("/s3/out", mount="/s3", total=0, free=0, device="0:9")), room.room)
    assert result.status == "skipped" and "does not say how much room" in result.reason


def test_inodes(matrix: Matrix) -> None:
    finding = one(on(matrix, output=place("/data/output", inodes_free=5, device="8:9")), room.inodes)
    assert "5 free inodes" in finding.seen and finding.commands == ("df -i /data/output",)
    assert findings(on(matrix, output=place("/data/output", inodes_free=None, device="8:9")), room.inodes) == ()


def test_memory_is_no_disk(matrix: Matrix) -> None:
    finding = one(on(matrix, output=place("/dev/shm/out", mount="/dev/shm", kind="tmpfs")), storage.on_a_disk)
    assert "The output: /dev/shm (tmpfs), which is memory" in finding.seen and "output_dir" in finding.hint


def test_a_container_s_own_layer(matrix: Matrix) -> None:
    layer = place("/app/output", mount="/", kind="overlay", device="0:30")
    volume = place("/workspace", mount="/workspace", kind="xfs", device="8:2")
    finding = one(on(matrix, output=layer, volume=volume), storage.outlives_container)
    assert "/workspace (xfs) is mounted beside it with 1000 GiB free" in finding.seen
    assert findings(on(matrix, output=layer), storage.outlives_container) == ()  # there is no better place
    assert findings(on(matrix, volume=volume), storage.outlives_container) == ()


@pytest.mark.parametrize(("values", "words"), [
    ({"writable": False}, "cannot be written by this user"),
    ({"read_only": True, "mount": "/ro"}, "mounted read-only"),
    ({"is_file": True}, "is a file"),
])  # fmt: skip
def test_caches_writable(matrix: Matrix, values: dict[str, Any], words: str) -> None:
    finding = one(on(matrix, cache=place("/data/cache", **values)), storage.caches_writable)
    assert words in finding.seen and "cache_dir" in finding.hint and finding.severity == "error"


def test_compile_caches_on_the_network(matrix: Matrix) -> None:
    nfs = place("/home/me/.cache/torch_extensions", mount="/home", kind="nfs4")
    finding = one(on(matrix, COMPILES, torch_extensions=nfs), storage.caches_local)
    assert "/home (nfs4)" in finding.seen and "TORCH_EXTENSIONS_DIR" in finding.hint
    ddp = job(XFLUX_ACCELERATE.replace("DEEPSPEED", "MULTI_GPU"))
    assert verdict(on(matrix, ddp, torch_extensions=nfs, triton=nfs), storage.caches_local).status == "skipped"


def test_noexec(matrix: Matrix) -> None:
    closed = place("/tmp/ext", mount="/tmp", no_exec=True)
    assert one(on(matrix, COMPILES, torch_extensions=closed), storage.may_load).severity == "error"
    assert one(on(matrix, COMPILES, triton=closed), storage.may_load).severity == "warning"


@pytest.mark.parametrize(("folder", "words"), [
    (Folder("/scratch/tmp", "/scratch", "/scratch", writable=True), "there is no such folder"),
    (place("/tmp", writable=False), "cannot be written by this user"),
    (place("/tmp", free=10 << 20), "has 10 MiB free"),
    (place("/tmp", inodes_free=0), "MiB free"),
])  # fmt: skip
def test_temporary(matrix: Matrix, folder: Folder, words: str) -> None:
    assert words in one(on(matrix, temporary=folder), storage.temporary).seen


def test_a_user_without_a_home(matrix: Matrix) -> None:
    nowhere = Folder("/.cache/torch_extensions", "/", "/", "overlay", total=GIB, free=GIB)
    finding = one(on(matrix, COMPILES, torch_extensions=nowhere, home=place("/")), storage.home_writable)
    assert "HOME is /" in finding.seen and finding.severity == "error"


def test_clock(matrix: Matrix) -> None:
    subject = on(matrix)
    for created, count in (("1970-01-01T00:03:12+00:00", 1), ("2026-11-24T10:00:00+00:00", 0)):
        facts = msgspec.structs.replace(subject.facts, created=created)
        assert len(findings(msgspec.structs.replace(subject, facts=facts), storage.clock)) == count
    unsaid = msgspec.structs.replace(subject, facts=msgspec.structs.replace(subject.facts, created=""))
    assert verdict(unsaid, storage.clock).status == "skipped"


def test_leftovers(matrix: Matrix) -> None:
    finding = one(on(matrix, hub=place("/data/my hub", leftovers=3, leftover_bytes=30 * GIB)), storage.leftovers)
    assert "3 unfinished files" in finding.seen and "30.0 GiB" in finding.seen
    assert finding.commands == ("find '/data/my hub' -name '*.incomplete' -mmin +60 -delete",)
    assert findings(on(matrix, hub=place("/data/hub", leftovers=3, leftover_bytes=1 << 20)), storage.leftovers) == ()


def test_object_storage(matrix: Matrix) -> None:
    finding = one(on(matrix, output=place("/s3/out", mount="/s3", kind="fuse.s3fs")), storage.can_rename)
    assert "fuse.s3fs" in finding.seen
    assert findings(on(matrix, output=place("/m/out", mount="/m", kind="fuse.sshfs")), storage.can_rename) == ()
