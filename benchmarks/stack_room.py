"""How much pip fetched for a stack, and how much room it fills in the venv whose Python runs this.

    python benchmarks/stack_room.py REPORT      where `pip install --report REPORT` made the venv

The matrix's `download_gib` and `installed_gib` are these, 3 % more, rounded up to a tenth.
"""

import json
import sys
import urllib.request
from pathlib import Path


def downloads(report: Path) -> int:
    """Bytes of the files that pip's installation report names."""
    return sum(_size(item["download_info"]["url"]) for item in json.loads(report.read_text())["install"])


def filled(prefix: Path) -> int:
    """Bytes of the disk under a folder; a link counts as a link."""
    return sum(path.lstat().st_blocks * 512 for path in prefix.rglob("*"))


def _size(url: str) -> int:
    if url.startswith("file://"):
        return Path(urllib.request.url2pathname(url.removeprefix("file://"))).stat().st_size
    asked = urllib.request.Request(url, method="HEAD")
    with urllib.request.urlopen(asked, timeout=60) as answer:
        return int(answer.headers["content-length"])


def words(report: Path) -> str:
    return f"{downloads(report) / 2**30:.2f} GiB fetched, {filled(Path(sys.prefix)) / 2**30:.2f} GiB filled"


if __name__ == "__main__":
    print(words(Path(sys.argv[1])))
