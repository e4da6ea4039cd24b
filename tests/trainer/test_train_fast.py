"""What computes a step: which blocks and which attention are chosen and what is said of it, a batch's inputs, recorded
steps. The blocks' own passes are compared in test_train_blocks.py, their kernels in test_train_kernels.py."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from torch import Tensor, nn  # noqa: E402
from trainer_kit import ROOT  # noqa: E402
from trainer_model import TINY, tiny_transformer  # noqa: E402
from xflux_trainer import attention, evaluate, fast, flow, graphs, lora, optim, side  # noqa: E402
from xflux_trainer.cache import Batch  # noqa: E402
from xflux_trainer.config import TrainConfig  # noqa: E402
from xflux_trainer.errors import Unsupported  # noqa: E402
from xflux_trainer.model import Velocity  # noqa: E402
from xflux_trainer.ranks import Launch, Ranks  # noqa: E402

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
BLOCKS = TINY.double_blocks + TINY.single_blocks
on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="a recording needs a GPU")


def config(**keys: Any) -> TrainConfig:
    return TrainConfig("none", **{"mixed_precision": "no", "rank": 2, "lora_targets": "all-linear", **keys})


class Model:
    """A FLUX with adapters far from zero, computed by the trainer's own blocks, and batches for it."""

    def __init__(self, net: Any, settings: TrainConfig, device: torch.device, text_dim: int, pooled_dim: int) -> None:
        self.settings, self.device, self.dims = settings, device, (text_dim, pooled_dim)
        self.trained: dict[str, nn.Parameter] = lora.attach(net, settings)
        for name, parameter in self.trained.items():
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=lora.generator("test", name)) * 0.1)
        self.velocity = Velocity(net, guidance=net.config.guidance_embeds)
        self.velocity.fast, self.notes = fast.build(net, settings, device)

    def inputs(self, size: int, number: int) -> tuple[Tensor | None, ...]:
        """Those of the micro-batch of that number, `size` images of 8 by 8 latents."""
        dice = lora.generator("batch", number)
        values = [torch.randn(size, *shape, generator=dice) for shape in ((16, 8, 8), (5, self.dims[0]), self.dims[1:])]
        eps, t = torch.randn(size, 16, 64, generator=dice), torch.rand(size, generator=dice)
        return evaluate.inputs(Batch(*values), eps, t, self.device)

    def compute(self, *inputs: Tensor | None) -> Tensor:
        given: Any = inputs
        return evaluate.losses(self.velocity, self.settings, *given).mean()

    def gradients(self, *batches: tuple[Tensor | None, ...]) -> tuple[float, dict[str, Tensor]]:
        """Autograd's, of the mean over the batches."""
        for parameter in self.trained.values():
            parameter.grad = None
        losses = torch.stack([self.compute(*inputs) for inputs in batches])
        losses.mean().backward()
        found = {name: each.grad.clone() for name, each in self.trained.items() if each.grad is not None}
        return float(losses.detach().mean()), found


def tiny(**keys: Any) -> Model:
    return Model(tiny_transformer(), config(kernels="fused", **keys), CPU, TINY.text_dim, TINY.pooled_dim)


# What is chosen, and what is said of it --------------------------------------------------------------------


@pytest.mark.parametrize(
    "keys", [{"kernels": "diffusers"}, {}, {"checkpointed_blocks": 1, "gradient_checkpointing": False}]
)
def test_diffusers_blocks_compute_on_a_cpu_without_a_word(keys: dict[str, Any]) -> None:
    assert fast.build(tiny_transformer(), config(**keys), CPU) == (None, [])


def test_what_keeps_diffusers_blocks_on_a_gpu_is_said() -> None:
    """The card is asked for nothing where the config or the ranks rule the kernels out."""
    net, gpu = tiny_transformer(), torch.device("cuda")
    assert fast.build(net, config(), gpu) == (None, ["diffusers' own blocks compute: nothing is computed in 16 bits."])
    cut = fast.build(net, config(mixed_precision="bf16"), gpu, cut=True)
    assert cut == (None, ["diffusers' own blocks compute: the model is cut up among the ranks."])


def test_what_cannot_be_had_is_refused() -> None:
    net = tiny_transformer()
    with pytest.raises(Unsupported, match="kernels is fused, but the model is cut up among the ranks") as refused:
        fast.build(net, config(kernels="fused"), CPU, cut=True)
    assert "Set kernels to auto" in str(refused.value)
    said = "checkpointed_blocks is 1, which fused kernels alone do, and there is no CUDA device"
    with pytest.raises(Unsupported, match=said) as refused:
        fast.build(net, config(checkpointed_blocks=1), CPU)
    assert "Set checkpointed_blocks to null" in str(refused.value)
    with pytest.raises(Unsupported, match="attention is cudnn, which does not work here: it is for CUDA") as refused:
        fast.build(net, config(kernels="fused", attention="cudnn"), CPU)
    assert "Set attention to auto" in str(refused.value)


@pytest.mark.parametrize(
    ("keys", "first"),
    [
        ({}, BLOCKS),
        ({"checkpointed_blocks": 3}, 3),
        ({"checkpointed_blocks": 0}, 0),
        ({"checkpointed_blocks": 99}, BLOCKS),
        ({"checkpointed_blocks": 3, "gradient_checkpointing": False}, 0),
    ],
)
def test_the_first_so_many_blocks_are_computed_again(keys: dict[str, Any], first: int) -> None:
    """As many attentions more, in the backward pass; and the same gradients, but for the order of one sum: where a
    gradient takes its own input's place there is no room for the adapters' product beside it."""
    model, plain = tiny(**keys), tiny(gradient_checkpointing=False)
    made: Any = model.velocity.fast
    calls: list[str] = []
    own = made.attention

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args: calls.append(name) or function(*args)

    counting = attention.Attention("counting", counted("forward", own.forward), counted("backward", own.backward))
    blocks = [*made.doubles, *made.singles]
    for block in blocks:
        block.attention = counting
    found = model.gradients(model.inputs(2, 0))
    assert calls[:BLOCKS] == ["forward"] * BLOCKS
    assert calls[BLOCKS:] == ["backward"] * (BLOCKS - first) + ["forward", "backward"] * first
    assert [block.checkpointed for block in blocks] == [True] * first + [False] * (BLOCKS - first)
    wanted = plain.gradients(plain.inputs(2, 0))
    assert found[0] == wanted[0] and found[1].keys() == wanted[1].keys()
    for name, gradient in wanted[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-6 * float(gradient.abs().max()))


def test_a_deterministic_run_takes_torchs_flash() -> None:
    made: Any = tiny(deterministic=True).velocity.fast
    assert made.attention.name == "flash" and made.describe() == "fused kernels, attention by flash"
    assert tiny(attention="sdpa").velocity.fast.attention.name == "sdpa"


def test_a_deterministic_run_without_torchs_flash_takes_torchs_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """The user asked for no backend: there is none to be refused."""

    def absent(_: torch.device) -> attention.Attention:
        raise RuntimeError("no kernel for this card")

    monkeypatch.setitem(attention._MAKERS, "flash", absent)
    made, passed = attention.choose("auto", CPU, torch.float32, 16, deterministic=True)
    assert made.name == "sdpa" and passed == ["flash: no kernel for this card"]


def test_a_kernel_that_ended_cuda_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: torch.device) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with ...")

    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    with pytest.raises(Unsupported, match="illegal memory access was encountered") as refused:
        attention._refuse_broken("flash-attn-4", attention._ORDER, torch.device("cuda"))
    assert "Set attention to flash" in refused.value.hint
    attention._refuse_broken("flash-attn-4", attention._ORDER, CPU)


@pytest.mark.parametrize("guidance", [True, False])
@pytest.mark.parametrize("residuals", [0, 1, 2])
def test_the_whole_pass_is_diffusers(guidance: bool, residuals: int) -> None:
    """With a ControlNet's residuals, which are used in turn, and without guidance as in schnell."""
    net = tiny_transformer(guidance=guidance)
    model = Model(net, config(kernels="fused"), CPU, TINY.text_dim, TINY.pooled_dim)
    velocity, made = model.velocity, model.velocity.fast
    dice = torch.Generator().manual_seed(2)
    added = [torch.randn(2, 16, TINY.hidden, generator=dice, requires_grad=True) for _ in range(residuals)]
    x_0, _, t, text, pooled, ids, text_ids = model.inputs(2, 0)
    found = []
    for velocity.fast in (made, None):
        for leaf in (*model.trained.values(), *added):
            leaf.grad = None
        v = velocity(x_0, t, text, pooled, ids, text_ids, 3.5, residuals=added or None)
        v.square().mean().backward()
        grads = {name: leaf.grad for name, leaf in model.trained.items()}
        found.append((v.detach(), grads | {f"residual {k}": leaf.grad for k, leaf in enumerate(added)}))
    (v, own), (right, wanted) = found
    assert torch.allclose(v, right, rtol=1e-4, atol=1e-5)
    assert len(wanted) == len(model.trained) + residuals
    for name, gradient in wanted.items():
        assert torch.allclose(own[name], gradient, rtol=1e-3, atol=1e-6 * float(gradient.abs().max() + 1)), name


def test_rotations_are_kept_by_their_positions() -> None:
    model = tiny()
    made: Any = model.velocity.fast
    wide = flow.image_ids(4, 16)
    for _ in range(2):
        model.compute(*model.inputs(1, 0))
        model.compute(*model.inputs(3, 1))  # of the same size, another batch
    assert len(made.held()) == 1
    inputs = list(model.inputs(1, 2))
    inputs[5] = wide
    model.compute(*inputs)
    assert len(made.held()) == 2 and not torch.equal(made.held()[0].cos, made.held()[1].cos)


# Attention -------------------------------------------------------------------------------------------------


def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k' / sqrt(C)) v of (B, L, H, C)."""
    weights = torch.einsum("blhc,bmhc->bhlm", q, k) / math.sqrt(q.shape[-1])
    return torch.einsum("bhlm,bmhc->blhc", weights.softmax(-1), v)


@pytest.mark.parametrize("channels", [16, 128])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", ["auto", "flash", "sdpa"])
def test_attention_is_the_formula(name: str, batch: int, channels: int) -> None:
    """v and its gradient are columns of wider buffers, as in a block; what lies beside them is left alone."""
    made, passed = attention.choose(name, CPU, torch.float32, channels)
    assert made.name == ("flash" if name == "auto" else name)
    assert passed == (["flash-attn-4: it is for CUDA"] if name == "auto" else [])
    dice = torch.Generator().manual_seed(1)
    q, k, dout = (torch.randn(batch, 37, 3, channels, generator=dice) for _ in range(3))
    wide = torch.randn(batch, 37, 2, 3, channels, generator=dice)
    v, grads = wide[:, :, 1], torch.full_like(wide, 7.0)
    out, kept = made.forward(q, k, v)
    dq, dk = made.backward(dout, q, k, v, out, kept, grads[:, :, 1])
    leaves = [each.clone().requires_grad_() for each in (q, k, v)]
    right = formula(*leaves)
    assert out.is_contiguous()
    assert torch.allclose(out, right, rtol=1e-5, atol=1e-6)
    for found, wanted in zip((dq, dk, grads[:, :, 1]), torch.autograd.grad(right, leaves, dout), strict=True):
        assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-5)
    assert bool((grads[:, :, 0] == 7.0).all())


@pytest.mark.parametrize("wrong", ["output", "dq", "dk", "dv"])
def test_a_backend_that_is_wrong_in_one_place_is_passed_over(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too large by a twentieth, or not written at all."""
    names = ("output", "dq", "dk", "dv")

    def broken(factor: float) -> Callable[[torch.device], attention.Attention]:
        right, _ = attention.choose("sdpa", CPU, torch.float32, 16)
        scale = [factor if name == wrong else 1.0 for name in names]

        def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
            return right.forward(q, k, v)[0] * scale[0], ()

        def backward(*args: Any) -> tuple[Tensor, Tensor]:
            dq, dk = right.backward(*args)
            args[-1].mul_(scale[3])
            return dq * scale[1], dk * scale[2]

        return lambda device: attention.Attention("broken", forward, backward)

    for factor, share in ((1.05, "5%"), (math.nan, "nan%")):
        monkeypatch.setitem(attention._MAKERS, "flash", broken(factor))
        made, passed = attention.choose("auto", CPU, torch.float32, 16)
        assert made.name == "sdpa"
        assert passed == ["flash-attn-4: it is for CUDA", f"flash: its {wrong} is wrong by {share}"]
        with pytest.raises(Unsupported, match=f"attention is flash, which does not work here: its {wrong} is wrong"):
            attention.choose("flash", CPU, torch.float32, 16)


# Inputs and losses -----------------------------------------------------------------------------------------


def test_the_inputs_of_a_batch() -> None:
    """Packed tokens; positions are the very same tensors for all batches of a size, and others for other sizes."""
    latents, eps = torch.randn(2, 16, 4, 6), torch.randn(2, 6, 64)
    batch, t = Batch(latents, torch.randn(2, 5, 8), torch.randn(2, 3)), torch.tensor([0.25, 0.75])
    x_0, noise, times, text, pooled, ids, text_ids = evaluate.inputs(batch, eps, t, CPU)
    patch = latents[1, :, 2:4, 4:6]  # the last of 2 rows of 3 tokens
    assert torch.equal(x_0[1, 5], patch.reshape(-1))
    assert noise is eps and times is t and text is batch.text and pooled is batch.pooled
    assert ids.tolist() == [[0, row, column] for row in range(2) for column in range(3)]
    assert text_ids.tolist() == [[0, 0, 0]] * 5
    again = evaluate.inputs(Batch(latents[:1], torch.randn(1, 5, 8), torch.randn(1, 3)), eps[:1], t[:1], CPU)
    assert again[5] is ids and again[6] is text_ids
    upright = Batch(latents.transpose(2, 3), torch.randn(2, 4, 8), torch.randn(2, 3))
    assert evaluate.inputs(upright, eps, t, CPU)[5][-1].tolist() == [0, 2, 1]
    assert len(evaluate.inputs(upright, eps, t, CPU)[6]) == 4


def test_the_loss_of_each_image() -> None:
    """The mean square of v - (eps - x_0), at tokens mixed by t; the guidance is the config's."""
    x_0, eps, t = torch.randn(2, 6, 64), torch.randn(2, 6, 64), torch.tensor([0.25, 0.75])
    seen: list[Any] = []

    def model(x_t: Tensor, *more: Any) -> Tensor:
        seen.extend((x_t, *more))
        return 2 * x_t

    rest = (torch.zeros(2, 5, 8), torch.zeros(2, 3), torch.zeros(6, 3), torch.zeros(5, 3))
    losses = evaluate.losses(model, config(guidance=2.5), x_0, eps, t, *rest)
    for number, time in enumerate((0.25, 0.75)):
        x_t = (1 - time) * x_0[number] + time * eps[number]
        assert torch.allclose(seen[0][number], x_t, atol=1e-6)
        wanted = (2 * x_t - (eps[number] - x_0[number])).square().mean()
        assert float(losses[number]) == pytest.approx(float(wanted), rel=1e-5)
    assert seen[1] is t and seen[6] == 2.5 and len(seen) == 7


# Recorded steps ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("targets", ["xflux", "all-linear"])
def test_gradients_of_a_step_lie_in_one_tensor(targets: str, accumulation: int) -> None:
    """Those of the blocks' adapters, step after step, which is what a recording fills; the others beside it. They are
    the mean over the passes of a step."""
    model = tiny(lora_targets=targets)
    made: Any = model.velocity.fast
    recorder = graphs.Recorder(made, model.trained.values(), accumulation, CPU)
    recorder.broken = "a CPU records nothing"
    for step in range(3):
        batches = [model.inputs(1 + (step + k) % 2, 10 * step + k) for k in range(accumulation)]
        losses = [float(recorder.run(model.compute, inputs)) for inputs in batches]
        flat, *rest = recorder.grads()
        recorder.publish()
        grads = {name: each.grad for name, each in model.trained.items() if each.grad is not None}
        assert grads.keys() == model.trained.keys()
        inside = [name for name, grad in grads.items() if grad.untyped_storage().data_ptr() == flat.data_ptr()]
        assert len(inside) + len(rest) == len(grads) and bool(rest) == (targets == "all-linear")
        # What clips the flat tensor clips them all, and nothing else lies in it.
        total = sum(float(grads[name].square().sum()) for name in inside)
        assert float(flat.square().sum()) == pytest.approx(total, rel=1e-5)
        plain = tiny(lora_targets=targets)
        loss, wanted = plain.gradients(*batches)
        assert sum(losses) / accumulation == pytest.approx(loss, rel=1e-6)
        for name, gradient in wanted.items():
            assert torch.allclose(grads[name], gradient, rtol=1e-5, atol=1e-8), name


def test_what_is_not_recorded() -> None:
    """Nothing on a CPU; and what cannot be recorded is not looked at, whatever the device."""
    model = tiny()
    gpu = torch.device("cuda")
    base = {"mixed_precision": "bf16"}
    cases: list[tuple[dict[str, Any], torch.device]] = [
        (base, CPU), (base | {"cuda_graphs": False}, gpu), (base | {"stream_blocks": 1}, gpu),
        (base | {"modulation": "stream"}, gpu), (base | {"mode": "finetune"}, gpu), ({}, gpu),
        (base | {"step_in_backward": True}, gpu),
    ]  # fmt: skip
    for keys, device in cases:
        assert graphs.recorder(model.velocity, model.trained, config(**keys), device, 1) is None, keys
    model.velocity.fast = None
    assert graphs.recorder(model.velocity, model.trained, config(**base), gpu, 1) is None


def test_without_a_recording_everything_stays_in_one_stream() -> None:
    beside = side.Side(CPU)
    assert not beside.active
    with beside.fork():
        made = torch.arange(3) * 2
        mark = beside.mark()
    beside.wait(mark)
    beside.join()
    assert mark is None and made.tolist() == [0, 2, 4]


@pytest.fixture
def random_flux(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import random_flux

    yield random_flux


@on_a_gpu
@pytest.mark.parametrize("quantization", ["none", "fp8-dynamic"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_recorded_steps_are_the_steps(random_flux: Any, accumulation: int, quantization: str) -> None:
    """Eight steps of two batch sizes in turn, each size recorded after two passes: losses, norms and adapters."""
    from xflux_trainer import fp8, quantize

    if quantization == "fp8-dynamic" and (why := fp8.supported(CUDA)):
        pytest.skip(why)
    results = []
    for recorded in (True, False):
        settings = config(
            mixed_precision="bf16", rank=16, cuda_graphs=recorded, quantization=quantization, learning_rate=1e-3,
            gradient_checkpointing=False, gradient_accumulation_steps=accumulation, kernels="fused",
        )  # fmt: skip
        spec = random_flux.spec_of((2, 2), 2)
        torch.manual_seed(0)
        prepare = fast.Packed(quantize.preparer(settings, CUDA, (2, 2)))
        net = random_flux.build(spec, torch.bfloat16, CUDA, prepare)
        model = Model(net, settings, CUDA, spec.text_dim, spec.pooled_dim)
        ranks = Ranks(Launch())
        stepper = optim.PlainStepper(model.velocity, model.trained, settings, ranks, accumulation)
        assert (stepper.recorder is not None) == recorded
        losses, norms = [], []
        for step in range(8):
            stepper.begin(settings.learning_rate)
            for k in range(accumulation):
                inputs = model.inputs(1 + (step + k) % 2, 10 * step + k)
                losses.append(float(optim.learn(stepper, model.compute, inputs)))
            norms.append(stepper.step())
            if recorded and step in (5, 7):
                recorder: Any = stepper.recorder
                assert not recorder.broken and len(recorder._recordings) == 2
                optim.release(stepper)  # as before images are drawn; the next two steps are recorded anew
        weights = {name: each.detach().clone() for name, each in model.trained.items()}
        results.append((losses, norms, weights))
    (losses, norms, weights), (plain_losses, plain_norms, plain_weights) = results
    # Sums of the adapters' gradients may come in another order from one launch to the next.
    assert losses == pytest.approx(plain_losses, rel=2e-3)
    assert norms == pytest.approx(plain_norms, rel=2e-2)
    moved = torch.stack([(weights[name] - each).norm() for name, each in plain_weights.items()]).norm()
    size = torch.stack([each.norm() for each in plain_weights.values()]).norm()
    assert float(moved / size) < 1e-2


@on_a_gpu
def test_work_beside_a_recording_is_waited_for() -> None:
    beside, x = side.Side(CUDA), torch.ones(1 << 20, device=CUDA)
    out, other = torch.zeros_like(x), torch.zeros_like(x)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        doubled = x * 2
        with beside.fork():
            assert beside.active
            early = doubled + 1
            mark = beside.mark()
            late = early * 10
        beside.wait(mark)
        out.copy_(early)
        beside.join()
        other.copy_(late)
    x.fill_(3.0)
    graph.replay()
    torch.cuda.synchronize()
    assert bool((out == 7.0).all()) and bool((other == 70.0).all())
