"""`explain LOG --bundle FILE.tar.gz`: what a bug report needs, without what must not leave this machine."""

from __future__ import annotations

import contextlib
import datetime
import getpass
import gzip
import io
import json
import os
import socket
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from xflux_doctor import __version__
from xflux_doctor.cluster import hosts_of
from xflux_doctor.errors import DoctorError, UsageError
from xflux_doctor.explain import excerpt
from xflux_doctor.explain.folder import logs_in
from xflux_doctor.files import replace
from xflux_doctor.redact import Redactor, pseudonyms, secrets_of
from xflux_doctor.report import jsonreport

_DOCUMENTS = (
    "facts.json", "findings.json", "plan.json", "launch.json", "result.json", "diagnosis.json", "metrics.json",
)  # fmt: skip
_TEXTS = (
    "train.yaml", "config.yaml", "accelerate.yaml", "accelerate.json", "deepspeed.json", "history.jsonl",
    "retries.jsonl", "events.jsonl",
)  # fmt: skip
_OF_RANKS = ("heartbeats/rank*.json", "stacks/rank*.txt")
_RANKS = 64
"""Files of each of these."""
_MOST = 2 << 20
"""Bytes of one file; more of it is left out and said."""
_LOGS = 16


def write(target: Path, source: Path, diagnosis: Mapping[str, Any], *, hosts: bool = False) -> str:
    """Write the bundle of a log or a run folder; what to say of it. `hosts`: host names and addresses stay.

    Raises UsageError where the bundle has no place.
    """
    if not target.absolute().parent.is_dir():
        raise UsageError(f"There is no folder {target.parent}.", "Check the path given to --bundle.")
    folder = _run_folder(source)
    facts = _json(folder / "facts.json") if folder else None
    redactor = Redactor(
        values=secrets_of(os.environ), people=True,
        names=pseudonyms(_users(), () if hosts else _hosts(facts if isinstance(facts, dict) else {})),
    )  # fmt: skip
    files: dict[str, str] = {"diagnosis.json": jsonreport.encode(redactor.tree(dict(diagnosis)))}
    notes: list[str] = []
    for name, text in _of_folder(folder, redactor, notes) if folder else ():
        files.setdefault(name, text)
    proof = {item["line"] for item in diagnosis.get("evidence", ()) if isinstance(item.get("line"), int)}
    for name, path in _logs(source, folder, notes):
        try:
            found = excerpt.of_file(path, proof)
        except OSError as error:
            notes.append(f"{name}: {error.strerror}")
            continue
        files[f"logs/{redactor.text(name)}.txt"] = redactor.text(found.text)
        if found.shown < found.lines:
            notes.append(f"{redactor.text(name)}: {found.shown} of {found.lines} lines, head, tail and around errors")
    manifest = {
        "schema": 1,
        "version": __version__,
        "made": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cause": diagnosis.get("cause"),
        "files": {name: len(text.encode("utf-8", "replace")) for name, text in sorted(files.items())},
        "removed": dict(sorted(redactor.counts.items())),
        "hosts": "as they are" if hosts else "host0, host1 …",
        "notes": notes,
    }
    files = {"manifest.json": jsonreport.encode(manifest), **files}
    data = _packed(files)
    try:
        replace(target.resolve(), data)
    except OSError as error:
        raise DoctorError(f"{target} could not be written: {error.strerror}.", "Choose another place.") from error
    gone = ", ".join(f"{number} × {kind}" for kind, number in sorted(redactor.counts.items()))
    return (
        f"bundle: {target} ({len(files)} files, {len(data) / 1024:.0f} KiB); removed: {gone or 'nothing was there'}. "
        "Look through it before you send it; manifest.json says what is inside."
    )


def _run_folder(source: Path) -> Path | None:
    """The run folder that the source is, or that its log lies in."""
    places = [source] if source.is_dir() else [source.absolute().parent.parent, source.absolute().parent]
    return next((p for p in places if (p / "launch.json").is_file() or (p / "facts.json").is_file()), None)


def _of_folder(folder: Path, redactor: Redactor, notes: list[str]) -> Iterator[tuple[str, str]]:
    for name in (*_DOCUMENTS, *_TEXTS, *_of_ranks(folder, notes)):
        path = folder / name
        if not path.is_file():
            continue
        document = _json(path) if name.endswith(".json") else None
        if document is not None:
            yield name, jsonreport.encode(redactor.tree(document))
            continue
        try:
            with path.open("rb") as file:
                data = file.read(_MOST)
        except OSError as error:
            notes.append(f"{name}: {error.strerror}")
            continue
        if path.stat().st_size > _MOST:
            notes.append(f"{name}: its first {_MOST >> 20} MiB")
        text = data.decode("utf-8", "replace")
        yield name, _records(text, redactor) if name.endswith(".jsonl") else redactor.text(text)


def _records(text: str, redactor: Redactor) -> str:
    """JSON lines, each read as the document that it is: a secret inside a string is not at the beginning of a line."""
    found = []
    for line in text.splitlines():
        try:
            found.append(json.dumps(redactor.tree(json.loads(line)), ensure_ascii=False))
        except (ValueError, RecursionError):  # cut off
            found.append(line)
    return redactor.text("".join(f"{line}\n" for line in found))


def _of_ranks(folder: Path, notes: list[str]) -> Iterator[str]:
    """The names of what each rank has of its own, lowest ranks first."""
    for pattern in _OF_RANKS:
        found = sorted(folder.glob(pattern), key=lambda path: (len(path.name), path.name))
        if len(found) > _RANKS:
            notes.append(f"{pattern}: {_RANKS} of {len(found)}")
        yield from (path.relative_to(folder).as_posix() for path in found[:_RANKS])


def _logs(source: Path, folder: Path | None, notes: list[str]) -> list[tuple[str, Path]]:
    if source.is_file():
        return [(source.name, source)]
    own = source / "logs" if folder is not None and (source / "logs").is_dir() else source
    found = [path for _, path in logs_in(own)]
    found.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    if len(found) > _LOGS:
        notes.append(f"the {_LOGS} newest of {len(found)} logs")
    return [("-".join(path.relative_to(own).parts), path) for path in found[:_LOGS]]


def _json(path: Path) -> Any:
    """A document that is small enough and whole; else None."""
    try:
        return json.loads(path.read_bytes()) if path.stat().st_size <= _MOST else None
    except (OSError, ValueError, RecursionError):
        return None


def _users() -> set[str]:
    names = {os.environ.get(name, "") for name in ("USER", "LOGNAME", "SUDO_USER", "SLURM_JOB_USER")}
    with contextlib.suppress(OSError, KeyError):  # a user without a name
        names.add(getpass.getuser())
    home = os.environ.get("HOME", "")
    return names | ({Path(home).name} if home.count("/") > 1 else set())


def _hosts(facts: Mapping[str, Any]) -> Iterator[str]:
    """This host's names, and those that the run's facts know of."""
    host = socket.gethostname()
    yield from (host, host.partition(".")[0])
    environment, cluster, meeting = (_mapping(facts.get(name)) for name in ("environment", "cluster", "meeting"))
    for name in ("SLURM_JOB_NODELIST", "SLURM_STEP_NODELIST"):
        yield from hosts_of(str(environment.get(name, "")))
    yield str(environment.get("MASTER_ADDR", ""))
    for key in ("names", "addresses", "own_addresses", "main_addresses"):
        yield from _texts(cluster.get(key))
    yield str(cluster.get("main") or "")
    yield str(meeting.get("address") or "").rpartition(":")[0]
    peers = meeting.get("peers")
    yield from (str(_mapping(peer).get("host", "")) for peer in (peers if isinstance(peers, list) else ()))


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _texts(value: Any) -> Iterable[str]:
    return [item for item in value if isinstance(item, str)] if isinstance(value, list) else ()


def _packed(files: Mapping[str, str]) -> bytes:
    """Without names or numbers of users, and without a time: the same content is the same file."""
    whole = io.BytesIO()
    with gzip.GzipFile(fileobj=whole, mode="wb", mtime=0) as packed, tarfile.open(fileobj=packed, mode="w") as archive:
        for name, text in files.items():
            data = text.encode("utf-8", "backslashreplace")
            entry = tarfile.TarInfo(f"xflux-doctor-bundle/{name}")
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return whole.getvalue()
