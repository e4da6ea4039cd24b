"""Write a tiny FLUX.1 pipeline: FLUX.1-dev's exact folder layout, a five-thousandth of its weights, no download.

    python examples/demo/make_tiny_flux.py OUT_DIR [--seed 0]

tiny_flux.py says what is in it. The same seed gives the same files. A complete folder is kept as it is; a new one
is written beside it under a temporary name and renamed, so that OUT_DIR is never half a pipeline.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
INGREDIENTS = ("*.py", "photos/*")
"""What the files follow from, besides the seed."""
MARKER = "tiny_flux.json"
"""Written last: says how the folder was made and how large each file is."""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    out: Path = options.out_dir
    if is_complete(out, options.seed):
        print(f"kept {out}: it is complete and was made with seed {options.seed}")
        return 0
    if out.exists() and not _may_replace(out):
        print(
            f"error: {out} exists and was not written by this program. Name a new folder, or remove it first.",
            file=sys.stderr,
        )
        return 1
    write(out, options.seed)
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    print(f"wrote {out}: {size / 1e6:.1f} MB, seed {options.seed}")
    return 0


def is_complete(out: Path, seed: int) -> bool:
    """Every file is there at its full size, made from these ingredients and this seed."""
    try:
        marker = json.loads((out / MARKER).read_text("utf-8"))
        sizes = {name: (out / name).stat().st_size for name in marker["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return (marker.get("recipe"), marker.get("seed"), marker["files"]) == (recipe(), seed, sizes)


def recipe() -> str:
    """A digest of all ingredients."""
    digest = hashlib.sha256()
    for file in sorted(file for pattern in INGREDIENTS for file in HERE.glob(pattern) if file.is_file()):
        content = file.read_bytes()
        digest.update(f"{file.name}:{len(content)}:".encode() + content)
    return digest.hexdigest()


def _may_replace(out: Path) -> bool:
    return out.is_dir() and ((out / MARKER).is_file() or not any(out.iterdir()))


def write(out: Path, seed: int) -> None:
    """Write the whole pipeline to a temporary folder beside `out`, then rename it."""
    import tiny_flux  # noqa: PLC0415 - torch and diffusers take seconds, and a complete folder needs neither

    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        tiny_flux.write_parts(temporary, seed)
        files = {
            str(file.relative_to(temporary)): file.stat().st_size
            for file in sorted(temporary.rglob("*"))
            if file.is_file()
        }
        marker = {"recipe": recipe(), "seed": seed, "files": files}
        (temporary / MARKER).write_text(json.dumps(marker, indent=2) + "\n", "utf-8")
        for file in temporary.rglob("*"):
            _sync(file)
        temporary.chmod(0o755)  # mkdtemp's folders are for their owner only
        if out.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
            out.rename(old / out.name)
            temporary.rename(out)
            shutil.rmtree(old)
        else:
            temporary.rename(out)
        _sync(out.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


if __name__ == "__main__":
    sys.exit(main())
