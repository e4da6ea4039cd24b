"""TensorBoard and Weights & Biases: curves and images for those who watch. Neither can end a run or hold it up.

metrics.jsonl is what a run must be able to write; a tracker that fails is left alone from then on, with a note.
"""

from __future__ import annotations

import netrc
import os
import secrets
import threading
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from xflux_trainer import config as train_config
from xflux_trainer import files
from xflux_trainer.config import TrainConfig

START_SECONDS = 20
"""How long wandb may look for its server, at the start."""
END_SECONDS = 60
"""How long wandb may send what is left, at the end: the files stay, and can be sent by hand."""
RUN_ID = "wandb-run-id"
"""File in the tracker's folder by which a resumed run goes on with its own curves."""


def installed(name: str) -> bool:
    """Asked of the metadata: wandb's own log folder would pass for the package."""
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


class Tracker:
    """TensorBoard or wandb, or neither. No method raises: what goes wrong is a note, said once by `tell`."""

    def __init__(self, config: TrainConfig, from_step: int = 0, tell: Callable[[str], None] | None = None) -> None:
        self.notes: list[str] = []
        self._tell = tell or (lambda _: None)
        self._backend: _Board | _Wandb | None = None
        folder = Path(config.output_dir) / config.logging_dir
        if config.report_to == "none":
            return
        if config.report_to == "wandb":
            self._try(lambda: self._start(_Wandb, "wandb", config, folder, from_step), "did not start")
        if self._backend is None:
            self._try(lambda: self._start(_Board, "tensorboard", config, folder, from_step), "did not start")

    def _start(self, kind: Any, package: str, config: TrainConfig, folder: Path, from_step: int) -> None:
        if not installed(package):
            instead = "the curves go to TensorBoard" if package == "wandb" else "the curves are in metrics.jsonl only"
            self._note(f"{package} is not installed, so {instead}.")
            return
        self._backend = kind(config, folder, from_step, self._note)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Scalars by name."""
        if self._backend:
            backend = self._backend
            self._try(lambda: backend.log(values, step), "failed and is left alone from here")

    def images(self, paths: Mapping[str, Path], step: int) -> None:
        """Images by name, read from their files."""
        if self._backend:
            backend = self._backend
            self._try(lambda: backend.images(paths, step), "failed and is left alone from here")

    def close(self) -> None:
        if self._backend:
            backend, self._backend = self._backend, None
            self._try(backend.close, "did not end well")

    def _try(self, work: Callable[[], None], what: str) -> None:
        name = type(self._backend).__name__.strip("_") if self._backend else "the tracker"
        try:
            work()
        except Exception as error:  # noqa: BLE001 (whatever it is, it is no reason not to train)
            self._backend = None
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            self._note(f"{name} {what} ({reason}); the numbers are in metrics.jsonl.")

    def _note(self, text: str) -> None:
        self.notes.append(text)
        self._tell(text)


class _Board:
    def __init__(self, config: TrainConfig, folder: Path, from_step: int, _note: Callable[[str], None]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        files.make_folder(folder)
        # What a run that was killed had drawn after the checkpoint is drawn again.
        self._writer = SummaryWriter(str(folder), purge_step=from_step + 1 if from_step else None)

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def images(self, paths: Mapping[str, Path], step: int) -> None:
        import numpy as np
        from PIL import Image

        for name, path in paths.items():
            with Image.open(path) as image:
                self._writer.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, config: TrainConfig, folder: Path, from_step: int, note: Callable[[str], None]) -> None:
        import wandb

        files.make_folder(folder)
        self._folder, self._note = folder, note
        mode = os.environ.get("WANDB_MODE") or ("online" if _has_key() else "offline")
        if mode == "offline" and not os.environ.get("WANDB_MODE"):
            note(f"wandb has no key here, so the curves are kept in {folder}: `wandb sync` sends them later.")
        options: dict[str, Any] = {
            "project": config.tracker_project_name,
            "dir": str(folder),
            "config": train_config.to_dict(config),
            "id": _earlier_id(folder, from_step) or secrets.token_hex(4),
            "resume": "allow" if from_step and mode == "online" else None,
            # It must not ask, must not wait for long, and must not take over the terminal's line.
            "settings": wandb.Settings(init_timeout=START_SECONDS, console="off"),
        }
        try:
            self._run = wandb.init(mode=mode, **options)
        except Exception as error:  # noqa: BLE001 (no network, a key that is not taken)
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            note(f"wandb cannot reach its server ({reason}), so the curves are kept in {folder}: `wandb sync` sends.")
            # Under another name: the one that could not start still holds its own.
            self._run = wandb.init(mode="offline", **{**options, "id": secrets.token_hex(4), "resume": None})
        files.write_bytes(folder / RUN_ID, str(self._run.id).encode())
        # A resumed run comes to steps that wandb's own count has passed, and would drop them.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log({**values, "step": step})

    def images(self, paths: Mapping[str, Path], step: int) -> None:
        import wandb

        self._run.log({**{name: wandb.Image(str(path)) for name, path in paths.items()}, "step": step})

    def close(self) -> None:
        """It waits for a lost network for ever; the run does not."""
        done = threading.Thread(target=self._run.finish, name="wandb-finish", daemon=True)
        done.start()
        done.join(END_SECONDS)
        if done.is_alive():
            self._note(f"wandb had not sent all after {END_SECONDS} s: `wandb sync` sends what is in {self._folder}.")


def _has_key() -> bool:
    """Whether wandb will find a key by itself, so that it does not ask for one. The key itself is not looked at."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    places = [os.environ["NETRC"]] if "NETRC" in os.environ else ["~/.netrc", "~/_netrc"]
    for place in places:
        try:
            if netrc.netrc(Path(place).expanduser()).authenticators(host):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False


def _earlier_id(folder: Path, from_step: int) -> str | None:
    """That of the run which is resumed; None where there is none."""
    place = folder / RUN_ID
    return place.read_text(encoding="utf-8").strip() if from_step and place.exists() else None
