"""The question to the hub against real servers on this machine: every answer, silence, and no question at all."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from conftest import ROOT, job, machine

from xflux_doctor.facts import Facts, HubAccess, HubCache, PythonFacts
from xflux_doctor.matrix import Matrix
from xflux_doctor.probes import level

NAME = "black-forest-labs/FLUX.1-dev"
TOKEN = "hf_abcdefghijklmnopqrstuvwxyz012345"


class Hub(http.server.ThreadingHTTPServer):
    """Answers every request with one status, and keeps what it was asked and with which token."""

    def __init__(self, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.status, self.headers = status, headers or {}
        self.asked: list[tuple[str, str, str | None]] = []
        super().__init__(("127.0.0.1", 0), _Answer)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Answer(http.server.BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.server.asked.append((self.command, self.path, self.headers.get("Authorization")))
        moved = self.server.status in (301, 302, 307, 308) and "/new/" in self.path
        self.send_response(200 if moved else self.server.status)
        for name, value in self.server.headers.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        return


@contextlib.contextmanager
def serving(status: int = 200, headers: dict[str, str] | None = None) -> Iterator[Hub]:
    hub = Hub(status, headers)
    thread = threading.Thread(target=hub.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()


def needing(matrix: Matrix, cache: HubCache | None = None) -> Facts:
    python = PythonFacts(sys.executable, "3.11", sys.prefix)
    return machine(matrix, card=None, stack="cpu", python_facts=python, hub_cache=cache or HubCache(NAME))


def environ(tmp_path: Path, endpoint: str, **more: str) -> dict[str, str]:
    """This process's environment without its proxies and hub settings."""
    kept = {n: v for n, v in os.environ.items() if "proxy" not in n.lower() and not n.startswith(("HF_", "HUGGING"))}
    kept.pop("TRANSFORMERS_OFFLINE", None)
    return {**kept, "HF_HOME": str(tmp_path), "HF_ENDPOINT": endpoint, **more}


def ask(matrix: Matrix, tmp_path: Path, endpoint: str, seconds: float = 5.0, **more: str) -> HubAccess:
    facts = level.ask_hub(needing(matrix), job(None), environ(tmp_path, endpoint, **more), seconds)
    assert facts.hub is not None
    assert TOKEN not in repr(facts)
    return facts.hub


@pytest.mark.parametrize("status", [200, 401, 403, 404, 429, 500, 503])
def test_statuses(matrix: Matrix, tmp_path: Path, status: int) -> None:
    with serving(status, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"}) as hub:
        answer = ask(matrix, tmp_path, hub.url + "/", HF_TOKEN=TOKEN)
        assert hub.asked == [("HEAD", f"/{NAME}/resolve/main/model_index.json", f"Bearer {TOKEN}")]
    assert (answer.status, answer.endpoint, answer.repository) == (status, hub.url, NAME)
    assert answer.detail == ("" if status == 200 else "GatedRepo: Access is restricted")


def test_where_the_token_is_found(matrix: Matrix, tmp_path: Path) -> None:
    with serving() as hub:
        ask(matrix, tmp_path, hub.url)
        (tmp_path / "token").write_text(f"{TOKEN}\n")
        ask(matrix, tmp_path, hub.url)
        (tmp_path / "other").write_text("hf_other")
        ask(matrix, tmp_path, hub.url, HF_TOKEN_PATH=str(tmp_path / "other"))
        ask(matrix, tmp_path, hub.url, HF_TOKEN="hf_named")
        ask(matrix, tmp_path, hub.url, HF_TOKEN=TOKEN, HF_HUB_DISABLE_IMPLICIT_TOKEN="1")
    assert [token for _, _, token in hub.asked] == [None, f"Bearer {TOKEN}", "Bearer hf_other", "Bearer hf_named", None]


def test_a_server_that_gives_the_token_back(matrix: Matrix, tmp_path: Path) -> None:
    """Neither the facts nor what the child prints hold it."""
    with serving(401, {"X-Error-Message": f"Bearer {TOKEN} is unknown"}) as hub:
        assert ask(matrix, tmp_path, hub.url, HF_TOKEN=TOKEN).detail == "Bearer *** is unknown"


def test_a_token_that_is_none(matrix: Matrix, tmp_path: Path) -> None:
    with serving() as hub:
        assert ask(matrix, tmp_path, hub.url, HF_TOKEN="hf_…").detail.startswith("token: ")
        assert hub.asked == []


def test_redirects(matrix: Matrix, tmp_path: Path) -> None:
    """A renamed repository is followed on its own host; another host never sees the token, nor a request."""
    with serving(307, {"Location": "/new/name/resolve/main/model_index.json"}) as hub:
        assert ask(matrix, tmp_path, hub.url, HF_TOKEN=TOKEN).status == 200
        assert [token for _, _, token in hub.asked] == [f"Bearer {TOKEN}"] * 2
    with serving() as other, serving(302, {"Location": f"{other.url}/new/x"}) as hub:
        assert ask(matrix, tmp_path, hub.url, HF_TOKEN=TOKEN).status == 302
        assert other.asked == []


def test_a_server_that_never_answers(matrix: Matrix, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        started = time.monotonic()
        answer = ask(matrix, tmp_path, f"http://127.0.0.1:{silent.getsockname()[1]}", 1.5, STUB_MARK=str(tmp_path))
        assert time.monotonic() - started < 20
    assert (answer.status, answer.detail) == (None, "timeout: no answer in time")
    mark = f"STUB_MARK={tmp_path}".encode()
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            assert not folder.name.isdigit() or mark not in (folder / "environ").read_bytes()


def test_a_child_that_hangs_is_killed(matrix: Matrix, tmp_path: Path) -> None:
    """Looking up a name has no limit of its own; the runner's holds."""
    (tmp_path / "sitecustomize.py").write_text("import time\ntime.sleep(600)\n")
    started = time.monotonic()
    answer = ask(matrix, tmp_path, "http://127.0.0.1:9", 1.0, PYTHONPATH=str(tmp_path))
    assert time.monotonic() - started < 20 and answer.detail == "timeout: no answer in time"


def test_failures_have_a_kind(matrix: Matrix, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    assert ask(matrix, tmp_path, f"http://127.0.0.1:{port}").detail == "network: Connection refused"
    assert ask(matrix, tmp_path, "http://no-such-host.invalid").detail.startswith("name: no-such-host.invalid has no")
    assert "does not begin with http" in ask(matrix, tmp_path, "file:///etc").detail
    with serving() as plain:
        assert ask(matrix, tmp_path, plain.url.replace("http", "https")).detail.startswith("tls: ")


def test_a_certificate_that_is_not_trusted(matrix: Matrix, tmp_path: Path) -> None:
    """It is trusted by the variable that the hub's library reads."""
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    new = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", "key.pem", "-out", "cert.pem", *names]
    try:
        subprocess.run(new, cwd=tmp_path, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("openssl makes no certificate here")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    with serving() as hub:
        hub.socket = context.wrap_socket(hub.socket, server_side=True)
        url = hub.url.replace("http://127.0.0.1", "https://localhost")
        assert ask(matrix, tmp_path, url).detail.startswith("tls: self")
        assert ask(matrix, tmp_path, url, REQUESTS_CA_BUNDLE=str(tmp_path / "cert.pem")).status == 200


def test_a_proxy_that_refuses(matrix: Matrix, tmp_path: Path) -> None:
    with serving(403) as proxy:
        answer = ask(matrix, tmp_path, "https://hub.invalid", https_proxy=proxy.url)
        assert answer.detail.startswith("proxy: Tunnel connection failed: ")
        assert ask(matrix, tmp_path, "http://hub.invalid", http_proxy=proxy.url).status == 403


def test_nobody_is_asked_without_need(matrix: Matrix, tmp_path: Path) -> None:
    whole = HubCache(NAME, "/hub/snapshots/abc")
    with serving() as hub:
        surroundings = environ(tmp_path, hub.url)
        assert level.ask_hub(needing(matrix, whole), job(None), surroundings, 5).hub is None
        local = msgspec.structs.replace(needing(matrix), hub_cache=None)
        assert level.ask_hub(local, job(None), surroundings, 5).hub is None
        work = msgspec.structs.replace(job(None), offline=True)
        facts = level.ask_hub(needing(matrix), work, surroundings, 5)
        assert facts.hub is None and "offline" in facts.unknown["hub"]
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
            assert level.ask_hub(needing(matrix), job(None), {**surroundings, name: "1"}, 5).hub is None
        assert hub.asked == []


AUDIT = """
import os, sys
def note(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto"):
        with open(os.path.join(os.environ["PYTHONPATH"], "opened"), "a") as file:
            file.write(f"{event} {arguments}")
sys.addaudithook(note)
"""


@pytest.mark.parametrize(("options", "asked"), [
    (("--quick",), 0), (("--offline", "--quick"), 0), (("--offline",), 0), ((), 1),
])  # fmt: skip
def test_the_command_line(tmp_path: Path, options: tuple[str, ...], asked: int) -> None:
    """`check` itself, with a hook in it and in its children that sees every connection."""
    (tmp_path / "sitecustomize.py").write_text(AUDIT)
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('none here')\n")
    (tmp_path / "train.yaml").write_text(f"img_dir: {ROOT / 'examples/demo/photos'}\n")
    with serving(401) as hub:
        surroundings = environ(tmp_path, hub.url, PYTHONPATH=str(tmp_path), HF_TOKEN=TOKEN)
        argv = [sys.executable, "-m", "xflux_doctor.cli", "check", "--cpu", "--format", "json", *options]
        done = subprocess.run(argv, cwd=tmp_path, env=surroundings, capture_output=True, text=True, timeout=60)
    assert len(hub.asked) == asked
    assert TOKEN not in done.stdout + done.stderr
    assert (tmp_path / "opened").exists() == bool(asked)
    document = json.loads(done.stdout)
    (verdict,) = [item for item in document["results"] if item["check"] == "WE104"]
    assert verdict["status"] == ("error" if asked else "skipped")
