"""HW: the attention and the blocks that this job computes, as they were tried at its shapes (`check --deep`)."""

from __future__ import annotations

from collections.abc import Iterator

from xflux_doctor.bill import fused
from xflux_doctor.check import Case, SkipCheck, check
from xflux_doctor.checks.tried import name
from xflux_doctor.facts import AttentionTrial, BlockTrial, GpuProbe
from xflux_doctor.finding import Edit, Finding, error, warning

_AUTO = ("flash-attn-4", "flash")
"""What the trainer's `auto` takes, in its order (trainer/attention.py)."""
_SLOWER = 1.25
"""So many times the time of another right one is worth a word."""
_PLAIN = ("attention torch choice", "attention torch cudnn", "blocks choice")
_SOURCE = "https://github.com/pytorch/pytorch/issues/190321"
WITHOUT_CUDNN = "export TORCH_CUDNN_SDPA_DEPRIORITIZED=1 TORCH_CUDNN_SDPA_PREFERRED=0"
"""The newer name and the older one of what keeps cuDNN from being torch's first choice (aten's sdp_utils.cpp)."""


def trial(probe: GpuProbe, of: str) -> AttentionTrial | None:
    """One attention of a GPU, a death or a hang too; None: it was not tried, or cannot be had there."""
    if why := probe.failed.get(f"attention {of}"):
        return AttentionTrial(of, False, detail=why)
    found = next((one for one in probe.attention if one.name == of), None)
    return None if found is None or found.absent else found


def fastest(case: Case) -> str | None:
    """The trainer's attention that is right on every GPU and takes the least time, by the name of the setting."""
    times: dict[str, float] = {}
    for of in ("flash-attn-4", "flash", "sdpa"):
        found = [trial(probe, f"trainer {of}") for probe in case.facts.gpu_probes or ()]
        right = [one for one in found if one is not None and one.ok]
        if right and len(right) == len(found):
            times[of] = max(one.forward + one.backward for one in right)
    return min(times, key=lambda of: times[of], default=None)


@check("HW206", "the attention that the job computes is right, forward and backward", needs=("gpu_probes",))
def attention(case: Case) -> Iterator[Finding]:
    """Each attention that is here, at the job's shapes, against the formula in float32, the gradient in the layouts of
    both kinds of block: the backward pass of cuDNN's, which torch takes by itself on Hopper, has died on this model on
    an H100 and an H200 (docs/log.md), and was right in isolation."""
    probes, wanted = case.facts.gpu_probes or (), case.job.train.attention if case.job.train else ""
    if not any(probe.attention or any("attention" in stage for stage in probe.failed) for probe in probes):
        raise SkipCheck("no attention was tried")
    by_itself = case.job.bundled and fused(case)
    trapped = [(probe, words) for probe in probes if (words := _trap(probe))]
    if by_itself:
        yield from _own(case, wanted, bool(trapped))
    if trapped and not (by_itself and wanted == "cudnn"):
        yield _trapped(case, *trapped[0])


def _own(case: Case, wanted: str, trapped: bool) -> Iterator[Finding]:
    """The attention by which the trainer's own blocks will compute."""
    config, best = case.job.train, fastest(case)
    assert config is not None
    for probe in case.facts.gpu_probes or ():
        order = (_AUTO[1:] if config.deterministic else _AUTO) if wanted == "auto" else (wanted,)
        taken = next((one for of in order if (one := trial(probe, f"trainer {of}")) is not None), None)
        if wanted == "cudnn" and trapped and (taken is None or taken.ok):
            words = _trap(probe) or "on another GPU it failed"
            taken = AttentionTrial("trainer cudnn", False, detail=f"the same kernels by torch's own call: {words}")
        if taken is None:
            continue
        if not taken.ok:
            better = best or "sdpa"
            yield error(
                f"{name(case, probe)}: the attention of this job, {taken.name.removeprefix('trainer ')}, fails at its "
                f"shapes ({probe.shapes}): {taken.detail}",
                "The first backward pass would die, often with an error that names something else, or train on wrong "
                "gradients.",
                f"Set attention to {better}, {'the fastest that is right here' if best else 'which is left to torch'}.",
                edits=(Edit("train", ("attention",), better, "it was tried here, forward and backward"),),
                docs=_SOURCE if "cudnn" in taken.name else "",
            )
            return
        if best and wanted != "auto" and not config.deterministic and best != wanted:
            other = trial(probe, f"trainer {best}")
            if other and taken.forward + taken.backward > _SLOWER * (other.forward + other.backward):
                yield warning(
                    f"{name(case, probe)}: attention {wanted} takes {1000 * (taken.forward + taken.backward):.1f} ms a "
                    f"block, {best} {1000 * (other.forward + other.backward):.1f}, and both are right.",
                    "57 blocks do it in every step.",
                    f"Set attention to auto, or to {best}.",
                    offers=(Edit("train", ("attention",), best, "the fastest that was right here"),),
                )
                return


def _trap(probe: GpuProbe) -> str:
    """How the attention that torch takes by itself failed, where it did; empty: it did not."""
    if not any(one.ok for one in probe.attention):
        return ""  # nothing works there
    for stage in _PLAIN:
        if why := probe.failed.get(stage):
            return f"{stage} {why}"
    for of in ("torch choice", "torch cudnn"):
        found = trial(probe, of)
        if found is not None and not found.ok:
            return f"{of}: {found.detail}"
    block = block_trial(probe, "choice")
    return f"blocks by torch's choice: {block.detail}" if block is not None and not block.ok else ""


def _trapped(case: Case, probe: GpuProbe, words: str) -> Finding:
    """What the job's own code may step into, or what the bundled trainer keeps it from."""
    seen = (
        f"{name(case, probe)}: the attention that torch takes by itself fails at this job's shapes ({probe.shapes}): "
    )
    seen += words
    because = (
        "On Hopper that is cuDNN's, whose backward pass is known to die on this model. It shows as an illegal memory "
        "access, a CUBLAS_STATUS_EXECUTION_FAILED somewhere else, or NaN. "
    )
    hint = "Call torch.backends.cuda.enable_cudnn_sdp(False) before training, or let torch take another first."
    if case.job.bundled:
        because += "The bundled trainer leaves it out, so this job is safe; X-Flux's and diffusers' scripts are not."
        return warning(seen, because, f"In other scripts: {hint}", commands=(WITHOUT_CUDNN,), docs=_SOURCE)
    return error(seen, f"{because}This job would die in its first step.", hint, commands=(WITHOUT_CUDNN,), docs=_SOURCE)


def block_trial(probe: GpuProbe, of: str) -> BlockTrial | None:
    if why := probe.failed.get(f"blocks {of}"):
        return BlockTrial(of, False, detail=why)
    return next((one for one in probe.blocks if one.name == of), None)


@check("HW207", "the trainer's blocks compute what diffusers' do", needs=("gpu_probes", "trainer", "train"))
def blocks(case: Case) -> Iterator[Finding]:
    """One double and one single block at the job's shapes with adapters: output and gradients against diffusers' blocks
    in float32 on the same weights; what 16 bits make of diffusers' own is the measure."""
    probes = case.facts.gpu_probes or ()
    own = "trainer" if fused(case) else "diffusers"
    found = [(probe, one) for probe in probes if (one := block_trial(probe, own)) is not None]
    if not found:
        whys = [why for probe in probes for stage, why in probe.skipped.items() if stage.startswith("blocks")]
        raise SkipCheck(whys[0] if whys else "no blocks were tried")
    for probe, one in found:
        if one.ok:
            continue
        edits = (Edit("train", ("kernels",), "diffusers", "its own blocks failed here"),) if own == "trainer" else ()
        yield error(
            f"{name(case, probe)}: the blocks of {'the trainer itself' if edits else 'diffusers'} fail at this job's "
            f"shapes ({probe.shapes}): {one.detail}",
            "Training would die in its first step, or learn from wrong gradients.",
            "Set kernels to diffusers, and report it with `xflux-doctor facts`." if edits else
            "Look at HW203 and HW206 first: a sick card or a wrong attention is the likeliest cause.",
            edits=edits,
        )  # fmt: skip
