"""The compatibility matrix as it is read: our own `compat_matrix.yaml`, and a site's file laid over it."""

from __future__ import annotations

import datetime
import importlib
import zlib
from pathlib import Path
from typing import Any

import msgspec

from xflux_doctor.errors import DoctorError
from xflux_doctor.matrix_types import Matrix as Matrix
from xflux_doctor.matrix_types import Pin as Pin
from xflux_doctor.matrix_types import Rule as Rule
from xflux_doctor.matrix_types import Stack as Stack
from xflux_doctor.matrix_types import has_kernels as has_kernels
from xflux_doctor.matrix_types import requirements as requirements


def default_path() -> Path:
    return Path(__file__).with_name("compat_matrix.yaml")


class _Compiled(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`compat_matrix.json`: our matrix as it is read a hundred times faster than from YAML."""

    matrix: Matrix
    of: tuple[int, int]
    """Length and CRC-32 of the text that it was made of."""


def load(path: Path | None = None) -> Matrix:
    """Read a matrix file. Raises DoctorError with all of its faults, each with its line.

    Our own file is only fitted to its types here, for the quick check's sake; a test holds it free of other faults.
    """
    file = path or default_path()
    try:
        text = file.read_bytes().decode()
    except OSError as error:
        raise DoctorError(f"The matrix {file} cannot be read: {error.strerror}.", code=2) from error
    except ValueError as error:
        raise _no_yaml(file, error) from error
    if path is not None:
        matrix = _parsed(file, text)
        problems, doubled = _lint().lint(matrix), _lint().doubled(text)
        if problems or doubled:
            raise _faults(file, problems, text, tuple(doubled))
        return matrix
    return _compiled(file.with_suffix(".json"), text) or _parsed(file, text)


def _compiled(file: Path, text: str) -> Matrix | None:
    """The compiled form, where it is there, whole, and made of this very text."""
    try:
        found = msgspec.json.decode(file.read_bytes(), type=_Compiled)
    except (OSError, msgspec.DecodeError, RecursionError):
        return None
    return found.matrix if found.of == _mark(text) else None


def _mark(text: str) -> tuple[int, int]:
    data = text.encode()
    return len(data), zlib.crc32(data)  # an edit is to be seen, and hashlib's import takes as long as all of this


def compiled(text: str) -> str:
    """What docs/generate.py writes beside a matrix: a row a line, so that a change of one shows as one."""
    keys = ",\n".join(f'"{key}":{_json(value)}' for key, value in _raw(text).items())
    return f'{{"matrix":{{\n{keys}\n}},\n"of":{list(_mark(text))}}}\n'


def _json(value: object) -> str:
    """A list as one line for each of its items."""
    if isinstance(value, list):
        return "[\n" + ",\n".join(map(_json, value)) + "\n]"
    return msgspec.json.encode(value).decode()


def _parsed(file: Path, text: str) -> Matrix:
    try:
        raw = _raw(text)
    except (_yaml().YAMLError, ValueError, RecursionError) as error:
        raise _no_yaml(file, error) from error
    try:
        return msgspec.convert(raw, Matrix)
    except (msgspec.ValidationError, RecursionError) as error:
        problems = _lint().shape(raw) or [str(error)]
        raise _faults(file, problems, text) from error


def _raw(text: str) -> Any:
    # The C loader is as safe as SafeLoader and ten times faster; some builds of PyYAML lack it.
    yaml = _yaml()
    return _plain(yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)))


def _yaml() -> Any:
    return importlib.import_module("yaml")  # not for a start that takes the compiled form


def _lint() -> Any:
    return importlib.import_module("xflux_doctor.matrix_lint")  # for a site's own file alone


def _no_yaml(file: Path, error: Exception) -> DoctorError:
    return DoctorError(f"The matrix {file} is not YAML: {error}.", "Repair the file.")


def _faults(file: Path, problems: list[str], text: str, placed: tuple[str, ...] = ()) -> DoctorError:
    lines = [*placed, *_lint().with_lines(problems, text)]
    count = "a fault" if len(lines) == 1 else f"{len(lines)} faults"
    return DoctorError(f"The matrix {file} has {count}:" + "".join(f"\n  {line}" for line in lines), "Repair the file.")


def load_with(site: str | None) -> Matrix:
    """Our matrix with a site's own file laid over it: its stacks and rules are added, or replace ours of the same name.

    `drop` takes stacks and rules of ours away. Added stacks stand last: among equal CUDA versions they are preferred.
    """
    ours = load()
    if site is None:
        return ours
    path = Path(site)
    if not path.is_file():
        raise DoctorError(f"There is no matrix file at {site}.", "Check the path given to --matrix.", code=2)
    theirs = load(path)
    text = path.read_text(encoding="utf-8")
    known = {stack.name for stack in ours.stacks} | {rule.id for rule in ours.rules}
    unknown = [name for name in theirs.drop if name not in known]
    if unknown:
        problems = [f"drop: there is no stack or rule {name} of ours to drop" for name in unknown]
        raise _faults(path, problems, text)
    stacks = {stack.name: stack for stack in ours.stacks} | {stack.name: stack for stack in theirs.stacks}
    rules = {rule.id: rule for rule in ours.rules} | {rule.id: rule for rule in theirs.rules}
    laid = tuple(rule for name, rule in rules.items() if name not in theirs.drop)
    clashes = list(_lint().contradictions(laid))
    if clashes:
        raise _faults(path, [f"{clash}; `drop` takes a row of ours away" for clash in clashes], text)
    return msgspec.structs.replace(
        ours,
        checked=theirs.checked or ours.checked,
        stacks=tuple(stack for name, stack in stacks.items() if name not in theirs.drop),
        rules=laid,
    )


def _plain(value: object) -> object:
    """YAML reads a bare 2026-11-24 as a date; the matrix keeps dates as text."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value.isoformat() if isinstance(value, datetime.date) else value
