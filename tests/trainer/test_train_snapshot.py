"""What a second start takes over of the first one's work, and when it must not."""

from __future__ import annotations

import os
import random
from array import array
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import numpy as np
from cache_kit import config, older
from trainer_kit import png, put, squares, tiny_flux
from xflux_trainer import cache, run, snapshot
from xflux_trainer.cache import Entries
from xflux_trainer.config import TrainConfig
from xflux_trainer.layout import Base
from xflux_trainer.ranks import Launch, Ranks
from xflux_trainer.samples import Sample
from xflux_trainer.sampletable import Samples, Texts, digest_of
from xflux_trainer.shuffle import Shuffler


def start(config: TrainConfig) -> dict[str, Entries]:
    sets, _, said = run.find_sets(config)
    return cache.fill(config, Base.of(tiny_flux()), Ranks(Launch()), sets, ["a prompt"], said)[0]


def age(folder: Path) -> None:
    older(*(path for path in folder.rglob("*") if path.is_file()))


def taken_over(monkeypatch: pytest.MonkeyPatch, config: TrainConfig) -> bool:
    """Whether the next start makes its entries of nothing but the arrays."""
    made = 0
    real = cache._entries

    def counted(*given: Any) -> Entries:
        nonlocal made
        made += 1
        return real(*given)

    with monkeypatch.context() as patch:
        patch.setattr(cache, "_entries", counted)
        start(config)
    return made == 0


def test_the_second_start_takes_all_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    more: dict[str, Any] = {
        "random_flip": True, "caption_dropout": 0.1, "resolutions": (96,), "repeats": ((".", 2),), "heldout_samples": 2,
        "heldout_dir": str(tmp_path / "images" / "held"),
    }  # fmt: skip
    settings = config(tmp_path, **more)
    squares(tmp_path / "images", ((64, 64), (96, 48)))
    put(tmp_path / "images", "again.png", "again", (tmp_path / "images" / "red.png").read_bytes())
    squares(tmp_path / "images" / "held")
    (tmp_path / "images" / "other.heic").touch()
    age(tmp_path / "images")
    first = start(settings)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note")]
    assert len(said) == 2  # copies, and enlarged ones
    listed, heldout_dir, notes = run.find_sets(settings)
    assert [len(one) for one in listed.values()] == [5, 2] and len(notes) == 2
    with monkeypatch.context() as patch:
        patch.setattr(run, "list_samples", lambda *_: pytest.fail("the images were listed again"))
        patch.setattr(cache, "Recall", lambda *_: pytest.fail("the images were looked at again"))
        again = run.find_sets(settings)
        second = start(settings)
    assert [list(one) for one in again[0].values()] == [list(one) for one in listed.values()]
    assert again[1:] == (heldout_dir, notes)
    assert [one.captions[:] for one in again[0].values()] == [one.captions[:] for one in listed.values()]
    assert capsys.readouterr().out.splitlines() == said
    assert second == first
    for root, entries in first.items():
        assert second[root].digest() == entries.digest()
        assert second[root].silent == entries.silent
        for a, b in zip(entries.buckets, second[root].buckets, strict=True):
            assert np.array_equal(a, b)
        for number in (0, len(entries) - 1):
            # mirrored, and without its caption: the numbers above the images' own
            assert second[root][2 * len(entries) + number] == entries[2 * len(entries) + number]


def test_what_changes_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config(tmp_path)
    images = squares(tmp_path / "images")
    age(images)
    first = start(settings)[settings.img_dir]
    assert taken_over(monkeypatch, settings)
    caption = images / "red.json"
    caption.write_text('{"caption": "a rad square"}')  # as long as before
    os.utime(caption, (1_000_000_000, 1_000_000_000))
    assert not taken_over(monkeypatch, settings)
    assert taken_over(monkeypatch, settings)
    put(images / "below", "new.png", "new")
    age(images)
    assert not taken_over(monkeypatch, settings)
    assert len(start(settings)[settings.img_dir]) == 5
    (images / "below" / "new.png").rename(images / "below" / "newer.png")
    (images / "below" / "new.json").rename(images / "below" / "newer.json")
    assert not taken_over(monkeypatch, settings)
    first[0].latents.unlink()
    assert not taken_over(monkeypatch, settings)
    assert first[0].latents.exists() and taken_over(monkeypatch, settings)
    data = first[1].text.read_bytes()
    first[1].text.write_bytes(data[:-1])
    assert not taken_over(monkeypatch, settings)
    assert first[1].text.read_bytes() == data


def test_other_settings_make_other_entries_of_the_same_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    age(squares(tmp_path / "images", ((96, 64),)))
    start(config(tmp_path))
    for change in (
        {"img_size": 32}, {"resolutions": (32,)}, {"bucket_by": "area"}, {"repeats": ((".", 3),)},
        {"random_flip": True}, {"caption_dropout": 0.5},
        {"random_ratio": True}, {"random_ratio": True, "seed": 1}, {"max_text_tokens": 8},
        {"text_padding": "none"}, {"mode": "controlnet", "canny_low": 50},
    ):  # fmt: skip
        changed = config(tmp_path, **change)
        with monkeypatch.context() as patch:
            patch.setattr(run, "list_samples", lambda *_: pytest.fail("the images were listed again"))
            assert not taken_over(monkeypatch, changed), change
            kept = start(changed)[changed.img_dir]
        assert taken_over(monkeypatch, changed), change
        # Without the arrays all is found out anew, and is the same.
        for index in changed.cache_path.glob("index-*/index.json"):
            index.unlink()
        assert start(changed)[changed.img_dir] == kept, change
    assert len(list(changed.cache_path.glob("index-*"))) == 1


def test_files_of_just_now_and_damaged_arrays_are_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config(tmp_path)
    images = squares(tmp_path / "images")
    age(images)
    os.utime(images / "red.json", (2_000_000_000 * 2, 2_000_000_000 * 2))  # a clock that is ahead
    assert snapshot.stamp(settings) is None
    start(settings)
    assert not list(settings.cache_path.glob("index-*"))
    age(images)
    start(settings)
    (place,) = settings.cache_path.glob("index-*")
    for name in ("entries-0-latents.npy", "samples-0-captions.npy", "payload-image_sizes.npy", snapshot.MANIFEST):
        for damage in (lambda data: data[:-3] + bytes([data[-3] ^ 1]) + data[-2:], lambda data: data[:-9], None):
            assert taken_over(monkeypatch, settings)
            file = place / name
            if damage:
                file.write_bytes(damage(file.read_bytes()))
            else:
                file.unlink()
            assert not taken_over(monkeypatch, settings), (name, damage)
    (images / "gone.png").symlink_to(images / "nowhere.png")
    assert snapshot.stamp(settings) is None


def test_a_link_that_leads_back_and_hidden_files(tmp_path: Path) -> None:
    settings = config(tmp_path)
    images = squares(tmp_path / "images")
    (images / "loop").symlink_to(images)
    age(images)
    before = snapshot.stamp(settings)
    (images / ".hidden").touch()
    assert snapshot.stamp(settings) == before is not None
    (images / "link.png").symlink_to(images / "red.png")
    assert snapshot.stamp(settings) not in (before, None)


def test_samples_in_arrays_are_the_samples(tmp_path: Path) -> None:
    odd = os.fsdecode(b"/set/\xff b.c.PNG")
    samples = [
        Sample(Path("/set/a.png"), Path("/set/a.json"), "ä cäption"),
        Sample(Path(odd), Path(odd).with_suffix(".json"), "ä cäption"),
        Sample(Path("/set/t.parquet"), Path("/set/t.parquet"), "one", 0),
        Sample(Path("/set/t.parquet"), Path("/set/t.parquet"), "two", 7),
    ]
    packed = Samples.pack(samples, "json")
    assert list(packed) == samples and len(packed) == 4
    assert packed[-1] == samples[-1] and packed[1:3] == samples[1:3]
    assert packed.captions[:] == ["ä cäption", "one", "two"]
    assert digest_of(packed, "/set") == digest_of(samples, "/set") != digest_of(samples[:3], "/set")
    with pytest.raises(IndexError):
        packed[4]
    assert list(Texts.pack([])) == [] and list(Texts.pack(["", "x", ""])) == ["", "x", ""]
    image = put(tmp_path, "a.png", data=png())
    assert Samples.pack([Sample(image, image.with_suffix(".txt"))], "txt")[0].caption_path.name == "a.txt"


def test_the_shuffle_is_pythons_own() -> None:
    ours, theirs = Shuffler(random.Random("7:3")), random.Random("7:3")
    for length in [*range(40), 63, 64, 65, 1023, 1024, 70_000, 5]:
        expected = list(range(length))
        theirs.shuffle(expected)
        made = array("i", range(length))
        ours.shuffle(made)
        assert made.tolist() == expected, length


def test_a_run_does_not_lean_on_files_that_others_replace(tmp_path: Path) -> None:
    """On a network disk they vanish under a mapping, which ends a process by a signal. Here they are cut off."""
    settings = config(tmp_path)
    squares(tmp_path / "images")
    age(tmp_path / "images")
    expected = start(settings)
    child = os.fork()
    if not child:
        found = start(settings)
        for file in settings.cache_path.glob("index-*/*.npy"):
            os.truncate(file, 0)
        os._exit(0 if found == expected else 3)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
