"""Every way of training FLUX.1 on one GPU, at full size with made-up weights: seconds per step and peak memory.

    python benchmarks/full_size.py [--rows 'lora-*'] [--sizes 512,1024] [--steps 8] [--gpu-limit-gib N] [--effect]

Nothing is downloaded or written but the result: weights are drawn on the device block by block and quantised as the
trainer's loader does it, and the steps are the trainer's own. Every row runs in a process of its own with a deadline,
so that one that is out of memory ends alone. `--effect` measures what quantisation does to the loss instead.
Writes benchmarks/results/full_size-GPU-DATE.json and prints a table. Exit 1 when a row failed for another reason
than memory or a missing part.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import children
from children import GIB, RESULTS, numbers

WARM_UP = 3


@dataclass(frozen=True)
class Row:
    """One line of the table: a name, what it shows, and the keys of the train config that make it."""

    name: str
    about: str
    keys: dict[str, Any] = field(default_factory=dict)


FULL = {"mode": "finetune", "weight_update": "stochastic"}
IN_BACKWARD = {**FULL, "step_in_backward": True}
ROWS = [
    Row("lora", "bf16 base"),
    Row("lora-kept", "bf16 base, nothing recomputed", {"gradient_checkpointing": False}),
    Row("lora-int8", "quanto int8", {"quantization": "int8"}),
    Row("lora-int8-kept", "quanto int8, nothing recomputed",
        {"quantization": "int8", "gradient_checkpointing": False}),
    Row("lora-fp8", "quanto fp8 (e4m3)", {"quantization": "fp8"}),
    Row("lora-int4", "quanto int4", {"quantization": "int4"}),
    Row("lora-nf4", "bitsandbytes nf4, double quantised", {"quantization": "nf4"}),
    Row("lora-torchao-int8", "torchao int8, weights only", {"quantization": "torchao-int8"}),
    Row("lora-torchao-fp8", "torchao fp8, weights only", {"quantization": "torchao-fp8"}),
    Row("lora-int8-all", "int8, the modulation too", {"quantization": "int8", "modulation": "quantize"}),
    Row("lora-nf4-all", "nf4, the modulation too", {"quantization": "nf4", "modulation": "quantize"}),
    Row("lora-int8-stream", "int8, the modulation streamed", {"quantization": "int8", "modulation": "stream"}),
    Row("lora-nf4-stream", "nf4, the modulation streamed", {"quantization": "nf4", "modulation": "stream"}),
    Row("lora-stream-19", "bf16, 19 of 57 blocks streamed", {"stream_blocks": 19}),
    Row("lora-stream-57", "bf16, every block streamed", {"stream_blocks": 57}),
    Row("lora-int8-stream-28", "int8, 28 of 57 blocks streamed", {"quantization": "int8", "stream_blocks": 28}),
    Row("finetune-adafactor", "all 11.9 B parameters, Adafactor stepped in the backward pass",
        {**IN_BACKWARD, "optimizer": "adafactor"}),
    Row("finetune-adafactor-kept", "the same, nothing recomputed",
        {**IN_BACKWARD, "optimizer": "adafactor", "gradient_checkpointing": False}),
    Row("finetune-adamw8bit", "all 11.9 B parameters, 8-bit AdamW", {**FULL, "optimizer": "adamw8bit"}),
    Row("finetune-adamw8bit-backward", "the same, stepped in the backward pass",
        {**IN_BACKWARD, "optimizer": "adamw8bit"}),
    Row("controlnet", "two double blocks beside a bf16 base", {"mode": "controlnet"}),
    Row("controlnet-int8", "the same beside an int8 base", {"mode": "controlnet", "quantization": "int8"}),
]  # fmt: skip


# One row, in a process of its own ------------------------------------------------------------------------


def measure(row: Row, pixels: int, options: argparse.Namespace) -> dict[str, Any]:
    """Build the model, take the steps, and say what they cost."""
    import torch
    from random_flux import batch, spec_of
    from xflux_trainer import evaluate, flow, model
    from xflux_trainer.config import TrainConfig
    from xflux_trainer.lora import generator
    from xflux_trainer.optim import PlainStepper
    from xflux_trainer.ranks import Launch, Ranks

    spec = spec_of(options.layers, options.heads)
    precision = "bf16" if torch.cuda.is_available() else "no"
    config = TrainConfig("none", img_size=pixels, **{"mixed_precision": precision, **row.keys})
    ranks = Ranks(Launch())
    ranks.join()
    cuda = ranks.device.type == "cuda"
    if cuda and options.gpu_limit_gib:
        total = torch.cuda.get_device_properties(ranks.device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, options.gpu_limit_gib * GIB / total))
    model.quiet_libraries()
    model.steady_attention(ranks.device)
    started = time.perf_counter()
    module, trained, found = assemble(config, spec, ranks.device)
    stepper = PlainStepper(module, trained, config, ranks, 1)
    found |= {"load_seconds": time.perf_counter() - started, "load_gib": peak(cuda)[0], "batch": 1}
    found["trained_parameters"] = sum(weight.numel() for weight in trained.values())
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    seconds, losses = [], []
    for number in range(WARM_UP + options.steps):
        data = batch(spec, pixels, 1, number, condition=config.mode == "controlnet")
        dice = generator("benchmark noise", number)
        x_0 = flow.pack(data.latents)
        t = flow.sample_t(1, flow.training_mu(config, spec, x_0.shape[1]), config.timestep_sampling, dice)
        eps = torch.randn(x_0.shape, generator=dice)
        started = time.perf_counter()
        stepper.begin(config.learning_rate)
        with stepper.micro(last=True):
            loss = evaluate.velocity_loss(stepper, config, data, eps, t, ranks.device).mean()
            stepper.backward(loss)
        losses.append(float(loss.detach()))
        stepper.step()
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    allocated, reserved = peak(cuda)
    steady = seconds[WARM_UP:]
    return found | {
        "seconds_per_step": statistics.median(steady), "seconds_min": min(steady), "seconds_max": max(steady),
        "allocated_gib": allocated, "reserved_gib": reserved, "loss_first": losses[0], "loss_last": losses[-1],
        "host_peak_gib": host_peak(),
    }  # fmt: skip


def assemble(config: Any, spec: Any, device: Any) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """The module that is trained, its trained parameters, and what streaming takes."""
    from random_flux import build, fill
    from xflux_trainer import fast, lora, model, quantize

    dtype = model.DTYPES[config.mixed_precision]
    prepare = quantize.preparer(config, device, (spec.double_blocks, spec.single_blocks))
    transformer = build(spec, dtype, device, fast.Packed(prepare))
    if config.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    pinned = prepare.streamer.host_bytes / GIB if prepare and prepare.streamer else 0.0
    found = {"pinned_gib": pinned}
    if config.mode == "controlnet":
        from xflux_trainer import controlnet

        net = controlnet.empty(spec, config.controlnet_depth)
        fill(net, dtype, device)
        trained = controlnet.parameters(net.train())
        for weight in trained.values():
            weight.requires_grad_(True)
        if config.gradient_checkpointing:
            net.enable_gradient_checkpointing()
        module: Any = controlnet.ControlVelocity(net, transformer, guidance=True)
        module.velocity.fast, found["computed_by"] = fast.build(transformer, config, device)
        return module, trained, found
    if config.mode == "finetune":
        # Without these, the stepper would take AdamW for every optimizer and the row would lie.
        from xflux_trainer import backward, finetune, optimizers, rounding  # noqa: F401

        trained = finetune.select(transformer, config)
    else:
        trained = lora.attach(transformer, config)
    module = model.Velocity(transformer, guidance=True)
    module.fast, found["computed_by"] = fast.build(transformer, config, device)
    return module, trained, found


def peak(cuda: bool) -> tuple[float, float]:
    """GiB allocated and reserved at most on the device."""
    import torch

    if not cuda:
        return 0.0, 0.0
    return torch.cuda.max_memory_allocated() / GIB, torch.cuda.max_memory_reserved() / GIB


def host_peak() -> float:
    """GiB of the host's memory that this process held at most."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def child(options: argparse.Namespace) -> int:
    """Measure the one row that is asked for, and write what came of it."""
    import torch
    from xflux_trainer.errors import UserError

    row = next(row for row in ROWS if row.name == options.child)
    try:
        outcome = {"outcome": "measured", **measure(row, options.sizes[0], options)}
    except torch.cuda.OutOfMemoryError as error:
        outcome = {"outcome": "out of memory", "why": str(error).split(". ")[0]}
    except UserError as error:
        outcome = {"outcome": "not there", "why": str(error)}
    except ImportError as error:
        outcome = {"outcome": "not there", "why": f"this trainer has no such part yet: {error}"}
    options.result.write_text(json.dumps(outcome), "utf-8")
    return 0


# All rows ------------------------------------------------------------------------------------------------


def run_row(row: Row, pixels: int, options: argparse.Namespace) -> dict[str, Any]:
    """One row's numbers, or why there are none."""
    argv = [sys.executable, str(Path(__file__).resolve()), "--child", row.name]
    argv += ["--sizes", str(pixels), "--steps", str(options.steps), "--heads", str(options.heads)]
    argv += ["--layers", ",".join(map(str, options.layers))]
    argv += ["--gpu-limit-gib", f"{options.gpu_limit_gib:g}"] if options.gpu_limit_gib else []
    head = {"row": row.name, "about": row.about, "pixels": pixels, "config": row.keys}
    return head | children.run(argv, options.deadline)


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| row | what | px | s/step | allocated GiB | reserved GiB | while loading GiB | pinned GiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        start = f"| {row['row']} | {row['about']} | {row['pixels']} |"
        if row["outcome"] != "measured":
            lines.append(f"{start} {row['outcome']} | – | – | – | – |")
            continue
        numbers = [row[key] for key in ("allocated_gib", "reserved_gib", "load_gib", "pinned_gib")]
        lines.append(f"{start} {row['seconds_per_step']:.3f} | " + " | ".join(f"{n:.1f}" for n in numbers) + " |")
    return "\n".join(lines)


def save(kind: str, options: argparse.Namespace, rows: list[dict[str, Any]]) -> Path:
    settings = {"layers": options.layers, "heads": options.heads, "steps": options.steps, "warm_up": WARM_UP}
    return children.save(options.results, kind, "full_size.py", {**settings, "rows": rows})


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--rows", default="*", help="names or patterns, with commas between them (--list shows them)")
    parser.add_argument("--list", action="store_true", help="show the rows and leave")
    parser.add_argument("--sizes", type=numbers, default=(512, 1024), help="pixels of the image's sides")
    parser.add_argument("--steps", type=int, default=8, help="measured steps, after three that are not")
    parser.add_argument("--layers", type=numbers, default=(19, 38), metavar="D,S", help="double and single blocks")
    parser.add_argument("--heads", type=int, default=24, help="attention heads of 128 each")
    parser.add_argument("--gpu-limit-gib", type=float, help="hold each row to this much GPU memory")
    parser.add_argument("--deadline", type=float, default=600, metavar="S", help="seconds for each row and size")
    parser.add_argument("--effect", action="store_true", help="measure the effect on the loss instead")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return child(options)
    if options.list:
        print("\n".join(f"{row.name:28} {row.about}" for row in ROWS))
        return 0
    if options.effect:
        import quantization_effect

        rows = quantization_effect.measure(options.steps)
        print(quantization_effect.table(rows))
        print(f"\nwritten to {save('quantization_effect', options, rows)}")
        return 0
    patterns = options.rows.split(",")
    chosen = [row for row in ROWS if any(fnmatch.fnmatch(row.name, pattern) for pattern in patterns)]
    if not chosen:
        print(f"error: no row is called {options.rows}. --list shows all.", file=sys.stderr)
        return 2
    results: list[dict[str, Any]] = []
    for row in chosen:
        for pixels in options.sizes:
            results.append(run_row(row, pixels, options))
            last = results[-1]
            print(table([last]).splitlines()[-1], last.get("why", ""), flush=True)
            file = save("full_size", options, results)  # after each: a row that ends the machine loses no others
    print(f"\n{table(results)}\n\nwritten to {file}")
    return 1 if any(row["outcome"] in ("failed", "too slow") for row in results) else 0


if __name__ == "__main__":
    sys.exit(main())
