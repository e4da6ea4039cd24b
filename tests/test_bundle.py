"""What leaves the machine in a bug report: planted secrets of many kinds, none of which may survive."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

import pytest
from cli_kit import doctor
from hypothesis import given, settings
from hypothesis import strategies as st

from xflux_doctor.commands import bundle
from xflux_doctor.errors import UsageError
from xflux_doctor.explain import excerpt
from xflux_doctor.redact import Redactor, pseudonyms, secret_name, secrets_of

# Each is a line of a log and the part of it that must go. None is anybody's.
PLANTED = (
    ("HF_TOKEN=hf_QwErTyUiOpAsDfGhJk", "hf_QwErTyUiOpAsDfGhJk"),
    ("  token: hf_ZxCvBnMaSdFgHjKl", "hf_ZxCvBnMaSdFgHjKl"),
    ("wandb: logging in with 0123456789abcdef0123456789abcdef01234567", "0123456789abcdef0123456789abcdef01234567"),
    ("export AWS_ACCESS_KEY_ID=AKIAIOSFODNN7EXAMPLE", "AKIAIOSFODNN7EXAMPLE"),
    ("aws_secret_access_key = wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"),
    ("je7MtGbClwBF/2Zp9Utk/h3yCo8nvbEXAMPLEKEY", "je7MtGbClwBF/2Zp9Utk/h3yCo8nvbEXAMPLEKEY"),
    ("Cloning https://alice:s3cr3tpw@git.example.org/x.git", "s3cr3tpw"),
    ("GET https://ghp_0123456789abcdefghij@github.com/x", "ghp_0123456789abcdefghij"),
    ("> Authorization: Bearer abcdef.ghijkl-1234", "abcdef.ghijkl-1234"),
    ('{"headers": {"authorization": "Basic dXNlcjpwYXNz", "x": 1}}', "dXNlcjpwYXNz"),
    ("Cookie: session=deadbeefcafe; theme=dark", "deadbeefcafe"),
    ("curl -H 'X-Api-Key: k-123456789' host", "k-123456789"),
    ("s3://b/k?X-Amz-Signature=aabbccdd11&X-Amz-Date=1", "aabbccdd11"),
    ("https://x.blob.core.windows.net/c?sv=1&sig=abc%2Fdef%3D", "abc%2Fdef%3D"),
    ("--hub-token abcdefgh12 --steps 5", "abcdefgh12"),
    ("password: correct horse battery staple", "horse battery"),
    ("PGPASSWORD='two words' psql", "two words"),
    ("OPENAI_API_KEY=sk-proj-abcdefghijklmnop1234", "abcdefghijklmnop1234"),
    ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmN", "dozjgNryP4J3jVmN"),
    ("machine api.wandb.ai login user password kdjfh3487", "kdjfh3487"),
    ("https://hooks.slack.com/services/T00000000/B00000000/XXXXXXXX", "B00000000"),
    ("-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaC1rZXktdjEAAAAABG5vbmU\n-----END OPENSSH PRIVATE KEY-----",
     "b3BlbnNzaC1rZXktdjEAAAAABG5vbmU"),
    ("cGFydG9mYWtleXdpdGhvdXRpdHNmaXJzdGxpbmVhYWFhYWFhYWFhYWFhYWFh", "cGFydG9mYWtleXdpdGhvdXRpdHNm"),
    ("FileNotFoundError: /home/alicesmith/data/x.png", "alicesmith"),
    ("C:\\Users\\bobjones\\train", "bobjones"),
    ("mail to carol.white@example.org", "carol.white"),
    ("curl -sSL -u alice:pa55word https://x", "pa55word"),
    ("curl -u'alice:two words' https://x", "two words"),
    ("curl https://x --user=alice:pa55word -o y", "pa55word"),
    ("the plain value swordfish-7 by itself", "swordfish-7"),  # of a secret variable of this process
    ("gpu-node-17: NCCL WARN connect failed", "gpu-node-17"),  # a host that the facts know
)  # fmt: skip
HARMLESS = (
    "curl -u alice https://x -o y:z",
    "max_text_tokens: 32", "note: 1 caption is longer than 32 T5 tokens", "tokenizer: T5TokenizerFast", "KeyError: 'x'",
    "hub_token: true", "token: null", "the token is invalid", "learning_rate: 1.0e-3", "step 5/10  loss 0.5",
    "PWD=/data/run", "RuntimeError: CUDA out of memory. Tried to allocate 2.00 GiB", "NCCL_IB_PKEY=1",
    "Invalid credentials in Authorization header", "transformer_blocks.0.attn.to_k.lora_A.weight",
    "torch 2.13.0+cpu", "https://huggingface.co/black-forest-labs/FLUX.1-dev",
)  # fmt: skip


def everything() -> Redactor:
    return Redactor(("swordfish-7",), pseudonyms(["dave"], ["gpu-node-17", "gpu-node-18"]), people=True)


@pytest.mark.parametrize(("line", "secret"), PLANTED)
def test_no_secret_survives(line: str, secret: str) -> None:
    redactor = everything()
    assert secret in line and secret not in redactor.text(line) and redactor.counts
    assert secret not in json.dumps(redactor.tree({"a": [line], line: 1}))


@pytest.mark.parametrize("line", HARMLESS)
def test_what_is_no_secret_stays(line: str) -> None:
    assert everything().text(line) == line


def test_what_stands_under_a_secret_s_name_goes_whole() -> None:
    found = Redactor().tree({"hub_token": True, "api_key": "a b", "AWS_SESSION_TOKEN": "x", "steps": 3, "k": ["a", 1]})
    assert found == {"hub_token": True, "api_key": "***", "AWS_SESSION_TOKEN": "***", "steps": 3, "k": ["a", 1]}


def test_names() -> None:
    assert all(map(secret_name, ("HF_TOKEN", "WANDB_API_KEY", "MY_PASS", "hubToken", "db_pwd", "password")))
    assert not any(map(secret_name, ("PWD", "tokenizer", "max_text_tokens", "key", "monkey", "SSH_AUTH_SOCK")))
    assert secrets_of({"A_TOKEN": "abcdefgh", "B_TOKEN": "abc", "C_KEY": "/path/to/key", "D": "abcdefgh"}) == (
        "abcdefgh",
    )
    assert pseudonyms(["root", "alice"], ["n1", "n2", "n1", "localhost"]) == {
        "alice": "USER", "n1": "host0", "n2": "host1"}  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=40), st.sampled_from(PLANTED), st.text(max_size=40))
def test_whatever_stands_around_it(before: str, planted: tuple[str, str], after: str) -> None:
    line, secret = planted
    assert secret not in everything().text(f"{before}\n{line}\n{after}")


def run_folder(place: Path) -> Path:
    """A run that died, with secrets in everything that it left."""
    out = place / "out"
    (out / "logs").mkdir(parents=True)
    lines = [line for line, _ in PLANTED]
    noise = [f"step {k}/9000  loss 0.5" for k in range(9000)]
    (out / "logs/run-1.log").write_text("\n".join([*lines, *noise, "BlubError: strange", *lines]) + "\n")
    values = {f"k{number}": line for number, line in enumerate(lines)}
    facts = {"environment": values | {"SLURM_JOB_NODELIST": "gpu-node-[17-18]"}, "cluster": {"names": ["gpu-node-17"]}}
    (out / "facts.json").write_text(json.dumps(facts))
    (out / "launch.json").write_text(json.dumps({"command": f"run {lines[14]}", "argv": lines}))
    (out / "train.yaml").write_text("\n".join([*(line for line in lines if "BEGIN" not in line), "rank: 4"]) + "\n")
    (out / "retries.jsonl").write_text('{"words": "broken \n' + "\n".join(lines))
    (out / "events.jsonl").write_text("".join(json.dumps({"words": line}) + "\n" for line in lines))
    for name, text in (("heartbeats/rank0.json", json.dumps({"host": "gpu-node-17", "words": lines})),
                       ("heartbeats/rank1.json", '{"cut'), ("stacks/rank0.txt", "\n".join(lines))):  # fmt: skip
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text(text)
    for number in range(1, 80):
        (out / f"stacks/rank{number}.txt").write_text("Thread 0x1\n")
    return out


def test_a_bundle_holds_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_SECRET", "swordfish-7")
    out = run_folder(tmp_path)
    target = tmp_path / "b.tar.gz"
    proof = {"cause": "unknown", "evidence": [{"line": 9000, "text": PLANTED[0][0], "rank": None}]}
    said = bundle.write(target, out, proof)
    whole = _read(target)
    for line, secret in PLANTED:
        assert secret not in said and not any(secret in text for text in whole.values()), line
    assert {"manifest.json", "facts.json", "launch.json", "train.yaml", "retries.jsonl", "diagnosis.json",
            "logs/run-1.log.txt", "events.jsonl", "heartbeats/rank0.json", "heartbeats/rank1.json",
            *(f"stacks/rank{number}.txt" for number in range(64))} == set(whole)  # fmt: skip
    assert "stacks/rank*.txt: 64 of 80" in json.loads(whole["manifest.json"])["notes"]
    manifest = json.loads(whole["manifest.json"])
    assert set(manifest["files"]) == set(whole) - {"manifest.json"} and len(manifest["removed"]) > 8
    log = whole["logs/run-1.log.txt"]
    assert "BlubError: strange" in log and "step 8990/9000" in log and "lines left out" in log and len(log) < 200_000
    assert "host0" in whole["facts.json"] and "rank: 4" in whole["train.yaml"]
    bundle.write(target, out, proof, hosts=True)
    assert "gpu-node-17" in _read(target)["facts.json"]


def _read(target: Path) -> dict[str, str]:
    with tarfile.open(fileobj=io.BytesIO(target.read_bytes())) as archive:
        members = archive.getmembers()
        assert all((one.uname, one.uid, one.mtime) == ("", 0, 0) and one.isfile() for one in members)
        return {one.name.partition("/")[2]: archive.extractfile(one).read().decode() for one in members}  # type: ignore[union-attr]


def test_from_the_command_line(tmp_path: Path) -> None:
    """It is proposed where the cause is unknown, and written when asked for."""
    (tmp_path / "x.log").write_text(
        "HF_TOKEN=hf_QwErTyUiOpAsDfGhJk\nTraceback (most recent call last):\nBlubError: x\n"
    )
    said = doctor("explain", "x.log", cwd=tmp_path, code=1).stdout
    assert "xflux-doctor explain x.log --bundle xflux-doctor-bundle.tar.gz" in said
    done = doctor("explain", "x.log", "--bundle", "b.tar.gz", "--format", "json", cwd=tmp_path, code=1)
    assert json.loads(done.stdout)["cause"] == "unknown" and "bundle: b.tar.gz" in done.stderr
    assert "hf_QwEr" not in "".join(_read(tmp_path / "b.tar.gz").values()) and os.listdir(tmp_path) != []
    assert "no folder" in doctor("explain", "x.log", "--bundle", "no/b.tar.gz", cwd=tmp_path, code=2).stderr
    assert "needs a log" in doctor("explain", "-", "--bundle", "b.tar.gz", cwd=tmp_path, code=2).stderr
    with pytest.raises(UsageError):
        bundle.write(tmp_path / "no/b", tmp_path / "x.log", {})


def test_an_excerpt_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    path.write_text("".join(f"error {k} " + "x" * 3000 + "\n" for k in range(20_000)))
    found = excerpt.of_file(path, {15_000})
    assert found.lines == 20_000 and len(found.text) < 3_000_000 and found.shown < 2_500
    for number in (1, 15_000, 19_999):
        assert f"\n{number}: error {number - 1} " in f"\n{found.text}"
    (tmp_path / "empty.log").write_text("")
    assert excerpt.of_file(tmp_path / "empty.log").text == ""
