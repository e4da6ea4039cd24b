"""The ControlNet: X-Flux's parts, keys and residuals; trained beside a base that stays as it is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from safetensors.torch import load_file, save_file  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from trainer_kit import tiny_flux  # noqa: E402
from xflux_trainer import controlnet, flow, model  # noqa: E402
from xflux_trainer.config import TrainConfig  # noqa: E402
from xflux_trainer.controlnet import ControlVelocity  # noqa: E402
from xflux_trainer.errors import ConfigError, ModelError  # noqa: E402
from xflux_trainer.layout import Base  # noqa: E402
from xflux_trainer.spec import FLUX_DEV, FLUX_SCHNELL  # noqa: E402

CPU = torch.device("cpu")
BASE = Base.of(tiny_flux())


def config(**changes: Any) -> TrainConfig:
    return TrainConfig(img_dir="images", mode="controlnet", mixed_precision="no", **changes)


def awake(net: nn.Module) -> nn.Module:
    """The zero layers set to something, so that the net adds something."""
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if not parameter.any():
                dice = torch.Generator().manual_seed(len(name))
                parameter.copy_(torch.randn(parameter.shape, generator=dice) * 0.1)
    return net


@pytest.fixture(scope="module")
def net() -> nn.Module:
    return awake(controlnet.build(BASE, config(), torch.float32, CPU))


@pytest.fixture(scope="module")
def transformer() -> nn.Module:
    return model.load_transformer(BASE, torch.float32, CPU)


@pytest.fixture(autouse=True)
def no_hooks(net: nn.Module, transformer: nn.Module) -> Iterator[None]:
    """The nets are of all tests: each takes its hooks away, and its gradients."""
    yield
    for module in (*net.modules(), *transformer.modules()):
        module._forward_pre_hooks.clear()
        module._forward_pre_hooks_with_kwargs.clear()
        module._forward_hooks.clear()
    net.zero_grad()
    for each in (net, transformer):
        each.disable_gradient_checkpointing()  # type: ignore[operator]


def inputs(batch: int, seed: int = 0) -> dict[str, Any]:
    """A batch of images of 96 x 64 pixels; every image follows from its own number."""
    dice = [torch.Generator().manual_seed(seed + k) for k in range(batch)]

    def normal(*shape: int) -> Tensor:
        return torch.stack([torch.randn(shape, generator=each) for each in dice])

    return {
        "x_t": normal(24, 64), "t": torch.stack([torch.rand((), generator=each) for each in dice]),
        "text": normal(6, 64), "pooled": normal(64), "ids": flow.image_ids(8, 12), "text_ids": flow.text_ids(6),
        "guidance": 4.0,
        "condition": torch.stack([torch.randint(0, 256, (3, 64, 96), generator=e, dtype=torch.uint8) for e in dice]),
    }  # fmt: skip


def xflux_keys(depth: int, guidance: bool) -> set[str]:
    """The state dict of X-Flux's ControlNetFlux, written down from its modules."""
    layers = ["img_in", "txt_in", "pos_embed_input", *(f"input_hint_block.{number}" for number in range(0, 16, 2))]
    for embedder in ("time_in", "vector_in", *(["guidance_in"] if guidance else [])):
        layers += [f"{embedder}.in_layer", f"{embedder}.out_layer"]
    norms = []
    for block in range(depth):
        layers.append(f"controlnet_blocks.{block}")
        for stream in ("img", "txt"):
            head = f"double_blocks.{block}.{stream}"
            layers += [f"{head}_mod.lin", f"{head}_attn.qkv", f"{head}_attn.proj", f"{head}_mlp.0", f"{head}_mlp.2"]
            norms += [f"{head}_attn.norm.{which}_norm.scale" for which in ("query", "key")]
    return {*norms, *(f"{layer}.{leaf}" for layer in layers for leaf in ("weight", "bias"))}


@pytest.mark.parametrize("spec", [FLUX_DEV, FLUX_SCHNELL], ids=lambda spec: spec.name)
def test_the_keys_and_shapes_are_xfluxs(spec: Any) -> None:
    shapes = {name: tuple(p.shape) for name, p in controlnet.empty(spec, 2).named_parameters()}
    places = {name: controlnet.place(name) for name in shapes}
    assert {place.name for place in places.values() if place} == xflux_keys(2, spec.guidance_embeds)
    stored = {place.name: place.stored(shapes[name]) for name, place in places.items() if place}
    assert stored["double_blocks.1.txt_attn.qkv.weight"] == (9216, 3072)
    assert stored["pos_embed_input.weight"] == (3072, 64)
    assert stored["input_hint_block.0.weight"] == (16, 3, 3, 3)
    assert stored["input_hint_block.14.weight"] == (16, 16, 3, 3)


def test_full_size() -> None:
    full = controlnet.empty(FLUX_DEV, 2)
    assert sum(p.numel() for p in full.parameters()) == 743_807_280
    assert (
        sum(p.numel() for p in controlnet.parameters(full).values()) == 743_807_280 - 75_512_832 - 2 * 9_440_256 - 128
    )


def test_a_fresh_net_has_the_bases_blocks_and_adds_nothing(transformer: nn.Module) -> None:
    fresh, again, other = (controlnet.build(BASE, config(seed=seed), torch.float32, CPU) for seed in (1, 1, 2))
    own = dict(transformer.named_parameters())
    drawn = []
    for name, parameter in controlnet.parameters(fresh).items():
        assert torch.equal(parameter, again.get_parameter(name)), name
        if name in own and not name.startswith("controlnet_"):
            assert torch.equal(parameter, own[name]), name
            assert parameter.data_ptr() != own[name].data_ptr()
        elif parameter.any():
            drawn.append(name)
            assert not torch.equal(parameter, other.get_parameter(name)), name
    assert len(drawn) == 2 * 8  # all convolutions but the last, and the layer after them: weight and bias
    batch = inputs(2)
    alone = {key: value for key, value in batch.items() if key != "condition"}
    velocity = ControlVelocity(fresh, transformer, guidance=True)
    assert torch.equal(velocity(**batch), velocity.velocity(**alone))
    with pytest.raises(ValueError, match="wants a condition"):
        velocity(**alone)


def test_the_first_steps_reach_every_parameter(transformer: nn.Module) -> None:
    """Zero layers behind one another would never learn."""
    fresh = controlnet.build(BASE, config(), torch.float32, CPU)
    velocity = ControlVelocity(fresh, transformer, guidance=True)
    reached: set[str] = set()
    trained = controlnet.parameters(fresh)
    for step in range(3):
        velocity(**inputs(1, step)).square().mean().backward()
        with torch.no_grad():
            for name, parameter in trained.items():
                assert parameter.grad is not None, name  # DDP waits for each
                if parameter.grad.any():
                    reached.add(name)
                    parameter -= 0.1 * parameter.grad
        if step == 0:
            assert reached == {f"controlnet_blocks.{k}.{leaf}" for k in (0, 1) for leaf in ("weight", "bias")}
        fresh.zero_grad()
    assert reached == set(trained)
    # What the last block makes of the text goes nowhere, in X-Flux's net too.
    idle = {name for name, parameter in fresh.named_parameters() if not parameter.requires_grad}
    assert idle == set(fresh.state_dict()) - set(trained)
    assert {name.rpartition(".")[0].removeprefix("transformer_blocks.1.") for name in idle} == {
        "ff_context.net.0.proj", "ff_context.net.2", "attn.to_add_out", "attn.add_q_proj", "attn.norm_added_q",
    }  # fmt: skip
    assert all(parameter.grad is None for parameter in transformer.parameters())


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_an_image_does_not_see_the_others_and_checkpointing_changes_nothing(
    net: nn.Module, transformer: nn.Module, batch: int
) -> None:
    velocity = ControlVelocity(net, transformer, guidance=True)
    mask = torch.ones(batch, 6, dtype=torch.bool)
    mask[-1, 4:] = False
    whole = velocity(**inputs(batch), mask=mask)
    for k in range(batch):
        alone = velocity(**inputs(1, k), mask=mask[k : k + 1])
        assert torch.allclose(whole[k : k + 1], alone, atol=1e-5)
    whole.square().mean().backward()
    plain = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    net.zero_grad()
    for each in (net, transformer):
        each.enable_gradient_checkpointing()  # type: ignore[operator]
    velocity(**inputs(batch), mask=mask).square().mean().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is None or torch.allclose(parameter.grad, plain[name], atol=1e-6), name
    assert all(p.grad is None and not p.requires_grad for p in transformer.parameters())


def test_what_the_nets_are_told(net: nn.Module, transformer: nn.Module) -> None:
    """t unrounded in a net of bf16, the condition in -1..1, and padding that nobody attends to."""
    net, transformer = (type(each).from_config(each.config) for each in (net, transformer))  # type: ignore[attr-defined]
    net, transformer = awake(net.to(torch.bfloat16)), transformer.to(torch.bfloat16)
    velocity = ControlVelocity(net, transformer, guidance=True)
    seen: dict[str, Any] = {}
    for each in (net, transformer):
        each.time_text_embed.time_proj.register_forward_pre_hook(
            lambda _, args: seen.setdefault("t", []).append(args[0])
        )
    net.input_hint_block.register_forward_pre_hook(lambda _, args: seen.update(hint=args[0]))
    batch = inputs(2)
    batch["condition"][0], batch["condition"][1] = 0, 255
    mask = torch.tensor([[True] * 4 + [False] * 2] * 2)
    v = velocity(**batch, mask=mask)
    assert v.dtype == torch.bfloat16
    assert torch.equal(seen["t"][0], batch["t"] * 1000)  # the net's
    assert torch.equal(seen["t"][-1], batch["t"] * 1000) or len(seen["t"]) == 4  # the base's; guidance has its own
    assert seen["hint"].flatten(1).unique(dim=1).tolist() == [[-1.0], [1.0]]
    batch["text"][:, 4:] = 100.0
    assert torch.equal(velocity(**batch, mask=mask), v)
    assert not torch.equal(velocity(**batch), v)


def test_residuals_come_again_after_the_depth() -> None:
    base = diffusers.FluxTransformer2DModel(
        num_layers=5, num_single_layers=1, num_attention_heads=1, attention_head_dim=32, joint_attention_dim=8,
        pooled_projection_dim=8, guidance_embeds=False, in_channels=64, axes_dims_rope=(4, 14, 14),
    ).requires_grad_(False)  # fmt: skip
    residuals = [torch.full((1, 4, 32), value) for value in (1.0, 100.0)]
    before, after = [], []
    for block in base.transformer_blocks:
        block.register_forward_hook(lambda *args: before.append(args[-1][1]))
        block.register_forward_pre_hook(lambda _, args, kwargs: after.append(kwargs["hidden_states"]), with_kwargs=True)
    model.Velocity(base, guidance=False)(
        torch.randn(1, 4, 64), torch.rand(1), torch.randn(1, 2, 8), torch.randn(1, 8), flow.image_ids(4, 4),
        flow.text_ids(2), 1.0, residuals=residuals,
    )  # fmt: skip
    for k in range(4):
        assert torch.allclose(after[k + 1] - before[k], residuals[k % 2], atol=1e-4), k


def test_the_files(net: nn.Module, transformer: nn.Module, tmp_path: Path) -> None:
    weights = {name: parameter.detach() for name, parameter in net.named_parameters()}
    trained = {name: weights[name] for name in controlnet.parameters(net)}
    paths = controlnet.write(tmp_path, trained, config(), net)
    assert [path.name for path in paths] == ["controlnet.safetensors", "controlnet"]
    assert set(load_file(paths[0])) == xflux_keys(2, guidance=True)
    theirs = diffusers.FluxControlNetModel.from_pretrained(paths[1])
    batch = inputs(2)
    expected = ControlVelocity(net, transformer, guidance=True)(**batch)
    assert torch.equal(ControlVelocity(theirs, transformer, guidance=True)(**batch), expected)
    for path in (*paths, paths[1] / "diffusion_pytorch_model.safetensors"):
        loaded = controlnet.load(path, torch.float32, CPU)
        built = controlnet.build(BASE, config(controlnet_init=str(path)), torch.float32, CPU)
        for name, value in weights.items():
            assert torch.equal(loaded.get_parameter(name), value), name
            assert torch.equal(built.get_parameter(name), value), name
        assert all(parameter.requires_grad for parameter in controlnet.parameters(built).values())
        assert not any(parameter.requires_grad for parameter in loaded.parameters())
    controlnet.write(tmp_path / "bf16", trained, TrainConfig(img_dir="images"), net)
    assert {tensor.dtype for tensor in load_file(tmp_path / "bf16" / "controlnet.safetensors").values()} == {
        torch.bfloat16
    }


def test_what_cannot_be_trained_on(net: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"controlnet_depth: is 3, and .* has 2 double blocks"):
        controlnet.build(BASE, config(controlnet_depth=3, pretrained_model=str(tiny_flux())), torch.float32, CPU)
    file, folder = controlnet.write(tmp_path, {}, config(), net)
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}

    def refuse(path: Path, text: str, **changes: Any) -> None:
        with pytest.raises((ModelError, ConfigError), match=text) as caught:
            controlnet.build(BASE, config(controlnet_init=str(path), **changes), torch.float32, CPU)
        assert ". " in str(caught.value)

    refuse(file, "controlnet_depth: is 1, and the ControlNet of controlnet_init has 2 blocks", controlnet_depth=1)
    refuse(tmp_path / "no.safetensors", "does not exist")
    (tmp_path / "controlnet.bin").write_bytes(b"\x80")
    refuse(tmp_path / "controlnet.bin", "is not a safetensors file")
    save_file({"x": torch.zeros(2)}, file)
    refuse(file, "is not a ControlNet as X-Flux trains it")
    save_file({name: tensor for name, tensor in tensors.items() if name != "pos_embed_input.bias"}, file)
    refuse(file, "is not a ControlNet as X-Flux trains it: it lacks 'controlnet_x_embedder.bias'")
    save_file({**tensors, "single_blocks.0.linear1.bias": torch.zeros(2)}, file)
    refuse(file, r"holds a tensor single_blocks.0.linear1.bias")
    save_file({**tensors, "txt_in.weight": torch.zeros(128, 32)}, file)
    refuse(file, r"context_embedder.weight in .* has the shape \(128, 32\)")
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({}))
    refuse(folder, "holds neither")
