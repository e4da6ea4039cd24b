"""A run folder as one page: of a real run, of broken, foreign and empty folders, escaped, and in a real browser."""

from __future__ import annotations

import importlib.util
import json
import shutil
from html import escape, unescape
from pathlib import Path
from typing import Any

import pytest
from cli_kit import doctor
from test_plan_html import FRAME, Read, browser, headless
from test_run import finish, start, write_job

from xflux_doctor.report import story, storyhtml, storytext

__all__ = ["browser"]
TORCH = all(importlib.util.find_spec(name) for name in ("torch", "accelerate", "diffusers"))
LAUNCH = {
    "command": "python -m x --token hf_QwErTyUiOpAsDfGh", "hash": "abc", "stack": "cuda13", "accepted": ["ME101"],
    "added_environment": {"NCCL_P2P_DISABLE": "1"}, "added_because": {"NCCL_P2P_DISABLE": "slow"},
    "edits": [{"type": "set", "file": "train", "key": ["rank"], "value": 4, "reason": "it fits"},
              {"type": "remove", "file": "accelerate", "key": ["a", "b"], "reason": "unknown"}],
}  # fmt: skip
GPU = {"peak_bytes": 10 << 30}
PLAN = {"ranks": [{"gpu": GPU, "host": {"peak_bytes": 4 << 30}}], "seconds_per_step": 0.5}
METRICS = {
    "status": "failed", "steps": 3, "max_steps": 9, "world_size": 2, "strategy": "zero2", "device": "NVIDIA H200",
    "versions": {"torch": "2.11.0"}, "loss": {"first": 2.0, "last": 1.0, "mean": 1.5}, "seconds_per_step": 0.55,
    "heldout_loss": {"before": 2.0, "after": 1.5}, "peak_device_bytes": {"overall": 11 << 30}, "data_wait": 0.1,
    "peak_host_bytes": {"overall": 3 << 30}, "notes": ["a note"],
}  # fmt: skip
DIAGNOSIS = {
    "cause": "cuda-oom", "code": "ME101", "confidence": "high", "title": "out of memory", "because": "it grew",
    "evidence": [{"line": 7, "text": "CUDA out of memory"}], "remedy": {"hint": "plan it", "commands": ["plan"]},
}  # fmt: skip


def folder(place: Path) -> Path:
    """A run that died after a retry, with a line that was being written."""
    out = place / "out"
    for name in ("checkpoint-2", "checkpoint-4", "logs", "samples"):
        (out / name).mkdir(parents=True)
    (out / "checkpoint-2/manifest.json").write_text("{}")
    (out / "checkpoint-4/weights").write_bytes(b"x" * (3 << 20))
    (out / "logs/run-1.log").write_text("x\n")
    for name, value in (("launch", LAUNCH), ("plan", PLAN), ("metrics", METRICS), ("diagnosis", DIAGNOSIS),
                        ("facts", {"version": "0.1.0"}), ("findings", {"results": []}),
                        ("result", {"phase": "train", "exit_code": 1})):  # fmt: skip
        (out / f"{name}.json").write_text(json.dumps(value))
    (out / "train.yaml").write_text("mode: lora\nrank: 4\ndata_config:\n  img_size: 512\n")
    lines = [json.dumps({"step": k, "loss": 3.0 - k / 1000}) for k in range(1, 2001)]
    (out / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 2001, "lo']))
    (out / "heldout.jsonl").write_text('{"step": 0, "mean": 2.0}\n{"step": 2000, "mean": 1.5}\n')
    (out / "history.jsonl").write_text(
        '{"time": "2026-01-01T00:00:00", "event": "start", "log": "run-1.log"}\n'
        '{"time": "2026-01-01T02:00:00", "event": "no retry", "why": "machine 1 did not come"}\n'
    )
    (out / "retries.jsonl").write_text(
        '{"time": "2026-01-01T01:00:00", "retry": 1, "seconds": 3600, "words": "by a plan that needs less"}\n'
    )
    return out


def test_it_says_what_the_files_say(tmp_path: Path) -> None:
    told = story.tell(folder(tmp_path))
    assert [row["off"] for row in told["memory"]] == [pytest.approx(0.1), pytest.approx(-0.25)]
    assert told["speed"]["off"] == pytest.approx(0.1) and told["missing"] == ["1 line of metrics.jsonl cannot be read"]
    assert 300 < len(told["loss"]["points"]) <= 600 and told["ended"]["steps"] == 2000
    assert [(one["step"], one["whole"]) for one in told["checkpoints"]] == [(2, True), (4, False)]
    text = storytext.render(told)
    for words in (
        "rank: 4 in the train file: it fits", "remove a.b in the accelerate file: unknown", "ME101 was accepted",
        "NCCL_P2P_DISABLE=1 was added to the launch: slow", "forecast 10.00 GiB, measured 11.00 GiB (+10.0%)",
        "forecast 0.500 s, measured 0.550 s (+10.0%)", "held out: 2.0000 before, 1.5000 after (-25.0%)",
        "retry 1 after 60 min: by a plan that needs less", "no retry: machine 1 did not come",
        "out of memory (cuda-oom, ME101; confidence high)",
        "checkpoint-4: 3.0 MiB", "not whole", "goes on after step 2", "failed, 2000 of 9 steps, exit code 1", "plan it",
        "rank: 4", "img_size: 512",
    ):  # fmt: skip
        assert words in text, text
    assert "hf_QwEr" not in text and "hf_QwEr" not in storyhtml.page(told)


def test_the_page_stands_alone(tmp_path: Path) -> None:
    told = story.tell(folder(tmp_path))
    whole = storyhtml.page(told)
    read = Read(whole.replace("<img", "<meta"))
    for words in ("What was changed, and why", "10.00 GiB", "11.00 GiB", "+10.0%", "cuda-oom", "What to do next"):
        assert words in read.words
    assert "polyline" in {tag for tag, _ in read.tags} and "script" not in {tag for tag, _ in read.tags}
    assert "http://" not in whole and "https://" not in whole


@pytest.mark.parametrize("text", ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "a\x00\x1b\ud800b"])
def test_every_text_is_escaped(tmp_path: Path, text: str) -> None:
    out = folder(tmp_path)
    (out / "launch.json").write_text(json.dumps({**LAUNCH, "command": text, "stack": text, "accepted": [text]}))
    (out / "diagnosis.json").write_text(json.dumps({**DIAGNOSIS, "title": text, "because": text}))
    (out / "samples/contact-sheet.png").write_bytes(b"<svg onload=alert(1)>")
    whole = storyhtml.page(story.tell(out))
    whole.encode()
    assert {tag for tag, _ in Read(whole).tags}.isdisjoint({"script", "img"})
    json.dumps(story.tell(out))


GARBAGE = (b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe\x00", b'{"loss": 5, "edits": {"a": 1}, "versions": [1]}',
           b'{"step": "x", "loss": NaN, "cause": 3, "evidence": 1, "peak_device_bytes": []}',
           b"[" * 100_000)  # fmt: skip


@pytest.mark.parametrize("data", GARBAGE)
def test_no_folder_is_too_broken(tmp_path: Path, data: bytes) -> None:
    out = folder(tmp_path)
    for path in out.rglob("*.*"):
        path.write_bytes(data)
    told = story.tell(out)
    json.dumps(told)
    assert storytext.render(told) and storyhtml.page(told)


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    said = doctor("report", "out", "--html", "r.html", cwd=tmp_path, code=0).stdout
    assert "launch.json is not there" in said and "holds no run" in said and (tmp_path / "r.html").is_file()
    assert "no run folder" in doctor("report", "nothing", cwd=tmp_path, code=2).stderr
    assert "no folder" in doctor("report", "out", "--html", "no/r.html", cwd=tmp_path, code=2).stderr
    assert json.loads(doctor("report", "out", "--format", "json", cwd=tmp_path, code=0).stdout)["schema"] == 1
    shutil.rmtree(tmp_path / "out")


@pytest.mark.skipif(not TORCH, reason="needs a stack of the matrix")
def test_a_real_run(tmp_path: Path, model: Path) -> None:
    """Ten lines before the start, and everything that the run left on one page."""
    alone = "compute_environment: LOCAL_MACHINE\ndistributed_type: 'NO'\nmixed_precision: 'no'\nnum_machines: 1\n"
    more = {"mixed_precision": "no", "max_text_tokens": 48, "gradient_accumulation_steps": 1, "max_train_steps": 8}
    write_job(tmp_path, model, accelerate=f"{alone}num_processes: 1\nuse_cpu: true\n", **more)
    process = start(tmp_path)
    output = finish(process)
    assert process.returncode == 0, output
    before = output[: output.index("\n\n", output.index("  log: "))].splitlines()
    assert len(before) <= 10 and any("forecast" in one for one in before) and before[-1].startswith("  log: "), before
    out = tmp_path / "out"
    told: dict[str, Any] = story.tell(out)
    metrics = json.loads((out / "metrics.json").read_text())
    assert told["missing"] == [] and told["ended"]["exit_code"] == 0 and told["ended"]["cause"] == "none"
    assert told["loss"]["points"][-1][1] == pytest.approx(metrics["loss"]["last"]) and told["heldout"]["points"]
    (host,) = told["memory"]
    assert host["measured"] == metrics["peak_host_bytes"]["overall"] and 0.5 < host["measured"] / host["forecast"] < 2
    assert [event["what"].split()[0].strip(",") for event in told["timeline"] if event["time"]] == ["started", "ended"]
    assert told["samples"] == ["samples/contact-sheet.png"] and "data:image/png" in storyhtml.page(told)
    assert told["ran"]["hash"] and told["checkpoints"][-1]["whole"]
    assert json.loads((out / "diagnosis.json").read_text())["cause"] == "none"


@pytest.mark.parametrize("width", [400, 1400])
def test_nothing_is_wider_than_the_page(browser: str, tmp_path: Path, width: int) -> None:
    whole = storyhtml.page(story.tell(folder(tmp_path)))
    (tmp_path / "frame.html").write_text(FRAME.format(width=width, page=escape(whole)), "utf-8")
    dom = headless(browser, tmp_path, width, "--dump-dom", f"file://{tmp_path}/frame.html")
    found = json.loads(unescape(dom.split("<pre>")[1].split("</pre>")[0]))
    assert width - 20 <= found["width"] == found["page"] <= width and max(found["tables"]) <= found["width"]
    assert "What happened" in found["text"] and "cuda-oom" in found["text"]
