"""How the start of a run grows with its images: from the listing to the first batch, 10 to 1,000,000 of them.

    python benchmarks/index.py [--work DIR] [--kind tables|files] [--counts 10,1000,100000,1000000] [--out JSON]

The images of every size are of 500 kinds, their captions of 400, so that the cache has 900 payload files at the most;
in `tables` they are the rows of at most 1,000 parquet files, in `files` each is a file with a caption beside it (hard
links). Everything is encoded and remembered before the clock runs. Measured through the trainer's own code, each
in a process of its own: the start that finds no index of an earlier one, and the starts after it, which do. The
memory is the process's own (RssAnon + RssShmem) beyond what it had after the imports.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "examples" / "demo"
IMAGES, CAPTIONS, TABLES = 500, 400, 1000
LIMIT = 5.0
"""Seconds to the first batch of a second start."""
PARTS = ("list", "entries", "order", "batch", "all")
LONG_AGO = (1_700_000_000, 1_700_000_000)


def config(work: Path, kind: str) -> Any:
    from xflux_trainer.config import TrainConfig

    return TrainConfig(
        pretrained_model=str(work / "model"), img_dir=str(work / "images"), output_dir=str(work / "out"), img_size=64,
        max_text_tokens=16, disable_sampling=True, heldout_samples=0, caption_type="txt" if kind == "files" else "json",
    )  # fmt: skip


def pictures() -> list[bytes]:
    """Small PNGs, each of its own color and of one of ten sizes."""
    from PIL import Image

    made = []
    for number in range(IMAGES):
        buffer = io.BytesIO()
        color = (number % 256, number // 256 * 99, 77)
        Image.new("RGB", (64, 64 - 4 * (number % 10)), color).save(buffer, "PNG")
        made.append(buffer.getvalue())
    return made


def write_tables(folder: Path, count: int) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    contents, tables = pictures(), min(TABLES, count)
    for number in range(tables):
        rows = range(number * count // tables, (number + 1) * count // tables)
        images = [{"bytes": contents[row % IMAGES], "path": None} for row in rows]
        table = pa.table({"image": images, "text": [f"caption {row % CAPTIONS}" for row in rows]})
        pq.write_table(table, folder / f"{number:04d}.parquet")
        os.utime(folder / f"{number:04d}.parquet", LONG_AGO)


def write_files(folder: Path, count: int, store: Path) -> None:
    store.mkdir()
    contents = pictures()
    for names, ending in ((contents, "png"), ([f"caption {k}".encode() for k in range(CAPTIONS)], "txt")):
        for number, content in enumerate(names):
            (store / f"{number}.{ending}").write_bytes(content)
            os.utime(store / f"{number}.{ending}", LONG_AGO)
    for row in range(count):
        below = folder / f"{row // 1000:04d}"
        if row % 1000 == 0:
            below.mkdir()
        os.link(store / f"{row % IMAGES}.png", below / f"{row:07d}.png")
        os.link(store / f"{row % CAPTIONS}.txt", below / f"{row:07d}.txt")


def fill(work: Path, kind: str, count: int) -> None:
    """The cache's entries, and what an earlier start remembers of the images, without encoding one."""
    import torch
    from xflux_trainer import cache, digests, entries, files, keys, samples
    from xflux_trainer.imagework import Item, Recipe
    from xflux_trainer.layout import Base

    run = config(work, kind)
    files.make_folder(run.cache_path)
    text, image = cache._who(Base.of(work / "model"), run.cache_path)
    for number in range(min(CAPTIONS, count)):
        name = keys.key(text, str(run.max_text_tokens), run.text_padding, f"caption {number}")
        values = {"text": torch.zeros(16, 64, dtype=torch.bfloat16), "pooled": torch.zeros(64, dtype=torch.bfloat16)}
        entries.write(entries.place(run.cache_path, "text", name), values)
    recipe = Recipe(run, run.cache_path, image)
    contents = []
    for number, data in enumerate(pictures()):
        found = digests.Content(digests.content_id(data), 64, 64 - 4 * (number % 10))
        contents.append(found)
        item = Item(samples.Sample(Path(f"{number}.png"), Path()), Path(), training=True)
        for view in recipe.views(item, found, b"") if number < count else []:
            width, height = view.size
            place = entries.place(run.cache_path, "image", view.latents[0])
            entries.write(place, {"latents": torch.zeros(16, height // 8, width // 8)})
    root = Path(run.img_dir)
    known = digests.Digests(run.cache_path, f"images {root.absolute()}")
    if kind == "tables":
        tables = min(TABLES, count)
        for number in range(tables):
            rows = range(number * count // tables, (number + 1) * count // tables)
            path = root / f"{number:04d}.parquet"
            known.put_rows(path, digests.pack([contents[row % IMAGES] for row in rows]), digests.state(path))
    else:
        for row in range(count):
            path = root / f"{row // 1000:04d}" / f"{row:07d}.png"
            known.put_rows(path, digests.pack([contents[row % IMAGES]]), digests.state(path))
    known.write()


def child(work: Path, kind: str) -> dict[str, Any]:
    """One start, up to its first batch."""
    from xflux_trainer import cache, meter
    from xflux_trainer.layout import Base
    from xflux_trainer.order import Order
    from xflux_trainer.ranks import Launch, Ranks
    from xflux_trainer.run import find_sets

    run, base, ranks = config(work, kind), Base.of(work / "model"), Ranks(Launch(use_cpu=True))
    before = meter.own_memory()
    watch = meter.HostWatch()
    watch.start()
    marks = [time.perf_counter()]
    sets, _, _ = find_sets(run)
    marks.append(time.perf_counter())
    found = cache.fill(run, base, ranks, sets, [])[0][run.img_dir]
    marks.append(time.perf_counter())
    buckets = found.buckets
    digest = found.digest()
    order = Order.of(buckets, run)
    first = order[0]
    marks.append(time.perf_counter())
    cache.read_batch([found[number] for number in first])
    marks.append(time.perf_counter())
    watch.look()
    watch.stop()
    del sets  # as in a run, which keeps the entries and the order alone
    times = {part: marks[k + 1] - marks[k] for k, part in enumerate(PARTS[:-1])}
    return {
        "entries": len(found), "first": first, "digest": digest, "seconds": {**times, "all": marks[-1] - marks[0]},
        "peak_bytes": max(watch.peaks.values()) - before, "kept_bytes": meter.own_memory() - before,
    }  # fmt: skip


def start(work: Path, kind: str) -> dict[str, Any]:
    argv = [sys.executable, str(Path(__file__).resolve()), "--child", "--work", str(work), "--kind", kind]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"error: the start failed:\n{done.stderr}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def measure(work: Path, kind: str, count: int) -> dict[str, Any]:
    for name in ("images", "out", "store"):
        shutil.rmtree(work / name, ignore_errors=True)
    (work / "images").mkdir(parents=True)
    if kind == "tables":
        write_tables(work / "images", count)
    else:
        write_files(work / "images", count, work / "store")
    fill(work, kind, count)
    starts = [start(work, kind) for _ in range(3)]
    assert len({(one["digest"], tuple(one["first"])) for one in starts}) == 1, "the starts differ"
    payload = len(list((work / "out" / "cache").glob("*.safetensors")))
    second = min(starts[1:], key=lambda one: one["seconds"]["all"])
    return {"kind": kind, "count": count, "payload": payload, "first": starts[0], "second": second}


def table(rows: list[dict[str, Any]]) -> str:
    head = ("images", "payload files", "start", *(f"{name} s" for name in PARTS), "peak MB", "kept MB", "B/image")
    lines = [" ".join(f"{name:>13}" for name in head)]
    for row in rows:
        for which in ("first", "second"):
            one = row[which]
            cells = [f"{row['count']:,}", row["payload"], f"{which} {row['kind']}"]
            cells += [f"{one['seconds'][name]:.3f}" for name in PARTS]
            cells += [f"{one[name] / 1e6:.1f}" for name in ("peak_bytes", "kept_bytes")]
            cells.append(f"{one['kept_bytes'] / row['count']:.0f}" if row["count"] >= 100_000 else "-")
            lines.append(" ".join(f"{cell:>13}" for cell in cells))
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--work", type=Path, help="a folder for what is made [default: a temporary one]")
    parser.add_argument("--kind", choices=["tables", "files"], default="tables")
    parser.add_argument("--counts", default="10,1000,100000,1000000")
    parser.add_argument("--out", type=Path, help="a JSON file for the numbers")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(options.work, options.kind)))
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        work = (options.work or Path(temporary)).absolute()
        work.mkdir(parents=True, exist_ok=True)
        subprocess.run([sys.executable, str(DEMO / "make_tiny_flux.py"), str(work / "model")], check=True)
        rows = []
        for count in map(int, options.counts.split(",")):
            rows.append(measure(work, options.kind, count))
            print(table(rows[-1:]), flush=True)
    print("\n" + table(rows))
    if options.out:
        from xflux_trainer.meter import versions

        told = {"cores": len(os.sched_getaffinity(0)), "versions": versions(), "limit_seconds": LIMIT, "rows": rows}
        options.out.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    slow = [row["count"] for row in rows if row["second"]["seconds"]["all"] > LIMIT]
    if slow:
        print(f"over {LIMIT:g} s to the first batch of a second start: {', '.join(map(str, slow))} images")
    return 1 if slow else 0


if __name__ == "__main__":
    sys.exit(main())
