"""An X-Flux checkout and one job of it, read as text and not judged: nothing of the checkout is imported.

What a script does is taken from its own text, because people patch it: the keys that it reads, whether it makes
the frozen base fp32, how it mixes noise. Source of the rules: XLabs-AI/x-flux@4749542, the last commit.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from xflux_doctor.errors import UsageError
from xflux_doctor.xflux_config import read_config
from xflux_doctor.xflux_images import Images, list_images
from xflux_doctor.xflux_scripts import SCRIPTS

_LOADERS = {"lora": "dataset.py", "finetune": "dataset.py", "controlnet": "canny_dataset.py"}
_MODULES = (
    "model.py", "util.py", "sampling.py", "math.py", "controlnet.py", "xflux_pipeline.py", "modules/layers.py",
    "modules/autoencoder.py", "modules/conditioner.py", "annotator/canny/__init__.py", "annotator/zoe/__init__.py",
)  # fmt: skip
LORA_KEYS = frozenset("rank single_blocks double_blocks disable_sampling sample_every sample_prompts".split())
WEIGHTS = {"FLUX_DEV": "flux-dev", "FLUX_SCHNELL": "flux-schnell", "FLUX_DEV_FP8": "flux-dev-fp8", "AE": ""}
"""Variables that name a local file, and the model_name that reads it; AE is read by all (src/flux/util.py)."""
_LARGEST = 1 << 20


class Script(msgspec.Struct, frozen=True):
    """One training script, and the loader that it takes its images from."""

    kind: str
    """lora, finetune or controlnet."""
    path: Path
    because: str = ""
    """Why this one goes with the config."""
    reads: Mapping[str, str] = {}
    """{key of the config: `start` (before the model is loaded), `setup` (after it) or `steps`}."""
    upcasts: bool = False
    """Makes the frozen transformer fp32."""
    one_t_per_image: bool = False
    """Mixes noise with t of shape (B,) against (B, tokens, 64)."""
    resumes_partition: bool = False
    """Reads `base_optimizer_state` of one rank back into a whole optimizer."""
    logs_images: bool = False
    """Hands its samples to wandb whatever the tracker is."""
    loader_keys: Mapping[str, bool] | None = None
    """{key that the loader takes: whether it must be given}; None: its code is another one than we know."""
    cuts_at_dots: bool = False
    """The caption's path is the image's path up to its first dot."""


class Checkpoint(msgspec.Struct, frozen=True):
    """One entry of output_dir whose name begins with `checkpoint`."""

    name: str
    files: Mapping[str, int] = {}
    """{path below it: bytes}, two levels deep."""

    @property
    def step(self) -> int | None:
        """As the scripts take it, `int(name.split("-")[1])`; None where that raises."""
        try:
            return int(self.name.split("-")[1])
        except (IndexError, ValueError):
            return None

    @property
    def zero_ranks(self) -> int:
        return sum("zero_pp_rank_" in name for name in self.files)


class XFlux(msgspec.Struct, frozen=True):
    """A checkout, and the job that its script would make of the config."""

    root: Path
    script: Script
    commit: str = ""
    missing: tuple[str, ...] = ()
    """Files that the script imports and that are not there."""
    config: Mapping[str, Any] | None = None
    problem: str = ""
    """Why the config cannot be read."""
    images: Images | None = None
    output: Path | None = None
    checkpoints: tuple[Checkpoint, ...] = ()
    """Oldest first; entries without a number last."""
    free: int | None = None
    """Bytes free where output_dir lies."""
    weights: Mapping[str, str] = {}
    """{variable: why the file that it names cannot be loaded}; empty text: it can."""

    def get(self, key: str, default: Any = None) -> Any:
        """A top-level value; what OmegaConf would put in from elsewhere is not known here."""
        return _known((self.config or {}).get(key, default), default)

    @property
    def data(self) -> Mapping[str, Any]:
        value = self.get("data_config")
        return value if isinstance(value, dict) else {}

    def data_get(self, key: str, default: Any = None) -> Any:
        return _known(self.data.get(key, default), default)

    @property
    def batch(self) -> int:
        """Images per rank and step: data_config's number is the real one."""
        value = self.data_get("train_batch_size")
        return value if isinstance(value, int) and value > 0 else 1

    @property
    def img_size(self) -> int:
        value = self.data_get("img_size", 512)
        return value if isinstance(value, int) and value > 0 else 512


def _known(value: Any, default: Any) -> Any:
    return default if isinstance(value, str) and "${" in value else value


def read(named: str, config: Path | None, environment: Mapping[str, str] | None = None) -> XFlux:
    """The checkout `named` (or one of its scripts) with this config. Paths count from the checkout, where its
    README launches. `environment` None: the variables of another machine, whose files are not looked for.

    Raises UsageError where there is no checkout.
    """
    path = Path(named)
    asked = next((kind for kind, name in SCRIPTS.items() if path.is_file() and path.name == name), "")
    root = (path.parent if asked else path).absolute()
    if not any((root / name).is_file() for name in SCRIPTS.values()):
        seen = f"{named} is no X-Flux checkout: it holds none of {', '.join(SCRIPTS.values())}."
        raise UsageError(seen, "Give --xflux the folder that `git clone` made, or one of its training scripts.")
    values, problem = read_config(config)
    kind, because = (asked, "named by --xflux") if asked else _kind(values or {}, config)
    found = XFlux(root, _script(root, kind, because), _commit(root), _missing(root, kind), values, problem)
    return _with_files(found, environment)


def _with_files(found: XFlux, environment: Mapping[str, str] | None) -> XFlux:
    folder = found.data_get("img_dir")
    images = None
    if isinstance(folder, str) and folder and found.script.loader_keys is not None:
        caption = "json" if found.script.kind == "controlnet" else str(found.data_get("caption_type", "json"))
        images = list_images(found.root / folder, caption)
    named = found.get("output_dir")
    output = found.root / named if isinstance(named, str) and named else None
    variables = environment or {}
    return msgspec.structs.replace(
        found,
        images=images,
        output=output,
        checkpoints=_checkpoints(output) if output else (),
        free=_free(output) if output else None,
        weights={name: _weight_fault(found.root, variables[name]) for name in WEIGHTS if name in variables},
    )


# The checkout --------------------------------------------------------------------------------------------


def _kind(values: Mapping[str, Any], path: Path | None) -> tuple[str, str]:
    """Which script goes with a config, which does not say so itself."""
    lora = sorted(LORA_KEYS & set(values))
    if lora:
        return "lora", f"the config has {lora[0]}"
    own = (path.name if path else "", values.get("output_dir"), values.get("tracker_project_name"))
    words = " ".join(str(word) for word in own).lower()
    for word, kind in (("canny", "controlnet"), ("controlnet", "controlnet"), ("lora", "lora")):
        if word in words:
            return kind, f"the config's names say {word}"
    return "finetune", "the config has no key of a LoRA"


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace") if path.stat().st_size <= _LARGEST else ""
    except OSError:
        return ""


def _script(root: Path, kind: str, because: str) -> Script:
    path = root / SCRIPTS[kind]
    text = re.sub(r"^\s*#.*", "", _text(path), flags=re.M)
    loader = _text(root / "image_datasets" / _LOADERS[kind])
    load = re.search(r"get_models\(name=\S*", text)  # its own arguments are read before it loads
    loads, steps = load.end() if load else -1, text.find("for epoch in range(")
    reads: dict[str, str] = {}
    for match in re.finditer(r"\bargs\.([a-z]\w*)\b(?!\s*=[^=])", text):
        when = "start" if match.start() <= loads else "setup" if match.start() < steps else "steps"
        reads.setdefault(match[1], when)
    reads.pop("config", None)  # of the command line, not of the file
    return Script(
        kind=kind,
        path=path,
        because=because,
        reads=reads,
        upcasts="dit = dit.to(torch.float32)" in text,
        one_t_per_image="torch.randn((bs,)" in text and "(1 - t) * x_1" in text,
        resumes_partition="base_optimizer_state" in text,
        logs_images="wandb.Image(" in text,
        loader_keys=_loader_keys(loader),
        cuts_at_dots=".split('.')[0]" in loader,
    )


def _loader_keys(text: str) -> dict[str, bool] | None:
    """The keys of data_config, by the signatures in the loader's text; None for code that lists images otherwise."""
    names = re.search(r"def __init__\(self,([^)]*)\)", text)
    rest = re.search(r"def loader\(([^)]*?),\s*\*\*", text)
    if names is None or rest is None or "'.jpg' in i or '.png' in i" not in text:
        return None
    parts = [part.strip() for part in f"{rest[1]},{names[1]}".split(",")]
    return {part.split("=")[0].strip(): "=" not in part for part in parts if part}


def _missing(root: Path, kind: str) -> tuple[str, ...]:
    wanted = [SCRIPTS[kind], f"image_datasets/{_LOADERS[kind]}", *(f"src/flux/{name}" for name in _MODULES)]
    return tuple(name for name in wanted if not (root / name).is_file())


def _commit(root: Path) -> str:
    """The commit that is checked out, where .git says so in plain text."""
    head = _text(root / ".git" / "HEAD").strip()
    if not head.startswith("ref: "):
        return head if re.fullmatch(r"[0-9a-f]{40}", head) else ""
    packed = re.search(rf"^([0-9a-f]{{40}}) {re.escape(head[5:])}$", _text(root / ".git" / "packed-refs"), re.M)
    return _text(root / ".git" / head[5:]).strip() or (packed[1] if packed else "")


# The run's files -----------------------------------------------------------------------------------------


def _checkpoints(output: Path) -> tuple[Checkpoint, ...]:
    try:
        names = [entry.name for entry in os.scandir(output) if entry.name.startswith("checkpoint")]
        found = [Checkpoint(name, dict(_sizes(output / name))) for name in names]
    except OSError:
        return ()
    return tuple(sorted(found, key=lambda c: (c.step is None, c.step or 0, c.name)))


def _sizes(folder: Path) -> Iterator[tuple[str, int]]:
    for pattern in ("*", "*/*"):
        for path in folder.glob(pattern):
            if path.is_file():
                yield path.relative_to(folder).as_posix(), path.stat().st_size


def _free(output: Path) -> int | None:
    try:
        existing = next(p for p in (output, *output.parents) if p.exists())
        stat = os.statvfs(existing)
    except (OSError, StopIteration):
        return None
    return stat.f_bavail * stat.f_frsize


def _weight_fault(root: Path, value: str) -> str:
    if not value:
        return "is set and empty"
    path = root / value
    if path.is_dir():
        return f"names the folder {value}"
    if not path.is_file():
        return f"names {value}, which is not there"
    return f"names {value}, which is empty" if path.stat().st_size == 0 else ""
