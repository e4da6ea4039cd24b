"""From a config to a run that can take its first step: files found, cache filled, model loaded, checkpoint read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn
from xflux_trainer import cache, checkpoint, fast, files, hub, model, modes, quantize, report, resume, sharded, snapshot
from xflux_trainer.cache import Entries, Entry
from xflux_trainer.checkpoint import Progress
from xflux_trainer.config import TrainConfig
from xflux_trainer.data import list_samples, outside
from xflux_trainer.errors import CheckpointError, ConfigError, DataError, Unsupported, UserError
from xflux_trainer.layout import Base
from xflux_trainer.meter import Meter
from xflux_trainer.modes import Trainee
from xflux_trainer.optim import PlainStepper, Stepper
from xflux_trainer.order import Order
from xflux_trainer.ranks import Ranks
from xflux_trainer.samples import Sample
from xflux_trainer.sampletable import Samples
from xflux_trainer.spec import FluxSpec
from xflux_trainer.weights import prefetch


@dataclass
class Run:
    """What one run consists of once everything is loaded."""

    config: TrainConfig
    ranks: Ranks
    meter: Meter
    base: Base
    spec: FluxSpec
    trainee: Trainee
    stepper: Stepper
    entries: Entries
    heldout: list[Entry]
    prompts: list[Path]
    captions: list[str]
    """What the prompts say."""
    shared_caption: list[str]
    """The one caption that all images have, if it is one."""
    order: Order
    accumulation: int
    total: int
    progress: Progress
    trained: int
    notes: list[str]
    digests: dict[str, str]
    """What the run is made of, for a resume to compare."""

    @property
    def output(self) -> Path:
        return Path(self.config.output_dir)

    @property
    def images(self) -> int:
        """Images that are trained on, whatever the number of sizes that each has an entry at."""
        return len(self.entries) // len(self.config.sizes)


def prepare(config: TrainConfig, notes: tuple[str, ...], ranks: Ranks, gauge: Meter) -> Run:
    """From files to a run that can take its first step."""
    said = [*notes, *filter(None, [hub.foresee(config)])]
    problem: UserError | None = None
    output = Path(config.output_dir)
    try:  # what only one rank may find is told to all: the others must not wait for it
        if (output / report.METRICS).exists():
            report.take_over(output, ranks)
        with gauge.phase("list"):
            sets, heldout_dir, ignored = find_sets(config)
        said += ignored
        files.make_folder(output)
        if ranks.main:
            files.remove_leftovers(output)
        report.take_over(output, ranks)
        base, found_notes = model.locate(config)
        said += found_notes
        spec = model.read_spec(base)
        # Asked again of the model itself; but here nothing has been encoded or loaded yet.
        modes.refuse(config, base, spec)
        found = checkpoint.find(config)
        refuse_slow(spec, ranks)
        # A second start, in which nothing is encoded: the disk is idle while libraries are imported.
        if ranks.device.type == "cuda" and not ranks.launch.local_rank and all(one.digest for one in sets.values()):
            prefetch(base.transformer)
    except UserError as error:
        problem = error
    ranks.agree(problem)
    ranks.share(output)
    accumulation, differing = ranks.accumulation(config)
    said += differing
    model.quiet_libraries()
    model.steady_attention(ranks.device)

    captions = choose_prompts(config, sets)
    said_of_images = sets[config.img_dir].captions
    shared = list(said_of_images) if len(said_of_images) == 1 else []
    prepare_block, cut = _block_preparer(config, spec, ranks)
    with gauge.phase("cache"):
        sets_entries, prompts = cache.fill(config, base, ranks, sets, captions, ignored)
    entries = sets_entries[config.img_dir]
    heldout = sets_entries[heldout_dir][: config.heldout_samples]
    dtype = model.DTYPES[config.mixed_precision]
    with gauge.phase("load"):
        transformer = model.load_transformer(base, dtype, ranks.device, prepare_block)
        trainee, computing = modes.build(config, base, spec, transformer, dtype, ranks, cut=cut)
    said += computing

    order = Order.of(entries.buckets, config)
    said += order.notes()
    per_step = ranks.world_size * accumulation
    total = config.max_train_steps or math.ceil((config.num_train_epochs or 1) * order.per_epoch / per_step)
    with gauge.phase("train"):
        stepper = _stepper(trainee.module, trainee.trained, config, ranks, accumulation)
    digests = resume.digests(base, entries, heldout, config)
    progress, resumed = _resume(found, stepper, config, ranks, digests, accumulation, total)
    trained = sum(math.prod(shape) for shape in stepper.shapes().values())
    return Run(
        config, ranks, gauge, base, spec, trainee, stepper, entries, heldout, prompts, captions, shared, order,
        accumulation,
        total, progress, trained, said + resumed, digests,
    )  # fmt: skip


def _block_preparer(config: TrainConfig, spec: FluxSpec, ranks: Ranks) -> tuple[model.Prepare, bool]:
    """What is done to each block as it is loaded, and whether the weights are cut up among the ranks, then or later;
    what a rank cannot do is told to all, before anything is encoded."""
    made: list[tuple[model.Prepare, bool]] = []

    def make() -> None:
        sharder = sharded.preparer(config, ranks)
        cut = sharder is not None or ranks.launch.fsdp  # of a fine-tune FSDP cuts up the whole model, later
        fast.refuse(config, ranks.device, spec.head_dim, cut=cut)
        own = quantize.preparer(config, ranks.device, (spec.double_blocks, spec.single_blocks))
        made.append((sharder or fast.Packed(own), cut))

    ranks.together(make)
    return made[0]


def _stepper(
    module: nn.Module, trained: dict[str, nn.Parameter], config: TrainConfig, ranks: Ranks, accumulation: int
) -> Stepper:
    """The one that the launcher asks for."""
    if ranks.launch.deepspeed:
        from xflux_trainer.zero import ZeroStepper  # DeepSpeed is only needed where it is asked for

        return ZeroStepper(module, trained, config, ranks, accumulation)
    if ranks.launch.fsdp:
        from xflux_trainer.fsdp import FsdpStepper

        return FsdpStepper(module, trained, config, ranks, accumulation)
    return PlainStepper(module, trained, config, ranks, accumulation)


def refuse_slow(spec: FluxSpec, ranks: Ranks) -> None:
    """A driver that stopped working must not turn a run of an hour into one of years."""
    if ranks.device.type == "cpu" and not ranks.launch.use_cpu and spec.transformer_parameters > 1_000_000_000:
        raise Unsupported(
            f"torch finds no GPU here, and {spec.transformer_parameters:,} parameters are too many for the CPU.",
            "Run `xflux-doctor check` to see why; set use_cpu: true in the accelerate config to do it all the same.",
        )


def find_sets(config: TrainConfig) -> tuple[dict[str, Samples], str, list[str]]:
    """Samples by their folder, the folder of the held-out ones, and notes: as an earlier start found them, where no
    file has changed since."""
    stamp = snapshot.stamp(config)
    known = snapshot.listing(config, stamp) if stamp else None
    if known is not None:
        return known
    sets, heldout_dir, notes = _list_sets(config)
    return (
        {folder: Samples.pack(samples, config.caption_type, stamp) for folder, samples in sets.items()},
        heldout_dir,
        notes,
    )


def _list_sets(config: TrainConfig) -> tuple[dict[str, list[Sample]], str, list[str]]:
    columns = config.image_column, config.caption_column
    samples, note = list_samples(config.img_dir, config.caption_type, columns)
    sets, notes = {config.img_dir: samples}, [note]
    heldout_dir = config.heldout_dir or config.img_dir
    if heldout_dir not in sets:
        heldout, note = list_samples(heldout_dir, config.caption_type, columns)
        sets[heldout_dir] = heldout[: config.heldout_samples]
        notes.append(note)
        sets[config.img_dir], note = _leave_out(samples, config.img_dir, heldout_dir)
        notes.append(note)
    return sets, heldout_dir, [note for note in notes if note]


def _leave_out(samples: list[Sample], img_dir: str, heldout_dir: str) -> tuple[list[Sample], str]:
    """The training set without the held-out images, whose loss would say nothing once they are trained on."""
    if Path(img_dir).resolve() == Path(heldout_dir).resolve():  # two spellings of one folder
        return samples, ""
    kept = outside(samples, heldout_dir)
    left = len(samples) - len(kept)
    if not kept:
        hint = "Set heldout_dir to a folder beside img_dir or inside it."
        raise DataError(f"All {left} images of {img_dir} lie in heldout_dir {heldout_dir}: none are trained on.", hint)
    return kept, f"{left} images of img_dir lie in heldout_dir and are not trained on." if left else ""


def choose_prompts(config: TrainConfig, sets: Mapping[str, Sequence[Sample]]) -> list[str]:
    if config.disable_sampling:
        return []
    return list(config.sample_prompts) or [sets[config.img_dir][0].caption]


def _resume(
    found: Path | None,
    stepper: Stepper,
    config: TrainConfig,
    ranks: Ranks,
    digests: dict[str, str],
    accumulation: int,
    total: int,
) -> tuple[Progress, list[str]]:
    """Load the checkpoint, and clear the way for what the run will save."""
    output = Path(config.output_dir)
    if found is None:
        place = _set_aside(output, None, ranks)
        return Progress(), [f"an earlier run's checkpoints were moved to {place}."] if place else []
    problem: UserError | None = None
    try:
        loaded = checkpoint.load(found, ranks)
        problems, changes = resume.compatible(
            loaded.manifest, config, digests, stepper.shapes(), ranks.world_size, accumulation
        )
        if problems:
            raise ConfigError(f"resume from {found}", tuple(problems))
        _refuse_overrun(loaded.progress.step, total, found)
    except UserError as error:
        problem = error
    ranks.agree(problem)
    stepper.load(loaded.read, loaded.scalars)
    progress = loaded.progress
    progress.batches = resume.batches(loaded.manifest, ranks.world_size, accumulation)
    notes = [f"resumed from {found} at step {progress.step}.", *changes]
    if progress.heldout_before and resume.measures_otherwise(loaded.manifest, digests):
        progress.heldout_before = None
        notes.append(f"the held-out loss is another one from here on: it is measured anew at step {progress.step}.")
    place = _set_aside(output, progress.step, ranks)
    real = found.resolve()  # a link may have another name
    if ranks.main and real.parent == output.resolve():
        # A run that was killed before it came to that may have nothing left to save.
        checkpoint.thin_out(output, config.checkpoints_total_limit, output / real.name)
    return progress, [*notes, f"later checkpoints were moved to {place}."] if place else notes


def _set_aside(output: Path, after: int | None, ranks: Ranks) -> Path | None:
    """Rank 0 moves the checkpoints; the others wait for it, and learn when it cannot."""
    place: Path | None = None
    problem: UserError | None = None
    if ranks.main:
        try:
            place = checkpoint.set_aside(output, after)
        except UserError as error:
            problem = error
    ranks.agree(problem)
    return place


def _refuse_overrun(step: int, total: int, found: Path) -> None:
    """A run of no steps would write the adapter of a later one and call it its own."""
    if step > total:
        hint = "Raise max_train_steps (or num_train_epochs), or resume from an earlier checkpoint."
        raise CheckpointError(f"{found} is at step {step}, beyond the {total} steps of this run.", hint)
