"""DA103 to DA108: what a dataset that can be read still gets wrong, and that a sound one is not blamed."""

from __future__ import annotations

import json
import struct
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
from conftest import ROOT, case, findings, job, machine, verdict

from xflux_doctor.checks import lint
from xflux_doctor.checks.data import dataset
from xflux_doctor.facts import Package
from xflux_doctor.finding import Finding
from xflux_doctor.matrix import Matrix

ALL = (lint.captions_fit, lint.pixels, lint.copies, lint.batches, lint.readers, lint.named_folders)
IMAGE = {"img_size": 512}


def bmp(width: int, height: int, byte: int = 0) -> bytes:
    """A whole BMP of two colors."""
    rows = bytes([byte]) * ((width + 31) // 32 * 4 * height)
    size = 62 + len(rows)
    head = struct.pack("<2sIHHI", b"BM", size, 0, 0, 62)
    return head + struct.pack("<IiiHHIIiiII", 40, width, height, 1, 1, 0, len(rows), 0, 0, 2, 2) + bytes(8) + rows


def images(folder: Path, *sizes: tuple[int, int], caption: str = "a cat") -> Path:
    """Images of these sizes, each of its own bytes."""
    for number, size in enumerate(sizes):
        path = folder / f"{number:05}.bmp"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bmp(*size, number % 251))
        path.with_suffix(".json").write_text(json.dumps({"caption": caption}))
    return folder


def found(matrix: Matrix, folder: Path, check: Any, *, packages: dict[str, Any] | None = None, **train: Any) -> Any:
    facts = machine(matrix)
    if packages is not None:
        facts = msgspec.structs.replace(facts, packages=packages)
    return findings(case(matrix, facts, job(None, img_dir=str(folder), **train)), check)


def one(seen: tuple[Finding, ...], severity: str = "warning") -> str:
    (finding,) = seen
    assert finding.severity == severity
    assert finding.hint
    return finding.seen


def test_a_sound_dataset_is_not_blamed(matrix: Matrix, tmp_path: Path) -> None:
    folder = images(tmp_path / "v1.2", *[(512, 512)] * 8)
    for check in ALL:
        assert found(matrix, folder, check, train_batch_size=4) == ()
        assert found(matrix, ROOT / "examples/demo/photos", check) == ()


def test_long_captions(matrix: Matrix, tmp_path: Path) -> None:
    folder = images(tmp_path / "a", (512, 512), caption="a red square " * 200)
    images(tmp_path / "a" / "b", (512, 512))
    seen = one(found(matrix, folder, lint.captions_fit))
    assert seen.startswith("1 caption is longer than 512 T5 tokens")
    assert "00000.bmp has about 601" in seen
    seen = one(found(matrix, folder, lint.captions_fit, max_text_tokens=2))
    assert seen.startswith("2 captions are longer than 2 T5 tokens")


@pytest.mark.parametrize(("size", "words"), [
    ((63, 500), "1 image is under 64 pixels wide or high"), ((255, 200), "1 image is enlarged 2 times or more"),
    ((256, 256), "2.0 times"),
])  # fmt: skip
def test_small_images(matrix: Matrix, tmp_path: Path, size: tuple[int, int], words: str) -> None:
    folder = images(tmp_path / "a", (512, 512), size)
    assert words in one(found(matrix, folder, lint.pixels))
    assert f"{size[0]} x {size[1]}" in one(found(matrix, folder, lint.pixels))


def test_images_of_half_the_size_are_let_through(matrix: Matrix, tmp_path: Path) -> None:
    folder = images(tmp_path / "a", (512, 512), (300, 280))
    assert found(matrix, folder, lint.pixels) == ()
    assert "3.4 times" in one(found(matrix, folder, lint.pixels, resolutions=(1024,)))


def test_copies(matrix: Matrix, tmp_path: Path) -> None:
    folder = images(tmp_path / "a", (64, 64), (64, 64), (64, 64), (64, 65))
    (folder / "00002.bmp").write_bytes((folder / "00000.bmp").read_bytes())
    assert one(found(matrix, folder, lint.copies)).startswith("1 image is byte for byte another; ")


def test_bucket_arithmetic(matrix: Matrix, tmp_path: Path) -> None:
    folder = images(tmp_path / "a", *[(512, 512)] * 6, (512, 256), (512, 300))
    seen = one(found(matrix, folder, lint.batches, train_batch_size=4))
    assert seen == (
        "8 images fall into 3 shapes, 2 of them with fewer than train_batch_size 4: 8 places of every pass are filled "
        "with repeats."
    )
    assert found(matrix, folder, lint.batches, train_batch_size=1) == ()
    # Areas have fewer shapes, a second size twice as many, and a folder that counts four times fills its batches.
    assert "into 4 shapes" not in one(found(matrix, folder, lint.batches, train_batch_size=4, bucket_by="area"))
    assert "16 images fall into 6" in one(found(matrix, folder, lint.batches, train_batch_size=4, resolutions=(256,)))
    assert found(matrix, folder, lint.batches, train_batch_size=4, repeats=((".", 4),)) == ()


def test_a_step_that_is_more_than_a_pass(matrix: Matrix, tmp_path: Path) -> None:
    folder = images(tmp_path / "a", *[(512, 512)] * 6)
    seen = one(found(matrix, folder, lint.batches, train_batch_size=2, gradient_accumulation_steps=7))
    assert seen == "One optimizer step takes 1 x 7 batches of 2; a pass over the images has 3."
    assert found(matrix, folder, lint.batches, train_batch_size=2, gradient_accumulation_steps=6) == ()


def test_the_trainer_fills_batches_as_the_check_says(matrix: Matrix, tmp_path: Path) -> None:
    """The same numbers from the trainer's own order."""
    pytest.importorskip("torch")
    from xflux_trainer import lint as rules
    from xflux_trainer import samples
    from xflux_trainer.config import TrainConfig
    from xflux_trainer.order import Order, buckets_of

    folder = images(tmp_path / "a", *[(512, 512)] * 7, (512, 256), (300, 512))
    config = TrainConfig(img_dir=str(folder), train_batch_size=3, resolutions=(256,), repeats=((".", 2),))
    survey = samples.survey(folder)
    filled = rules.fill(survey, config)
    assert filled is not None
    shapes = [target for look in survey.looks for target in rules.targets(look, config)]
    order = Order.of(buckets_of(shapes, [2] * len(shapes)), config)
    assert (filled.batches, filled.places) == (order.per_epoch, 36)
    assert order.notes()[0].startswith(f"{filled.repeated} of a pass's {36 + filled.repeated} places")


PACKAGE = Package(name="x", version="1")


def test_what_reads_tables_and_draws_edges(matrix: Matrix, tmp_path: Path) -> None:
    folder = images(tmp_path / "a", (512, 512))
    canny = {"mode": "controlnet", "packages": {}}
    assert "OpenCV is not installed" in one(found(matrix, folder, lint.readers, **canny), "error")
    assert found(matrix, folder, lint.readers, mode="controlnet", packages={"opencv-python": PACKAGE}) == ()
    files = {"control_type": "files", "control_dir": str(folder)}
    assert found(matrix, folder, lint.readers, **canny, **files) == ()
    tables = images(tmp_path / "b", (512, 512))
    (tables / "a.arrow").write_bytes(b"x")
    assert "a.arrow is a table" in one(found(matrix, tables, lint.readers, packages={}), "error")
    assert found(matrix, tables, lint.readers, packages={"pyarrow": PACKAGE}) == ()


def test_named_folders(matrix: Matrix, tmp_path: Path) -> None:
    images(tmp_path / "a" / "faces" / "close", (512, 512))
    folder = images(tmp_path / "a", (512, 512))
    assert found(matrix, folder, lint.named_folders, repeats=(("faces", 3), (".", 2), ("faces/close/", 1))) != ()
    assert found(matrix, folder, lint.named_folders, repeats=(("faces", 3), (".", 2))) == ()
    assert "repeats names face;" in one(found(matrix, folder, lint.named_folders, repeats=(("face", 3),)), "error")
    files = {"mode": "controlnet", "control_type": "files", "control_dir": str(tmp_path / "c")}
    assert "is not a folder" in one(found(matrix, folder, lint.named_folders, **files), "error")
    images(tmp_path / "c" / "faces" / "close", (512, 512))
    assert "1 images have no condition" in one(found(matrix, folder, lint.named_folders, **files), "error")
    images(tmp_path / "c", (512, 512))
    assert found(matrix, folder, lint.named_folders, **files) == ()


def test_tables_are_counted_and_their_images_are_not_judged(matrix: Matrix, tmp_path: Path) -> None:
    (tmp_path / "a.arrow").write_bytes(b"x")
    subject = case(matrix, machine(matrix), job(None, img_dir=str(tmp_path), train_batch_size=4))
    assert findings(subject, dataset) == ()
    for check in (lint.captions_fit, lint.pixels, lint.batches):
        assert verdict(subject, check).status == "skipped"


def test_a_name_that_is_not_utf8_is_shown(matrix: Matrix, tmp_path: Path) -> None:
    (tmp_path / b"caf\xe9.png".decode("utf-8", "surrogateescape")).write_bytes(b"")
    subject = case(matrix, machine(matrix), job(None, img_dir=str(tmp_path)))
    (finding, *_) = findings(subject, dataset)
    assert "caf\\xe9.png: is empty" in finding.seen
    msgspec.json.encode(finding)


def test_ten_thousand_images_are_looked_at_in_a_second(matrix: Matrix, tmp_path: Path) -> None:
    """A quarter of the second is what an idle core takes."""
    folder = images(tmp_path / "a", *[(512, 512)] * 2)
    for number in range(10_000):
        (folder / f"x{number}.bmp").hardlink_to(folder / "00000.bmp")
        (folder / f"x{number}.json").hardlink_to(folder / "00000.json")
    subject = case(matrix, machine(matrix), job(None, img_dir=str(folder)))
    started = time.process_time()
    for check in (dataset, *ALL):
        assert verdict(subject, check).status != "crashed"
    assert time.process_time() - started < 5
