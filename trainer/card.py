"""README.md in the output folder: a model card in the hub's format, of what was trained, on what, and how to load it.

It holds no path of this machine: a card is made to be published.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from xflux_trainer import config as train_config
from xflux_trainer import files, sheet
from xflux_trainer.config import HUB_IDS, TrainConfig
from xflux_trainer.plots import NAME as PLOT
from xflux_trainer.settings import MODE_KEYS

NAME = "README.md"
LICENSES: dict[str, dict[str, str]] = {
    "flux-dev": {
        "license": "other",
        "license_name": "flux-1-dev-non-commercial-license",
        "license_link": "https://huggingface.co/black-forest-labs/FLUX.1-dev/blob/main/LICENSE.md",
    },
    "flux-schnell": {"license": "apache-2.0"},
}
"""The base model's, which what is trained on it inherits."""
KINDS = {"lora": "LoRA", "finetune": "fine-tune", "controlnet": "ControlNet"}
LOCAL = """img_dir output_dir pretrained_model cache_dir heldout_dir control_dir resume_from_checkpoint lora_init
controlnet_init logging_dir push_to_hub tracker_project_name repeats num_workers""".split()
"""Keys that say something of this machine and nothing of the model."""


def write(
    output: Path, config: TrainConfig, told: Mapping[str, Any], results: Sequence[Path], captions: Sequence[str] = ()
) -> Path:
    """Write the card. `told` is metrics.json, `results` are the final files or folders below `output`.

    `captions` are those of the images: one that all share is the card's instance prompt. Raises `WriteError`.
    """
    samples = [row[sheet.FINAL] for _, row in sorted(sheet.images(output / "samples").items()) if sheet.FINAL in row]
    front = _front(config, [(path, _caption(path)) for path in samples], captions, output)
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True, width=1000)}---\n",
        f"# {_title(config, output)}\n",
        f"A {KINDS[config.mode]} for [{base_id(config)}](https://huggingface.co/{base_id(config)}).\n",
        "<Gallery />\n" if samples else "",
        _training(config, told),
        f"![loss]({PLOT})\n" if (output / PLOT).exists() else "",
        "## Use\n\n" + _use(config, [path.relative_to(output).as_posix() for path in results]),
    ]
    files.write_bytes(output / NAME, "\n".join(part for part in parts if part).encode())
    return output / NAME


def base_id(config: TrainConfig) -> str:
    """The base model's name on the hub; for a local folder that of the model that it says it is."""
    name = config.pretrained_model
    plain = name and name.count("/") == 1 and not name.startswith((".", "/", "~")) and not Path(name).exists()
    return name if name and plain else HUB_IDS[config.model_name]


def _title(config: TrainConfig, output: Path) -> str:
    return (config.push_to_hub or output.resolve().name).split("/")[-1]


def _front(
    config: TrainConfig, samples: list[tuple[Path, str]], captions: Sequence[str], output: Path
) -> dict[str, Any]:
    """The YAML between the lines of dashes, by which the hub sorts and shows the model."""
    front: dict[str, Any] = {
        **LICENSES[config.model_name],
        "base_model": base_id(config),
        "base_model_relation": "finetune" if config.mode == "finetune" else "adapter",
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["flux", "flux-diffusers", "text-to-image", "diffusers", "diffusers-training", config.mode],
    }
    if config.mode == "lora":
        front["tags"].append("template:sd-lora")  # the hub's gallery of adapters
    shared = set(captions)
    if len(shared) == 1 and (prompt := shared.pop().strip()):
        front["instance_prompt"] = prompt
    if samples:
        front["widget"] = [
            {"text": caption or "a sample", "output": {"url": path.relative_to(output).as_posix()}}
            for path, caption in samples
        ]
    return front


def _caption(path: Path) -> str:
    from PIL import Image

    try:
        with Image.open(path) as image:
            return str(getattr(image, "text", {}).get("Description", ""))
    except (OSError, SyntaxError):
        return ""


def _training(config: TrainConfig, told: Mapping[str, Any]) -> str:
    """What was trained, on how many images, with which losses."""
    batch = told.get("train_batch_size", config.train_batch_size) * told.get("gradient_accumulation_steps", 1)
    loss, heldout = told.get("loss") or {}, told.get("heldout_loss") or {}
    rows = [
        ("images", f"{told['images']:,}" if "images" in told else None),
        ("optimizer steps", f"{told['steps']:,}" if "steps" in told else None),
        ("images a step", f"{batch * told.get('world_size', 1):,}"),
        ("trained parameters", f"{told['trained_parameters']:,}" if "trained_parameters" in told else None),
        ("size", " and ".join(f"{size} px" for size in config.sizes)),
        ("learning rate", f"{config.learning_rate:g}, {config.lr_scheduler}"),
        ("mean loss", _float(loss.get("mean"))),
        ("held-out loss", _change(heldout.get("before"), heldout.get("after"))),
        ("time", f"{told['seconds_training'] / 60:,.1f} minutes" if told.get("seconds_training") else None),
        ("on", f"{told.get('world_size', 1)} x {told['device']}" if told.get("device") else None),
        ("with", ", ".join(f"{name} {number}" for name, number in (told.get("versions") or {}).items())),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows if value)
    changed = yaml.safe_dump(_settings(config), sort_keys=False, allow_unicode=True, width=110)
    return (
        f"## Training\n\nBy rectified flow, with the `xflux-doctor` trainer.\n\n| | |\n| --- | --- |\n{table}\n\n"
        f"Settings that are not the trainer's own:\n\n```yaml\n{changed}```\n"
    )


def _settings(config: TrainConfig) -> dict[str, Any]:
    """What differs from the defaults and says something of the training; the mode, the model and the seed always."""
    defaults = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
    other = {key for mode, keys in MODE_KEYS.items() if mode != config.mode for key in keys}
    plain = train_config.to_dict(config)
    return {
        key: value
        for key, value in plain.items()
        if key in ("mode", "model_name", "seed")
        or (key not in LOCAL and key not in other and getattr(config, key) != defaults[key])
    }


def _float(value: Any) -> str | None:
    return None if value is None else f"{value:.4f}"


def _change(before: Any, after: Any) -> str | None:
    if before is None or after is None:
        return _float(after)
    return f"{before:.4f} before, {after:.4f} after"


def _use(config: TrainConfig, results: list[str]) -> str:
    place = config.push_to_hub or "."
    lines = {"lora": _lora, "finetune": _finetune, "controlnet": _controlnet}[config.mode]
    return lines(config, place, results)


def _call(config: TrainConfig, more: str = "") -> str:
    dev = config.model_name == "flux-dev"
    steps, guidance = (config.sample_steps, config.sample_guidance) if dev else (4, 0.0)
    return (
        f'pipe.to("cuda")\nimage = pipe("a prompt", {more}width={config.sample_width}, height={config.sample_height}, '
        f'num_inference_steps={steps}, guidance_scale={guidance:g}).images[0]\nimage.save("image.png")\n'
    )


def _lora(config: TrainConfig, place: str, results: list[str]) -> str:
    # diffusers reads all three formats; its own needs no conversion.
    names = {"diffusers": "pytorch_lora_weights.safetensors", "xlabs": "lora.safetensors"}
    best = next((name for name in results if name == names["diffusers"]), results[0] if results else "")
    plain = [name for name in results if name != names["xlabs"]]
    text = (
        "With diffusers:\n\n```python\nimport torch\nfrom diffusers import FluxPipeline\n\n"
        f'pipe = FluxPipeline.from_pretrained("{base_id(config)}", torch_dtype=torch.bfloat16)\n'
        f'pipe.load_lora_weights("{place}", weight_name="{best}")\n{_call(config)}```\n'
    )
    if plain:
        text += f"\nIn ComfyUI: put `{plain[-1]}` into `models/loras`, and add the node *Load LoRA*.\n"
    if names["xlabs"] in results:
        text += f"\n`{names['xlabs']}` is for X-Flux and for the nodes of x-flux-comfyui (`models/xlabs/loras`).\n"
    return text


def _finetune(config: TrainConfig, place: str, results: list[str]) -> str:
    folder = results[0] if results else "transformer"
    return (
        "With diffusers:\n\n```python\nimport torch\nfrom diffusers import FluxPipeline, FluxTransformer2DModel\n\n"
        f'transformer = FluxTransformer2DModel.from_pretrained("{place}", subfolder="{folder}", '
        "torch_dtype=torch.bfloat16)\n"
        f'pipe = FluxPipeline.from_pretrained("{base_id(config)}", transformer=transformer, '
        f"torch_dtype=torch.bfloat16)\n{_call(config)}```\n\n"
        "ComfyUI wants one file in `models/diffusion_models`, for the node *Load Diffusion Model*: "
        '`transformer.save_pretrained("one", max_shard_size="100GB")` makes it.\n'
    )


def _controlnet(config: TrainConfig, place: str, results: list[str]) -> str:
    folder = next((name for name in results if not name.endswith(".safetensors")), "controlnet")
    single = next((name for name in results if name.endswith(".safetensors")), "")
    what = "the image's Canny edges" if config.control_type == "canny" else "an image as those of its training"
    text = (
        "With diffusers:\n\n```python\nimport torch\n"
        "from diffusers import FluxControlNetModel, FluxControlNetPipeline\n"
        "from diffusers.utils import load_image\n\n"
        f'controlnet = FluxControlNetModel.from_pretrained("{place}", subfolder="{folder}", '
        "torch_dtype=torch.bfloat16)\n"
        f'pipe = FluxControlNetPipeline.from_pretrained("{base_id(config)}", controlnet=controlnet, '
        f'torch_dtype=torch.bfloat16)\ncondition = load_image("condition.png")  # {what}\n'
        f"{_call(config, 'control_image=condition, controlnet_conditioning_scale=0.7, ')}```\n"
    )
    if single:
        text += (
            f"\nIn ComfyUI: put `{single}` into `models/controlnet`, and add the nodes *Load ControlNet Model* and "
            "*Apply ControlNet*. X-Flux reads the same file.\n"
        )
    return text
