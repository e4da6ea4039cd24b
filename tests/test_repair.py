"""Real files, real errors: a full tmpfs, a read-only mount, another user, a process killed while it writes."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from xflux_doctor import repair
from xflux_doctor.repair import RepairError

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "train [1].yaml"
    path.write_bytes(b"a: 1  # \xc3\xbc\r\nb: 2\n")
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_write_keeps_a_backup_and_undo_restores_it(config: Path) -> None:
    old = config.read_bytes()
    text = repair.read(config)
    backup = repair.write(config, text.replace("1", "7"), was=text)
    assert backup is not None
    assert config.read_bytes() == old.replace(b"1", b"7")
    assert backup.copy.read_bytes() == old
    assert backup.copy.name.startswith("train [1].yaml.xflux-doctor.bak-")
    assert repair.undo(config) == backup
    assert config.read_bytes() == old
    assert names(config.parent) == [config.name]


def test_the_same_text_writes_nothing(config: Path) -> None:
    before = config.stat()
    assert repair.write(config, repair.read(config)) is None
    assert config.stat().st_mtime_ns == before.st_mtime_ns
    assert config.stat().st_ino == before.st_ino
    assert names(config.parent) == [config.name]


def test_undo_goes_back_step_by_step(config: Path) -> None:
    texts = [repair.read(config), "a: 2\n", "a: 3\n", "a: 4\n"]
    for text in texts[1:]:
        repair.write(config, text)
    assert len(repair.backups(config)) == 3
    for text in reversed(texts[:-1]):
        repair.undo(config)
        assert repair.read(config) == text
    with pytest.raises(RepairError, match="no backup"):
        repair.undo(config)


def test_undo_of_a_file_changed_since(config: Path) -> None:
    old = repair.read(config)
    repair.write(config, "a: 2\n")
    config.write_text("a: mine\n")
    with pytest.raises(RepairError, match="changed after the repair"):
        repair.undo(config)
    assert config.read_text() == "a: mine\n"
    repair.undo(config, force=True)
    assert repair.read(config) == old
    repair.undo(config)
    assert config.read_text() == "a: mine\n"


def test_undo_refuses_a_changed_backup(config: Path) -> None:
    backup = repair.write(config, "a: 2\n")
    assert backup is not None
    backup.copy.write_text("a: 9\n")
    with pytest.raises(RepairError, match=r"backup .* was changed"):
        repair.undo(config, force=True)
    assert config.read_text() == "a: 2\n"


def test_write_refuses_a_text_that_is_no_longer_there(config: Path) -> None:
    text = repair.read(config)
    config.write_text("a: mine\n")
    with pytest.raises(RepairError, match="changed while"):
        repair.write(config, "a: 2\n", was=text)
    assert config.read_text() == "a: mine\n"
    assert names(config.parent) == [config.name]


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664])
def test_mode_is_kept(config: Path, mode: int) -> None:
    config.chmod(mode)
    backup = repair.write(config, "a: 2\n")
    assert backup is not None
    assert stat.S_IMODE(config.stat().st_mode) == mode
    assert stat.S_IMODE(backup.copy.stat().st_mode) == mode
    repair.undo(config)
    assert stat.S_IMODE(config.stat().st_mode) == mode


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_owner_is_kept(config: Path) -> None:
    os.chown(config, 12345, 12346)
    repair.write(config, "a: 2\n")
    assert (config.stat().st_uid, config.stat().st_gid) == (12345, 12346)


def test_symbolic_links_are_followed(config: Path, tmp_path: Path) -> None:
    folder = tmp_path / "links"
    folder.mkdir()
    link = folder / "link.yaml"
    link.symlink_to("../" + config.name)
    backup = repair.write(link, "a: 2\n")
    assert link.is_symlink()
    assert config.read_text() == "a: 2\n"
    assert backup is not None
    assert backup.copy.parent == config.parent
    assert names(folder) == ["link.yaml"]
    repair.undo(link)
    assert repair.read(config).startswith("a: 1")


def test_what_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(RepairError, match="not there"):
        repair.write(tmp_path / "none.yaml", "a: 1\n")
    with pytest.raises(RepairError, match="not there"):
        repair.read(tmp_path / "none.yaml")
    with pytest.raises(RepairError, match="not there"):
        repair.undo(tmp_path / "none.yaml")
    with pytest.raises(RepairError, match="not a regular file"):
        repair.write(tmp_path, "a: 1\n")
    circle = tmp_path / "circle"
    circle.symlink_to("circle")
    with pytest.raises(RepairError, match=r"circle"):
        repair.write(circle, "a: 1\n")
    binary = tmp_path / "binary.yaml"
    binary.write_bytes("a: 1\n".encode("utf-16"))
    with pytest.raises(RepairError, match="not UTF-8"):
        repair.read(binary)
    assert names(tmp_path) == ["binary.yaml", "circle"]


def in_child(act: Callable[[], None], user: int | None = None) -> str:
    """What `act` raised, told by a forked child that may give up its rights first."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        said = b"nothing"
        try:
            if user is not None:
                os.setgroups([])
                os.setgid(user)
                os.setuid(user)
            act()
        except RepairError as error:
            said = str(error).encode()
        except Exception as error:  # noqa: BLE001 - the parent asserts on it
            said = b"!" + repr(error).encode()
        os.write(writer, said)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        text = file.read().decode()
    os.waitpid(pid, 0)
    return text


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that another user can look into; pytest's own ones are closed to others."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else")
def test_no_permission(public: Path) -> None:
    path = public / "train.yaml"
    path.write_text("a: 1\n")
    said = in_child(lambda: repair.write(path, "a: 2\n") and None, user=65534)
    assert "write-protected" in said
    path.chmod(0o666)  # the file may be written, but not its folder
    said = in_child(lambda: repair.write(path, "a: 2\n") and None, user=65534)
    assert "no permission" in said
    assert "folder must be writable" in said
    path.chmod(0o600)
    said = in_child(lambda: repair.read(path) and None, user=65534)
    assert "no permission" in said
    assert path.read_text() == "a: 1\n"
    assert names(public) == ["train.yaml"]


def test_a_limit_in_the_middle_of_the_write(config: Path) -> None:
    """The kernel takes 4 KiB and refuses the rest: the old text stays, nothing is left behind."""
    import resource

    old = config.read_bytes()

    def act() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        repair.write(config, "a: 1\n" * 4000)

    assert "is full" in in_child(act)
    assert config.read_bytes() == old
    assert names(config.parent) == [config.name]


def mounted(folder: Path, options: str, before: str, after: str) -> str:
    """Run `after` with a private tmpfs on the folder; skips where mounting is not allowed."""
    program = f"import sys; from pathlib import Path; p = Path(sys.argv[1], 'train.yaml'); {before}"
    script = (
        f"mount -t tmpfs -o {options} tmpfs '{folder}' || exit 77; '{sys.executable}' -c \"$1\" '{folder}' || exit 1; "
    )
    script += f"{after}; '{sys.executable}' -c \"$2\" '{folder}'"
    check = (
        "import os, sys; from pathlib import Path; from xflux_doctor import repair\n"
        "p = Path(sys.argv[1], 'train.yaml')\n"
        "old = p.read_bytes()\n"
        "try: repair.write(p, 'b: 2\\n' * 9000)\n"
        "except repair.RepairError as error: print(error)\n"
        "assert p.read_bytes() == old and os.listdir(p.parent) == ['train.yaml'], os.listdir(p.parent)\n"
    )
    try:
        done = subprocess.run(
            ["unshare", "-m", "sh", "-c", script, "sh", program, check],
            capture_output=True,
            text=True,
            timeout=60,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
    except FileNotFoundError:
        pytest.skip("no unshare here")
    if done.returncode == 77 or "unshare failed" in done.stderr:
        pytest.skip("mounting is not allowed here")
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_full_disk(tmp_path: Path) -> None:
    said = mounted(tmp_path, "size=48k", "p.write_text('a: 1\\n')", "true")
    assert "is full" in said


def test_read_only_file_system(tmp_path: Path) -> None:
    said = mounted(tmp_path, "size=1m", "p.write_text('a: 1\\n')", f"mount -o remount,ro '{tmp_path}'")
    assert "read-only file system" in said


CHILD = """
import sys
from pathlib import Path
from xflux_doctor import repair
path, texts = Path(sys.argv[1]), ["a" * 300_000, "b" * 500_000]
print("ready", flush=True)
while True:
    for text in texts:
        repair.write(path, text)
        repair.undo(path)
"""


def killed_while_writing(path: Path, delay: float) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(path)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert child.stdout is not None
    child.stdout.readline()
    time.sleep(delay)
    child.kill()
    child.wait()
    child.stdout.close()


def power_loss(tmp_path: Path, rounds: int) -> None:
    path = tmp_path / "train.yaml"
    whole = {"c" * 400_000, "a" * 300_000, "b" * 500_000}
    for number in range(rounds):
        path.write_text("c" * 400_000)
        killed_while_writing(path, 0.002 * (number % 25))
        assert path.read_text() in whole
        for backup in repair.backups(path):  # what undo would take is whole, too
            assert backup.copy.read_text() in whole
        while repair.backups(path):
            repair.undo(path)
        assert path.read_text() == "c" * 400_000
        for leftover in tmp_path.iterdir():
            if leftover != path:
                leftover.unlink()


def test_killed_while_writing(tmp_path: Path) -> None:
    power_loss(tmp_path, 8)


@pytest.mark.long
def test_killed_while_writing_many_times(tmp_path: Path) -> None:
    power_loss(tmp_path, 150)


def test_nothing_is_left_when_the_rename_fails(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = config.read_bytes()
    really = os.replace

    def fails(source: str, target: Path) -> None:
        if target == config:
            raise OSError(5, "Input/output error")
        really(source, target)

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(RepairError, match="Input/output error"):
        repair.write(config, "a: 2\n")
    assert config.read_bytes() == old
    assert names(config.parent) == [config.name]


DIFFS = [
    ("a: 1\nb: 2\n", "a: 1\nb: 3\n"),
    ("a: 1\r\nb: 2\r\n", "a: 1\r\nb: 3\r\n"),
    ("a: 1", "a: 2"),
    ("a: 1", "a: 1\n"),
    ("", "a: 1\n"),
    ("a: '\x0c\u2028'\nb: 1\n", "a: '\x0c\u2028'\nb: 2\n"),
]


@pytest.mark.parametrize(("old", "new"), DIFFS)
def test_patch_takes_the_diff(tmp_path: Path, old: str, new: str) -> None:
    if shutil.which("git") is None:
        pytest.skip("no git here")
    (tmp_path / "x.yaml").write_bytes(old.encode())
    subprocess.run(
        ["git", "apply", "--whitespace=nowarn", "-"],
        input=repair.diff(old, new, "x.yaml").encode(),
        cwd=tmp_path,
        check=True,
        env={**os.environ, "GIT_CEILING_DIRECTORIES": str(tmp_path.parent)},
    )
    assert (tmp_path / "x.yaml").read_bytes() == new.encode()


def test_no_diff_without_a_change() -> None:
    assert repair.diff("a: 1", "a: 1", "x.yaml") == ""
