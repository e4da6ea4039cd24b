"""The reader of an X-Flux checkout: what it takes from the scripts' own text, the config, the folders."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import xflux_kit as kit
import yaml
from click.testing import CliRunner

from xflux_doctor import job as job_files
from xflux_doctor import xflux, yamltext
from xflux_doctor.cli import cli
from xflux_doctor.errors import UsageError
from xflux_doctor.finding import Edit, Remove
from xflux_doctor.job import Job
from xflux_doctor.plan import lay
from xflux_doctor.xflux_config import read_config
from xflux_doctor.xflux_images import list_images, shape


def script_of(work: Job) -> xflux.Script:
    assert work.xflux is not None
    return work.xflux.script


def test_what_a_script_reads_is_taken_from_its_text(tmp_path: Path) -> None:
    script = script_of(kit.job(tmp_path))
    assert script.reads["model_name"] == "start" and script.reads["rank"] == "setup"
    assert script.reads["sample_every"] == "steps"
    assert "nothing" not in script.reads and "written" not in script.reads
    assert script.upcasts and script.logs_images and script.cuts_at_dots and not script.one_t_per_image
    assert script.loader_keys == {
        "train_batch_size": True, "num_workers": True, "img_dir": True,
        "img_size": False, "caption_type": False, "random_ratio": False,
    }  # fmt: skip


def test_a_patched_script_is_read_as_it_is(tmp_path: Path) -> None:
    root = kit.checkout(tmp_path)
    path = root / xflux.SCRIPTS["lora"]
    path.write_text(path.read_text().replace("dit = dit.to(torch.float32)", "# dit = dit.to(torch.float32)"))
    loader = root / "image_datasets/dataset.py"
    loader.write_text("def loader(folder): return walk(folder)\n")
    script = script_of(kit.job(root))
    assert not script.upcasts and script.loader_keys is None


@pytest.mark.parametrize(
    ("name", "values", "kind"),
    [
        ("a.yaml", kit.LORA, "lora"),
        ("test_canny_controlnet.yaml", {}, "controlnet"),
        ("a.yaml", {"output_dir": "saves_canny/"}, "controlnet"),
        ("test_finetune.yaml", {}, "finetune"),
    ],
)
def test_which_script_goes_with_a_config(tmp_path: Path, name: str, values: dict[str, object], kind: str) -> None:
    root = kit.checkout(tmp_path / "x")
    assert xflux.read(str(root), kit.config(tmp_path / name, **values)).script.kind == kind
    named = root / xflux.SCRIPTS["finetune"]
    assert xflux.read(str(named), kit.config(tmp_path / name, **values)).script.kind == "finetune"


def test_no_checkout_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is no X-Flux checkout"):
        xflux.read(str(tmp_path), None)


def test_the_commit_is_read_as_text(tmp_path: Path) -> None:
    root, commit = kit.checkout(tmp_path), "4749542" + "5" * 33
    (root / ".git/refs/heads").mkdir(parents=True)
    (root / ".git/HEAD").write_text("ref: refs/heads/main\n")
    (root / ".git/packed-refs").write_text(f"# pack-refs\n{commit} refs/heads/main\n")
    assert xflux.read(str(root), None).commit == commit
    (root / ".git/HEAD").write_text(commit)
    assert xflux.read(str(root), None).commit == commit


def test_the_config_is_read_as_omegaconf_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("learning_rate: 1e-5\nrank: 16\nsingle_blocks: '1,2'\nname: 1e-5abc\n")
    assert read_config(path) == ({"learning_rate": 1e-5, "rank": 16, "single_blocks": "1,2", "name": "1e-5abc"}, "")
    for text, word in (("a: 1\na: 2\n", "duplicate key a"), ("a: [\n", "not YAML at line"), ("- 1\n", "holds list")):
        path.write_text(text)
        assert read_config(path)[0] is None and word in read_config(path)[1]
    path.write_bytes(b"\xff\xfe\x00")
    assert read_config(path)[0] is None


def test_values_from_elsewhere_are_not_known(tmp_path: Path) -> None:
    found = kit.job(tmp_path, output_dir="${oc.env:OUT}").xflux
    assert found is not None and found.get("output_dir") is None and found.output is None


def test_images_by_xflux_own_rules(tmp_path: Path) -> None:
    kit.png(tmp_path / "1.png")
    kit.png(tmp_path / "2.png", caption=None)
    kit.png(tmp_path / "a.b.png", 300, 900)  # its caption is a.json
    kit.png(tmp_path / "3.PNG")
    kit.png(tmp_path / "more/4.png")
    (tmp_path / "5.webp").write_bytes(b"RIFF")
    (tmp_path / "1.png.json").write_text("{}")  # a name that contains .png is an item
    kit.png(tmp_path / "6.png", caption="x")
    (tmp_path / "6.json").write_text("[1]")
    (tmp_path / "7.jpg").write_bytes(b"")
    found = list_images(tmp_path, "json")
    assert found.listed == 6 and found.unseen == ("3.PNG", "5.webp") and found.folders == ("more",)
    assert found.uncaptioned == ("2.png",)
    assert dict(found.unusable) == {
        "1.png.json": "it is text, no image", "6.png": '6.json has no "caption"', "7.jpg": "it is empty",
    }  # fmt: skip
    assert found.sizes == {(640, 480), (300, 900)}
    assert not list_images(tmp_path / "none", "json").exists


def test_the_size_of_a_jpeg_is_in_its_frame_header(tmp_path: Path) -> None:
    head = b"\xff\xd8\xff\xe0\x00\x10JFIF" + bytes(10) + b"\xff\xc0\x00\x11\x08\x02\x00\x03\x00\x03" + bytes(9)
    (tmp_path / "1.jpg").write_bytes(head)
    (tmp_path / "1.json").write_text('{"caption": "x"}')
    assert list_images(tmp_path, "json").sizes == {(768, 512)}


def test_shape_is_cut_to_multiples_of_32() -> None:
    assert shape((640, 480), 512) == (512, 384)
    assert shape((480, 640), 512) == (384, 512)
    assert shape((1920, 1080), 512) == (512, 288)
    assert shape((1000, 990), 512) == (512, 480)


def test_checkpoints_and_variables(tmp_path: Path) -> None:
    root = kit.checkout(tmp_path)
    kit.zero_checkpoint(root / "out", 1000, ranks=2)
    kit.zero_checkpoint(root / "out", 500)
    (root / "out/checkpoint-old").mkdir()
    (root / "dev.safetensors").write_bytes(b"1")
    variables = {"FLUX_DEV": "dev.safetensors", "AE": "gone.safetensors", "FLUX_SCHNELL": "", "HOME": "/"}
    found = kit.job(root, environment=variables).xflux
    assert found is not None
    assert [(c.name, c.step, c.zero_ranks) for c in found.checkpoints] == [
        ("checkpoint-500", 500, 1), ("checkpoint-1000", 1000, 2), ("checkpoint-old", None, 0),
    ]  # fmt: skip
    assert found.weights == {
        "FLUX_DEV": "", "AE": "names gone.safetensors, which is not there", "FLUX_SCHNELL": "is set and empty",
    }  # fmt: skip
    assert found.free is not None and found.free > 0


def test_a_config_inside_a_checkout_is_noticed(tmp_path: Path) -> None:
    root = kit.checkout(tmp_path / "x")
    inside = kit.config(root / "train_configs/a.yaml", **kit.LORA)
    assert job_files.read(str(inside), None, folder=tmp_path).xflux_nearby == str(root)
    outside = kit.config(tmp_path / "a.yaml", **kit.LORA)
    assert job_files.read(str(outside), None, folder=tmp_path).xflux_nearby == ""


def test_a_config_that_our_trainer_refuses_is_read_for_xflux(tmp_path: Path) -> None:
    root = kit.checkout(tmp_path)
    path = kit.config(root / "a.yaml", model_name="flux-dev-fp8", foreign=1)
    assert job_files.read(str(path), None, folder=tmp_path).problems
    read = job_files.read(str(path), None, folder=tmp_path, xflux=str(root))
    assert not read.problems and read.train is None
    assert read.xflux is not None and read.xflux.get("model_name") == "flux-dev-fp8"


def test_edits_reach_the_config_and_its_text(tmp_path: Path) -> None:
    work = kit.job(tmp_path, data={"train_batch_size": 4})
    edits = [
        Edit("train", ("data_config", "train_batch_size"), 1),
        Edit("train", ("max_grad_norm",), 2.0),
        Remove("train", ("data_config", "img_size")),
    ]
    mended = lay(work, list(edits)).xflux
    assert mended is not None and work.xflux is not None
    assert mended.batch == 1 and mended.get("max_grad_norm") == 2.0 and "img_size" not in mended.data
    assert work.xflux.batch == 4  # the old job is as it was
    assert work.train_path is not None
    assert yaml.safe_load(yamltext.apply(work.train_path.read_text(), edits)) == mended.config
    assert msgspec.structs.replace(work, xflux=None).xflux is None


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = kit.checkout(tmp_path / "x")
    path = kit.config(root / "train_configs/a.yaml", **{**kit.LORA, "train_batch_size": 3})
    monkeypatch.chdir(tmp_path)
    facts = str(Path(__file__).parent / "machines/h100.json")
    usual = ["--config", str(path), "--facts", facts]
    without = CliRunner().invoke(cli, ["check", *usual, "-v"], standalone_mode=False)
    assert f"--xflux {root}" in without.output and "XF105" in without.output
    assert "! XF105" not in without.output
    given = CliRunner().invoke(cli, ["check", *usual, "--xflux", str(root), "-v"], standalone_mode=False)
    assert "! XF105" in given.output and given.return_value == 1
    assert "- LA109" in given.output and "- ME101" in given.output and "- DA101" in given.output
    fixed = CliRunner().invoke(
        cli, ["fix", *usual, "--xflux", str(root), "--write-config", "--yes"], standalone_mode=False
    )
    made = yaml.safe_load((tmp_path / "accelerate_config.yaml").read_text())
    assert made["distributed_type"] == "DEEPSPEED" and made["deepspeed_config"]["gradient_accumulation_steps"] == 2
    assert yaml.safe_load(path.read_text())["train_batch_size"] == 1, fixed.output
    planned = CliRunner().invoke(cli, ["plan", *usual, "--xflux", str(root), "--gpu", "A100:80"], standalone_mode=False)
    assert "as it is" in planned.output and "42.0 GiB" in planned.output and "fits" in planned.output
    assert planned.return_value == 0
