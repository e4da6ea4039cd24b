"""The model card, and the upload against a hub of our own on this machine."""

from __future__ import annotations

import base64
import importlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

torch = pytest.importorskip("torch")
huggingface_hub = pytest.importorskip("huggingface_hub")

from trainer_kit import png  # noqa: E402
from xflux_trainer import card, hub, sample  # noqa: E402
from xflux_trainer.config import TrainConfig  # noqa: E402

TOLD = {
    "status": "finished", "steps": 1000, "images": 24, "world_size": 2, "train_batch_size": 2,
    "gradient_accumulation_steps": 3, "trained_parameters": 13172736, "device": "NVIDIA H200", "seconds_training": 600,
    "loss": {"mean": 0.4321}, "heldout_loss": {"before": 0.5, "after": 0.4}, "versions": {"torch": "2.13.0"},
}  # fmt: skip
TOKEN = "hf_abcdefghijklmnop"
ENDPOINTS = ("huggingface_hub.constants.ENDPOINT", "huggingface_hub.hf_api.ENDPOINT")
"""Read at import; before hub 1 in two places."""


def finished(folder: Path, *results: str) -> list[Path]:
    """A run's folder: results, samples, and what must stay at home."""
    for name in ("checkpoint-4/adapters.safetensors", "cache/x.safetensors", "config.yaml", "metrics.json", *results):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())
    sample.write_png(folder / "samples" / "final-0.png", torch.zeros(3, 16, 16), "a cat: on\na mat")
    (folder / "samples" / "step-000002-0.png").write_bytes(png())
    (folder / "samples" / "contact-sheet.png").write_bytes(png())
    (folder / "loss.svg").write_text("<svg/>")
    return [folder / name for name in results]


def front(folder: Path) -> tuple[dict[str, Any], str]:
    _, header, body = (folder / card.NAME).read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(header), body


def test_the_card_of_an_adapter(tmp_path: Path) -> None:
    results = finished(tmp_path, "pytorch_lora_weights.safetensors", "lora.safetensors")
    config = TrainConfig(
        img_dir="/home/me/photos", output_dir=str(tmp_path), pretrained_model=str(tmp_path), rank=32,
        learning_rate=3e-4, push_to_hub="me/cats", cache_dir="/home/me/cache", repeats=(("secret", 3),),
    )  # fmt: skip
    card.write(tmp_path, config, TOLD, results, ["a sks cat", "a sks cat"])
    header, body = front(tmp_path)
    assert header["base_model"] == "black-forest-labs/FLUX.1-dev"
    assert header["license_name"] == "flux-1-dev-non-commercial-license"
    assert {"lora", "flux", "text-to-image", "template:sd-lora"} <= set(header["tags"])
    assert header["instance_prompt"] == "a sks cat"
    assert header["widget"] == [{"text": "a cat: on\na mat", "output": {"url": "samples/final-0.png"}}]
    assert "# cats\n" in body
    for line in ("| images | 24 |", "| images a step | 12 |", "| held-out loss | 0.5000 before, 0.4000 after |",
                 "| on | 2 x NVIDIA H200 |", "rank: 32", "seed: 0", "![loss](loss.svg)", "<Gallery />",
                 'pipe.load_lora_weights("me/cats", weight_name="pytorch_lora_weights.safetensors")',
                 "`lora.safetensors` is for X-Flux"):  # fmt: skip
        assert line in body
    text = (tmp_path / card.NAME).read_text(encoding="utf-8")
    assert "/home/me" not in text and str(tmp_path) not in text and "secret" not in text
    compile(body.split("```python\n")[1].split("```")[0], "card", "exec")


@pytest.mark.parametrize(
    ("config", "results", "lines"),
    [
        (
            TrainConfig("x", mode="finetune", model_name="flux-schnell", pretrained_model="someone/flux"),
            ["transformer/config.json"],
            ["license: apache-2.0", "base_model: someone/flux", 'subfolder="transformer"', "num_inference_steps=4",
             "base_model_relation: finetune"],
        ),
        (
            TrainConfig("x", mode="controlnet", canny_low=50),
            ["controlnet/config.json", "controlnet.safetensors"],
            ["controlnet_conditioning_scale", 'subfolder="controlnet"', "put `controlnet.safetensors` into",
             "canny_low: 50", "Canny edges"],
        ),
    ],
    ids=["finetune", "controlnet"],
)  # fmt: skip
def test_the_cards_of_the_other_modes(
    tmp_path: Path, config: TrainConfig, results: list[str], lines: list[str]
) -> None:
    finished(tmp_path, *results)
    card.write(tmp_path, config, TOLD, [tmp_path / name.split("/")[0] for name in results], ["a", "b"])
    text = (tmp_path / card.NAME).read_text(encoding="utf-8")
    for line in lines:
        assert line in text
    assert "instance_prompt" not in text
    compile(text.split("```python\n")[1].split("```")[0], "card", "exec")


def test_a_card_of_a_run_that_says_little(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"")
    card.write(
        tmp_path, TrainConfig("x"), {"steps": 1, "loss": None, "heldout_loss": None}, [tmp_path / "a.safetensors"]
    )
    header, body = front(tmp_path)
    assert "widget" not in header and "Gallery" not in body and "![" not in body


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as an upload of small files asks for."""

    requests: list[tuple[str, bytes, str]] = []  # noqa: RUF012 (cleared by the fixture)
    refuses = False

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.requests.append((self.path, body, self.headers.get("Authorization", "")))
        if self.refuses:
            return self._answer(403, {"error": "You may not, with hf_abcdefghijklmnop"})
        if self.path == "/api/repos/create":
            return self._answer(200, {"url": f"http://{self.headers['Host']}/me/cats", "name": "me/cats"})
        if "/preupload/" in self.path:
            asked = json.loads(body)["files"]
            told = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in asked]
            return self._answer(200, {"files": told})
        if "/commit/" in self.path:
            url = f"http://{self.headers['Host']}/me/cats/commit/abc"
            return self._answer(200, {"success": True, "commitOid": "abc", "commitUrl": url, "hookOutput": ""})
        return self._answer(200, {"errors": [], "warnings": []})

    def do_GET(self) -> None:
        self.requests.append((self.path, b"", self.headers.get("Authorization", "")))
        self._answer(404 if self.refuses else 200, {"id": "me/cats", "sha": "abc", "siblings": []})

    def _answer(self, status: int, value: dict[str, Any]) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    Hub.requests, Hub.refuses = [], False
    served = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=served.serve_forever, args=(0.02,), daemon=True).start()
    url = f"http://127.0.0.1:{served.server_port}"
    for place in ENDPOINTS:
        monkeypatch.setattr(place, url, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    # Before hub 1 a session that another test opened offline stays so.
    getattr(importlib.import_module("huggingface_hub.utils._http"), "reset_sessions", lambda: None)()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield Hub
    served.shutdown()
    served.server_close()


CONFIG = TrainConfig("x", push_to_hub="me/cats")


def test_only_final_files_are_uploaded_to_a_private_repository(tmp_path: Path, server: type[Hub]) -> None:
    results = finished(tmp_path, "lora.safetensors")
    card.write(tmp_path, CONFIG, TOLD, results)
    pushed = hub.push(tmp_path, CONFIG, results)
    assert pushed.done, pushed.text
    assert pushed.text.endswith("/me/cats")
    asked = {path.split("?")[0]: body for path, body, _ in server.requests}
    made = json.loads(asked["/api/repos/create"])
    assert made.get("private") is True or made.get("visibility") == "private"  # before and since hub 1
    commit = next(body for path, body in asked.items() if "/commit/" in path)
    lines = [json.loads(line) for line in commit.splitlines()]
    sent = {line["value"]["path"]: line["value"]["content"] for line in lines if line["key"] == "file"}
    assert set(sent) == {
        "README.md", "loss.svg", "lora.safetensors", "samples/final-0.png", "samples/contact-sheet.png",
    }  # fmt: skip
    assert base64.b64decode(sent["lora.safetensors"]) == b"lora.safetensors"


def test_a_refusal_is_a_sentence_without_the_token(tmp_path: Path, server: type[Hub]) -> None:
    server.refuses = True
    results = finished(tmp_path, "lora.safetensors", "transformer/config.json")
    pushed = hub.push(tmp_path, CONFIG, [results[0], tmp_path / "transformer"])
    assert not pushed.done
    assert TOKEN not in pushed.text
    assert f"upload me/cats {tmp_path} . --private --include lora.safetensors" in pushed.text
    again = "--include " if hub._major() >= 1 else ""
    assert f"lora.safetensors {again}transformer/config.json" in pushed.text
    assert "\n" not in pushed.text


def test_no_network_is_a_sentence(tmp_path: Path, server: type[Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ENDPOINTS:
        monkeypatch.setattr(place, "http://127.0.0.1:9", raising=False)
    pushed = hub.push(tmp_path, CONFIG, finished(tmp_path, "lora.safetensors"))
    assert not pushed.done
    assert "the upload to me/cats failed" in pushed.text


def test_what_would_fail_at_the_end_is_said_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert hub.foresee(TrainConfig("x")) is None
    assert "no token is found" in str(hub.foresee(CONFIG))
    assert "no name of a repository" in str(hub.foresee(TrainConfig("x", push_to_hub="a/b/c")))
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: TOKEN)
    assert hub.foresee(CONFIG) is None
