"""The compatibility matrix as it is read: our own `compat_matrix.yaml`, and a site's file laid over it."""

from __future__ import annotations

import datetime
from pathlib import Path

import msgspec
import yaml

from xflux_doctor import matrix_lint
from xflux_doctor.errors import DoctorError
from xflux_doctor.matrix_types import Matrix as Matrix
from xflux_doctor.matrix_types import Pin as Pin
from xflux_doctor.matrix_types import Rule as Rule
from xflux_doctor.matrix_types import Stack as Stack
from xflux_doctor.matrix_types import has_kernels as has_kernels
from xflux_doctor.matrix_types import requirements as requirements


def default_path() -> Path:
    return Path(__file__).with_name("compat_matrix.yaml")


def load(path: Path | None = None) -> Matrix:
    """Read a matrix file. Raises DoctorError with all of its faults, each with its line.

    Our own file is only fitted to its types here, for the quick check's sake; a test holds it free of other faults.
    """
    file = path or default_path()
    try:
        text = file.read_bytes().decode()
        # The C loader is as safe as SafeLoader and ten times faster; some builds of PyYAML lack it.
        raw = _plain(yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)))  # noqa: S506
    except OSError as error:
        raise DoctorError(f"The matrix {file} cannot be read: {error.strerror}.", code=2) from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise DoctorError(f"The matrix {file} is not YAML: {error}.", "Repair the file.") from error
    try:
        matrix = msgspec.convert(raw, Matrix)
    except (msgspec.ValidationError, RecursionError) as error:
        problems = matrix_lint.shape(raw) or [str(error)]
        raise _faults(file, problems, text) from error
    if path is not None:
        problems = matrix_lint.lint(matrix)
        doubled = matrix_lint.doubled(text)
        if problems or doubled:
            raise _faults(file, problems, text, tuple(doubled))
    return matrix


def _faults(file: Path, problems: list[str], text: str, placed: tuple[str, ...] = ()) -> DoctorError:
    lines = [*placed, *matrix_lint.with_lines(problems, text)]
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
    clashes = list(matrix_lint.contradictions(laid))
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
