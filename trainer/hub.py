"""Upload a finished run to the Hugging Face hub: the final files, the card and the samples, and nothing else.

It comes after the result is on the disk, so whatever goes wrong here is a sentence with the command to do it by hand.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from glob import escape
from pathlib import Path
from typing import NamedTuple

from xflux_trainer import card, plots, sheet
from xflux_trainer.config import TrainConfig

_SECRET = re.compile(r"hf_\w{8,}")


class Pushed(NamedTuple):
    """Whether the result is on the hub, and the sentence that says so or why not."""

    done: bool
    text: str


def foresee(config: TrainConfig) -> str | None:
    """A note at the start of a run whose upload at its end would fail: no token, or no name. Asks no network."""
    if not config.push_to_hub:
        return None
    from huggingface_hub import get_token
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(config.push_to_hub)
    except HFValidationError as error:
        return f"push_to_hub {config.push_to_hub} is no name of a repository: {_reason(error)}"
    if not get_token():
        return f"push_to_hub is set and no token is found: log in with `{_tool()} {_login()}` before the run ends."
    return None


def push(output: Path, config: TrainConfig, results: Sequence[Path]) -> Pushed:
    """Upload to `config.push_to_hub`, which is made private if it is new. Never raises; rank 0 calls it.

    `results` are the final files or folders below `output`. What is uploaded is named file by file: a checkpoint, a
    cache or what else lies there cannot slip in.
    """
    from huggingface_hub import HfApi

    name = config.push_to_hub or ""
    wanted = chosen(output, results)
    try:
        api = HfApi()
        repo = api.create_repo(name, private=True, exist_ok=True).repo_id
        api.upload_folder(
            repo_id=repo,
            folder_path=output,
            allow_patterns=[escape(path) for path in wanted],
            commit_message=f"Trained on {card.base_id(config)}",
        )
    except Exception as error:  # noqa: BLE001 (network, rights, quota: the result is safe on the disk)
        paths = [shlex.quote(path) for path in wanted]
        include = " ".join(f"--include {path}" for path in paths) if _major() >= 1 else f"--include {' '.join(paths)}"
        by_hand = f"{_tool()} upload {shlex.quote(name)} {shlex.quote(str(output))} . --private {include}"
        return Pushed(False, f"the upload to {name} failed ({_reason(error)}). By hand: {by_hand}")
    return Pushed(True, f"uploaded to {api.endpoint}/{repo}")


def chosen(output: Path, results: Sequence[Path]) -> list[str]:
    """Paths below `output` of all files that go to the hub."""
    single = [output / card.NAME, output / plots.NAME, output / "samples" / sheet.NAME]
    samples = [row[sheet.FINAL] for row in sheet.images(output / "samples").values() if sheet.FINAL in row]
    found: list[Path] = []
    for path in (*results, *single, *samples):
        found += sorted(inner for inner in path.rglob("*") if inner.is_file()) if path.is_dir() else [path]
    return [path.relative_to(output).as_posix() for path in found if path.is_file()]


def _reason(error: Exception) -> str:
    """The first line of what went wrong, without anything that looks like a token."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return _SECRET.sub("hf_…", lines[0] if lines else type(error).__name__)


def _tool() -> str:
    """The hub's command line, which was renamed with release 1.0."""
    return "hf" if _major() >= 1 else "huggingface-cli"


def _login() -> str:
    return "auth login" if _major() >= 1 else "login"


def _major() -> int:
    from importlib.metadata import version

    return int(version("huggingface_hub").split(".")[0])
