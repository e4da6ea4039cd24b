"""Stage of `gpu.py`: one double and one single block at the job's shapes, forward and backward.

Judged against diffusers' own blocks in float32 on the same weights and inputs: what rounding to 16 bits makes of
diffusers' blocks is the measure for the trainer's.
"""

from __future__ import annotations

import importlib
import math
from typing import Any

LEAST = (0.03, 0.06)
"""Relative errors of the output and of a gradient up to which nothing is wrong in 16 bits, whatever diffusers' are."""
TIMES = 2.0
"""So many times diffusers' own error in 16 bits is still rounding: other places of it, other sums."""
EXACT = (1e-4, 1e-3)
"""The same in float32."""
WORDS = {"text": 4096, "pooled": 768}


class Absent(Exception):
    """Why no blocks can be made here."""


def blocks(gpu: Any, name: str) -> dict[str, Any]:
    """`trainer`: its own code; `diffusers`: their blocks as the trainer runs them; `choice`: with any attention."""
    try:
        twin = _Twin(gpu)
    except Absent as error:
        return {"left_out": str(error)[:300]}
    true = twin.reference()
    rounded = twin.by_diffusers(steady=True)
    errors = _errors(rounded, true)
    if name == "diffusers":
        limits, made, attention = _least(gpu), errors, "torch's, without cuDNN's"
        seconds = gpu.timed(lambda: twin.by_diffusers(steady=True), 0, warm=0)
    elif name == "choice":
        limits, attention = _limits(gpu, errors), "torch's choice"
        made = _errors(twin.by_diffusers(steady=False), true)
        seconds = gpu.timed(lambda: twin.by_diffusers(steady=False), 0, warm=0)
    else:
        limits, (fast, attention) = _limits(gpu, errors), twin.own()
        made = _errors(twin.run(fast), true)
        seconds = gpu.timed(lambda: twin.run(fast), 0, warm=1)
    ok = all(value <= limit for value, limit in zip(made, limits))  # noqa: B905 (two each)
    numbers = [value if math.isfinite(value) else 1e9 for value in made]
    detail = "" if ok else f"the output is off by {numbers[0]:.1%}, a gradient by {numbers[1]:.1%}; diffusers' own "
    detail += "" if ok else f"blocks in the same format by {errors[0]:.1%} and {errors[1]:.1%}"
    return {"blocks": {"name": name, "ok": ok, "output": numbers[0], "gradient": numbers[1], "seconds": seconds,
                       "attention": attention, "detail": detail}}  # fmt: skip


def _least(gpu: Any) -> tuple[float, float]:
    return EXACT if gpu.ask["dtype"] == "float32" else (2 * LEAST[0], 2 * LEAST[1])


def _limits(gpu: Any, errors: tuple[float, float]) -> tuple[float, float]:
    least = EXACT if gpu.ask["dtype"] == "float32" else LEAST
    return max(least[0], TIMES * errors[0]), max(least[1], TIMES * errors[1])


Made = tuple[Any, dict[str, Any]]


def _errors(made: Made, true: Made) -> tuple[float, float]:
    """Of the output, and the largest of a gradient; infinite where a number is none."""

    def off(mine: Any, right: Any) -> float:
        error = float((mine.double() - right.double()).norm() / right.double().norm().clamp_min(1e-30))
        return error if math.isfinite(error) else math.inf

    return off(made[0], true[0]), max(off(made[1][name], right) for name, right in true[1].items())


class _Twin:
    """A FLUX of one double and one single block with adapters, and one batch for it."""

    def __init__(self, gpu: Any) -> None:
        try:
            diffusers = importlib.import_module("diffusers")
            self.parts = {name: importlib.import_module(f"xflux_trainer.{name}")
                          for name in ("attention", "config", "fast", "fastops", "flow", "lora", "model")}  # fmt: skip
        except Exception as error:
            raise Absent(f"the trainer and diffusers cannot be imported here: {error}") from error
        torch = self.torch = gpu.torch
        self.gpu, self.dtype = gpu, getattr(torch, gpu.ask["dtype"])
        batch, _, heads, channels = gpu.ask["shape"]
        side = channels * 7 // 32 * 2  # of 128 channels 56 turn by the row, 56 by the column, and 16 by nothing
        rest = channels - 2 * side
        with torch.device(gpu.device):
            self.net = diffusers.FluxTransformer2DModel(
                num_layers=1, num_single_layers=1, num_attention_heads=heads, attention_head_dim=channels,
                joint_attention_dim=WORDS["text"] if gpu.cuda else 24, guidance_embeds=True, in_channels=64,
                pooled_projection_dim=WORDS["pooled"] if gpu.cuda else 12, axes_dims_rope=(rest, side, side),
            ).requires_grad_(False).to(self.dtype)  # fmt: skip
        packed = self.parts["fast"].Packed()
        for kind in ("transformer_blocks", "single_transformer_blocks"):
            packed(f"{kind}.0", getattr(self.net, kind)[0])
        self.settings = self.parts["config"].TrainConfig(
            "none", mixed_precision={"bfloat16": "bf16", "float16": "fp16"}.get(gpu.ask["dtype"], "no"), rank=4,
            lora_targets="diffusers", attention=gpu.ask["attention"],
        )  # fmt: skip
        self.trained = self.parts["lora"].attach(self.net, self.settings)
        for parameter in self.trained.values():
            parameter.data.normal_(0, 0.02)
        self.inputs = self._inputs(batch)

    def _inputs(self, batch: int) -> dict[str, Any]:
        torch, gpu, flow = self.torch, self.gpu, self.parts["flow"]
        rows, columns = gpu.ask["image"]
        sizes = self.net.config

        def random(*shape: int) -> Any:
            return torch.randn(*shape, device=gpu.device).to(self.dtype)

        # 500 and 2000 are not rounded in 16 bits, so that all formats have the same times.
        t, guidance = (torch.full((batch,), value, device=gpu.device) for value in (0.5, 2.0))
        return {
            "x": random(batch, rows * columns, 64),
            "text": random(batch, gpu.ask["text"], sizes.joint_attention_dim),
            "pooled": random(batch, sizes.pooled_projection_dim),
            "t": t,
            "guidance": guidance,
            "ids": flow.image_ids(2 * rows, 2 * columns).to(gpu.device),
            "text_ids": flow.text_ids(gpu.ask["text"]).to(gpu.device),
            "out": random(batch, rows * columns, 64),
        }

    def run(self, call: Any) -> Made:
        """The output, and the gradients of the adapters and of the input."""
        self.inputs["x"] = self.inputs["x"].detach().requires_grad_()
        y = call()
        names = [*self.trained, "the input"]
        wanted = [*self.trained.values(), self.inputs["x"]]
        grads = self.torch.autograd.grad(y, wanted, self.inputs["out"].to(y.dtype))
        return y.detach(), dict(zip(names, grads))  # noqa: B905 (of one length)

    def _diffusers(self) -> Any:
        given = self.inputs
        dtype = next(self.net.parameters()).dtype
        return self.net(
            hidden_states=given["x"].to(dtype), timestep=given["t"], guidance=given["guidance"], return_dict=False,
            encoder_hidden_states=given["text"].to(dtype), pooled_projections=given["pooled"].to(dtype),
            img_ids=given["ids"], txt_ids=given["text_ids"],
        )[0]  # fmt: skip

    def by_diffusers(self, *, steady: bool) -> Made:
        """As the trainer has them computed, or with whatever attention torch takes by itself."""
        self.gpu.allow_cudnn(not steady)
        return self.run(self._diffusers)

    def reference(self) -> Made:
        """diffusers' blocks in float32, on weights that have been rounded already."""
        self.gpu.allow_cudnn(False)
        kept = {name: value.data for name, value in self.net.named_parameters()}
        try:
            self.net.float()
            return self.run(self._diffusers)
        finally:
            for name, value in self.net.named_parameters():
                value.data = kept[name]

    def own(self) -> tuple[Any, str]:
        """The trainer's blocks with the attention that its config makes it take, and that one's name."""
        given, parts, device = self.inputs, self.parts, self.gpu.device
        chosen, _ = parts["attention"].choose(self.settings.attention, device, self.dtype, self.gpu.ask["shape"][3])
        fast = parts["fast"].Fast(self.net, chosen, parts["fastops"].ops(device), 0)

        def call() -> Any:
            return fast(given["x"], given["text"], given["pooled"], given["t"], given["guidance"], given["ids"],
                        given["text_ids"])  # fmt: skip

        return call, chosen.name
