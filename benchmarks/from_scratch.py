"""Train a small FLUX from scratch on the demo's photographs, then have it draw them again.

    python benchmarks/from_scratch.py [--work DIR] [--sheet FILE.jpg] [--steps 1500] [--vae-steps 1500] [--size 256]

Everything that `make demo` cannot show with random weights: an autoencoder is trained on the photos, then a
transformer of 70 million parameters in FLUX.1's layout, every weight of it, by `python -m xflux_trainer train` in
mode finetune, and each caption is drawn by `python -m xflux_trainer sample`. It is meant to overfit: eight photos,
one text each. Writes the contact sheet (photos above, drawings below) and benchmarks/results/from_scratch-*.json with
the times, the held-out loss before and after, and how far each drawing is from its own photo and from the others.
Exit 1 when a drawing is nearer to another photo than to its own. Needs one GPU; ten minutes at most on an H100.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from PIL import Image, ImageOps
from torch import Tensor, nn

REPO = Path(__file__).resolve().parent.parent
DEMO = REPO / "examples" / "demo"
sys.path.insert(0, str(DEMO))

import caption_tokenizers  # noqa: E402
import flux_layout  # noqa: E402
import tiny_flux  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

TRANSFORMER: dict[str, Any] = {
    **flux_layout.TRANSFORMER,
    "attention_head_dim": 64,
    "axes_dims_rope": [8, 28, 28],
    "guidance_embeds": False,  # nothing was distilled
    "joint_attention_dim": tiny_flux.T5["d_model"],
    "num_attention_heads": 8,
    "num_layers": 4,
    "num_single_layers": 8,
    "pooled_projection_dim": tiny_flux.CLIP["hidden_size"],
}
VAE: dict[str, Any] = {
    **flux_layout.VAE,
    "block_out_channels": [64, 128, 128, 128],
    "layers_per_block": 1,
    "mid_block_add_attention": False,
    "sample_size": 256,
}


def photos(size: int) -> dict[str, Image.Image]:
    """The demo's photos by name, cut to squares."""
    found = {}
    for path in sorted(DEMO.glob("photos/*.jpg")):
        with Image.open(path) as photo:
            found[path.stem] = ImageOps.fit(photo.convert("RGB"), (size, size), Image.Resampling.LANCZOS)
    return found


def pixels(image: Image.Image) -> Tensor:
    """(3, H, W) in [-1, 1]."""
    raw = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return raw.view(image.height, image.width, 3).permute(2, 0, 1).float() / 127.5 - 1


def train_vae(folder: Path, size: int, steps: int, device: torch.device) -> float:
    """An autoencoder for these photos, at scales and places of its own choice. Returns its error on them (RMS)."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL.from_config(VAE).to(device)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-3, weight_decay=0)
    whole = torch.stack([pixels(image) for image in photos(size).values()]).to(device)
    large = torch.stack([pixels(image) for image in photos(2 * size).values()]).to(device)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / steps))
        batch = whole if step % 2 == 0 else _crops(large, size)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            posterior = vae.encode(batch).latent_dist
            answer = vae.decode(posterior.sample()).sample
        error = (answer.float() - batch).abs().mean() + F.mse_loss(answer.float(), batch)
        loss = error + 1e-6 * posterior.kl().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
    with torch.no_grad():
        latents = vae.encode(whole).latent_dist.mode()
        rms = float((vae.decode(latents).sample - whole).square().mean().sqrt())
    # As FLUX.1's: the transformer sees latents of about unit variance.
    config = {**VAE, "scaling_factor": 1 / float(latents.std()), "shift_factor": float(latents.mean())}
    folder.mkdir()
    caption_tokenizers.write_json(folder / "config.json", config)
    _save(folder / "diffusion_pytorch_model.safetensors", dict(vae.state_dict()))
    return rms


def _crops(images: Tensor, size: int) -> Tensor:
    """A window of each image at a random place, half of them mirrored."""
    room = images.shape[-1] - size
    cut = []
    for image in images:
        top, left = (int(x) for x in torch.randint(0, room + 1, (2,)))
        window = image[:, top : top + size, left : left + size]
        cut.append(window.flip(-1) if torch.rand(()) < 0.5 else window)
    return torch.stack(cut)


def fresh_transformer(seed: int) -> dict[str, Tensor]:
    """As diffusion transformers start: modulations and the last layer at zero, so that every block is the identity."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in sorted(flux_layout.diffusers_shapes(TRANSFORMER).items()):
        if len(shape) == 1:
            tensors[name] = torch.zeros(shape) if name.endswith(".bias") else torch.ones(shape)
        elif re.search(r"norm\w*\.linear\.weight$", name) or name == "proj_out.weight":
            tensors[name] = torch.zeros(shape)
        else:
            bound = math.sqrt(6 / (shape[0] + shape[1]))
            tensors[name] = (torch.rand(shape, generator=generator) * 2 - 1) * bound
    return tensors


def write_pipeline(out: Path, size: int, vae_steps: int, device: torch.device) -> dict[str, float]:
    """A pipeline folder with a trained autoencoder and a transformer that knows nothing."""
    captions = caption_tokenizers.read_captions(DEMO / "photos")
    out.mkdir(parents=True)
    clip_tokens = caption_tokenizers.write_clip_tokenizer(out / "tokenizer", captions)
    t5_tokens = caption_tokenizers.write_t5_tokenizer(out / "tokenizer_2", captions)
    end = clip_tokens - 1
    clip = {
        **tiny_flux.CLIP,
        "vocab_size": clip_tokens,
        "bos_token_id": end - 1,
        "eos_token_id": end,
        "pad_token_id": end,
    }
    t5 = {**tiny_flux.T5, "vocab_size": t5_tokens}
    for name, config, tensors in (
        ("text_encoder", clip, tiny_flux.random_tensors(flux_layout.clip_shapes(clip), 0)),
        ("text_encoder_2", t5, tiny_flux.random_tensors(flux_layout.t5_shapes(t5), 1)),
        ("transformer", TRANSFORMER, fresh_transformer(2)),
    ):
        (out / name).mkdir()
        caption_tokenizers.write_json(out / name / "config.json", config)
        stem = "model" if "model_type" in config else "diffusion_pytorch_model"
        _save(out / name / f"{stem}.safetensors", tensors)
    (out / "scheduler").mkdir()
    # No shift: what is drawn is as small as the model, and its coarse shapes are not where the difficulty lies.
    scheduler = {**flux_layout.SCHEDULER, "use_dynamic_shifting": False, "shift": 1.0}
    caption_tokenizers.write_json(out / "scheduler" / "scheduler_config.json", scheduler)
    caption_tokenizers.write_json(out / "model_index.json", flux_layout.MODEL_INDEX)
    started = time.perf_counter()
    rms = train_vae(out / "vae", size, vae_steps, device)
    return {"vae_seconds": time.perf_counter() - started, "vae_rms": rms}


def _save(path: Path, tensors: dict[str, Tensor]) -> None:
    save_file({name: value.detach().float().cpu().contiguous() for name, value in tensors.items()}, path,
              metadata={"format": "pt"})  # fmt: skip


def train_config(work: Path, steps: int, size: int) -> dict[str, Any]:
    return {
        "mode": "finetune",
        "pretrained_model": str(work / "pipeline"),
        "img_dir": str(work / "images"),
        "img_size": size,
        "output_dir": str(work / "output"),
        "train_batch_size": 8,
        "max_train_steps": steps,
        "learning_rate": 5e-4,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 100,
        "adam_beta2": 0.99,
        "adam_weight_decay": 0.0,
        "weight_update": "master",
        "ema_decay": 0.995,
        "mixed_precision": "bf16",
        "gradient_checkpointing": False,
        "timestep_sampling": "logit_normal",
        "stratified_timesteps": True,
        "timestep_shift": "none",
        "max_text_tokens": 64,
        "heldout_samples": 8,
        "checkpointing_steps": steps,
        "sample_every": max(1, steps // 4),
        "sample_prompts": [json.loads(path.read_text())["caption"] for path in sorted(DEMO.glob("photos/*.json"))],
        "sample_width": size,
        "sample_height": size,
        "sample_steps": 28,
        "report_to": "none",
        "num_workers": 2,
        "seed": 0,
    }


def write_sheet(path: Path, rows: list[list[Image.Image]], size: int) -> None:
    sheet = Image.new("RGB", (len(rows[0]) * size, len(rows) * size), "white")
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            sheet.paste(image.resize((size, size), Image.Resampling.LANCZOS), (x * size, y * size))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, quality=88)


def distances(drawn: list[Image.Image], real: list[Image.Image]) -> list[list[float]]:
    """RMS difference of every drawing from every photo, in units of the photos' own spread (1 is as far as grey)."""
    a = torch.stack([pixels(image) for image in drawn]).flatten(1)
    b = torch.stack([pixels(image) for image in real]).flatten(1)
    spread = (b - b.mean(1, keepdim=True)).square().mean(1).sqrt()
    return (((a[:, None] - b[None]).square().mean(2).sqrt()) / spread[None]).tolist()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--work", type=Path, default=REPO / "output" / "from-scratch")
    parser.add_argument("--sheet", type=Path, default=REPO / "docs" / "from-scratch.jpg")
    parser.add_argument("--results", type=Path, default=REPO / "benchmarks" / "results")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--vae-steps", type=int, default=1500)
    parser.add_argument("--size", type=int, default=256)
    options = parser.parse_args()
    started = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    work: Path = options.work
    if work.exists():
        print(f"error: {work} exists: remove it, or name another folder with --work.", file=sys.stderr)
        return 2
    (work / "images").mkdir(parents=True)
    real = photos(options.size)
    for name, image in real.items():
        image.save(work / "images" / f"{name}.png")
        (work / "images" / f"{name}.json").write_bytes((DEMO / "photos" / f"{name}.json").read_bytes())
    numbers: dict[str, Any] = write_pipeline(work / "pipeline", options.size, options.vae_steps, device)
    print(f"autoencoder: {numbers['vae_seconds']:.0f} s, RMS error {numbers['vae_rms']:.3f}", flush=True)
    config = work / "train.yaml"
    config.write_text(yaml.safe_dump(train_config(work, options.steps, options.size), sort_keys=False))
    done = subprocess.run([sys.executable, "-m", "xflux_trainer", "train", "--config", str(config)], cwd=REPO)
    if done.returncode:
        return done.returncode
    metrics = json.loads((work / "output" / "metrics.json").read_text(encoding="utf-8"))
    drawn = []
    for number in range(len(real)):
        with Image.open(work / "output" / "samples" / f"final-{number}.png") as image:
            drawn.append(image.convert("RGB"))
    away = distances(drawn, list(real.values()))
    own = [row[k] for k, row in enumerate(away)]
    lost = [name for k, name in enumerate(real) if min(range(len(own)), key=lambda j, k=k: away[k][j]) != k]
    write_sheet(options.sheet, [list(real.values()), drawn], 192)
    numbers |= {
        "machine": metrics["device"],
        "versions": metrics["versions"],
        "trained_parameters": metrics["trained_parameters"],
        "steps": metrics["steps"],
        "seconds_per_step": metrics["seconds_per_step"],
        "loss": metrics["loss"],
        "heldout_loss": metrics["heldout_loss"],
        "distance_from_own_photo": dict(zip(real, own, strict=True)),
        "nearer_to_another": lost,
        "seconds_total": time.perf_counter() - started,
    }
    machine = re.sub(r"\W+", "-", str(metrics["device"]).lower()).strip("-")
    options.results.mkdir(parents=True, exist_ok=True)
    result = options.results / f"from_scratch-{machine}-{datetime.date.today()}.json"
    result.write_text(json.dumps(numbers, indent=2) + "\n")
    print(f"{numbers['seconds_total']:.0f} s in all; distance from the own photo: "
          + ", ".join(f"{name} {value:.2f}" for name, value in numbers["distance_from_own_photo"].items()))  # fmt: skip
    print(f"wrote {options.sheet} and {result}")
    if lost:
        print(f"error: drawings nearer to another photo than to their own: {', '.join(lost)}", file=sys.stderr)
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
