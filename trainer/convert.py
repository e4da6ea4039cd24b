"""From a checkpoint, or from a file or folder that a run wrote, to files of any format. No GPU is needed."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from xflux_trainer import bfl, checkpoint, controlnet, finetune, lora_files, model
from xflux_trainer.checkpoint import Checkpoint
from xflux_trainer.config import TrainConfig
from xflux_trainer.errors import CheckpointError, WriteError
from xflux_trainer.layout import Base
from xflux_trainer.targets import FILES
from xflux_trainer.weights import open_weights

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
FORMATS = {"lora": tuple(FILES), "finetune": ("diffusers", "bfl"), "controlnet": ("diffusers", "xlabs")}
"""What the result of each mode can be written as. A ControlNet is always written as both."""
RESULTS = {"lora": "the adapter", "finetune": "the transformer", "controlnet": "the ControlNet"}


@dataclass(frozen=True)
class Converted:
    """What was made, and what is worth saying of it."""

    what: str
    paths: list[Path]
    notes: tuple[str, ...] = ()


def convert(
    source: Path,
    output: Path | None,
    form: str = "diffusers",
    dtype: str | None = None,
    where: TrainConfig | None = None,
) -> Converted:
    """Write what a checkpoint folder holds, its average where there is one, or the adapter of a file.

    `where` says where the base model lies today, if not where the checkpoint's own config says. Adapters are written
    in fp32, models in the format of their run, unless `dtype` says otherwise. Raises `UserError`.
    """
    if source.is_file() or source.suffix == ".safetensors":
        return _adapter_file(source, output, _of("lora", form, source), DTYPES[dtype or "fp32"])
    loaded = checkpoint.load(source)
    config = _config(loaded)
    _of(config.mode, form, source)
    if config.mode == "lora":
        return _adapter(loaded, config, output or source / FILES[form], form, DTYPES[dtype or "fp32"])
    base = _base(loaded, where or config)
    if config.mode == "finetune":
        return _finetune(loaded, config, base, output, form, DTYPES[dtype] if dtype else None)
    return _controlnet(loaded, config, base, output or source, DTYPES[dtype] if dtype else None)


def transformer(folder: Path, output: Path | None, dtype: str | None = None) -> Converted:
    """Write a transformer's folder in diffusers' layout as Black Forest Labs' single file, in bf16 unless told.

    Raises `UserError`.
    """
    base = dataclasses.replace(Base.of(folder.parent), transformer=folder)
    shapes = finetune.shapes_of(base)
    path = output or folder.with_name(f"{folder.resolve().name}_bfl.safetensors")
    with open_weights(folder, torch.device("cpu")) as weights:
        weights.refuse(shapes)
        tensors = ((name, weights.read(name)) for name in shapes)
        return Converted(RESULTS["finetune"], [bfl.write_single(path, tensors, shapes, DTYPES[dtype or "bf16"])])


def newest(config: TrainConfig) -> Path:
    """The newest checkpoint of the config's run."""
    found = checkpoint.list_checkpoints(Path(config.output_dir))
    if not found:
        raise CheckpointError(f"{config.output_dir} holds no checkpoint.", "Train first, or name --checkpoint.")
    return found[-1]


def _of(mode: str, form: str, source: Path) -> str:
    if form not in FORMATS[mode]:
        seen = f"{source} holds {RESULTS[mode].removeprefix('the ')} weights, which cannot be written as {form}."
        raise CheckpointError(seen, f"Take --format {' or '.join(FORMATS[mode])}.")
    return form


def _adapter_file(source: Path, output: Path | None, form: str, dtype: torch.dtype) -> Converted:
    weights, held = lora_files.read(source), lora_files.read_metadata(source)
    about = {key: held[key] for key in ("alpha", "base_model", "model_name") if key in held}
    return _write_adapter(
        weights, output or source.with_name(f"{source.stem}_{form}.safetensors"), form, 1.0, about, dtype
    )


def _adapter(loaded: Checkpoint, config: TrainConfig, path: Path, form: str, dtype: torch.dtype) -> Converted:
    weights, about = dict(loaded.weights(averaged=True)), lora_files.about(config)
    return _write_adapter(weights, path, form, config.alpha / config.rank, about, dtype)


def _write_adapter(
    weights: dict[str, Tensor], path: Path, form: str, scale: float, about: dict[str, str], dtype: torch.dtype
) -> Converted:
    before = max(tensor.shape[0] for name, tensor in weights.items() if ".lora_A." in name)
    after = lora_files.write(path, weights, form, scale=scale, about=about, dtype=dtype)
    if after == before:
        return Converted(RESULTS["lora"], [path])
    grows = f"the rank grows from {before} to {after}, with zeros between them; the adapter does the same."
    note = f"layers with adapters of their own are one matrix in this format: {grows}"
    return Converted(RESULTS["lora"], [path], (note,))


def _finetune(
    loaded: Checkpoint, config: TrainConfig, base: Base, output: Path | None, form: str, dtype: torch.dtype | None
) -> Converted:
    weights = loaded.weights(averaged=True)
    if form == "diffusers":
        return Converted(RESULTS["finetune"], [finetune.write(output or loaded.folder, weights, base, config, dtype)])
    path = output or loaded.folder / "transformer_bfl.safetensors"
    if path.resolve() == base.transformer.resolve():
        seen = f"The fine-tuned transformer would replace the base model's own, {base.transformer}."
        raise WriteError(seen, "Name another --output.")
    shapes = finetune.shapes_of(base)
    tensors = finetune.whole(weights, base, shapes)
    return Converted(
        RESULTS["finetune"], [bfl.write_single(path, tensors, shapes, dtype or finetune.saved_in(config))]
    )  # fmt: skip


def _controlnet(
    loaded: Checkpoint, config: TrainConfig, base: Base, output: Path, dtype: torch.dtype | None
) -> Converted:
    if config.controlnet_init and not Path(config.controlnet_init).expanduser().exists():
        # Only the parts that nothing is computed with come from there: those of the base do as well.
        config = dataclasses.replace(config, controlnet_init=None)
    form = dtype or model.DTYPES[config.mixed_precision]
    net = controlnet.build(base, config, form, torch.device("cpu"))
    paths = controlnet.write(output, dict(loaded.weights(averaged=True)), config, net, form)
    return Converted(RESULTS["controlnet"], paths)


def _config(loaded: Checkpoint) -> TrainConfig:
    """What the checkpoint was trained with, whatever a config file says today."""
    names = {field.name for field in dataclasses.fields(TrainConfig)}
    return TrainConfig(**{key: value for key, value in loaded.config.items() if key in names})


def _base(loaded: Checkpoint, config: TrainConfig) -> Base:
    """The base that it was trained on: what was not trained comes from there."""
    base, _ = model.locate(config)
    known = loaded.manifest["digests"].get("base")
    if known is not None and known != model.fingerprint(base.transformer):
        seen = f"{base.transformer} is not the base model that {loaded.folder} was trained on."
        raise CheckpointError(seen, "Name the right one: pretrained_model in the train config, and --config with it.")
    return base
