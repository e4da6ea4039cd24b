"""The maths of rectified flow, against diffusers' own pipeline and against plain loops."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from trainer_model import TINY, tiny_transformer  # noqa: E402
from xflux_trainer import evaluate, flow, lora, train  # noqa: E402
from xflux_trainer.cache import Batch  # noqa: E402
from xflux_trainer.config import TrainConfig  # noqa: E402
from xflux_trainer.model import Velocity  # noqa: E402
from xflux_trainer.ranks import Launch, Ranks  # noqa: E402
from xflux_trainer.spec import FLUX_DEV, FLUX_SCHNELL, shift_mu  # noqa: E402

CONFIG = TrainConfig(img_dir="x")


def batch(size: int, h: int = 8, w: int = 12) -> Batch:
    dice = torch.Generator().manual_seed(size)
    return Batch(
        torch.randn(size, 16, h, w, generator=dice),
        torch.randn(size, 5, TINY.text_dim, generator=dice),
        torch.randn(size, TINY.pooled_dim, generator=dice),
    )


def test_pack_is_the_pipelines_and_unpack_its_inverse() -> None:
    latents = torch.randn(3, 16, 8, 12)
    tokens = flow.pack(latents)
    assert tokens.shape == (3, 24, 64)
    assert torch.equal(tokens, diffusers.FluxPipeline._pack_latents(latents, 3, 16, 8, 12))
    assert torch.equal(flow.unpack(tokens, 8, 12), latents)


def test_image_ids_are_the_pipelines() -> None:
    theirs = diffusers.FluxPipeline._prepare_latent_image_ids(1, 4, 6, torch.device("cpu"), torch.float32)
    assert torch.equal(flow.image_ids(8, 12), theirs.view(-1, 3))


@pytest.mark.parametrize("mu", [0.5, 1.15])
def test_sampling_times_are_the_schedulers(mu: float) -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15)
    scheduler.set_timesteps(sigmas=[1 - k / 7 for k in range(7)], mu=mu)
    assert torch.allclose(flow.sampling_times(7, mu), scheduler.sigmas, atol=1e-6)


def test_the_shift_at_its_ends_and_its_mean() -> None:
    t = torch.linspace(0, 1, 1001)
    moved = flow.shift(t, 1.15)
    assert float(moved[0]) == 0
    assert float(moved[-1]) == pytest.approx(1)
    assert bool((moved[1:] > moved[:-1]).all())
    assert float(moved.mean()) == pytest.approx(0.683, abs=0.002)
    assert torch.equal(flow.shift(t, 0.0), t)


def test_the_shift_follows_the_true_number_of_tokens() -> None:
    assert flow.training_mu(CONFIG, FLUX_DEV, 4096) == pytest.approx(1.15)
    assert flow.training_mu(CONFIG, FLUX_DEV, 1024) == pytest.approx(0.63)  # X-Flux takes 1.15 here too
    assert flow.training_mu(CONFIG, FLUX_SCHNELL, 4096) == 0
    assert flow.training_mu(TrainConfig("x", timestep_shift="none"), FLUX_DEV, 4096) == 0
    assert flow.training_mu(TrainConfig("x", timestep_shift=0.7), FLUX_SCHNELL, 1) == 0.7


@pytest.mark.parametrize("sampling", ["uniform", "logit_normal"])
def test_every_image_has_its_own_time(sampling: str) -> None:
    t = flow.sample_t(1000, 0.63, sampling, torch.Generator().manual_seed(0))
    assert t.dtype == torch.float32
    assert len(set(t.tolist())) == 1000
    assert bool(((t >= 0) & (t < 1)).all())
    again = flow.sample_t(1000, 0.63, sampling, torch.Generator().manual_seed(0))
    assert torch.equal(t, again)


@pytest.mark.parametrize("size", [1, 2, 3, 24, 64])
def test_times_meet_images_and_not_tokens_or_channels(size: int) -> None:
    """24 is the number of tokens and 64 that of channels: there a wrong broadcast makes no error."""
    x_0, eps = torch.randn(size, 24, 64), torch.randn(size, 24, 64)
    t = torch.rand(size)
    x_t = flow.mix(x_0, eps, t)
    for k in range(size):
        assert torch.equal(x_t[k], (1 - t[k]) * x_0[k] + t[k] * eps[k])
    assert flow.loss(torch.zeros_like(x_0), x_0, eps).shape == (size,)


def test_the_loss_is_nought_for_the_true_velocity() -> None:
    x_0, eps = torch.randn(2, 24, 64), torch.randn(2, 24, 64)
    assert torch.equal(flow.loss(eps - x_0, x_0, eps), torch.zeros(2))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_loss_is_plain_diffusers(size: int) -> None:
    """Against the lines of diffusers' own training script, written out, with its transformer: loss and gradients."""
    transformer, b = tiny_transformer().requires_grad_(True), batch(size)
    t, eps = torch.tensor([0.2, 0.55, 0.9])[:size], torch.randn(size, 24, 64)
    ours = evaluate.velocity_loss(Velocity(transformer, guidance=True), CONFIG, b, eps, t, torch.device("cpu"))

    plain = tiny_transformer().requires_grad_(True)
    noise = diffusers.FluxPipeline._unpack_latents(eps, 64, 96, 8)
    sigmas = t.view(-1, 1, 1, 1)
    noisy = (1.0 - sigmas) * b.latents + sigmas * noise
    packed = diffusers.FluxPipeline._pack_latents(noisy, size, 16, 8, 12)
    ids = diffusers.FluxPipeline._prepare_latent_image_ids(size, 4, 6, torch.device("cpu"), torch.float32)
    predicted = plain(
        hidden_states=packed, timestep=t, guidance=torch.full([size], 1.0), pooled_projections=b.pooled,
        encoder_hidden_states=b.text, txt_ids=torch.zeros(5, 3), img_ids=ids, return_dict=False,
    )[0]  # fmt: skip
    predicted = diffusers.FluxPipeline._unpack_latents(predicted, 64, 96, 8)
    theirs = ((predicted.float() - (noise - b.latents).float()) ** 2).reshape(size, -1).mean(1)
    assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    ours.mean().backward()
    theirs.mean().backward()
    wanted = {name: parameter.grad for name, parameter in plain.named_parameters()}
    for name, parameter in transformer.named_parameters():
        assert torch.allclose(parameter.grad, wanted[name], rtol=1e-4, atol=1e-6), name


def test_a_batch_is_its_images_one_by_one() -> None:
    velocity, b = Velocity(tiny_transformer(), guidance=True), batch(3)
    t, eps = torch.tensor([0.1, 0.5, 0.8]), torch.randn(3, 24, 64)
    cpu = torch.device("cpu")
    together = evaluate.velocity_loss(velocity, CONFIG, b, eps, t, cpu)
    for k in range(3):
        one = Batch(b.latents[k : k + 1], b.text[k : k + 1], b.pooled[k : k + 1])
        alone = evaluate.velocity_loss(velocity, CONFIG, one, eps[k : k + 1], t[k : k + 1], cpu)
        assert float(alone) == pytest.approx(float(together[k]), rel=1e-5)


def test_time_reaches_the_embedding_unrounded() -> None:
    """In bf16, 0.5017 would become 0.5."""
    transformer = tiny_transformer().to(torch.bfloat16)
    seen = []
    transformer.time_text_embed.time_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    b, t = batch(2), torch.tensor([0.5017, 0.3333])
    evaluate.velocity_loss(
        Velocity(transformer, guidance=True), CONFIG, b, torch.randn(2, 24, 64), t, torch.device("cpu")
    )
    assert seen[0].dtype == torch.float32
    assert torch.equal(seen[0], t * 1000)
    assert seen[1].tolist() == [1000, 1000]  # the guidance of 1


def test_schnell_takes_no_guidance() -> None:
    transformer = tiny_transformer(guidance=False)
    loss = evaluate.velocity_loss(
        Velocity(transformer, guidance=False),
        CONFIG,
        batch(1),
        torch.randn(1, 24, 64),
        torch.tensor([0.5]),
        torch.device("cpu"),
    )
    assert math.isfinite(float(loss))


def test_mu_between_the_anchors_is_a_line() -> None:
    assert shift_mu(2176) == pytest.approx((shift_mu(256) + shift_mu(4096)) / 2)


def times_of_step(per_step: int, size: int, *, step: int = 5, tokens: int = 24, **more: object) -> list[float]:
    """The times of all images of one step, in their order, of a run whose steps are so many batches of that size."""
    draws = flow.Draws(TrainConfig("x", stratified_timesteps=True, **more), FLUX_DEV, per_step)  # type: ignore[arg-type]
    numbers = range(step * per_step, (step + 1) * per_step)
    return [t for number in numbers for t in draws.draw(number, (size, tokens, 64))[1].tolist()]


@pytest.mark.parametrize("sampling", ["uniform", "logit_normal"])
@pytest.mark.parametrize("mu", [0.0, 1.15])
def test_stratified_times_take_every_slice_once(sampling: str, mu: float) -> None:
    times = torch.tensor(times_of_step(4, 16, timestep_sampling=sampling, timestep_shift=mu), dtype=torch.float64)
    e = math.exp(mu)
    unshifted = times / (e - (e - 1) * times)
    u = unshifted if sampling == "uniform" else torch.special.ndtr(torch.logit(unshifted))
    assert sorted((u * 64).floor().int().tolist()) == list(range(64))
    assert times.tolist() != sorted(times.tolist())  # not in the order of the images


def test_stratified_times_do_not_depend_on_how_a_step_is_shared() -> None:
    """Batches of 1, 2 and 4 images: by accumulation or by ranks is the same to a batch's number."""
    four, two, one = times_of_step(4, 1), times_of_step(2, 2), times_of_step(1, 4)
    assert four == two == one
    assert len(set(four)) == 4
    assert times_of_step(4, 1, step=6) != four != times_of_step(4, 1, seed=1)


def test_stratified_times_after_a_resume_with_other_ranks() -> None:
    """Twelve batches in three steps, then two batches a step: the steps keep their slices, whatever came before."""
    config = TrainConfig("x", stratified_timesteps=True)
    resumed = flow.Draws(config, FLUX_DEV, per_step=2, step=3, batches=13)
    got = [t for number in (13, 14) for t in resumed.draw(number, (2, 24, 64))[1].tolist()]
    assert got == times_of_step(2, 2, step=3)


def test_each_batch_of_a_step_is_shifted_by_its_own_tokens() -> None:
    config = TrainConfig("x", stratified_timesteps=True)
    u = flow.strata(2, 0, 0)
    for side, mu in ((512, 0.63), (768, 0.846667), (1024, 1.15)):
        draws = flow.Draws(config, FLUX_DEV, per_step=2)
        t = draws.draw(0, (1, (side // 16) ** 2, 64))[1]
        assert torch.equal(t, flow.shift(u[:1], shift_mu((side // 16) ** 2)).float())
        assert flow.training_mu(config, FLUX_DEV, (side // 16) ** 2) == pytest.approx(mu, abs=1e-6)
    # 1024 x 576: 64 x 36 tokens, and not those of a square of its long side.
    assert flow.training_mu(config, FLUX_DEV, 64 * 36) == pytest.approx(0.5 + (2304 - 256) * 0.65 / 3840)


@pytest.mark.parametrize("size", [1, 2, 3, 64])
def test_draws_are_of_the_batchs_shape_and_repeat(size: int) -> None:
    for config in (CONFIG, TrainConfig("x", stratified_timesteps=True, timestep_sampling="logit_normal")):
        draws = flow.Draws(config, FLUX_DEV, per_step=1)
        eps, t = draws.draw(7, (size, 24, 64))
        assert (eps.shape, t.shape, eps.dtype, t.dtype) == ((size, 24, 64), (size,), torch.float32, torch.float32)
        assert len(set(t.tolist())) == size
        assert bool(((t >= 0) & (t <= 1)).all())
        again = draws.draw(7, (size, 24, 64))
        assert torch.equal(again[0], eps) and torch.equal(again[1], t)


def test_the_ends_of_the_quantiles_give_times() -> None:
    """The inverse of the normal distribution is infinite there; a time is not."""
    t = flow.stratified_t(torch.tensor([0.0, 1e-300, 0.5, 1.0], dtype=torch.float64), 1.15, "logit_normal")
    assert t.tolist() == pytest.approx([0.0, 0.0, math.exp(1.15) / (1 + math.exp(1.15)), 1.0], abs=1e-6)


def test_the_logit_normal_s_two_ways_are_one_distribution() -> None:
    dice = torch.Generator().manual_seed(0)
    plain = flow.sample_t(4000, 0.63, "logit_normal", dice)
    even = flow.stratified_t(flow.strata(4000, 0, 0), 0.63, "logit_normal")
    for q in (0.05, 0.25, 0.5, 0.75, 0.95):
        assert float(plain.quantile(q)) == pytest.approx(float(even.quantile(q)), abs=0.02)


def test_noise_and_time_follow_from_the_batch_s_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each batch has its own, whoever trains on it; the shift is that of its own count of tokens."""
    monkeypatch.setattr(train.cache, "read_batch", lambda images: batch(len(images)))
    config = TrainConfig(img_dir="x", seed=3, timestep_sampling="logit_normal")
    run = SimpleNamespace(order=[[0, 1], [2, 3]], entries=range(4), ranks=Ranks(Launch(use_cpu=True)))
    draws = flow.Draws(config, FLUX_DEV, per_step=1)
    (_, (eps, t)), (_, (other_eps, other_t)), (_, again) = (train._read(run, draws, n) for n in (0, 1, 0))  # type: ignore[arg-type]
    assert not torch.equal(eps, other_eps) and not torch.equal(t, other_t)
    assert torch.equal(eps, again[0]) and torch.equal(t, again[1])
    dice = lora.generator("train", 3, 0)
    assert torch.equal(t, flow.sample_t(2, shift_mu(4 * 6), "logit_normal", dice))
    assert torch.equal(eps, torch.randn(2, 24, 64, generator=dice))
    assert not torch.equal(t, flow.sample_t(2, shift_mu(4 * 6), "uniform", lora.generator("train", 3, 0)))


def test_the_loss_is_taken_at_the_noise_and_times_that_were_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []

    def losses(_model: object, _config: object, _x_0: object, eps: torch.Tensor, t: torch.Tensor, *_: object) -> object:
        seen.extend([eps, t])
        return torch.tensor([1.0, 3.0])

    monkeypatch.setattr(evaluate, "losses", losses)
    told: list[float] = []
    stepper = SimpleNamespace(backward=lambda value: told.append(float(value)))
    run = SimpleNamespace(config=CONFIG, stepper=stepper, ranks=Ranks(Launch(use_cpu=True)))
    drawn = train._Drawn(torch.zeros(2, 24, 64), torch.zeros(2))
    assert train._micro_step(run, batch(2), drawn) == 2.0  # type: ignore[arg-type]
    assert told == [2.0] and seen[0] is drawn.eps and seen[1] is drawn.t
