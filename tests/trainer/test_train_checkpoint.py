"""Checkpoints: whole or not there, checked when loaded, the newest kept; files that survive a full disk."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")

from safetensors.torch import load  # noqa: E402
from trainer_kit import environment  # noqa: E402
from xflux_trainer import checkpoint, files, shards  # noqa: E402
from xflux_trainer.checkpoint import Progress  # noqa: E402
from xflux_trainer.config import TrainConfig  # noqa: E402
from xflux_trainer.errors import CheckpointError, WriteError  # noqa: E402
from xflux_trainer.ranks import Launch, Ranks  # noqa: E402

RANKS = Ranks(Launch())


class Steps:
    """A stepper that has what it is made with, and takes no steps."""

    strategy = "single"

    def __init__(self, pieces: dict[str, dict], steps: float = 7.0) -> None:
        self._pieces, self._steps = pieces, steps
        self.asked: list[str] = []

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(piece["weight"].shape) for name, piece in self._pieces.items()}

    def pieces(self) -> Iterator[tuple[str, dict]]:
        for name, piece in self._pieces.items():
            self.asked.append(name)
            yield name, piece

    def scalars(self) -> dict[str, float]:
        return {"steps": self._steps}


def pieces(seed: int = 0, *keys: str) -> dict[str, dict]:
    dice = torch.Generator().manual_seed(seed)
    names = ("a.lora_A.weight", "a.lora_B.weight")
    return {
        name: {key: torch.randn(4, 3, generator=dice) for key in ("weight", *(keys or ("exp_avg", "exp_avg_sq")))}
        for name in names
    }


def save(output: Path, step: int = 7, stepper: Steps | None = None, **config: object) -> Path:
    settings = TrainConfig(img_dir="x", **config)
    progress = Progress(step=step, batches=14)
    return checkpoint.save(output, stepper or Steps(pieces()), progress, settings, RANKS, {"torch": "x"}, {"data": "d"})


def equal(loaded: checkpoint.Checkpoint, expected: dict[str, dict]) -> bool:
    found = {name: loaded.read(name) for name in loaded.shapes}
    if [*found] != [*expected]:
        return False
    pairs = [(found[name], piece) for name, piece in expected.items()]
    return all(
        a.keys() == b.keys() and all(a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]) for key in a)
        for a, b in pairs
    )


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    torch.manual_seed(5)
    folder = save(tmp_path, rank=8)
    drawn = torch.rand(3)
    loaded = checkpoint.load(folder, RANKS)
    assert torch.equal(torch.rand(3), drawn)  # the generators stand where they stood
    assert folder.name == "checkpoint-7"
    assert loaded.progress == Progress(step=7, batches=14)
    assert loaded.config["rank"] == 8
    assert loaded.scalars == {"steps": 7.0}
    assert loaded.manifest["digests"] == {"data": "d"}
    assert equal(loaded, pieces())
    assert not loaded.averaged
    with pytest.raises(CheckpointError, match="holds no b"):
        loaded.read("b")


def test_before_the_first_step_there_are_no_moments(tmp_path: Path) -> None:
    fresh = {name: {"weight": piece["weight"]} for name, piece in pieces().items()}
    loaded = checkpoint.load(save(tmp_path, stepper=Steps(fresh, 0.0)))
    assert equal(loaded, fresh)
    assert {path.name for path in loaded.folder.iterdir()} == {
        "manifest.json", "weights-00001.safetensors", "random-rank0.safetensors",
    }  # fmt: skip


def test_every_kind_of_piece(tmp_path: Path) -> None:
    """Averages have files of their own, other optimizers' tensors their own types; a scalar and nothing are tensors."""
    odd = pieces(0, "exp_avg", "ema")
    odd["a.lora_A.weight"] |= {
        "exp_avg_codes": torch.arange(12, dtype=torch.uint8).view(3, 4), "compensation": torch.randn(4, 3).bfloat16(),
        "exp_avg_scale": torch.tensor(2.5), "exp_avg_sq": torch.empty(0), "weight": torch.randn(3, 4).half(),
    }  # fmt: skip
    loaded = checkpoint.load(save(tmp_path, stepper=Steps(odd)))
    assert equal(loaded, odd)
    assert loaded.averaged
    for averaged in (False, True):
        for name, value in loaded.weights(averaged=averaged):
            assert torch.equal(value, odd[name]["ema" if averaged else "weight"])
    for file in loaded.folder.glob("*.safetensors"):  # also by the library's own strict reader
        assert load(file.read_bytes())


def test_shards_end_below_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    many = {f"layer.{k}": pieces(k)["a.lora_A.weight"] for k in range(10)}
    monkeypatch.setattr(shards.Writer.__init__, "__defaults__", (200,))  # bytes: four tensors of 48
    loaded = checkpoint.load(save(tmp_path, stepper=Steps(many)), RANKS)
    assert equal(loaded, many)
    names = sorted(path.name for path in loaded.folder.iterdir())
    assert names == [
        "manifest.json", *(f"optimizer-{k:05d}.safetensors" for k in range(1, 6)), "random-rank0.safetensors",
        *(f"weights-{k:05d}.safetensors" for k in range(1, 4)),
    ]  # fmt: skip


def test_pieces_are_written_as_they_come(tmp_path: Path) -> None:
    """No more than two of them are on the host at a time, of whatever size the model is."""
    alive: list[int] = []

    class Counted(Steps):
        def pieces(self) -> Iterator[tuple[str, dict]]:
            held: list = []
            for k in range(8):
                value = torch.full((64, 64), float(k))
                held.append(weakref.ref(value))
                alive.append(sum(ref() is not None for ref in held))
                yield f"layer.{k}", {"weight": value}
                del value

        def shapes(self) -> dict[str, tuple[int, ...]]:
            return {f"layer.{k}": (64, 64) for k in range(8)}

    loaded = checkpoint.load(save(tmp_path, stepper=Counted({})))
    assert max(alive) <= 2
    assert all(torch.equal(value, torch.full((64, 64), float(k))) for k, (_, value) in enumerate(loaded.weights()))


def test_a_full_disk_ends_the_saving_after_the_last_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other ranks are inside the collectives of `pieces`: rank 0 must not leave them there."""

    def full(self: object, name: str, tensor: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shards.Writer, "add", full)
    stepper = Steps(pieces())
    with pytest.raises(WriteError, match="no space left"):
        save(tmp_path, stepper=stepper)
    assert stepper.asked == list(pieces())
    assert list(tmp_path.iterdir()) == []


def test_tensors_are_mapped_and_not_read(tmp_path: Path) -> None:
    """A fine-tune's masters and moments are 140 GB: every rank looks at its part of them."""
    loaded = checkpoint.load(save(tmp_path), RANKS)
    value = loaded.read("a.lora_A.weight")["exp_avg"]
    ranges = [
        [int(text, 16) for text in line.split()[0].split("-")]
        for line in Path("/proc/self/maps").read_text().splitlines()
        if "optimizer-00001" in line
    ]
    assert any(start <= value.data_ptr() < end for start, end in ranges)


def test_an_earlier_format_is_a_sentence(tmp_path: Path) -> None:
    folder = save(tmp_path)
    manifest = json.loads((folder / checkpoint.MANIFEST).read_text())
    (folder / checkpoint.MANIFEST).write_text(json.dumps({**manifest, "format": 1}))
    with pytest.raises(CheckpointError, match="has the format 1; this release reads and writes 2"):
        checkpoint.load(folder)


def test_no_pickles(tmp_path: Path) -> None:
    names = {path.suffix for path in save(tmp_path).iterdir()}
    assert names == {".safetensors", ".json"}


def test_the_newest_are_kept_by_number_not_by_name(tmp_path: Path) -> None:
    for step in (8, 9, 10, 100):
        save(tmp_path, step, checkpoints_total_limit=2)
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path)] == ["checkpoint-10", "checkpoint-100"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-100"]


@pytest.mark.parametrize(("limit", "left"), [(1, [5]), (2, [5, 12]), (3, [5, 9, 12]), (4, [3, 5, 9, 12])])
def test_what_was_just_written_is_never_the_oldest(tmp_path: Path, limit: int, left: list[int]) -> None:
    """Another run in the same folder may be further."""
    for step in (3, 9, 12):
        save(tmp_path, step)
    assert save(tmp_path, 5, checkpoints_total_limit=limit).is_dir()
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path)] == [f"checkpoint-{step}" for step in left]


def test_the_same_step_again_replaces(tmp_path: Path) -> None:
    save(tmp_path, rank=8)
    save(tmp_path, rank=9)
    assert checkpoint.load(tmp_path / "checkpoint-7").config["rank"] == 9
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-7"]


@pytest.mark.parametrize(
    "name", ["weights-00001.safetensors", "optimizer-00001.safetensors", "random-rank0.safetensors"]
)
@pytest.mark.parametrize("harm", ["flip", "cut", "gone"])
def test_harm_is_noticed(tmp_path: Path, name: str, harm: str) -> None:
    path = save(tmp_path) / name
    data = bytearray(path.read_bytes())
    if harm == "gone":
        path.unlink()
    elif harm == "cut":
        path.write_bytes(bytes(data[:-1]))
    else:
        data[-1] ^= 1
        path.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match=name):
        checkpoint.load(path.parent, RANKS)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": 99}', '{"format": 2, "progress": {"speed": 1}}'])
def test_broken_manifests(tmp_path: Path, text: str) -> None:
    folder = save(tmp_path)
    (folder / checkpoint.MANIFEST).write_text(text)
    with pytest.raises(CheckpointError):
        checkpoint.load(folder)


def test_find(tmp_path: Path) -> None:
    def find(resume: str | None) -> Path | None:
        return checkpoint.find(TrainConfig(img_dir="x", output_dir=str(tmp_path), resume_from_checkpoint=resume))

    assert find(None) is None
    assert find("latest") is None
    save(tmp_path, 9)
    save(tmp_path, 10)
    (tmp_path / "checkpoint-11").mkdir()  # somebody else's, or from a trainer that was killed
    (tmp_path / f"{files.TEMPORARY}x").mkdir()
    assert find("latest") == tmp_path / "checkpoint-10"
    assert find("checkpoint-9") == find(str(tmp_path / "checkpoint-9")) == tmp_path / "checkpoint-9"
    with pytest.raises(CheckpointError, match="checkpoint-9, checkpoint-10"):
        find("checkpoint-12")


def test_a_fresh_start_puts_the_old_run_aside(tmp_path: Path) -> None:
    assert checkpoint.set_aside(tmp_path) is None
    save(tmp_path, 9)
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    assert checkpoint.set_aside(tmp_path) == tmp_path / "previous-1"
    save(tmp_path, 3)
    assert checkpoint.set_aside(tmp_path) == tmp_path / "previous-2"
    assert checkpoint.list_checkpoints(tmp_path) == []
    assert checkpoint.load(tmp_path / "previous-1" / "checkpoint-9").progress.step == 9
    assert (tmp_path / "previous-1" / "metrics.jsonl").exists()


def test_a_resume_puts_what_came_later_aside(tmp_path: Path) -> None:
    for step in (3, 9, 12):
        save(tmp_path, step)
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    assert checkpoint.set_aside(tmp_path, after=12) is None
    assert checkpoint.set_aside(tmp_path, after=3) == tmp_path / "previous-1"
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path)] == ["checkpoint-3"]
    assert sorted(path.name for path in (tmp_path / "previous-1").iterdir()) == ["checkpoint-12", "checkpoint-9"]
    assert (tmp_path / "metrics.jsonl").exists()  # the steps up to the resume belong to this run


def test_a_folder_that_cannot_be_written_to_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 9)

    def refuse(*_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(WriteError, match="read-only"):
        checkpoint.set_aside(tmp_path)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
@pytest.mark.parametrize("after", range(6))
def test_a_disk_that_fills_up_leaves_no_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, after: int
) -> None:
    """The n-th flush to the disk fails: nothing of the new checkpoint stays, the old one does."""
    save(tmp_path, 1)
    real, calls = os.fsync, 0

    def full(handle: int) -> None:
        nonlocal calls
        calls += 1
        if calls > after:
            raise OSError(number, os.strerror(number))
        real(handle)

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(WriteError) as caught:
        save(tmp_path, 2)
    assert str(caught.value).count(".") >= 2
    assert caught.value.hint
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    checkpoint.load(tmp_path / "checkpoint-1")


def test_a_real_full_disk(tmp_path: Path) -> None:
    """On a file system of 64 KiB, where root may mount one."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no right to mount")
    try:
        with pytest.raises(WriteError, match="no space left"):
            files.write_bytes(place / "x", b"1" * 100_000)
        assert list(place.iterdir()) == []
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_another_rank_may_tidy_up_while_the_folder_is_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 removes leftovers while the others still try whether they can write there."""
    real = os.close

    def close(handle: int) -> None:
        real(handle)
        files.remove_leftovers(tmp_path)

    monkeypatch.setattr(files.os, "close", close)
    files.make_folder(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_leftovers_may_vanish_on_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    gone = tmp_path / f"{files.TEMPORARY}gone"
    monkeypatch.setattr(Path, "glob", lambda self, pattern: iter([gone]))
    if kind == "folder":
        monkeypatch.setattr(Path, "is_dir", lambda self: True)
    files.remove_leftovers(tmp_path)


def test_a_file_where_a_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    for action in (lambda: files.make_folder(tmp_path / "out"), lambda: files.write_json(tmp_path / "out" / "a", {})):
        with pytest.raises(WriteError, match="name another folder"):
            action()


def test_killed_in_the_middle_of_writing(tmp_path: Path) -> None:
    """kill -9 at twelve different moments: the folder on the disk is always a whole one."""
    code = (
        "import sys, torch\nfrom pathlib import Path\n"
        "from xflux_trainer import files\n"
        "print('ready', flush=True)\n"
        "k = 0\n"
        "while True:\n"
        "    k += 1\n"
        "    with files.new_folder(Path(sys.argv[1]) / 'checkpoint-1') as place:\n"
        "        for name in 'abc': files.write_bytes(place / name, bytes([k % 251]) * 200_000)\n"
    )
    for k in range(12):
        process = subprocess.Popen(
            [sys.executable, "-c", code.replace("import sys, torch", "import sys"), str(tmp_path)],
            stdout=subprocess.PIPE, env=environment(),
        )  # fmt: skip
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.05 + 0.013 * k)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        folder = tmp_path / "checkpoint-1"
        if folder.exists():
            contents = {(folder / name).read_bytes() for name in "abc"}
            assert len(contents) == 1
            assert len(contents.pop()) == 200_000
        files.remove_leftovers(tmp_path)
        assert all(not path.name.startswith(files.TEMPORARY) for path in tmp_path.iterdir())
    assert folder.exists()


def test_writing_keeps_to_the_umask(tmp_path: Path) -> None:
    files.write_json(tmp_path / "a.json", {"ü": 1})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"ü": 1}
    (tmp_path / "plain").write_text("")
    assert (tmp_path / "a.json").stat().st_mode == (tmp_path / "plain").stat().st_mode
