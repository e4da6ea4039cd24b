"""The memory bill of a case: the trainer's own forecast for this job's strategy and ranks."""

from __future__ import annotations

import functools
import importlib
from pathlib import Path
from typing import Any

from xflux_trainer import memory, memory_diffusers, memory_fused, samples, spec
from xflux_trainer.config import TrainConfig

from xflux_doctor.check import Case, SkipCheck
from xflux_doctor.facts import Gpu
from xflux_doctor.gather.folders import base_place
from xflux_doctor.refused import fp8_lacks
from xflux_doctor.versions import version_of


def need(case: Case) -> memory.Bill:
    """What one rank of this job needs, by the model folder's own sizes where it is local.

    Raises SkipCheck where the forecast does not know the job's strategy, or where a file system does not answer.
    """
    if not _LATEST or _LATEST[0][0] is not case:
        _LATEST[:] = [(case, forecast_of(case, case.job.train))]
    return _LATEST[0][1]


def surveyed(case: Case) -> bool:
    """Whether the images of the case that was asked last are this one's."""
    return bool(_LATEST) and _LATEST[0][0].facts is case.facts


_LATEST: list[tuple[Case, memory.Bill]] = []
"""Of the case that was asked last: five checks ask for one bill, and a case never changes."""


def forecast_of(
    case: Case, config: TrainConfig | None, model: spec.FluxSpec | None = None, *, encoded: bool | None = None,
    count: int | None = None, gpu_only: bool = False,
) -> memory.Bill:  # fmt: skip
    """The bill of that case with another training config. Raises SkipCheck. `encoded`: whether the cache is filled;
    None: by the number of its entries. `count`: of the images; None: they are looked at. `gpu_only`: neither the host
    nor the disk is asked for."""
    assert config is not None
    shared = sharing(case)
    if count is None:
        count = 0 if gpu_only else dataset(case).count
    return memory.forecast(
        config,
        model or spec_of(case),
        device="cpu" if case.job.use_cpu else "cuda",
        samples=count,
        encoded=_encoded(case, config, count) if encoded is None else encoded,
        gpu_only=gpu_only,
        **shared,
    )


def sharing(case: Case) -> dict[str, Any]:
    """What `memory.forecast` and `memory.peak` are told of how the job's ranks share the work, and of the packages.
    Raises SkipCheck."""
    job = case.job
    if job.strategy not in memory.STRATEGIES:
        raise SkipCheck(f"the forecast does not know {job.strategy} yet")
    return {
        "world_size": max(1, job.num_processes),
        "strategy": job.strategy,
        "offload": job.offloads,
        "triton": has_triton(case),
        "norms": norms_of(case),
        "reshard": str(job.section("fsdp_config").get("fsdp_reshard_after_forward", True)).lower() != "false",
    }


def views(config: TrainConfig) -> int:
    """Cached entries of one image: one for each size and mirror image."""
    return len(config.sizes) * (2 if config.random_flip else 1)


def _encoded(case: Case, config: TrainConfig, count: int) -> bool:
    """Whether an earlier run's cache has as many entries as there are images: then no encoder is loaded, unless they
    are of other images or sizes, or a caption was edited since."""
    own, cache = case.job.train, (case.facts.folders or {}).get("cache")
    if own is None or cache is None or not count or (config.sizes, config.random_flip) != (own.sizes, own.random_flip):
        return False
    return cache.entries >= count * views(config)


def norms_of(case: Case) -> memory_diffusers.Norms:
    """How diffusers' blocks will norm, by the releases there; as the newest where they are still to come."""
    diffusers, torch = (version_of(case.facts, name) for name in ("diffusers", "torch"))
    if diffusers is None or torch is None:
        return "fused"
    return memory_diffusers.norms_of(diffusers.release, torch.release)


def has_triton(case: Case) -> bool:
    """Whether Triton is installed; taken for granted where torch is still to come, or does not say what it requires."""
    packages = case.facts.packages or {}
    torch = packages.get("torch")
    return torch is None or not torch.requires or "triton" in packages or "pytorch-triton" in packages


def fused(case: Case) -> bool:
    """Whether the trainer's own kernels will compute this job's blocks, by all that is known here."""
    job = case.job
    if job.train is None:
        return False
    device = "cpu" if job.use_cpu else "cuda"
    computes: bool = memory_fused.computes(job.train, job.strategy, device, triton=has_triton(case))
    return computes


def multiplies_fp8(case: Case, cards: tuple[Gpu, ...]) -> bool:
    """Whether quantization fp8-dynamic goes with this job, its torch and these cards."""
    if not fused(case) or case.job.train is None or case.job.train.mixed_precision != "bf16":
        return False
    torch = version_of(case.facts, "torch")
    return not any(fp8_lacks(gpu.capability, torch) for gpu in cards)


def spec_of(case: Case) -> spec.FluxSpec:
    """The model's sizes: read from a local folder or single file, else those of FLUX.1."""
    assert case.job.train is not None
    place = model_place(case)
    if place is not None and place.exists():
        try:
            local: Any = importlib.import_module("xflux_trainer.bfl_spec")  # for a model that is here
            return local.read_local(place)
        except (OSError, ValueError, KeyError, TypeError):
            pass  # the model's fault is WE101's to report; FLUX.1's own sizes are what it should hold
    return spec.SPECS[case.job.train.model_name]


def model_place(case: Case) -> Path | None:
    """The model's folder or single file when it is local. Raises SkipCheck where its mount does not answer."""
    assert case.job.train is not None
    _must_answer(case, "model")
    return base_place(case.job.train, case.facts.environment)


def dataset(case: Case) -> samples.Survey:
    """The dataset's images and faults. Raises SkipCheck where its mount does not answer."""
    assert case.job.train is not None
    _must_answer(case, "images")
    train = case.job.train
    return _survey(train.img_dir, train.caption_type, (train.image_column, train.caption_column))


def _must_answer(case: Case, purpose: str) -> None:
    """Whoever asked a dead mount again would wait for ever."""
    folder = (case.facts.folders or {}).get(purpose)
    if folder and folder.error:
        raise SkipCheck(f"{folder.path}: {folder.error} (see ST101)")


@functools.lru_cache(maxsize=4)
def _survey(img_dir: str, caption_type: str, columns: tuple[str, str]) -> samples.Survey:
    """Walked once per process: several checks ask, and none changes it."""
    return samples.survey(img_dir, caption_type, columns=columns)
