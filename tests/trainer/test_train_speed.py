"""Peaks of cards by name, FLOPs against torch's own counter and the tables of the paper, and rates over a window."""

from __future__ import annotations

from dataclasses import replace

import pytest
from xflux_trainer.config import TrainConfig
from xflux_trainer.spec import FLUX_DEV, is_target
from xflux_trainer.speed import Window, costs, peak, step_flops, tokens_of

CONFIG = TrainConfig("x", gradient_checkpointing=False)


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4), ("NVIDIA H100 PCIe", 756.4), ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.4), ("NVIDIA H200 NVL", 835.5), ("NVIDIA B200", 2250), ("NVIDIA GB200", 2500),
        ("NVIDIA A100-SXM4-80GB", 311.8), ("NVIDIA A100 80GB PCIe", 311.8), ("A100-PCIE-40GB", 311.8),
        ("NVIDIA L40S", 362.05), ("NVIDIA L40", 181.05), ("NVIDIA L4", 121), ("NVIDIA A10G", 70), ("NVIDIA A10", 125),
        ("NVIDIA GeForce RTX 4090", 165.2), ("NVIDIA GeForce RTX 3090", 71.2), ("NVIDIA GeForce RTX 3090 Ti", 80),
        ("NVIDIA RTX A6000", 154.8), ("NVIDIA RTX 6000 Ada Generation", 364.2), ("NVIDIA GeForce RTX 5090", 209.5),
        # Unknown, or a relative of another speed: no number is better than a wrong one.
        ("cpu", None), ("Tesla T4", None), ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("AMD Instinct MI300X", None),
        ("NVIDIA GeForce RTX 4090 D", None), ("NVIDIA GeForce RTX 4080 SUPER", None), ("NVIDIA A10-24Q", None),
        ("NVIDIA GeForce RTX 3080 Ti", None), ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", None),
    ],
)  # fmt: skip
def test_the_peak_of_a_card(name: str, tflops: float | None) -> None:
    assert peak(name, "bf16") == peak(name, "fp16") == tflops
    assert peak(name, "no") is None


def adapters(config: TrainConfig) -> dict[str, tuple[int, ...]]:
    return {
        f"{linear.name}.lora_{side}.weight": shape
        for linear in FLUX_DEV.linears()
        if is_target(linear.name, config.lora_targets)
        for side, shape in (("A", (config.rank, linear.inputs)), ("B", (linear.outputs, config.rank)))
    }


def test_the_step_of_1024_px_is_the_tables() -> None:
    config = replace(CONFIG, lora_targets="diffusers")
    bare = step_flops(config, FLUX_DEV, {}, 4096, 512)
    assert bare / 1e12 == pytest.approx(171.1, abs=0.05)
    # 1.24 TFLOP are the adapters' of rank 16 on twelve layers a block.
    assert (step_flops(config, FLUX_DEV, adapters(config), 4096, 512) - bare) / 1e12 == pytest.approx(0.99, abs=0.3)
    assert step_flops(replace(config, gradient_checkpointing=True), FLUX_DEV, {}, 4096, 512) / 1e12 == pytest.approx(
        245.5, abs=0.05
    )


@pytest.mark.parametrize(("side", "plain", "again"), [(512, 65.3, 86.8), (1024, 230.6, 305.0)])
def test_a_fine_tune_adds_the_weights_gradients(side: int, plain: float, again: float) -> None:
    config = replace(CONFIG, mode="finetune")
    every = {f"{linear.name}.weight": (linear.outputs, linear.inputs) for linear in FLUX_DEV.linears()}
    tokens = (side // 16) ** 2
    assert step_flops(config, FLUX_DEV, every, tokens, 512) / 1e12 == pytest.approx(plain, abs=0.1)
    config = replace(config, gradient_checkpointing=True)
    assert step_flops(config, FLUX_DEV, every, tokens, 512) / 1e12 == pytest.approx(again, abs=0.1)


def test_fused_blocks_compute_less_again() -> None:
    """Not their last products, unless a gate's gradient wants the results; and only in the checkpointed blocks."""

    def again(names: dict[str, tuple[int, ...]], **changes: object) -> float:
        kept = replace(CONFIG, lora_targets="diffusers")
        config = replace(kept, gradient_checkpointing=True, **changes)  # type: ignore[arg-type]
        whole = step_flops(config, FLUX_DEV, names, 4096, 512, fused=True)
        return whole - step_flops(kept, FLUX_DEV, names, 4096, 512, fused=True)

    attention, layer = 4.0 * 4608**2 * 3072, 2.0 * 4608 * 3072**2
    assert again({}) == pytest.approx(57 * attention + (19 * 8 + 38 * 7) * layer, rel=1e-6)
    assert again({}, checkpointed_blocks=0) == 0
    assert again({}, checkpointed_blocks=20) == pytest.approx(20 * attention + (19 * 8 + 7) * layer, rel=1e-6)
    gates = {"time_text_embed.text_embedder.linear_1.bias": (3072,)}
    assert again(gates) == pytest.approx(57 * (attention + 12 * layer), rel=1e-6)
    one = {"single_transformer_blocks.0.norm.linear.bias": (9216,)}
    assert again(one) == pytest.approx(57 * attention + (19 * 8 + 38 * 7 + 5) * layer, rel=1e-6)
    factors = {"single_transformer_blocks.0.attn.to_q.lora_A.weight": (16, 3072),
               "single_transformer_blocks.0.proj_out.lora_A.weight": (16, 15360)}  # fmt: skip
    assert again(factors) - again({}) == pytest.approx(2 * 16 * 3072 * 4608, rel=1e-6)
    diffusers = step_flops(replace(CONFIG, gradient_checkpointing=True), FLUX_DEV, {}, 4096, 512)
    assert diffusers - step_flops(CONFIG, FLUX_DEV, {}, 4096, 512) > again({}) * 1.4


def test_every_layer_meets_its_own_tokens() -> None:
    """Summed over all layers, the products are those of the forward pass."""
    products = sum(2.0 * i.inputs * i.outputs * tokens_of(i.name, 4096, 512) for i in FLUX_DEV.linears())
    attention = 57 * 4 * 4608**2 * FLUX_DEV.hidden
    assert products + attention == pytest.approx(FLUX_DEV.forward_flops(4096), rel=1e-9)
    assert tokens_of("transformer_blocks.0.attn.to_added_qkv.lora_A.weight", 7, 3) == 3
    assert tokens_of("transformer_blocks.0.attn.to_qkv.lora_A.weight", 7, 3) == 7


def test_flops_of_a_lora_step_against_torchs_counter() -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode
    from trainer_model import TINY, tiny_transformer
    from xflux_trainer import evaluate, lora
    from xflux_trainer.cache import Batch
    from xflux_trainer.model import Velocity

    config = replace(CONFIG, rank=8, lora_targets="all-linear")
    transformer = tiny_transformer()
    trained = lora.attach(transformer, config)
    batch = Batch(torch.randn(1, 16, 16, 16), torch.randn(1, 8, TINY.text_dim), torch.randn(1, TINY.pooled_dim))
    eps = torch.randn(1, 64, 64)
    velocity = Velocity(transformer, guidance=True)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # the CPU's own is not counted
        evaluate.velocity_loss(velocity, config, batch, eps, torch.tensor([0.5]), torch.device("cpu")).mean().backward()
    ours = step_flops(config, TINY, {name: tuple(p.shape) for name, p in trained.items()}, 64, 8)
    # A GPU's attention computes its forward anew: 2.5 forwards backward, and here 2.
    ours -= 0.5 * 4 * 4 * 72**2 * TINY.hidden
    # Nobody asks for the gradients of the inputs: what is left is the first layers' share.
    assert counter.get_total_flops() == pytest.approx(ours, rel=0.02)


def test_a_controlnet_adds_its_own_passes_to_those_through_the_base() -> None:
    config = replace(CONFIG, mode="controlnet")
    block = {f"transformer_blocks.{k}.attn.to_q.weight": (3072, 3072) for k in range(2)}
    got = step_flops(config, FLUX_DEV, block | {"input_hint_block.0.weight": (16, 3, 3, 3)}, 4096, 512)
    products, attention = 2 * 2.0 * 3072**2 * 4096, 2 * 4.0 * 4608**2 * 3072
    assert costs(config, FLUX_DEV, block)(4096, 512) == got
    assert got == pytest.approx(171.1e12 + 3 * products + 3.5 * attention, rel=1e-3)


def test_rates_are_of_the_window() -> None:
    window = Window(2)
    assert window.line() == {"samples_per_second": 0, "tflops": 0, "data_wait": 0}
    window.add(9, 1, 1e12, 9)  # falls out of the window
    assert window.add(0.5, 4, 2e12, 0.1) == {
        "seconds": 0.5, "samples_per_second": 8, "tflops": 4, "data_wait": 0.2,
    }  # fmt: skip
    window.add(1.5, 4, 6e12, 0.3)
    assert window.line() == {"samples_per_second": 4, "tflops": 4, "data_wait": 0.2}
