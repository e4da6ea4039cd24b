"""How much pip fetched for a stack, and how much room a folder fills.

The matrix's `download_gib` and `installed_gib` are these of the stack's venv, 3 % more, rounded up to a tenth.
"""

import json
import urllib.request
from pathlib import Path


def downloads(report: Path) -> int:
    """Bytes of the files that `pip install --report` names."""
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
