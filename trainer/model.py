"""Find the base model, and bring its transformer onto the device tensor by tensor.

The module is made without weights, then every tensor goes from the file's pages straight to the device in
the wanted format: no fp32 copy, and no copy in the memory of the host for each rank.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from xflux_trainer.errors import ModelError
from xflux_trainer.layout import PARTS, Base
from xflux_trainer.spec import FluxSpec, read_folder

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "no": torch.float32}


def resolve(name: str) -> Base:
    """The folder of a base model: itself, or where the hub's files lie after downloading what is missing."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        missing = [part for part in PARTS if not (folder / part).is_dir()]
        if missing:
            seen = f"{folder} is not a FLUX.1 pipeline in diffusers' layout: it has no {', '.join(missing)}."
            raise ModelError(seen, "Point pretrained_model at a folder such as a download of FLUX.1-dev.")
        return Base.of(folder)
    if folder.exists() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise ModelError(f"The folder {name} does not exist.", "Correct pretrained_model in the train config.")
    return Base.of(_download(name))


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    patterns = [f"{part}/*" for part in PARTS] + ["model_index.json"]
    hint = "Log in with `huggingface-cli login`, or set pretrained_model to a local folder."
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except GatedRepoError as error:
        raise ModelError(
            f"{name} is gated: this account has not been let in.",
            f"Accept its licence at https://huggingface.co/{name}, then log in with `huggingface-cli login`.",
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelError(f"The hub has no model {name}, or it is private.", hint) from error
    except LocalEntryNotFoundError as error:
        hint = "Connect to the network for the first run, or set pretrained_model to a local folder."
        raise ModelError(f"{name} is not on this machine and the hub cannot be reached.", hint) from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ModelError(f"{name} could not be downloaded: {reason}.", hint) from error


def read_spec(base: Base) -> FluxSpec:
    folder = base.transformer.parent
    try:
        return read_folder(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{folder} cannot be read as a FLUX.1 model: {error}.", "Download it again.") from error


def load_transformer(base: Base, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """diffusers' `FluxTransformer2DModel`, frozen, in `dtype` on `device`."""
    from diffusers import FluxTransformer2DModel

    place = base.transformer
    with torch.device("meta"):
        transformer: nn.Module = FluxTransformer2DModel.from_config(FluxTransformer2DModel.load_config(place))
    expected = dict(transformer.named_parameters())
    for name, tensor in read_tensors(place, "diffusion_pytorch_model", device):
        parameter = expected.pop(name, None)
        if parameter is None:
            raise ModelError(f"{place} holds a tensor {name} that this model has not.", "Is it a FLUX.1 model?")
        if parameter.shape != tensor.shape:
            seen = f"{name} in {place} has the shape {tuple(tensor.shape)}, not {tuple(parameter.shape)}."
            raise ModelError(seen, "Is its config.json the right one?")
        if not tensor.is_floating_point() or tensor.element_size() < 2:
            seen = f"{place} holds {str(tensor.dtype).removeprefix('torch.')} weights, which cannot be trained."
            raise ModelError(seen, "Use the bf16 weights of FLUX.1-dev or FLUX.1-schnell.")
        put_tensor(transformer, name, tensor.to(dtype))
    if expected:
        seen = f"{place} lacks {len(expected)} tensors, the first is {next(iter(expected))}."
        raise ModelError(seen, "A file is missing or was not downloaded to its end: download it again.")
    transformer.requires_grad_(False)
    # The blocks hold no dropout; some diffusers releases checkpoint only a module that is in training mode.
    return transformer.train()


def read_tensors(folder: Path, stem: str, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a possibly sharded safetensors model, one at a time, on the device."""
    for file in _shards(folder, stem):
        try:
            with safe_open(file, framework="pt", device=str(device)) as tensors:
                for name in tensors.keys():  # noqa: SIM118 (not a dict)
                    yield name, tensors.get_tensor(name)
        except FileNotFoundError as error:
            raise ModelError(f"{file} is missing.", "Download the model again.") from error
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{file} is broken or cut short: {error}.", "Download it again.") from error


def _shards(folder: Path, stem: str) -> list[Path]:
    single = folder / f"{stem}.safetensors"
    index = folder / f"{stem}.safetensors.index.json"
    if single.exists():
        return [single]
    if not index.exists():
        raise ModelError(f"{folder} holds neither {single.name} nor {index.name}.", "Download the model again.")
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(f"{index} is not a list of shards.", "Download the model again.") from error
    missing = sorted(name for name in names if not (folder / name).exists())
    if missing:
        raise ModelError(f"{folder} lacks {', '.join(missing)}.", "Download the model again.")
    return [folder / name for name in sorted(names)]


def put_tensor(module: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)


def fingerprint(folder: Path) -> str:
    """Who the weights of a folder are: sizes, names, and pages spread over every file.

    Hashing 10 GB at every start would take longer than what the cache saves; two trainings of one
    architecture differ in nearly every page.
    """
    import hashlib

    digest = hashlib.sha256()
    for file in sorted(folder.glob("*")):
        if file.suffix not in (".safetensors", ".json", ".txt", ".model"):
            continue
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}:".encode())
        with file.open("rb") as stream:
            if size <= 1 << 20:
                digest.update(stream.read())
                continue
            for step in range(64):
                stream.seek(step * (size - 4096) // 63)
                digest.update(stream.read(4096))
    return digest.hexdigest()[:32]


class Velocity(nn.Module):
    """The transformer as this trainer calls it: tokens in, velocity out, and t untouched on its way."""

    transformer: Any

    def __init__(self, transformer: nn.Module, *, guidance: bool) -> None:
        super().__init__()
        self.transformer = transformer
        self.guidance = guidance
        self._t: Tensor | None = None
        self.transformer.time_text_embed.register_forward_pre_hook(self._exact_time)

    def forward(
        self, x_t: Tensor, t: Tensor, text: Tensor, pooled: Tensor, ids: Tensor, text_ids: Tensor, guidance: float
    ) -> Tensor:
        """(B, N, 4C) velocity for tokens x_t at times t (B,), text (B, L, D), pooled (B, P)."""
        dtype = self.transformer.x_embedder.weight.dtype
        self._t = t.float()
        scale = torch.full((len(t),), guidance, device=t.device) if self.guidance else None
        v: Tensor = self.transformer(
            hidden_states=x_t.to(dtype),
            timestep=t,
            guidance=scale,
            encoder_hidden_states=text.to(dtype),
            pooled_projections=pooled.to(dtype),
            img_ids=ids,
            txt_ids=text_ids,
            return_dict=False,
        )[0]
        return v

    def _exact_time(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """diffusers rounds t to the model's format before the embedding; put the unrounded one back."""
        assert self._t is not None
        return (self._t * 1000, *args[1:])


def steady_attention(device: torch.device) -> None:
    """Leave out cuDNN's attention: its backward pass died on this model on an H100, torch's flash never did."""
    if device.type == "cuda" and hasattr(torch.backends.cuda, "enable_cudnn_sdp"):
        torch.backends.cuda.enable_cudnn_sdp(False)


def quiet_libraries() -> None:
    """The libraries' warnings about attributes that nobody reads would bury the progress lines."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.set_verbosity_error()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    diffusers_logging.disable_progress_bar()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # torch's own calls of its own deprecated functions, once for every checkpointed block.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.")
