"""The blocks' own forward and backward passes against diffusers' code and autograd, on a FLUX of a few channels."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from safetensors.torch import save_file  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from trainer_kit import AVX_512, ROOT  # noqa: E402
from xflux_trainer import attention, extended, fast, flow, lora, model, pointwise, quantize  # noqa: E402
from xflux_trainer.config import TrainConfig  # noqa: E402

torch.set_num_threads(1)  # sums of several threads may come in another order

CPU = torch.device("cpu")
BLOCKS, HEADS, SIDE, WORDS, RANK = (2, 2), 2, 4, 7, 4
COUNT = sum(BLOCKS)
TARGETS = ("xflux", "diffusers", "all-linear")
EXACT = (2e-6, 2e-5 if AVX_512 else 5e-5)
"""Relative errors of the outputs and of the worst gradient in fp32: some ten times what rounding makes of them, where
products are summed in few parts."""
ROUNDED = (4e-2, 0.3)
"""The same where both sides round everything to 8 bits, each at places of its own."""

Made = tuple[Tensor, dict[str, "Tensor | None"]]


class Twin:
    """A model with everything that is trained in it, computed by diffusers' code until it is given another."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, config: TrainConfig, dtype: torch.dtype, adapters: Path | None = None
    ) -> None:
        monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
        import random_flux

        torch.manual_seed(0)
        self.spec, self.dtype = random_flux.spec_of(BLOCKS, HEADS), dtype
        prepare = fast.Packed(quantize.preparer(config, CPU, BLOCKS))
        self.net: Any = random_flux.build(self.spec, dtype, CPU, prepare)
        for parameter in self.net.parameters():
            # Far from what the model begins with: zero biases and norms of 1 would hide mistakes.
            parameter.data.add_(torch.randn_like(parameter) * 0.1) if parameter.dim() == 1 else parameter.data.mul_(3)
        self.trained: dict[str, nn.Parameter] = {}
        if config.mode == "finetune":
            self.trained = dict(self.net.requires_grad_(True).named_parameters())
        else:
            self.trained = lora.attach(self.net, config) if adapters is None else lora.attach_file(self.net, adapters)
            for parameter in self.trained.values():
                parameter.data.normal_(0, 0.1)
        self.velocity = model.Velocity(self.net, guidance=True)

    def compute(self, checkpointed: int) -> fast.Fast:
        """Let the blocks' own code compute."""
        chosen, _ = attention.choose("auto", CPU, self.dtype, self.spec.head_dim)
        made = fast.Fast(self.net, chosen, pointwise, checkpointed)
        self.velocity.fast = made
        return made

    def run(self, batch: int) -> Made:
        """The output and all gradients, the same inputs every time."""
        torch.manual_seed(1)
        tokens = SIDE * SIDE
        x, out = (torch.randn(batch, tokens, self.spec.in_channels) for _ in range(2))
        text, pooled = torch.randn(batch, WORDS, self.spec.text_dim) * 0.1, torch.randn(batch, self.spec.pooled_dim)
        ids, text_ids = flow.image_ids(2 * SIDE, 2 * SIDE), flow.text_ids(WORDS)
        for parameter in self.trained.values():
            parameter.grad = None
        y = self.velocity(x, torch.rand(batch), text, pooled, ids, text_ids, 3.5)
        (y * out).sum().backward()
        return y.detach(), {name: parameter.grad for name, parameter in self.trained.items()}


def off(made: Tensor, meant: Tensor) -> float:
    return ((made.float() - meant.float()).norm() / meant.float().norm()).item()


def same(made: Made, meant: Made, limits: tuple[float, float] = EXACT) -> None:
    assert off(made[0], meant[0]) < limits[0]
    for name, grad in meant[1].items():
        own = made[1][name]
        assert (own is None) == (grad is None), name
        if own is not None and grad is not None:
            assert off(own, grad) < limits[1], name


@pytest.fixture
def twin(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Twin]]:
    """Makes one. What nothing was written to is NaN then; but with weights in fp8, which torch 2.4 cannot fill."""
    before = torch.are_deterministic_algorithms_enabled()

    def make(dtype: torch.dtype = torch.float32, adapters: Path | None = None, **keys: Any) -> Twin:
        torch.use_deterministic_algorithms("quantization" not in keys, warn_only=True)
        precision = "no" if dtype == torch.float32 else "bf16"
        config = TrainConfig("none", mixed_precision=precision, rank=keys.pop("rank", RANK), **keys)
        return Twin(monkeypatch, config, dtype, adapters)

    yield make
    torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("checkpointed", [0, COUNT - 1, COUNT])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("targets", TARGETS)
def test_adapters(twin: Callable[..., Twin], targets: str, batch: int, checkpointed: int) -> None:
    both = twin(lora_targets=targets)
    meant = both.run(batch)
    both.compute(checkpointed)
    same(both.run(batch), meant)


@pytest.mark.parametrize("checkpointed", [0, COUNT - 1])
@pytest.mark.parametrize("batch", [1, 2])
def test_all_weights_trained(twin: Callable[..., Twin], batch: int, checkpointed: int) -> None:
    both = twin(mode="finetune")
    meant = both.run(batch)
    both.compute(checkpointed)
    same(both.run(batch), meant)


@pytest.mark.parametrize("rank", [1, 8, 12])
def test_an_alpha_that_is_not_the_rank(twin: Callable[..., Twin], rank: int) -> None:
    both = twin(lora_targets="all-linear", rank=rank, lora_alpha=3.0 * rank)
    meant = both.run(2)
    both.compute(1)
    same(both.run(2), meant)


@pytest.mark.parametrize("checkpointed", [0, COUNT])
@pytest.mark.parametrize("targets", TARGETS)
def test_weights_in_fp8(twin: Callable[..., Twin], targets: str, checkpointed: int) -> None:
    both = twin(torch.bfloat16, lora_targets=targets, quantization="fp8-dynamic")
    meant = both.run(2)
    both.compute(checkpointed)
    same(both.run(2), meant, ROUNDED)


@pytest.mark.parametrize("targets", ["xflux", "all-linear"])
def test_bf16(twin: Callable[..., Twin], targets: str) -> None:
    both = twin(torch.bfloat16, lora_targets=targets, rank=8)
    meant = both.run(2)
    both.compute(1)
    same(both.run(2), meant, ROUNDED)


def test_what_lies_behind_a_row_is_finite_on_a_cpu(twin: Callable[..., Twin]) -> None:
    """Products by AMX read it: with torch 2.13, `test_bf16` was NaN on such a CPU."""
    twin()  # what nothing is written to is NaN from now on
    room = extended.spread(torch.ones(3, 1, dtype=torch.bfloat16), 40)
    assert torch.empty(0, dtype=room.dtype).set_(room.untyped_storage()).isfinite().all()


def test_a_file_of_many_ranks(twin: Callable[..., Twin], tmp_path: Path) -> None:
    """Adapters of a group have ranks of their own, or there are none on some of its layers."""
    ranks = {
        "transformer_blocks.0.attn.to_q": 3, "transformer_blocks.0.attn.to_v": 9, "transformer_blocks.0.ff.net.2": 5,
        "transformer_blocks.1.attn.add_k_proj": 2, "transformer_blocks.1.ff_context.net.0.proj": 8,
        "single_transformer_blocks.0.attn.to_k": 6, "single_transformer_blocks.0.proj_mlp": 1,
        "single_transformer_blocks.1.proj_out": 7,
    }  # fmt: skip
    layers = lora.layers_of(twin().net)
    weights = {}
    for name, rank in ranks.items():
        layer: Any = layers[name]
        weights[f"transformer.{name}.lora_A.weight"] = torch.randn(rank, layer.in_features)
        weights[f"transformer.{name}.lora_B.weight"] = torch.randn(layer.out_features, rank)
    save_file(weights, tmp_path / "adapters.safetensors")
    both = twin(adapters=tmp_path / "adapters.safetensors")
    meant = both.run(2)
    assert len(meant[1]) == 2 * len(ranks)
    both.compute(2)
    same(both.run(2), meant)


def extras(made: fast.Fast) -> list[int]:
    groups = [group for block in [*made.doubles, *made.singles] for group in block.groups.values()]
    found = [group.extended() for group in groups]
    return [each.extra if each else 0 for each in found]


def test_which_weights_have_adapters_below_them(twin: Callable[..., Twin]) -> None:
    """Plain frozen ones, and rows filled up to eights: the four of a double block have three adapters or one."""
    double, single = [16, 16, *[8] * 6], [16, 8]
    assert extras(twin(lora_targets="all-linear", rank=3).compute(0)) == [*double, *double, *single, *single]
    assert not any(extras(twin(mode="finetune").compute(0)))
    assert not any(extras(twin(torch.bfloat16, quantization="fp8-dynamic").compute(0)))


def test_a_step_is_seen_by_the_next_pass(twin: Callable[..., Twin]) -> None:
    """What the products read of the adapters follows the parameters."""
    both = twin(lora_targets="all-linear")
    both.compute(1)
    both.run(1)
    with torch.no_grad():
        for parameter in both.trained.values():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    made = both.run(1)
    both.velocity.fast = None
    same(made, both.run(1))


def test_the_weights_stay_what_they_were(twin: Callable[..., Twin]) -> None:
    """In place, in value and by name, however they lie; and a copy of the model is one."""
    both = twin(lora_targets="all-linear")
    before = {name: value.clone() for name, value in both.net.state_dict().items()}
    both.compute(1)
    made = both.run(1)
    after = copy.deepcopy(both.net).state_dict()
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(value, both.net.state_dict()[name]) and torch.equal(value, after[name]), name
    # Values that move after that are the ones that count.
    both.net.to(torch.float64).to(torch.float32)
    for parameter in both.net.single_transformer_blocks[0].attn.to_q.base_layer.parameters():
        parameter.data = parameter.data * 2
    moved = both.run(1)
    assert off(moved[0], made[0]) > 1e-3
    both.velocity.fast = None
    same(moved, both.run(1))
