"""The job's places and the mounts under them: real folders, and a mount table as the kernel writes it."""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import case, job, machine
from xflux_trainer.config import TrainConfig

from xflux_doctor.facts import Facts, Folder, HubCache
from xflux_doctor.gather.deadline import within
from xflux_doctor.gather.folders import with_folders
from xflux_doctor.gather.mounts import mounts, under
from xflux_doctor.matrix import Matrix, load

TABLE = """\
22 1 0:30 / / rw,relatime - overlay overlay rw,lowerdir=/a
23 22 8:1 / /data rw,noexec - ext4 /dev/sda1 rw
24 22 0:40 / /mnt/my\\040share ro,relatime - nfs4 server:/export rw,hard
25 23 8:2 / /data/big rw - xfs /dev/sdb1 rw
"""


def look(tmp_path: Path, **train: object) -> dict[str, Folder]:
    config = TrainConfig(**{"img_dir": str(tmp_path), "output_dir": str(tmp_path / "out/deep"), **train})
    facts = with_folders(case_facts(), config, {"HOME": str(tmp_path / "home")})
    assert facts.folders is not None
    return facts.folders


def case_facts() -> Facts:
    return machine(load())


def test_the_nearest_parent_that_is_there(tmp_path: Path) -> None:
    output = look(tmp_path)["output"]
    assert output.path == str(tmp_path / "out/deep") and output.existing == str(tmp_path)
    room = os.statvfs(tmp_path)
    assert output.writable and output.total == room.f_blocks * room.f_frsize and output.mount and output.kind
    assert output.device == look(tmp_path)["images"].device


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    assert look(tmp_path)["output"].is_file


def test_places_follow_the_variables(tmp_path: Path) -> None:
    config = TrainConfig(img_dir=str(tmp_path), output_dir=str(tmp_path))
    environ = {"HOME": "/home/me", "HF_HOME": "/big/hf", "TMPDIR": "/big/tmp", "TORCH_EXTENSIONS_DIR": "/big/ext",
               "TRITON_CACHE_DIR": "/big/triton"}  # fmt: skip
    folders = with_folders(case_facts(), config, environ).folders
    assert folders is not None
    found = {name: folders[name].path for name in ("hub", "temporary", "torch_extensions", "triton")}
    assert found == {"hub": "/big/hf/hub", "temporary": "/big/tmp", "torch_extensions": "/big/ext",
                     "triton": "/big/triton"}  # fmt: skip
    usual = with_folders(case_facts(), config, {"HOME": "/home/me"}).folders
    assert usual is not None and usual["hub"].path == "/home/me/.cache/huggingface/hub"


def test_left_over_parts_count_when_they_are_old(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    for name, age in ((".xflux-tmp-a", 7200), (".xflux-tmp-b", 1)):
        (cache / name).write_bytes(b"x" * 1000)
        os.utime(cache / name, (time.time() - age,) * 2)
    folder = look(tmp_path, cache_dir=str(cache))["cache"]
    assert (folder.leftovers, folder.leftover_bytes) == (1, 1000)


def test_mount_table(tmp_path: Path) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/mountinfo").write_text(TABLE)
    table = mounts(tmp_path)
    places = {path: under(table, path) for path in ("/data/x", "/data/big/x", "/mnt/my share/x", "/databases")}
    found = {path: (mount.place, mount.kind) for path, mount in places.items() if mount}
    assert found == {"/data/x": ("/data", "ext4"), "/data/big/x": ("/data/big", "xfs"),
                     "/mnt/my share/x": ("/mnt/my share", "nfs4"), "/databases": ("/", "overlay")}  # fmt: skip


def test_an_answer_that_never_comes_costs_the_deadline_and_no_more() -> None:
    started = time.monotonic()
    answers = within(1.0, {"dead": lambda: time.sleep(30), "quick": lambda: 7, "odd": lambda: int("x")})
    assert answers == {"quick": 7} and time.monotonic() - started < 20


def test_those_that_never_answer_hold_up_nobody() -> None:
    """Where one thread does not get through them, each has a thread of its own."""
    dead = threading.Event()
    calls: dict[str, Callable[[], object]] = {f"dead {n}": dead.wait for n in range(40)}
    answers = within(0.5, {"first": lambda: 1, **calls, "quick": lambda: 2})
    dead.set()
    assert answers == {"first": 1, "quick": 2}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_question_that_crashes_takes_no_other_with_it() -> None:
    assert within(1, {"first": lambda: 1, "crash": lambda: {}["none"], "last": lambda: 2}) == {"first": 1, "last": 2}


def test_a_half_downloaded_snapshot_is_not_complete(matrix: Matrix, tmp_path: Path) -> None:
    """The repository's folder in the hub's cache, with a link whose blob never came."""
    snapshot = tmp_path / "home/.cache/huggingface/hub/models--black-forest-labs--FLUX.1-dev/snapshots/abc"
    (snapshot / "transformer").mkdir(parents=True)
    (snapshot / "transformer/config.json").symlink_to("../../../blobs/none")
    refs = snapshot.parent.parent / "refs"
    refs.mkdir()
    (refs / "main").write_text("abc")
    config = TrainConfig(img_dir=str(tmp_path), output_dir=str(tmp_path))
    cache = with_folders(machine(matrix), config, {"HOME": str(tmp_path / "home")}).hub_cache
    assert isinstance(cache, HubCache) and not cache.complete and "vae" in " ".join(cache.missing)
    assert case(matrix, machine(matrix), job()).facts.hub_cache is None


def test_a_folder_of_another_user(tmp_path: Path) -> None:
    """Root may write everywhere, so the test becomes nobody for a moment; os.access asks the real user."""
    with tempfile.TemporaryDirectory() as base:
        folder = Path(base, "out")
        folder.mkdir(mode=0o555)
        Path(base).chmod(0o755)
        assert look(tmp_path)["output"].writable  # everything that the gatherer loads is loaded now
        if os.geteuid() == 0:
            os.setresuid(65534, 65534, 0)
        try:
            output = look(tmp_path, output_dir=str(folder))["output"]
        finally:
            if os.getresuid()[2] == 0:
                os.setresuid(0, 0, 0)
    assert output.existing == str(folder) and not output.writable
