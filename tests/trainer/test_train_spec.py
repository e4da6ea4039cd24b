"""Sizes of FLUX.1, against the published counts and against diffusers' own module."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path

import pytest
from xflux_trainer.spec import (
    FLUX_DEV,
    FLUX_SCHNELL,
    LORA_TARGETS,
    FluxSpec,
    adapters_of,
    count_blocks,
    count_parameters,
    image_tokens,
    is_target,
    read_folder,
    safetensors_header,
    shift_mu,
    unmatched,
)
from xflux_trainer.targets import growth, unplaced

TINY = FluxSpec("tiny", 2, 3, heads=2, head_dim=16, text_dim=24, pooled_dim=12)


def test_published_counts() -> None:
    assert FLUX_DEV.transformer_parameters == 11_901_408_320
    assert FLUX_SCHNELL.transformer_parameters == 11_891_178_560
    assert FLUX_DEV.parameters()["double_blocks"] == 6_456_794_624
    assert FLUX_DEV.parameters()["single_blocks"] == 5_380_488_704


def module(spec: FluxSpec):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        return diffusers.FluxTransformer2DModel(
            num_layers=spec.double_blocks, num_single_layers=spec.single_blocks, num_attention_heads=spec.heads,
            attention_head_dim=spec.head_dim, joint_attention_dim=spec.text_dim, pooled_projection_dim=spec.pooled_dim,
            guidance_embeds=spec.guidance_embeds, in_channels=spec.in_channels,
            axes_dims_rope=(16, 56, 56) if spec.head_dim == 128 else (4, 6, 6),
        )  # fmt: skip


@pytest.mark.parametrize(
    "spec", [FLUX_DEV, FLUX_SCHNELL, TINY, replace(TINY, guidance_embeds=False)], ids=lambda s: s.name
)
def test_counts_and_names_are_those_of_diffusers(spec: FluxSpec) -> None:
    torch = pytest.importorskip("torch")
    transformer = module(spec)
    assert sum(p.numel() for p in transformer.parameters()) == spec.transformer_parameters
    parts: dict[str, int] = {}
    for name, parameter in transformer.named_parameters():
        part = {"transformer_blocks": "double_blocks", "single_transformer_blocks": "single_blocks"}
        head = part.get(name.split(".")[0], name.split(".")[0])
        parts[head] = parts.get(head, 0) + parameter.numel()
    assert parts == spec.parameters()
    linears = {
        name: (linear.in_features, linear.out_features)
        for name, linear in transformer.named_modules()
        if isinstance(linear, torch.nn.Linear)
    }
    assert linears == {linear.name: (linear.inputs, linear.outputs) for linear in spec.linears()}


def test_flops_of_1024_px() -> None:
    """The numbers of the design's table, in TFLOP: forward 74.4, adapter step 171.1, checkpointed 245.5."""
    assert FLUX_DEV.forward_flops(4096) / 1e12 == pytest.approx(74.4, abs=0.05)
    assert FLUX_DEV.step_flops(4096, checkpointing=False) / 1e12 == pytest.approx(171.1, abs=0.05)
    assert FLUX_DEV.step_flops(4096, checkpointing=True) / 1e12 == pytest.approx(245.5, abs=0.05)


def test_forward_flops_against_torchs_counter() -> None:
    torch = pytest.importorskip("torch")
    from torch.utils.flop_counter import FlopCounterMode

    transformer, h = module(TINY).to_empty(device="cpu").float(), TINY.hidden
    x, text = torch.zeros(1, 64, 64), torch.zeros(1, 8, 24)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        transformer(
            hidden_states=x, encoder_hidden_states=text, pooled_projections=torch.zeros(1, 12),
            timestep=torch.zeros(1), guidance=torch.ones(1), img_ids=torch.zeros(64, 3), txt_ids=torch.zeros(8, 3),
        )  # fmt: skip
    counted = counter.get_total_flops()
    # torch 2.4's counter knows no attention on the CPU.
    attention = 5 * 4 * 72**2 * h
    assert TINY.forward_flops(64, 8) in (
        pytest.approx(counted, rel=0.001),
        pytest.approx(counted + attention, rel=0.001),
    )


def test_tokens_and_shift() -> None:
    assert image_tokens(1024, 1024) == 4096
    assert image_tokens(512, 768) == 32 * 48
    assert shift_mu(256) == pytest.approx(0.5)
    assert shift_mu(4096) == pytest.approx(1.15)
    assert shift_mu(1024) == pytest.approx(0.63)


def count(targets: str | tuple[str, ...], **blocks: tuple[int, ...]) -> int:
    return sum(adapter.parameters(16) for adapter in adapters_of(FLUX_DEV.linears(), targets, **blocks))


def test_named_targets() -> None:
    counts = {targets: count(targets) for targets in LORA_TARGETS}
    assert counts["diffusers"] == 44_826_624  # diffusers' script prints this for rank 16
    # X-Flux's own counts of all blocks, and of its default file.
    assert counts["xflux"] == 29_884_416
    assert count("xflux", single_blocks=(1, 2, 3, 4)) == 13_172_736
    assert counts["attn"] < counts["diffusers"] < counts["all-linear"]


def test_xfluxs_adapters_are_fused_and_no_others() -> None:
    names = {adapter.name: adapter for adapter in adapters_of(TINY.linears(), "xflux", (1,), (0,))}
    h = TINY.hidden
    double, single = "transformer_blocks.0.attn", "single_transformer_blocks.1"
    assert {name: (adapter.inputs, adapter.outputs) for name, adapter in names.items()} == {
        f"{double}.to_qkv": (h, 3 * h), f"{double}.to_added_qkv": (h, 3 * h),
        f"{double}.to_out.0": (h, h), f"{double}.to_add_out": (h, h),
        f"{single}.attn.to_qkv": (h, 3 * h), f"{single}.proj_out": (5 * h, h),
    }  # fmt: skip
    assert names[f"{double}.to_added_qkv"].layers == tuple(f"{double}.add_{part}_proj" for part in "qkv")
    for targets in ("attn", "diffusers", "all-linear", LORA_TARGETS["xflux"]):
        adapters = adapters_of(TINY.linears(), targets)
        assert all(adapter.layers == (adapter.name,) for adapter in adapters)
        assert [a.name for a in adapters] == [line.name for line in TINY.linears() if is_target(line.name, targets)]


def test_what_a_format_has_no_place_for() -> None:
    names = [line.name for line in FLUX_DEV.linears()]
    placed = [name for name in names if not unplaced([name], "xlabs")]
    assert placed == [name for name in names if is_target(name, "xflux")]
    assert unplaced(names, "kohya") == unplaced(names, "diffusers") == ()


@pytest.mark.parametrize(
    ("targets", "grown"),
    [
        ("xflux", (1, 1, 1)),
        ("attn", (1, 3, 3)),
        ("all-linear", (1, 4, 3)),
        (("attn.to_q", "attn.to_out.0"), (1, 1, 1)),
        (("to_v", "proj_mlp"), (1, 2, 1)),
    ],
)
def test_how_ranks_grow(targets: str | tuple[str, ...], grown: tuple[int, ...]) -> None:
    adapters = adapters_of(FLUX_DEV.linears(), targets)
    assert tuple(growth(adapters, form) for form in ("diffusers", "kohya", "xlabs")) == grown


@pytest.mark.parametrize(
    ("name", "targets", "hit"),
    [
        ("single_transformer_blocks.3.proj_out", "xflux", True),
        ("proj_out", "xflux", False),  # the model's last layer bears the same name
        ("proj_out", ("proj_out",), True),
        ("transformer_blocks.0.attn.to_q", ("to_q",), True),
        ("transformer_blocks.0.attn.to_q", ("o_q",), False),
        ("transformer_blocks.0.attn.to_q", ("single:attn.to_q",), False),
        ("x_embedder", "all-linear", True),
        ("transformer_blocks.1.ff.net.2", "attn", False),
    ],
)
def test_is_target(name: str, targets: str | tuple[str, ...], hit: bool) -> None:
    assert is_target(name, targets) is hit


def test_block_lists_choose_blocks() -> None:
    hit = [
        linear.name.rsplit(".attn", 1)[0]
        for linear in FLUX_DEV.linears()
        if is_target(linear.name, ("attn.to_q",), single_blocks=(1, 37), double_blocks=())
    ]
    assert hit == ["single_transformer_blocks.1", "single_transformer_blocks.37"]


def test_what_a_model_has_not() -> None:
    names = [linear.name for linear in TINY.linears()]
    assert unmatched(names, ("to_q", "to_z", "single:proj_out", "double:to_q", "*", "proj_out", "")) == (
        "to_z", "double:to_q", "",
    )  # fmt: skip
    assert all(unmatched(names, targets) == () for targets in LORA_TARGETS)
    assert unmatched([], "attn") == ()
    assert count_blocks(names) == {"single_blocks": 3, "double_blocks": 2}
    assert count_blocks(["proj_out"]) == {"single_blocks": 0, "double_blocks": 0}


def write_model(folder: Path, name: str, shapes: dict[str, list[int]]) -> Path:
    """A safetensors file with a header and no data worth reading."""
    header = json.dumps(
        {key: {"dtype": "BF16", "shape": s, "data_offsets": [0, 0]} for key, s in shapes.items()}
    ).encode()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    return path


def test_read_folder(tmp_path: Path) -> None:
    config = {
        "num_layers": 2, "num_single_layers": 4, "num_attention_heads": 3, "attention_head_dim": 8, "in_channels": 64,
        "joint_attention_dim": 32, "pooled_projection_dim": 16, "guidance_embeds": False,
    }  # fmt: skip
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(config))
    write_model(tmp_path / "vae", "x.safetensors", {"encoder.a": [2, 3], "decoder.b": [5]})
    write_model(tmp_path / "text_encoder_2", "model-00001-of-00002.safetensors", {"a": [7, 2]})
    write_model(tmp_path / "text_encoder_2", "model-00002-of-00002.safetensors", {"b": [3]})
    spec = read_folder(tmp_path)
    assert (spec.double_blocks, spec.single_blocks, spec.hidden, spec.guidance_embeds) == (2, 4, 24, False)
    assert (spec.t5_parameters, spec.vae_parameters) == (17, 11)
    assert spec.clip_parameters == FLUX_DEV.clip_parameters  # not there: the real one's size is assumed
    assert spec.dynamic_shift is False
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text('{"use_dynamic_shifting": true}')
    assert read_folder(tmp_path).dynamic_shift is True


@pytest.mark.parametrize(
    "data", [b"", b"abc", b"\x02" + b"\0" * 7 + b"[]", struct.pack("<Q", 500) + b"{}", b"\xff" * 64]
)
def test_broken_safetensors_headers(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"x\.safetensors"):
        safetensors_header(path)
    with pytest.raises(ValueError, match=r"x\.safetensors"):
        count_parameters(tmp_path)
