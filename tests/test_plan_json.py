"""`plan --format json`: the issue's form, its sums and verdicts, and that it comes without torch."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pytest
import xflux_kit as kit
import yaml
from conftest import GIB, ROOT, XFLUX_ACCELERATE, gpus, machine, packages, record

from xflux_doctor.cli import main
from xflux_doctor.matrix import Matrix
from xflux_doctor.verdict import fitting, reserved

SCHEMA = json.loads((ROOT / "xflux_doctor/report/plan.schema.json").read_text())
NO = XFLUX_ACCELERATE.replace("DEEPSPEED", "NO").replace("num_processes: 8", "num_processes: 1")
TWO = XFLUX_ACCELERATE.replace("DEEPSPEED", "MULTI_GPU").replace("num_processes: 8", "num_processes: 2")


@pytest.fixture
def place(tmp_path: Path, matrix: Matrix, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A job at 1024 px beside two H100s, the second of which has 20 GiB free."""
    cards = (gpus("H100", 2, memory_free=70 * GIB)[0], gpus("H100", 2, memory_free=20 * GIB)[1])
    record(tmp_path / "facts.json", machine(matrix, gpus=cards, packages=packages(matrix, "cuda13")))
    (tmp_path / "images").mkdir()
    train(tmp_path)
    (tmp_path / "accelerate.yaml").write_text(NO)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train(folder: Path, **values: Any) -> None:
    text = {"img_dir": "images", "img_size": 1024, "output_dir": "out", **values}
    (folder / "train.yaml").write_text(yaml.safe_dump(text))


def planned(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> dict[str, Any]:
    usual = ["--config", "train.yaml", "--accelerate-config", "accelerate.yaml", "--facts", "facts.json"]
    assert main(["plan", "--format", "json", *usual, *arguments]) == code
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    jsonschema.validate(found, SCHEMA)
    entries = [rank["gpu"] for rank in found["ranks"]] + [row["gpu"] for row in found["alternatives"]]
    for gpu in filter(None, entries):
        assert sum(gpu["terms"].values()) == gpu["peak_bytes"]
        assert gpu["peak_bytes"] < gpu["reserved_bytes"] == gpu["device_bytes"] - gpu["context_bytes"]
        if gpu["limit_bytes"] is not None:
            assert gpu["verdict"] == fitting(gpu["device_bytes"], gpu["limit_bytes"])
    for rank in found["ranks"]:
        assert sum(rank["host"]["terms"].values()) == rank["host"]["peak_bytes"]
    return found


@pytest.mark.parametrize(("device", "limit", "word"), [
    (9700, 10_000, "fits"), (9701, 10_000, "tight"), (10_000, 10_000, "tight"), (10_001, 10_000, "does not fit"),
])  # fmt: skip
def test_tight_is_97_to_100_percent(device: int, limit: int, word: str) -> None:
    assert fitting(device, limit) == word


def test_reserved_is_never_less() -> None:
    assert reserved(0) == 0 and reserved(100 * GIB) == math.ceil(102 * GIB) and reserved(1) > 1


def test_free_now_is_the_limit_and_each_rank_has_its_own(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "accelerate.yaml").write_text(TWO)
    found = planned(capsys)
    assert [rank["gpu"]["limit_bytes"] for rank in found["ranks"]] == [70 * GIB, 20 * GIB]
    assert [rank["gpu"]["verdict"] for rank in found["ranks"]] == ["fits", "does not fit"]
    hosts = [rank["host"] for rank in found["ranks"]]
    assert hosts[0]["peak_bytes"] > hosts[1]["peak_bytes"] == sum(hosts[1]["terms"].values())  # the first one writes
    assert {host["all_ranks_bytes"] for host in hosts} == {sum(host["peak_bytes"] for host in hosts)}
    # 20 GiB hold the job quantised, or streamed, which loses nothing.
    assert found["plan"]["gpu"]["verdict"] == "fits" and not found["plan"]["lossy"]
    assert found["plan"]["gpu"]["limit_bytes"] == 20 * GIB and found["plan"]["changes"]["stream_blocks"] > 0
    assert any(row["lossy"] and row["gpu"]["verdict"] == "fits" for row in found["alternatives"])


@pytest.mark.parametrize(("arguments", "limit"), [
    (["--gpu", "A100:80"], 80), (["--gpu-limit", "40"], 40), (["--gpu", "A100:80", "--gpu-limit", "24.5"], 24.5),
    (["--gpu", "RTX 4090:24", "--gpu-limit", "80"], 24),
])  # fmt: skip
def test_a_card_and_a_limit(
    place: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], limit: float
) -> None:
    (rank,) = planned(capsys, *arguments)["ranks"]
    assert rank["gpu"]["limit_bytes"] == limit * GIB


def test_the_plan_changes_what_keeps_the_numbers(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(place, gradient_checkpointing=False)
    own = planned(capsys)
    assert {key: own["plan"][key] for key in ("label", "changes", "lossy", "why")} == {
        "label": "as it is", "changes": {}, "lossy": False,
        "why": "as it is it fits, and nothing that may be changed makes it faster",
    }  # fmt: skip
    assert own["plan"]["gpu"] == own["ranks"][0]["gpu"]
    found = planned(capsys, "--gpu", "RTX 5090:32")
    plan = found["plan"]
    assert plan["changes"]["gradient_checkpointing"] is True and not plan["lossy"]
    assert plan["label"] not in [row["label"] for row in found["alternatives"]]
    assert found["seconds_per_step"] is None  # no such card was timed
    (same,) = (row for row in found["alternatives"] if row["label"] == "as it is")
    assert same["gpu"]["verdict"] == "does not fit" == found["ranks"][0]["gpu"]["verdict"]


def test_the_plan_s_time_is_the_time_model_s(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever the job says, the same plan has the same time; and the fastest is taken."""
    train(place, gradient_checkpointing=True)
    found = planned(capsys)
    assert found["plan"]["changes"] == {"gradient_checkpointing": False}
    (own,) = (row for row in found["alternatives"] if row["label"] == "as it is")
    assert 0 < found["seconds_per_step"] < own["seconds_per_step"]
    train(place, gradient_checkpointing=False)
    kept = planned(capsys)
    assert kept["plan"]["changes"] == {} and kept["seconds_per_step"] == found["seconds_per_step"]


def test_nothing_fits(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert planned(capsys, "--gpu", "RTX 3050:8", code=1)["plan"] is None


def test_without_a_gpu_there_is_no_verdict(place: Path, matrix: Matrix, capsys: pytest.CaptureFixture[str]) -> None:
    record(place / "facts.json", machine(matrix, card=None))
    (rank,) = planned(capsys)["ranks"]
    assert rank["gpu"]["limit_bytes"] is rank["gpu"]["verdict"] is None and rank["gpu"]["peak_bytes"] > 20 * GIB
    (limited,) = planned(capsys, "--gpu-limit", "78")["ranks"]
    assert limited["gpu"]["verdict"] == "fits"
    (cpu,) = planned(capsys, "--cpu")["ranks"]
    assert cpu["gpu"] is None and cpu["host"]["peak_bytes"] > 9 * GIB  # the rest stays in the weights' file


def test_more_needs_more(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for key, values in {"img_size": (512, 768, 1024), "train_batch_size": (1, 2, 4), "rank": (4, 16, 64)}.items():
        peaks = []
        for value in values:
            train(place, **{key: value, "disable_sampling": True})
            peaks.append(planned(capsys, "--gpu", "H200:139")["ranks"][0]["gpu"]["peak_bytes"])
        assert peaks == sorted(set(peaks)), key


def test_xflux(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """X-Flux's own script without DeepSpeed at 1024 px: 98 GiB, and what DeepSpeed makes of it."""
    kit.job(place, data={"img_size": 1024})
    found = planned(capsys, "--config", "own.yaml", "--xflux", str(place), "--gpu", "A100:80")
    gpu = found["ranks"][0]["gpu"]
    assert gpu["verdict"] == "does not fit" and gpu["terms"]["transformer in fp32"] == 11_901_408_320 * 4
    assert found["plan"]["changes"] == {"distributed_type": "DEEPSPEED", "mixed_precision": "bf16"}
    assert found["ranks"][0]["host"]["peak_bytes"] == 11_901_408_320 * 4


def test_a_card_without_memory_is_no_card(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--config", "train.yaml", "--facts", "facts.json", "--gpu", "A100:0"]) == 2
    assert "Write NAME:GIB" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["text", "json"])
def test_neither_torch_nor_much_time_is_taken(place: Path, form: str) -> None:
    """Processor time, which other programs of the machine do not lengthen much; 0.3 s are promised."""
    code = (
        "import resource, sys\n"
        "from xflux_doctor.cli import main\n"
        f"code = main(['plan', '--config', 'train.yaml', '--gpu', 'A100:80', '--format', {form!r}])\n"
        "assert 'torch' not in sys.modules and 'diffusers' not in sys.modules\n"
        "used = resource.getrusage(resource.RUSAGE_SELF)\n"
        "print(used.ru_utime + used.ru_stime, file=sys.stderr)\n"
        "sys.exit(code)\n"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code], cwd=place, capture_output=True, text=True, timeout=60)
        for _ in range(3)
    ]
    assert [done.returncode for done in runs] == [0, 0, 0], runs[0].stderr
    assert min(float(done.stderr.split()[-1]) for done in runs) < 0.6


def test_what_the_host_lacks(place: Path, matrix: Matrix, capsys: pytest.CaptureFixture[str]) -> None:
    """In a container of 7 GiB nothing lossless fits 16 GiB of a card: every form says what is missing."""
    facts = machine(matrix, gpus=gpus("H100", 1), packages=packages(matrix, "cuda13", triton="3.6.0"))
    assert facts.host
    host = msgspec.structs.replace(facts.host, memory_limit=7 * GIB)
    record(place / "facts.json", msgspec.structs.replace(facts, host=host))
    train(place, disable_sampling=True)
    found = planned(capsys, "--gpu-limit", "16", "--html", "plan.html")
    rows = [row for row in found["alternatives"] if row["gpu"]["verdict"] == "fits" and not row["lossy"]]
    assert found["plan"] is None and rows and all(row["host"]["lacks_bytes"] > 5 * GIB for row in rows)
    usual = ["--config", "train.yaml", "--accelerate-config", "accelerate.yaml", "--facts", "facts.json"]
    assert main(["plan", *usual, "--gpu-limit", "16"]) == 0
    out = capsys.readouterr().out
    assert "Nothing that fits may be taken: name what may be lost in the training file's allow." in out
    least = min(row["host"]["lacks_bytes"] for row in rows) / GIB
    assert f"(the host lacks {least:.1f} GiB)" in out and f"may be taken lacks {least:.1f} GiB of the host's" in out
    assert "start fewer ranks" not in out and f"{least:.1f} GiB too much" in (place / "plan.html").read_text()
    # Where what is lossy lacks it too, nothing fits.
    record(place / "facts.json", msgspec.structs.replace(facts, host=msgspec.structs.replace(host, memory_limit=GIB)))
    assert main(["plan", *usual, "--gpu-limit", "16", "--html", "plan.html"]) == 1
    out = capsys.readouterr().out
    assert "may be taken lacks" in out and "Nothing that fits" not in out
    assert "What fits this card takes more of the host" in (place / "plan.html").read_text()
    record(place / "facts.json", msgspec.structs.replace(facts, host=host))
    # With more of the card it is chosen, and says what it takes.
    takes = planned(capsys, "--gpu-limit", "24")["plan"]["host"]["peak_bytes"]
    assert 3 * GIB < takes < 7 * GIB and main(["plan", *usual, "--gpu-limit", "24"]) == 0
    assert f"The plan takes {takes / GIB:.1f} GiB of the host's memory for the rank." in capsys.readouterr().out


def test_a_card_that_is_not_here_is_not_held_against_this_machine(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    train(place, disable_sampling=True)
    monkeypatch.setattr("xflux_doctor.verdict.host_room", lambda host: (GIB, 0))
    files = ["--config", "train.yaml", "--accelerate-config", "accelerate.yaml", "--offline"]
    assert main(["plan", "--format", "json", *files, "--gpu", "H100:24"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["plan"] and found["ranks"][0]["host"]["limit_bytes"] is None


def test_ranks_without_a_device_are_told(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    usual = ["plan", "--config", "train.yaml", "--accelerate-config", "accelerate.yaml", "--facts", "facts.json"]
    (place / "accelerate.yaml").write_text(TWO.replace("num_processes: 2", "num_processes: 3"))
    main([*usual, "--offline"])
    assert "1 of the 3 ranks have no device (LA105)" in capsys.readouterr().out
    main([*usual, "--offline", "--gpu", "H100:80"])
    assert "no device (LA105)" not in capsys.readouterr().out
    (place / "accelerate.yaml").write_text(TWO.replace("num_processes: 2", "num_processes: 1000000000"))
    assert main([*usual, "--offline"]) == 1
    assert "The job has 1,000,000,000 ranks on this machine." in capsys.readouterr().err


@pytest.mark.parametrize(("card", "free", "values"), [
    ("H100", 23, {}), ("H100", 23, {"mode": "controlnet"}),
    ("A100", 79, {"mode": "finetune", "allow": ["optimizer", "backward_clip"]}), ("H100", 40, {}),
])  # fmt: skip
def test_fix_plans_for_the_launch_that_it_writes(
    place: Path, matrix: Matrix, capsys: pytest.CaptureFixture[str], card: str, free: int, values: dict[str, Any]
) -> None:
    """Two cards and no accelerate file: the plan was one process's, and the file that came with it FSDP's."""
    cards = gpus(card, 2, memory_total=(free + 1) * GIB, memory_free=free * GIB)
    record(place / "facts.json", machine(matrix, gpus=cards, packages=packages(matrix, "cuda13", triton="3.6.0")))
    (place / "accelerate.yaml").unlink()
    train(place, disable_sampling=True, **values)
    words = ["--config", "train.yaml", "--facts", "facts.json"]
    accepted = [word for code in ("DA101", "ST103", "WE102", "WE103") for word in ("--accept", code)]
    main(["fix", *words, *accepted])
    shown = capsys.readouterr().out
    main(["fix", *words, *accepted, "--write-config", "--yes"])
    written = capsys.readouterr().out
    assert "does not come to rest" not in written and "LA116" not in written, written
    wanted = {line for line in shown.splitlines() if line.startswith("+")}
    assert wanted == {line for line in written.splitlines() if line.startswith("+")}
    assert yaml.safe_load((place / "accelerate_config.yaml").read_text())["num_processes"] == 2


def test_no_launch_is_written_that_stops_a_job_which_can_start(
    place: Path, matrix: Matrix, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second card is held by others: one process is none of its business."""
    cards = (gpus("H100", 2)[0], gpus("H100", 2, memory_free=9 * GIB)[1])
    record(place / "facts.json", machine(matrix, gpus=cards, packages=packages(matrix, "cuda13", triton="3.6.0")))
    (place / "accelerate.yaml").unlink()
    train(place, disable_sampling=True)
    words = ["--config", "train.yaml", "--facts", "facts.json", "--accept", "DA101", "--accept", "WE102"]
    main(["check", *words, "--quick"])
    before = capsys.readouterr().out
    main(["fix", *words, "--write-config", "--yes"])
    said = capsys.readouterr().out
    assert "ME101" not in said and not (place / "accelerate_config.yaml").exists(), before + said
