"""Rows of tables by pyarrow, which is imported here alone and only when a training set is one.

A cell of images is bytes, a path, or what `datasets.Image` writes: {"bytes": …, "path": …}.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from xflux_trainer.captions import SampleProblem, check_caption
from xflux_trainer.errors import DataError
from xflux_trainer.imagefile import shown
from xflux_trainer.tables import Table, lacking

ROWS = 32
"""Rows that are decoded at a time: an image is a megabyte or a few."""


def read_captions(path: Path, columns: tuple[str, str]) -> tuple[list[str], list[SampleProblem]]:
    """Every row's caption, empty where it cannot be used, and what is wrong. Raises `DataError`."""
    names = _names(path)
    if missing := lacking(Table(path, None, names), columns):
        return [], [missing]
    captions: list[str] = []
    problems: list[SampleProblem] = []
    key = columns[1]
    for batch in _batches(path, [key], 65536):
        for value in batch.column(0).to_pylist():
            place = Path(f"{path}#{len(captions)}")
            caption, problem = check_caption(place, value, f'Write a text into the column "{key}".')
            captions.append(caption)
            if problem:
                problems.append(problem)
    return captions, problems


def read_images(path: Path, column: str, rows: Sequence[int]) -> Iterator[tuple[int, bytes]]:
    """(row, the bytes of its image) for these rows, which ascend. Holds a few images at a time; raises `DataError`."""
    wanted = iter(rows)
    row = next(wanted, None)
    start = 0
    for batch in _batches(path, [column], ROWS):
        while row is not None and row < start + batch.num_rows:
            yield row, _content(batch.column(0)[row - start].as_py(), path, row)
            row = next(wanted, None)
        start += batch.num_rows
        if row is None:
            return
    raise DataError(f"{shown(path)} has {start} rows and not the row {row}.", "Did it change? Start again.")


def _content(value: Any, path: Path, row: int) -> bytes:
    """The image's bytes; a path is taken from where the table lies."""
    name: Any = None
    if isinstance(value, dict):
        value, name = value.get("bytes"), value.get("path")
    elif isinstance(value, str):
        value, name = None, value
    if isinstance(value, bytes):
        return value
    if isinstance(name, str) and name:
        try:
            return (path.parent / name).read_bytes()
        except OSError as error:
            seen = f"{shown(path)}#{row} names the image {shown(name)}, which cannot be read: {error.strerror}."
            raise DataError(seen, "Put it there, or write the dataset with its images inside.") from error
    seen = f"{shown(path)}#{row} holds no image but {type(value).__name__}."
    raise DataError(seen, "Set image_column to a column of images, or remove the row.")


def _names(path: Path) -> tuple[str, ...]:
    parquet, ipc = _pyarrow()
    with _sentences(path):
        if path.suffix.lower() == ".parquet":
            names = parquet.read_schema(path).names
        else:
            with _open(ipc, path) as reader:
                names = reader.schema.names
    return tuple(names)


def _batches(path: Path, columns: list[str], rows: int) -> Iterator[Any]:
    """The rows in order, in batches of at most `rows`, these columns alone."""
    parquet, ipc = _pyarrow()
    with _sentences(path):
        if path.suffix.lower() == ".parquet":
            with parquet.ParquetFile(path) as file:
                yield from file.iter_batches(batch_size=rows, columns=columns)
            return
        with _open(ipc, path) as reader:
            for batch in _each(reader):
                chosen = batch.select(columns)
                for start in range(0, chosen.num_rows, rows):
                    yield chosen.slice(start, rows)


def _open(ipc: Any, path: Path) -> Any:
    """An arrow file is a stream (as `datasets` writes it) or a file with a footer."""
    import pyarrow

    source = pyarrow.memory_map(str(path))
    whole = source.read(6) == b"ARROW1"
    source.seek(0)
    return ipc.open_file(source) if whole else ipc.open_stream(source)


def _each(reader: Any) -> Iterator[Any]:
    if hasattr(reader, "num_record_batches"):
        return (reader.get_batch(number) for number in range(reader.num_record_batches))
    return iter(reader)


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow.parquet
        from pyarrow import ipc
    except ImportError as error:
        seen = f"The training set is a table, and pyarrow is not installed for reading it ({error})."
        raise DataError(seen, "Run `pip install pyarrow`.") from error
    return pyarrow.parquet, ipc


@contextmanager
def _sentences(path: Path) -> Iterator[None]:
    """Turn what pyarrow says of a file into a sentence: ValueErrors, OSErrors, or a codec that was not built in."""
    try:
        yield
    except (ValueError, OSError, NotImplementedError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(f"{shown(path)} cannot be read: {reason}.", "Copy or write it again.") from error
