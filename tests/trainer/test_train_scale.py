"""Weights cut up among two real ranks on the CPU: ZeRO 2 and 3, FSDP2 and DDP train as one process does.

All cases run in one launch of `scale_child.py`. Its losses are held against a loop of a few lines that knows nothing of
the steppers: in fp32 to 1e-5 (relative), the gradients' norms to 1e-4, in bf16 to 1e-2.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("peft")

import scale_child  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from test_train_ranks import DDP, ZERO  # noqa: E402
from test_train_ranks import launch as accelerate  # noqa: E402
from trainer_kit import AVX_512, environment, losses, metrics, write_config  # noqa: E402
from xflux_trainer import controlnet, fsdp, model, parts, sharded, zero  # noqa: E402
from xflux_trainer.averages import decay_at  # noqa: E402
from xflux_trainer.config import TrainConfig, load  # noqa: E402
from xflux_trainer.errors import Unsupported  # noqa: E402
from xflux_trainer.ranks import Launch, Ranks  # noqa: E402

KINDS = ("lora", "full")


def _has_fsdp() -> bool:
    try:
        fsdp._fully_shard()
    except Unsupported:
        return False
    # The first releases that have it know of nothing but CUDA.
    return tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 6)


_ENGINES = (
    "ddp",
    *(("zero2", "zero3") if importlib.util.find_spec("deepspeed") else ()),
    *(("fsdp",) if _has_fsdp() else ()),
)
# A case of ZeRO-3 takes three seconds here: the offload is tried with the fine-tune, the rest in the long tests.
CASES = [f"{name}-offload:full" if name == "zero3" else f"{name}:full" for name in _ENGINES]
CASES += [f"{name}:lora" for name in _ENGINES]
_ROUNDED = ["bf16-kahan:full", *(("bf16-8bit-stochastic:full",) if importlib.util.find_spec("torchao") else ())]
ROUNDED = [f"{name}-{way}" for way in _ROUNDED for name in ("ddp", "fsdp")] if _has_fsdp() else []
LONG = [f"{name}-bf16:lora" for name in _ENGINES if name in ("zero3", "fsdp")]
LONG += [f"{name}:full" for name in ("zero1", "zero3") if "zero2" in _ENGINES]
LONG += ["fsdp-offload:full", "fsdp-fp16:full"] if "fsdp" in _ENGINES else []


def launch(folder: Path, cases: list[str]) -> dict[str, Any]:
    child = Path(__file__).with_name("scale_child.py")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(child),
         str(folder), *cases],
        capture_output=True, text=True, timeout=280, env=environment(CUDA_VISIBLE_DEVICES=""),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    return {case: {**found, "file": folder / f"{case}.safetensors"} for case, found in results.items()}


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return launch(tmp_path_factory.mktemp("scale"), CASES + ROUNDED)


@pytest.fixture(scope="module", params=KINDS)
def alone(request: pytest.FixtureRequest) -> dict[str, Any]:
    """One process that accumulates both images, written out: AdamW, clipping, an average."""
    config = scale_child.config_of(f"alone:{request.param}")
    velocity, trained = scale_child.make(config)
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
    average = {name: value.detach().clone() for name, value in trained.items()}
    found: dict[str, Any] = {"kind": request.param, "steps": []}
    for step in range(scale_child.STEPS + 1):
        if step == scale_child.STEPS:
            found["moments"] = {n: optimizer.state[p]["exp_avg"].clone() for n, p in trained.items()}
            found["ema"] = {name: value.clone() for name, value in average.items()}
        losses = [scale_child.batch_loss(velocity, step, k) for k in range(2)]
        mean = torch.stack(losses).mean()
        mean.backward()
        norm = torch.nn.utils.clip_grad_norm_(list(trained.values()), config.max_grad_norm)
        found["steps"].append((float(mean.detach()), float(norm)))
        optimizer.step()
        optimizer.zero_grad()
        for name, value in trained.items():
            average[name].lerp_(value.detach(), 1 - decay_at(config.ema_decay, step + 1))
    with torch.no_grad():
        found["after"] = float(scale_child.batch_loss(velocity, 9, 0))
        for name, value in trained.items():
            value.copy_(average[name])
        found["average"] = float(scale_child.batch_loss(velocity, 9, 0))
    return found


def compare_losses(case: str, found: dict[str, Any], alone: dict[str, Any]) -> None:
    assert found["strategy"] == case.split(":")[0].split("-")[0]
    for (loss, norm), (own, own_norm) in zip([*found["steps"], found["next"]], alone["steps"]):  # noqa: B905
        assert loss == pytest.approx(own, rel=1e-5), case
        assert norm == pytest.approx(own_norm, rel=1e-4), case
    # With the average's weights, and with the trained ones again after it.
    assert found["average"] == pytest.approx(alone["average"], rel=1e-4), case
    assert found["after"] == pytest.approx(alone["after"], rel=1e-4), case
    assert alone["after"] != pytest.approx(alone["average"], rel=1e-4)


def compare_pieces(case: str, found: dict[str, Any], alone: dict[str, Any]) -> None:
    stored = load_file(found["file"])
    assert {name.split("|")[1] for name in stored} == {"weight", "exp_avg", "exp_avg_sq", "ema"}
    assert found["scalars"]["steps"] == scale_child.STEPS
    for name, value in alone["moments"].items():
        assert stored[f"{name}|exp_avg"].shape == value.shape
        assert torch.allclose(stored[f"{name}|exp_avg"], value, rtol=1e-3, atol=1e-5), (case, name)
    # Where a gradient is nothing but rounding (the bias of a key), Adam makes whole steps of it.
    wrong = [(stored[f"{n}|ema"] - value).abs().flatten() > 1e-4 for n, value in alone["ema"].items()]
    assert float(torch.cat(wrong).float().mean()) < 0.02, case


def of_kind(cases: list[str], kind: str) -> list[str]:
    return [case for case in cases if case.endswith(f":{kind}")]


def test_two_ranks_train_as_one_process_does(told: dict[str, Any], alone: dict[str, Any]) -> None:
    for case in of_kind(CASES, alone["kind"]):
        compare_losses(case, told[case], alone)


def test_a_rank_holds_its_share_of_the_base_alone(told: dict[str, Any]) -> None:
    """As soon as it is loaded: no device ever holds all of it."""
    shares = {case.split(":")[0]: told[case]["share"] for case in of_kind(CASES, "lora")}
    whole = {name: share for name, share in shares.items() if name in ("ddp", "zero2")}
    assert all(share == 1 for share in whole.values())
    assert all(0.5 <= share < 0.51 for name, share in shares.items() if name not in whole), shares


def test_the_pieces_are_the_same_whoever_wrote_them(told: dict[str, Any], alone: dict[str, Any]) -> None:
    for case in of_kind(CASES, alone["kind"]):
        compare_pieces(case, told[case], alone)


@pytest.mark.parametrize("kind", KINDS)
def test_each_goes_on_from_anothers_checkpoint(kind: str, told: dict[str, Any]) -> None:
    exact = [case for case in told if "<" in case and case.endswith(kind) and case.split("<")[0] not in ROUNDED]
    resumed = {case: told[case] for case in exact}
    assert [case.split("<")[0] for case in resumed] == of_kind(CASES, kind)
    for case, found in resumed.items():
        source = told[case.split("<")[1]]
        assert found["next"] == pytest.approx(source["next"], rel=1e-5), case
        assert found["average"] == pytest.approx(source["average"], rel=1e-4), case


@pytest.mark.skipif(not ROUNDED, reason="this torch has no FSDP2")
def test_weights_in_16_bits_and_moments_in_8_bits(told: dict[str, Any]) -> None:
    """Cut up among ranks or not: nearly the same steps, and each goes on from the other's checkpoint."""
    for case in ROUNDED:
        found, way = told[case], case.partition("-")[2]
        other = told[f"{'fsdp' if case.startswith('ddp') else 'ddp'}-{way}"]
        assert (found["share"] == 0.5) == case.startswith("fsdp"), case  # cut up as it was loaded
        for (loss, norm), (own, own_norm) in zip(found["steps"], other["steps"]):  # noqa: B905
            # Without AVX-512 products in bf16 are rounded more than once: 1.4 and 2.6 % at the third step.
            near = 1e-2 if AVX_512 else 3e-2
            assert loss == pytest.approx(own, rel=near) and norm == pytest.approx(own_norm, rel=2 * near), case
        resumed = told[_resumed(told, case)]  # before its step only what was taken up counts
        assert resumed["next"][0] == pytest.approx(found["next"][0], rel=1e-3), case
        stored = load_file(found["file"])
        assert {value.dtype for name, value in stored.items() if name.endswith("|weight")} == {torch.bfloat16}
        kinds = {name.split("|")[1] for name in stored}
        assert ("compensation" in kinds) == ("kahan" in case), case
        assert ({"exp_avg_codes", "exp_avg_sq_scale"} <= kinds) == ("8bit" in case), case
        # A weight of 32 x 160 is large enough for blocks of 8 bits, and its halves are not.
        small = next(name for name, value in stored.items() if name.endswith("|weight") and value.shape == (32, 160))
        name = small.replace("|weight", "|exp_avg_codes" if case == "ddp-bf16-8bit-stochastic:full" else "|exp_avg")
        assert stored[name].shape == (32, 160), case


def _resumed(results: dict[str, Any], source: str) -> str:
    return next(case for case in results if case.endswith(f"<{source}"))


@pytest.mark.long
@pytest.mark.skipif(not LONG, reason="this stack has neither DeepSpeed nor FSDP2")
def test_more_of_the_same(tmp_path: Path, alone: dict[str, Any]) -> None:
    """ZeRO 1, ZeRO-3 on the device, FSDP's offload; and bf16, on a base that is cut up as it is loaded."""
    results = launch(tmp_path, of_kind(LONG, alone["kind"]))
    for case, found in results.items():
        if "<" in case:
            continue
        assert found["next"] == pytest.approx(results[_resumed(results, case)]["next"], rel=1e-5), case
        if "fp16" in case:
            # The first steps overflow, are left out, and halve the scale.
            scale, clean = found["scalars"]["loss_scale"], found["scalars"]["growth_tracker"]
            assert (scale, found["scalars"]["steps"]) == (65536 / 2 ** (scale_child.STEPS - clean), clean)
            assert 0 < clean < scale_child.STEPS
            continue
        if "bf16" not in case:
            compare_losses(case, found, alone)
            compare_pieces(case, found, alone)
            continue
        losses = [loss for loss, _ in [*found["steps"], found["next"]]]
        assert losses == pytest.approx([loss for loss, _ in alone["steps"]], rel=1e-2), case
        # Adapters step in fp32: most of their values have no bf16 form.
        weights = [value for name, value in load_file(found["file"]).items() if name.endswith("|weight")]
        exact = torch.cat([(value == value.bfloat16().float()).float().flatten() for value in weights])
        assert float(exact.mean()) < 0.2, case


ZERO_3 = ZERO | {"deepspeed_config": ZERO["deepspeed_config"] | {
    "zero_stage": 3, "offload_optimizer_device": "cpu", "offload_param_device": "cpu", "zero3_init_flag": True,
    "zero3_save_16bit_model": True,
}}  # fmt: skip
FSDP_2 = DDP | {"distributed_type": "FSDP", "fsdp_config": {
    "fsdp_version": 2, "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "fsdp_reshard_after_forward": True,
    "fsdp_state_dict_type": "SHARDED_STATE_DICT", "fsdp_offload_params": False,
    "fsdp_transformer_layer_cls_to_wrap": "FluxTransformerBlock",
}}  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("engine", [name for name in _ENGINES if name in ("zero3", "fsdp")])
def test_a_whole_run_by_accelerate_resumes_exactly(tmp_path: Path, engine: str) -> None:
    """Held-out losses and samples of uneven shares on the way; three and three steps are six, bit for bit."""
    pytest.importorskip("accelerate")
    settings = ZERO_3 if engine == "zero3" else FSDP_2
    common = {
        "mixed_precision": "bf16", "checkpointing_steps": 3, "learning_rate": 1e-2, "gradient_accumulation_steps": 2,
        "heldout_samples": 3, "heldout_timesteps": [0.5], "disable_sampling": False, "sample_every": 0,
        "sample_prompts": ["a square"], "sample_width": 64, "sample_height": 64, "sample_steps": 2,
    }  # fmt: skip
    whole = write_config(tmp_path, "a.yaml", max_train_steps=6, output_dir=str(tmp_path / "a"), **common)
    done = accelerate(settings, whole)
    assert done.returncode == 0, done.stdout + done.stderr
    told = metrics(tmp_path / "a")
    assert (told["strategy"], told["world_size"]) == (engine, 2)
    assert told["heldout_loss"]["after"] < told["heldout_loss"]["before"]
    shutil.copytree(tmp_path / "a" / "checkpoint-3", tmp_path / "b" / "checkpoint-3")
    more = {"output_dir": str(tmp_path / "b"), "resume_from_checkpoint": "latest"}
    done = accelerate(settings, write_config(tmp_path, "b.yaml", max_train_steps=6, **more, **common))
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "a")[3:] == losses(tmp_path / "b")
    for name in ("weights-00001.safetensors", "optimizer-00001.safetensors"):
        a, b = (tmp_path / run / "checkpoint-6" / name for run in "ab")
        assert a.read_bytes() == b.read_bytes(), name


@pytest.mark.long
@pytest.mark.parametrize("engine", [name for name in _ENGINES if name in ("zero3", "fsdp")])
def test_a_controlnet_is_written_whole(tmp_path: Path, engine: str) -> None:
    """Also what is not trained of it, of which every rank holds a part by then."""
    pytest.importorskip("accelerate")
    images = str(tmp_path / "images")
    more = {"control_type": "files", "control_dir": images, "mixed_precision": "bf16", "max_train_steps": 2}
    file = write_config(tmp_path, mode="controlnet", **more)
    done = accelerate(ZERO_3 if engine == "zero3" else FSDP_2, file)
    assert done.returncode == 0, done.stdout + done.stderr
    config = load(file)
    base, _ = model.locate(config)
    host = torch.device("cpu")
    fresh = controlnet.build(base, config, torch.bfloat16, host)
    written = controlnet.load(tmp_path / "out" / "controlnet.safetensors", torch.bfloat16, host).state_dict()
    assert written.keys() == fresh.state_dict().keys()
    resting = controlnet.idle(fresh)
    assert all(torch.equal(written[name], value) for name, value in resting.items()) and resting
    assert any(not torch.equal(written[name], value) for name, value in fresh.state_dict().items())


@pytest.mark.parametrize(("changes", "words"), [
    ({"optimizer": "adafactor"}, "The optimizer adafactor wants whole weights"),
    ({"mode": "finetune", "weight_update": "kahan"}, "holds fp32 masters"),
])  # fmt: skip
def test_what_cannot_be_cut_up_is_refused(changes: dict[str, Any], words: str) -> None:
    config = TrainConfig(img_dir="x", mixed_precision="fp16", **changes)
    with pytest.raises(Unsupported, match=words):
        zero.deepspeed_settings({"ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"}, config, 2, 1, 10)
    with pytest.raises(Unsupported, match=words):
        fsdp.refuse(config)


@pytest.mark.parametrize("stage", ["2", "3"])
def test_a_quantised_base_is_cut_up_by_nobody(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """ZeRO 2 leaves it whole on every device."""
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", stage)
    config = TrainConfig(img_dir="x", quantization="int8", mixed_precision="bf16")
    ranks = Ranks(Launch(use_cpu=True, deepspeed=True))
    if stage == "2":
        assert sharded.preparer(config, ranks) is None
        return
    with pytest.raises(Unsupported, match="quantization is int8, and zero3 cannot"):
        sharded.preparer(config, ranks)
    with pytest.raises(Unsupported, match="quantization is int8, and fsdp cannot"):
        sharded.preparer(config, Ranks(Launch(use_cpu=True, fsdp=True)))


def test_nothing_is_cut_up_early_without_being_asked() -> None:
    ranks = Ranks(Launch(use_cpu=True))
    config = TrainConfig(img_dir="x")
    assert sharded.preparer(config, ranks) is None
    some = replace(config, mode="finetune", train_parameters=("img_attn",))
    assert sharded.preparer(some, Ranks(Launch(use_cpu=True, fsdp=True))) is None  # which become fp32 is not known yet


def test_deepspeeds_loss_scale_goes_on_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own scaler, with overflows here and there: what is taken up in the middle moves as what was never stopped."""
    scalers = pytest.importorskip("deepspeed.runtime.fp16.loss_scaler")
    monkeypatch.setattr(scalers.dist, "get_rank", lambda: 1)  # it tells of overflows on rank 0

    def fresh() -> Any:
        more = {"init_scale": 2.0**16, "scale_window": 5, "min_scale": 1, "delayed_shift": 2}
        return scalers.DynamicLossScaler(**more, consecutive_hysteresis=False)

    overflows = [k in (0, 1, 3, 17, 18, 19, 40) for k in range(60)]
    whole, scales = fresh(), []
    copies: list[Any] = []  # one is taken at every step, and moves on beside the whole
    for overflow in overflows:
        for scaler in (whole, *copies):
            scaler.update_scale(overflow)
        scales.append(whole.cur_scale)
        assert {scaler.cur_scale for scaler in copies} <= {whole.cur_scale}
        copies.append(fresh())
        zero.load_scaling(copies[-1], zero.scaling(whole))
    assert len(set(scales)) > 4
    assert zero.scaling(None) == {}


@pytest.mark.parametrize(("environ", "first"), [
    ({}, []), ({"FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP"}, ["fsdp_auto_wrap_policy"]),
    ({"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_ACTIVATION_CHECKPOINTING": "false"}, []),
    ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, ["fsdp_activation_checkpointing"]),
])  # fmt: skip
def test_what_is_done_otherwise_is_told(environ: dict[str, str], first: list[str]) -> None:
    assert [note.split()[0] for note in fsdp.notes(environ)] == first


def test_an_older_torch_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.distributed.fsdp, "fully_shard", raising=False)
    with pytest.raises(Unsupported, match="has no FSDP2"):
        fsdp._fully_shard()


@pytest.mark.parametrize("world", [2, 3, 5])
@pytest.mark.parametrize("shape", [(1,), (5,), (7, 3), (6, 2, 2)])
def test_every_rank_knows_whose_rows_are_whose(world: int, shape: tuple[int, ...]) -> None:
    """As `fully_shard` deals them out, and below one another they are the whole."""
    value = torch.arange(float(torch.Size(shape).numel())).view(shape)
    config = TrainConfig(img_dir="x")
    found = []
    for rank in range(world):
        ranks = Ranks(Launch(rank=rank, world_size=world, use_cpu=True))
        slot = parts.slots.Slot(0, "x", torch.nn.Parameter(value.clone()), config)
        part = parts.Part(slot, shape, ranks, whole=False)
        rows = part.rows(value)
        assert rows.numel() == part._counts()[rank]
        found.append(rows)
        assert part.rows(value).shape[1:] == value.shape[1:]
        assert parts.Part(slot, shape, ranks, whole=True).rows(value) is value
    assert torch.equal(torch.cat(found), value)


@pytest.mark.skipif(not ROUNDED, reason="this torch has no FSDP2")
@pytest.mark.parametrize(("world", "update", "optimizer"), [
    (2, "stochastic", "adamw"),
    *(pytest.param(*case, marks=pytest.mark.long) for case in (
        (2, "auto", "adamw"), (4, "auto", "adamw"), (8, "auto", "adamw"),
        *(((2, "stochastic", "adamw8bit"),) if importlib.util.find_spec("torchao") else ()),
    )),
])  # fmt: skip
def test_the_bill_of_what_is_cut_up(world: int, update: str, optimizer: str) -> None:
    """Against the storages that are alive in a step, what is gathered and on its way among them."""
    child = Path(__file__).with_name("fsdp_memory_child.py")
    done = subprocess.run(
        [sys.executable, str(child), str(world), update, optimizer], capture_output=True, text=True, timeout=280,
        env=environment(CUDA_VISIBLE_DEVICES=""),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert 0 <= found["bill"] / found["seen"] - 1 < 0.03, found
