"""Recorded steps: what they are found by, whose gradients they are; on a GPU the same losses as kernel by kernel."""

from __future__ import annotations

import copy
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from steps_kit import pair  # noqa: E402
from torch import Tensor  # noqa: E402
from trainer_model import TINY, tiny_transformer  # noqa: E402
from xflux_trainer import evaluate, fast, flow, graphs, lora  # noqa: E402
from xflux_trainer.config import TrainConfig  # noqa: E402
from xflux_trainer.model import Velocity, steady_attention  # noqa: E402
from xflux_trainer.optim import PlainStepper, learn  # noqa: E402
from xflux_trainer.ranks import Launch, Ranks  # noqa: E402

CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
on_gpu = pytest.mark.skipif(DEVICE.type == "cpu", reason="CUDA graphs need a GPU")
SIZES = [(4, 8), (8, 4), (4, 4)]
"""Latents: two of as many tokens, of which one is the other on its side; and another."""


def config(**changes: Any) -> TrainConfig:
    return TrainConfig("images", rank=16, kernels="fused", learning_rate=1e-3, **changes)


def model(settings: TrainConfig, device: torch.device) -> tuple[Velocity, dict[str, torch.nn.Parameter]]:
    dtype = torch.bfloat16 if settings.mixed_precision == "bf16" else torch.float32
    net = tiny_transformer().to(device, dtype)
    adapters = lora.attach(net, settings)
    for name, parameter in adapters.items():
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape, generator=lora.generator(name)) * 0.1)
    net.enable_gradient_checkpointing()
    velocity = Velocity(net, guidance=True)
    velocity.fast, _ = fast.build(net, settings, device)
    return velocity, adapters


def batch(number: int, device: torch.device, *, masked: bool = False) -> tuple[Tensor | None, ...]:
    """What `evaluate.losses` computes from, of sizes in turn."""
    h, w = SIZES[number % len(SIZES)]
    dice = lora.generator("batch", number)
    x_0, eps = (torch.randn(2, h // 2 * (w // 2), 64, generator=dice) for _ in range(2))
    text, pooled = torch.randn(2, 5, TINY.text_dim, generator=dice), torch.randn(2, TINY.pooled_dim, generator=dice)
    places = evaluate._positions(h, w, device), evaluate._positions(0, 5, device)
    values = tuple(value.to(device) for value in (x_0, eps, torch.rand(2, generator=dice), text, pooled))
    mask = torch.ones(2, 5, dtype=torch.bool, device=device)
    mask[1, 3:] = False
    return (*values, *places, *((mask, None) if masked else ()))


def stepper_of(settings: TrainConfig, device: torch.device, accumulation: int = 1) -> PlainStepper:
    return PlainStepper(*model(settings, device), settings, Ranks(Launch(use_cpu=device.type == "cpu")), accumulation)


def step(stepper: PlainStepper, settings: TrainConfig, batches: list[Any]) -> tuple[list[float], float]:
    stepper.begin(settings.learning_rate)
    found = []
    for number, inputs in enumerate(batches):
        with stepper.micro(number == len(batches) - 1):
            loss = learn(stepper, lambda *given: evaluate.losses(stepper, settings, *given).mean(), inputs)
            found.append(float(loss))
    return found, stepper.step()


def test_an_image_on_its_side_is_another_size() -> None:
    """It has as many tokens, at other places: what is recorded for the one must not be replayed for the other."""
    upright, lying, other = (batch(number, CPU) for number in range(3))
    assert [None if each is None else each.shape for each in upright] == [each.shape for each in lying]
    assert len({graphs.key_of(inputs) for inputs in (upright, lying, other)}) == 3
    assert graphs.key_of(batch(0, CPU)) == graphs.key_of(batch(3, CPU))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_gradients_of_masked_texts_are_those_of_the_step(accumulation: int) -> None:
    """diffusers' blocks compute where texts of a batch differ in length, and know nothing of the recorder's places."""
    settings = config(mixed_precision="no")
    plain, ours = (stepper_of(settings, CPU, accumulation) for _ in range(2))
    ours.recorder = graphs.Recorder(ours._model.fast, ours._trained.values(), accumulation, CPU)
    for number in range(4):
        batches = [batch(number + k, CPU, masked=(number + k) % 2 == 1) for k in range(accumulation)]
        expected, norm = step(plain, settings, batches)
        found, own = step(ours, settings, batches)
        assert found == pytest.approx(expected, rel=1e-5)
        assert own == pytest.approx(norm, rel=1e-4), number


def test_no_step_is_taken_where_the_norm_is_not_finite() -> None:
    """Whatever the optimizer: torch's AdamW alone has a switch for it on the device."""
    pytest.importorskip("transformers")
    settings = config(mixed_precision="no", optimizer="adafactor")
    stepper = stepper_of(settings, CPU)
    stepper.recorder = graphs.Recorder(stepper._model.fast, stepper._trained.values(), 1, CPU)
    inputs = list(batch(0, CPU))
    inputs[0] = inputs[0] * float("nan")
    before = copy.deepcopy({name: value.detach() for name, value in stepper._trained.items()})
    _, norm = step(stepper, settings, [tuple(inputs)])
    assert norm != norm
    assert all(torch.equal(value, before[name]) for name, value in stepper._trained.items())


def test_what_concerns_one_rank_is_said_by_that_one(capsys: pytest.CaptureFixture[str]) -> None:
    """A recording may fail on any of them: a note of rank 0 alone would miss the others'."""
    Ranks(Launch(rank=1, world_size=2, use_cpu=True)).say_own("note: nothing is recorded")
    Ranks(Launch(use_cpu=True)).say_own("note: nothing is recorded")
    assert capsys.readouterr().out == "rank 1: note: nothing is recorded\nnote: nothing is recorded\n"


@pytest.mark.skipif(DEVICE.type == "cuda", reason="ranks that are forked do not go with CUDA's threads")
@pytest.mark.parametrize("accumulation", [1, 2])
def test_ranks_exchange_the_flat_gradients_once_a_step(accumulation: int) -> None:
    """In place of DDP, which takes gradients one by one as they come: the same steps, also from other first weights."""

    def work(ranks: Ranks, _: Any) -> list[Any]:
        settings = config(mixed_precision="no")
        told = []
        for recorded in (False, True):
            velocity, adapters = model(settings, CPU)
            with torch.no_grad():
                for weight in adapters.values():
                    weight.add_(ranks.rank)  # rank 0's are what counts
            with pytest.MonkeyPatch.context() as patch:
                if recorded:  # a CPU has nothing to record with, but the gradients can take the same way
                    own = graphs.Recorder(velocity.fast, adapters.values(), accumulation, CPU)
                    own.broken = "a CPU records nothing"
                    patch.setattr(graphs, "recorder", lambda *_, own=own: own)
                stepper = PlainStepper(velocity, adapters, settings, ranks, accumulation)
            found = []
            for number in range(3):
                first = 10 * number + ranks.rank * accumulation
                batches = [batch(first + k, CPU) for k in range(accumulation)]
                found.append(step(stepper, settings, batches))
            told.append((found, sum(float(weight.detach().double().sum()) for weight in adapters.values())))
        return told

    for ddp, ours in pair(work):
        for (losses, norm), (own, mine) in zip(ddp[0], ours[0]):  # noqa: B905 (of one length)
            assert own == pytest.approx(losses, rel=1e-5) and mine == pytest.approx(norm, rel=1e-4)
        assert ours[1] == pytest.approx(ddp[1], rel=1e-6)


@on_gpu
@pytest.mark.parametrize("accumulation", [1, 2])
def test_replayed_steps_are_those_of_kernel_by_kernel(accumulation: int) -> None:
    """Over sizes of which two have as many tokens, texts with a mask, held-out losses and images between."""
    steady_attention(DEVICE)  # as a run does: cuDNN's makes gradients of NaN
    recorded, plain = config(), config(cuda_graphs=False)
    ours, theirs = stepper_of(recorded, DEVICE, accumulation), stepper_of(plain, DEVICE, accumulation)
    assert ours.recorder is not None and theirs.recorder is None
    places = evaluate._positions(*SIZES[0], DEVICE).clone()
    for number in range(24):
        batches = [batch(number + k, DEVICE, masked=(number + k) % 7 == 6) for k in range(accumulation)]
        expected, norm = step(theirs, plain, batches)
        found, own = step(ours, recorded, batches)
        assert found == pytest.approx(expected, rel=3e-2), number
        assert own == pytest.approx(norm, rel=5e-2), number
        if number % 5 == 4:  # what is measured and drawn asks for positions of its own
            with torch.no_grad():
                for stepper in (ours, theirs):
                    x, eps, t, text, pooled, ids, text_ids = batch(number, DEVICE)
                    for _ in range(fast.ROPES):
                        stepper(flow.mix(x, eps, t), t, text, pooled, ids.clone(), text_ids, 1.0)
        if number == 14:
            ours.recorder.release()
    assert ours.recorder._recordings
    assert torch.equal(evaluate._positions(*SIZES[0], DEVICE), places)


@on_gpu
def test_memory_of_recordings_goes_where_a_pass_lacks_it() -> None:
    settings = config()
    stepper = stepper_of(settings, DEVICE)
    recorder = stepper.recorder
    assert recorder is not None
    for _ in range(4):
        step(stepper, settings, [batch(0, DEVICE)])
    assert recorder._recordings
    refused = []

    def compute(*given: Any) -> Tensor:
        if recorder._recordings:
            refused.append(1)
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return evaluate.losses(stepper, settings, *given).mean()

    recorder.run(compute, batch(2, DEVICE))
    assert refused == [1] and not recorder._recordings


@on_gpu
def test_what_cannot_be_recorded_is_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    settings = config()
    stepper = stepper_of(settings, DEVICE)
    assert stepper.recorder is not None

    def compute(*given: Any) -> Tensor:
        loss = evaluate.losses(stepper, settings, *given).mean()
        float(loss)  # a look at the device, which no recording allows
        return loss

    for _ in range(5):
        stepper.recorder.run(compute, batch(0, DEVICE))
    assert capsys.readouterr().out.count("kernel by kernel") == 1
