"""The host's part of a bill: what one rank holds of the host's memory, phase by phase, each with its reason.

Counted is what is the process's own, RssAnon and RssShmem. Pages of mapped files are not: the kernel drops them when
it wants the memory. Weights that are used as the files have them therefore cost a CPU run nothing. The numbers of the
process itself are measured by benchmarks/host_memory.py, with memory that is given back once it is freed (see `heap`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from xflux_trainer.config import TrainConfig
from xflux_trainer.memory_terms import TRANSFORMER, Term, checkpoints, narrow, width
from xflux_trainer.savings import held, is_block, is_modulation, stored, streamed_blocks
from xflux_trainer.spec import FluxSpec, image_tokens
from xflux_trainer.trained import trained

MIB = 1 << 20
ERROR_BAR = 0.10
"""Measured so far: within 10 % in every phase of benchmarks/results/host_memory-*.json, but for the end of a LoRA's run
on a GPU, which took more when they were made; within 5 % of every rank in limits-… and two-gpus-…-2026-11-30.json."""

PROCESS = {
    # (all is to be encoded, the cache is filled)
    "cpu": {"cache": (315, 230), "load": (315, 297), "train": (355, 346), "sample": (358, 346)},
    "cuda": {"cache": (1_370, 440), "load": (1_330, 720), "train": (1_400, 1_030), "sample": (1_530, 1_230)},
}
"""MiB of Python, torch, diffusers and transformers; on a GPU with the CUDA context and the libraries' kernels. Encoding
leaves some of its own behind: modules, and on a GPU the VAE's kernels.

Sources: on a CPU the demo's model, which has nearly no weights, by torch 2.4.0 and 2.13.0 (which differ by 25 MiB).
On a GPU, torch 2.11.0+cu130, benchmarks/results/host_memory-nvidia-h200-2026-11-29.json, 5 + 10 blocks; at full size
two fine-tunes with a filled cache held 1,381 and 1,394 MiB in all (limits-nvidia-h200-2026-11-29.json)."""
NCCL, NCCL_ENCODING, NCCL_CUTTING, DEEPSPEED = 320 * MIB, 520 * MIB, 200 * MIB, 210 * MIB
"""Of each of several ranks on GPUs, more while they encode, less while FSDP2 cuts up what is loaded; DeepSpeed's comes
with the first step. torch 2.11, NCCL 2.28, DeepSpeed 0.19: benchmarks/results/host_memory-2-ranks-*-2026-11-29.json."""
WRITING = 90 * MIB
"""On a GPU, of the rank that writes a fine-tune's result, beside the tensors themselves: 66 to 74 MiB were measured."""
RECORDING = 130 * MIB
"""Of PROCESS's `train`, while steps are recorded. It is let go before adapters are written, which take its place: two
ranks under DDP held 1,610 MiB at the most and 1,482 after their steps, one card let go of 171 at the least. Sources:
benchmarks/results/two-gpus-nvidia-h200-2026-11-30.json and limits-nvidia-h200-2026-11-30.json."""
FP8 = {"cache": 150 * MIB, "load": 60 * MIB}
"""Of products in fp8, which are tried before anything else: Triton and the kernels. Later phases need it anyway. From
the same limits-….json."""
JOINED = 2
"""Times the adapters that another format's tensors take beside them: measured for kohya's and X-Flux's at rank 16."""
BY_ONE, ALONE = ("writing", "adapter files", "a tensor on its way"), ("sample",)
"""Terms and phases of rank 0 alone, which writes results and draws samples."""
STAGING = 16 * (16 << 20)
"""The buffers of `readahead.Window`. Pinned memory stays torch's until the process ends."""
AHEAD = 4 + 1
"""Batches that are read ahead, `ahead.DEPTH`, and the one that is trained on."""
PACKED = ("to_q", "to_k", "to_v", "proj_mlp", "add_q_proj", "add_k_proj", "add_v_proj")
"""Layers of a block whose weights are laid one below the other when it is loaded."""
MAPPED = ("text encoders", "VAE beyond the text encoders", "VAE", "cuBLAS")
"""Terms of a device that are none of a CPU's: encoders stay in their files' pages, and there is no cuBLAS."""
FORWARD, DECODING = "one block forward", "VAE activations"
PASSES = ("load", "train", "sample")


def terms(
    config: TrainConfig, spec: FluxSpec, strategy: str, compute: Iterable[Term], *, on_cpu: bool, encoded: bool = False,
    recorded: bool = False,
) -> Iterator[Term]:  # fmt: skip
    """What one rank holds of the host. `compute` are the terms of the device that computes, `encoded`: the cache is
    filled, so that no encoder is loaded; `recorded`: steps are."""
    if on_cpu:
        yield from _process(config, "cpu", "Python and torch", encoded=encoded)
        yield from _cpu(config, spec, strategy, list(compute), encoded=encoded)
    else:
        yield from _process(config, "cuda", "Python, torch and CUDA", encoded=encoded)
        yield from _cuda(config, spec)
        if config.quantization == "fp8-dynamic":
            yield from (Term("fp8 products", size, phase, "tried first; measured") for phase, size in FP8.items())
        yield from _together(config, spec, strategy, encoded=encoded)
    yield from _batches(config, spec, on_cpu=on_cpu)
    if not on_cpu:  # there the activations, which have gone by then, are more
        yield _written(config, spec, recorded=recorded)


def of_others(terms: Iterable[Term]) -> Iterator[Term]:
    """What a rank holds that is not the first."""
    yield from (term for term in terms if term.name not in BY_ONE and term.phase not in ALONE)


def _process(config: TrainConfig, device: str, name: str, *, encoded: bool) -> Iterator[Term]:
    for phase, sizes in PROCESS[device].items():
        if phase == "sample" and config.disable_sampling:
            continue
        yield Term(name, sizes[encoded] * MIB, phase, "measured, nearly the same for every model")


def _together(config: TrainConfig, spec: FluxSpec, strategy: str, *, encoded: bool) -> Iterator[Term]:
    """What it takes to be one of several ranks on GPUs."""
    if strategy == "single":
        return
    for phase in ("cache", *_passes(config)):
        size = NCCL_ENCODING if phase == "cache" and not encoded else NCCL
        size = NCCL_CUTTING if phase == "load" and strategy == "fsdp" else size
        yield Term("NCCL", size, phase, "its threads and buffers, as measured")
        if strategy.startswith("zero") and phase in PASSES[1:]:
            yield Term("DeepSpeed", DEEPSPEED, phase, "its modules and buffers, as measured")
    if strategy == "fsdp" and config.mode != "lora":
        why = "the largest, whole on the rank that writes; in a checkpoint with its moments"
        yield Term("a tensor on its way", _piece(config, trained(config, spec).largest), "train", why)


def _piece(config: TrainConfig, parameters: int) -> int:
    """Bytes of a parameter of that size under FSDP2 as it is written: weight, moments and average."""
    weight = 4 if not narrow(config) else width(config) * (2 if config.weight_update == "kahan" else 1)
    average = 4 if config.ema_decay else 0
    if not checkpoints(config):  # a result alone
        return parameters * max(weight, average)
    return parameters * (weight + (2 if config.optimizer == "adamw8bit" else 8) + average)


def _passes(config: TrainConfig) -> tuple[str, ...]:
    return PASSES[:2] if config.disable_sampling else PASSES


def _cuda(config: TrainConfig, spec: FluxSpec) -> Iterator[Term]:
    waiting = held(config, spec, width(config)).host
    for phase in _passes(config):
        kept = "" if phase == "load" else "; torch keeps them"
        yield Term("staging buffers", STAGING, phase, f"16 of 16 MiB, pinned: weights are read ahead into them{kept}")
        if waiting:
            yield Term("streamed blocks", waiting, phase, "pinned; the device fetches them when their turn comes")


def _batches(config: TrainConfig, spec: FluxSpec, *, on_cpu: bool) -> Iterator[Term]:
    side = max(config.sizes)
    tokens = image_tokens(side, side)
    one = config.max_text_tokens * spec.text_dim * 2 + 2 * tokens * spec.in_channels * 4  # latents and their noise
    if config.mode == "controlnet":
        one += 3 * side * side
    size = AHEAD * config.train_batch_size * one
    yield Term("batches ahead", size, "train", f"{AHEAD} of them{'' if on_cpu else ', pinned'}")


def _written(config: TrainConfig, spec: FluxSpec, *, recorded: bool) -> Term:
    """By the first rank, beside what is there all the time. Adapters are in fp32: beyond diffusers' format they are
    laid together anew, and B is multiplied by a scale that is not 1."""
    if config.mode != "lora":
        return Term("writing", WRITING, "train", "the result, at the end, by the first rank; as measured")
    joined = any(form != "diffusers" for form in config.formats)
    scaled = config.alpha != config.rank
    size = 4 * trained(config, spec).parameters
    size += (JOINED * size if joined else 0) + (size // 2 if scaled else 0)
    said = ["fp32, at the end", *["laid together"] * joined, *["scaled"] * scaled]
    if recorded:
        size = max(0, size - RECORDING)
        said.append(f"in place of {RECORDING // MIB} MiB that recording the steps took")
    return Term("adapter files", size, "train", ", ".join(said))


# A run on the CPU ----------------------------------------------------------------------------------------


def _cpu(config: TrainConfig, spec: FluxSpec, strategy: str, compute: list[Term], *, encoded: bool) -> Iterator[Term]:
    if not encoded:
        pixels = max(config.sizes) ** 2
        yield Term("VAE", spec.vae_parameters * 4, "cache", "fp32; its file and the text encoders' have bf16")
        yield Term("VAE activations", 5 * 128 * pixels * 4, "cache", "fp32, one image")
    drawing: list[Term] = []
    for term in compute:
        if term.phase == "cache" or term.name in MAPPED:
            continue
        if term.name == TRANSFORMER:
            yield from _weights(config, spec, strategy, term)
        elif term.name in (FORWARD, DECODING):
            drawing.append(term)
        else:
            yield term
    yield from _draw(config, spec, drawing)


def _draw(config: TrainConfig, spec: FluxSpec, drawing: list[Term]) -> Iterator[Term]:
    """The transformer's passes and the VAE's, of which each is gone when the other comes."""
    if not drawing:
        return
    passes = [
        term._replace(bytes=term.bytes // 2, why="half of a GPU's: no convolution has a workspace")
        if term.name == DECODING
        else term
        for term in drawing
    ]
    if width(config) == 4:
        yield Term("VAE", spec.vae_parameters * 4, "sample", "converted: its file has bf16")
        passes = [term._replace(bytes=term.bytes * 2) if term.name == DECODING else term for term in passes]
    yield max(passes, key=lambda term: term.bytes)


def _weights(config: TrainConfig, spec: FluxSpec, strategy: str, whole: Term) -> Iterator[Term]:
    """Of the transformer what does not stay in its file's pages."""
    cut = strategy in ("zero3", "fsdp")
    if config.mixed_precision != "bf16" or cut:
        why = "this rank's part" if cut else "converted: the file has bf16"
        yield Term(TRANSFORMER, whole.bytes + held(config, spec, width(config)).host, whole.phase, why)
        if whole.phase == "load" and not cut and config.quantization == "none":
            lines = spec.linears()
            laid = sum(line.parameters for line in lines if _packed(line.name) and line.name.startswith("single_"))
            after = sum(line.parameters for line in lines if line.name.startswith(("norm_out", "proj_out")))
            size = (laid // max(1, spec.single_blocks) - after) * width(config)
            yield Term("laid together", max(0, size), "load", "the last block's, beside what it is copied from")
        return
    kept = held(config, spec)
    streamed = set(streamed_blocks(spec.double_blocks, spec.single_blocks, config.stream_blocks))
    copied, left = kept.host + kept.slots * (whole.phase != "load"), 0  # the slots are made at the first step
    what = trained(config, spec).layers if config.mode == "finetune" else frozenset()
    for linear in spec.linears():
        block = ".".join(linear.name.split(".")[:2])
        modulates = is_modulation(linear.name)
        if not is_block(block) or block in streamed or (modulates and config.modulation == "stream"):
            left += linear.parameters * 2 * (linear.name in what)
        elif config.quantization != "none" and (not modulates or config.modulation == "quantize"):
            copied += stored(linear, config.quantization)
        elif _packed(linear.name):
            copied += linear.parameters * 2
        else:
            left += linear.parameters * 2 * (linear.name in what)
    mapped = max(0, spec.transformer_parameters * 2 - copied) // MIB
    why = f"what is laid together, quantised or streamed; {mapped:,} MiB at the most stay in the file's pages"
    yield Term(TRANSFORMER, copied, whole.phase, why)
    if left and whole.phase != "load":
        yield Term("weights that were stepped", left, whole.phase, "pages of the file become the process's own")


def _packed(name: str) -> bool:
    return name.rpartition(".")[2] in PACKED
