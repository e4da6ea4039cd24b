"""Listing a training set, without an image library: what is found, and each thing that can be wrong."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from trainer_kit import DEMO, png, put
from xflux_trainer.samples import find_samples

JPEG = (DEMO / "photos" / "coffee.jpg").read_bytes()


def kinds(folder: Path, caption_type: str = "json") -> dict[str, str]:
    return {problem.path.name: problem.kind for problem in find_samples(folder, caption_type).problems}


def test_the_demo_is_clean() -> None:
    index = find_samples(DEMO / "photos")
    assert index.problems == ()
    assert len(index.samples) == len(list((DEMO / "photos").glob("*.jpg")))
    assert all(sample.caption and sample.caption_path.exists() for sample in index.samples)


def test_extensions_of_any_case_folders_and_dots(tmp_path: Path) -> None:
    names = ["a.PNG", "b.Jpg", "c.jpeg", "sub.v1.2/d.webp.png", "sub.v1.2/deep/e e.png", "f.bmp.png", "ü.png"]
    for name in names:
        put(tmp_path / "data.v1.0", name, f"caption of {name}", JPEG if "jp" in name.lower() else None)
    index = find_samples(tmp_path / "data.v1.0")
    assert index.problems == ()
    found = {sample.image.relative_to(tmp_path / "data.v1.0").as_posix(): sample.caption for sample in index.samples}
    assert found == {name: f"caption of {name}" for name in names}
    assert list(found) == sorted(found)


def test_hidden_files_and_others_are_not_images(tmp_path: Path) -> None:
    put(tmp_path, "a.png")
    put(tmp_path, "._a.png", None, b"\0\5\x16\7")
    put(tmp_path, ".ipynb_checkpoints/a.png", None)
    put(tmp_path, "__MACOSX/a.png", None)
    (tmp_path / "notes.txt").write_text("not a caption")
    put(tmp_path, "phone.HEIC", None, b"\0\0\0\x18ftypheic")
    index = find_samples(tmp_path)
    assert [sample.image.name for sample in index.samples] == ["a.png"]
    assert index.problems == ()
    assert [path.name for path in index.ignored] == ["phone.HEIC"]


def test_txt_captions(tmp_path: Path) -> None:
    put(tmp_path, "a.png", None).with_suffix(".txt").write_text("  a cat\n", encoding="utf-8")
    (sample,) = find_samples(tmp_path, "txt").samples
    assert sample.caption == "a cat"
    problem = find_samples(tmp_path, "json").problems[0]
    assert problem.kind == "no-caption"
    assert "caption_type to txt" in problem.hint


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (None, "no-caption"), ("", "bad-json"), ("{", "bad-json"), ('{"caption": "x"', "bad-json"),
        ("[" * 100000, "bad-json"),
        ('{"text": "x"}', "no-caption-key"), ('["x"]', "no-caption-key"), ('"x"', "no-caption-key"),
        ("null", "no-caption-key"),
        ('{"caption": ""}', "empty-caption"), ('{"caption": "  "}', "empty-caption"),
        ('{"caption": ["x"]}', "bad-caption"), ('{"caption": null}', "bad-caption"), (b"\xff\xfe{", "not-utf8"),
        (b'{"caption": "' + b"x" * (1 << 20) + b'"}', "bad-caption"),
    ],
)  # fmt: skip
def test_captions_that_cannot_be_used(tmp_path: Path, text: str | bytes | None, kind: str) -> None:
    put(tmp_path, "good.png")
    put(tmp_path, "bad.png", None)
    if text is not None:
        (tmp_path / "bad.json").write_bytes(text.encode() if isinstance(text, str) else text)
    index = find_samples(tmp_path)
    assert [problem.kind for problem in index.problems] == [kind]
    assert [sample.image.name for sample in index.samples] == ["good.png"]
    assert index.problems[0].seen
    assert index.problems[0].hint


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"", "zero-byte"), (JPEG[: len(JPEG) // 2], "truncated"), (JPEG[:-1], "truncated"), (JPEG[:20], "truncated"),
        (png()[:-5], "truncated"), (png()[:40], "truncated"), (b"RIFF\xff\xff\0\0WEBPVP8 ", "truncated"),
        (b"<!DOCTYPE html><html>404</html>", "not-an-image"),
        (b"version https://git-lfs.github.com/spec/v1\n", "not-an-image"),
        (b"GIF89a" + b"\0" * 40, "truncated"), (b"\0" * 100, "not-an-image"), (b"BM", "not-an-image"),
        (b"x", "not-an-image"),
    ],
)  # fmt: skip
def test_images_that_cannot_be_used(tmp_path: Path, data: bytes, kind: str) -> None:
    put(tmp_path, "bad.jpg", data=data)
    put(tmp_path, "good.png")
    assert kinds(tmp_path) == {"bad.jpg": kind}


def test_what_a_wrong_file_is_is_said(tmp_path: Path) -> None:
    put(tmp_path, "a.jpg", data=b"<html>")
    put(tmp_path, "b.png", data=b"version https://git-lfs.github.com/spec/v1\n")
    seen = " ".join(problem.seen + problem.hint for problem in find_samples(tmp_path).problems)
    assert "HTML" in seen
    assert "git lfs pull" in seen


def test_whole_images_that_look_odd_are_fine(tmp_path: Path) -> None:
    """No false alarm: trailing bytes, a thumbnail inside, a PNG under the name of a JPEG."""
    put(tmp_path, "trailer.jpg", data=JPEG + b"\0" * 100)
    put(tmp_path, "motion.jpg", data=JPEG + os.urandom(300_000).replace(b"\xff\xd9", b"\0\0"))
    put(tmp_path, "png.jpg", data=png())
    put(tmp_path, "padded.png", data=png() + b"\n")
    webp = b"RIFF" + (12).to_bytes(4, "little") + b"WEBPVP8 " + b"\0" * 8
    put(tmp_path, "a.webp", data=webp)
    assert kinds(tmp_path) == {}


def test_a_thumbnails_end_is_not_the_images_end(tmp_path: Path) -> None:
    thumbnail = b"\xff\xd8" + b"\0" * 50 + b"\xff\xd9"
    segment = b"\xff\xe1" + (len(thumbnail) + 2).to_bytes(2, "big") + thumbnail
    put(tmp_path, "whole.jpg", data=JPEG[:2] + segment + JPEG[2:])
    put(tmp_path, "cut.jpg", data=(JPEG[:2] + segment + JPEG[2:])[:2000])
    assert kinds(tmp_path) == {"cut.jpg": "truncated"}


def test_every_cut_of_an_image_is_noticed(tmp_path: Path) -> None:
    """At 40 places along a JPEG and a PNG."""
    for name, data in (("a.jpg", JPEG), ("a.png", png(64, 64))):
        for k in range(1, 40):
            put(tmp_path, name, data=data[: k * len(data) // 40])
            assert kinds(tmp_path)[name] in ("truncated", "not-an-image"), k
        (tmp_path / name).unlink()


def test_two_images_with_one_caption_file(tmp_path: Path) -> None:
    put(tmp_path, "1.jpg", data=JPEG)
    put(tmp_path, "1.png", None)
    index = find_samples(tmp_path)
    assert [problem.kind for problem in index.problems] == ["shared-caption"]
    assert len(index.samples) == 1


def test_folders_that_are_not_there_or_empty(tmp_path: Path) -> None:
    assert find_samples(tmp_path / "no").problems[0].kind == "no-folder"
    assert find_samples(tmp_path).problems[0].kind == "no-samples"
    file = put(tmp_path, "a.png")
    assert find_samples(file).problems[0].kind == "no-folder"


def test_links_are_followed_and_circles_end(tmp_path: Path) -> None:
    put(tmp_path / "far", "a.png")
    (tmp_path / "near").mkdir()
    (tmp_path / "near" / "link").symlink_to(tmp_path / "far")
    (tmp_path / "far" / "back").symlink_to(tmp_path / "near")
    index = find_samples(tmp_path / "near")
    assert [sample.image.name for sample in index.samples] == ["a.png"]
    (tmp_path / "near" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    put(tmp_path / "near", "gone.json", None, json.dumps({"caption": "x"}).encode())
    assert kinds(tmp_path / "near") == {"gone.png": "unreadable"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_folder_and_file(tmp_path: Path) -> None:
    put(tmp_path, "closed/a.png")
    image = put(tmp_path, "b.png")
    image.chmod(0)
    (tmp_path / "closed").chmod(0)
    try:
        assert kinds(tmp_path) == {"closed": "unreadable", "b.png": "unreadable"}
    finally:
        (tmp_path / "closed").chmod(0o700)


def test_the_order_does_not_depend_on_the_file_system(tmp_path: Path) -> None:
    for name in ("10.png", "2.png", "b/1.png", "a/3.png", "B.png"):
        put(tmp_path, name)
    names = [sample.image.relative_to(tmp_path).as_posix() for sample in find_samples(tmp_path).samples]
    assert names == ["10.png", "2.png", "B.png", "a/3.png", "b/1.png"]
