"""The steps of two other trainers, with their libraries' own model code: diffusers' example, and X-Flux.

Nothing of theirs is kept here. diffusers, peft and accelerate are imported; X-Flux is imported from a checkout that
the user names. Both are given what favours them: text and latents encoded before and lying on the device, and no
encoder in memory.
"""

from __future__ import annotations

import importlib
import math
import sys
import time
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from random_flux import build, fill, parts
from torch import Tensor, nn
from xflux_trainer import flow
from xflux_trainer.cache import Batch
from xflux_trainer.errors import ModelError
from xflux_trainer.spec import FluxSpec

RANK = 16


class Peer(Protocol):
    """A model with its optimizer. `found` is what of the set-up is worth writing down."""

    found: dict[str, Any]

    def step(self, batch: Batch) -> float:
        """One optimizer step on a batch that lies on the device; the loss."""
        ...


class DiffusersExample:
    """`examples/dreambooth/train_dreambooth_lora_flux.py` with --mixed_precision bf16 and --cache_latents.

    As that script: frozen weights in bf16, LoRA on its 12 default targets in the format that peft gives it,
    accelerate's autocast, torch's AdamW with the script's defaults, clipping at 1, guidance 3.5, the loss read at
    every step.
    """

    TARGETS = (
        "attn.to_k", "attn.to_q", "attn.to_v", "attn.to_out.0",
        "attn.add_k_proj", "attn.add_q_proj", "attn.add_v_proj", "attn.to_add_out",
        "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2",
    )  # fmt: skip

    def __init__(self, spec: FluxSpec, device: torch.device, *, checkpointing: bool) -> None:
        from accelerate import Accelerator
        from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
        from diffusers.optimization import get_scheduler
        from peft import LoraConfig

        cuda = device.type == "cuda"
        self._pipeline: Any = FluxPipeline
        self._dtype = torch.bfloat16 if cuda else torch.float32
        self._accelerator = Accelerator(mixed_precision="bf16" if cuda else "no", cpu=not cuda)
        transformer = build(spec, self._dtype, device)
        if checkpointing:
            transformer.enable_gradient_checkpointing()
        transformer.add_adapter(
            LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=list(self.TARGETS))
        )
        trained = [weight for weight in transformer.parameters() if weight.requires_grad]
        self.found = {
            "trained_parameters": sum(weight.numel() for weight in trained),
            "trained_dtype": str(trained[0].dtype).removeprefix("torch."),
        }
        optimizer = torch.optim.AdamW(trained, lr=1e-4, betas=(0.9, 0.999), weight_decay=1e-4, eps=1e-8)
        rate = get_scheduler("constant", optimizer=optimizer)
        self._transformer, self._optimizer, self._rate = self._accelerator.prepare(transformer, optimizer, rate)
        self._schedule: Any = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)

    def step(self, batch: Batch) -> float:
        from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3

        accelerator, x_0 = self._accelerator, batch.latents.to(self._dtype)
        b, c, h, w = x_0.shape
        with accelerator.accumulate(self._transformer):
            ids = self._pipeline._prepare_latent_image_ids(b, h // 2, w // 2, x_0.device, self._dtype)
            text_ids = torch.zeros(batch.text.shape[1], 3, device=x_0.device, dtype=self._dtype)
            eps = torch.randn_like(x_0)
            u = compute_density_for_timestep_sampling("none", b, logit_mean=0.0, logit_std=1.0, mode_scale=1.29)
            times = self._schedule.timesteps[(u * self._schedule.config.num_train_timesteps).long()].to(x_0.device)
            sigmas = self._sigmas(times, x_0)
            x_t = self._pipeline._pack_latents((1.0 - sigmas) * x_0 + sigmas * eps, b, c, h, w)
            v = self._transformer(
                hidden_states=x_t,
                timestep=times / 1000,
                guidance=torch.tensor([3.5], device=x_0.device).expand(b),
                pooled_projections=batch.pooled.to(self._dtype),
                encoder_hidden_states=batch.text.to(self._dtype),
                txt_ids=text_ids,
                img_ids=ids,
                return_dict=False,
            )[0]
            v = self._pipeline._unpack_latents(v, height=h * 8, width=w * 8, vae_scale_factor=8)
            weighting = compute_loss_weighting_for_sd3(weighting_scheme="none", sigmas=sigmas)
            error = weighting.float() * (v.float() - (eps - x_0).float()) ** 2
            loss = error.reshape(b, -1).mean(1).mean()
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(self._transformer.parameters(), 1.0)
            self._optimizer.step()
            self._rate.step()
            self._optimizer.zero_grad()
        return float(loss.detach())

    def _sigmas(self, times: Tensor, like: Tensor) -> Tensor:
        """The script looks every time up in the schedule, and waits for the device at each."""
        sigmas = self._schedule.sigmas.to(like.device, like.dtype)
        known = self._schedule.timesteps.to(like.device)
        places = [int((known == t).nonzero().item()) for t in times]
        return sigmas[places].view(-1, 1, 1, 1)  # type: ignore[no-any-return]


class XFlux:
    """X-Flux's LoRA script with the model cast to bf16 whole, adapters too, as DeepSpeed's bf16 engine does it.

    Its LoRA processors stand on all blocks; nothing is recomputed, for its code cannot. The optimizer steps masters in
    fp32, as ZeRO's does.
    """

    def __init__(self, spec: FluxSpec, device: torch.device, checkout: Path) -> None:
        code, layers = _xflux(checkout)
        sizes = code.FluxParams(
            spec.in_channels, spec.pooled_dim, spec.text_dim, spec.hidden, 4.0, spec.heads, spec.double_blocks,
            spec.single_blocks, [16, 56, 56], 10_000, True, spec.guidance_embeds,
        )  # fmt: skip
        self._dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        with torch.device("meta"):
            net = code.Flux(sizes)
        for _, module in parts(net):
            fill(module, self._dtype, device)
        with device:
            net.set_attn_processor({name: _processor(layers, name, spec) for name in net.attn_processors})
        self._net: Any = net.to(device, self._dtype).train()
        self._trained: list[nn.Parameter] = []
        for name, weight in net.named_parameters():
            weight.requires_grad_("_lora" in name)
            if weight.requires_grad:
                self._trained.append(weight)
        self._masters = [nn.Parameter(weight.detach().float()) for weight in self._trained]
        self._optimizer = torch.optim.AdamW(self._masters, lr=1e-5, betas=(0.9, 0.999), weight_decay=0.01, eps=1e-8)
        self.found = {
            "trained_parameters": sum(weight.numel() for weight in self._trained),
            "trained_dtype": str(self._dtype).removeprefix("torch."),
        }

    def step(self, batch: Batch) -> float:
        h, w = batch.latents.shape[2:]
        x_0 = flow.pack(batch.latents.float())
        b, device, dtype = len(x_0), x_0.device, self._dtype
        t = flow.shift(torch.rand(1), 1.15).to(device)  # one time for the whole batch
        eps = torch.randn_like(x_0)
        v = self._net(
            img=flow.mix(x_0, eps, t).to(dtype),
            img_ids=flow.image_ids(h, w).expand(b, -1, -1).to(device, dtype),
            txt=batch.text.to(dtype),
            txt_ids=flow.text_ids(batch.text.shape[1]).expand(b, -1, -1).to(device, dtype),
            y=batch.pooled.to(dtype),
            timesteps=t.to(dtype),
            guidance=torch.full((b,), 1.0, device=device, dtype=dtype),
        )
        loss = F.mse_loss(v.float(), eps - x_0)
        told = float(loss.detach())
        loss.backward()
        for master, weight in zip(self._masters, self._trained):  # noqa: B905 (of one length)
            master.grad, weight.grad = weight.grad.float(), None  # type: ignore[union-attr]
        nn.utils.clip_grad_norm_(self._masters, 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_copy_(self._trained, self._masters)
        return told


def _xflux(checkout: Path) -> tuple[Any, Any]:
    """X-Flux's modules of the model and of its layers. Raises `ModelError`, and ImportError for what they need."""
    if not (checkout / "src" / "flux" / "model.py").is_file():
        raise ModelError(f"{checkout} holds no src/flux/model.py.", "Give --xflux the folder of an X-Flux checkout.")
    sys.path.insert(0, str(checkout))
    return importlib.import_module("src.flux.model"), importlib.import_module("src.flux.modules.layers")


def _processor(layers: Any, name: str, spec: FluxSpec) -> nn.Module:
    """The LoRA processor of the block of that name."""
    if name.startswith("double_blocks"):
        return layers.DoubleStreamBlockLoraProcessor(dim=spec.hidden, rank=RANK)  # type: ignore[no-any-return]
    made = layers.SingleStreamBlockLoraProcessor(dim=spec.hidden, rank=RANK)
    if made.proj_lora.down.in_features != spec.hidden + spec.mlp:  # it knows FLUX.1's own width alone
        made.proj_lora = layers.LoRALinearLayer(spec.hidden + spec.mlp, spec.hidden, RANK)
    return made  # type: ignore[no-any-return]


def take_steps(peer: Peer, batches: list[Batch], count: int) -> tuple[list[float], list[float]]:
    """Seconds and losses of so many steps, on batches that are there in turn."""
    cuda = batches[0].latents.is_cuda
    seconds, losses = [], []
    for number in range(count):
        started = time.perf_counter()
        losses.append(peer.step(batches[number % len(batches)]))
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
        if not math.isfinite(losses[-1]):
            raise FloatingPointError(f"the loss of step {number} is {losses[-1]}")
    return seconds, losses
