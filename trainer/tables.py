"""Training sets that are tables: parquet files, or what `datasets.save_to_disk` writes. Here without a library:
which tables a folder holds, how many rows and which columns each has, and what is wrong with them.

Sources: Apache Parquet's format.md and parquet.thrift (the footer, in Thrift's compact protocol); the files that
`datasets` 2 and 3 write (state.json, dataset_info.json, dataset_dict.json).
"""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any, NamedTuple

from xflux_trainer.captions import SampleProblem
from xflux_trainer.imagefile import at_once

ENDINGS = (".parquet", ".arrow")
_MOST_FOOTER = 1 << 28


class Table(NamedTuple):
    """One file of rows. `rows` is None where only pyarrow could tell, `columns` likewise."""

    path: Path
    rows: int | None = None
    columns: tuple[str, ...] | None = None


def saved_files(folder: str, names: list[str]) -> tuple[list[str], SampleProblem | None]:
    """The tables among the files of one folder. Of a saved dataset those that its state.json names, because `datasets`
    keeps files of its own beside them; of a saved dictionary of several splits none, because one must be chosen."""
    if "dataset_dict.json" in names:
        splits = _json(Path(folder, "dataset_dict.json")).get("splits")
        if isinstance(splits, list) and len(splits) > 1:
            seen = f"holds the splits {', '.join(map(str, splits))} of a saved dataset"
            return [], SampleProblem(Path(folder), "splits", seen, "Set img_dir to the folder of one of them.")
    # `datasets`' ImageFolder keeps what is said of files in metadata.parquet: it holds no images.
    tables = sorted(name for name in names if name.lower().endswith(ENDINGS) and name.lower() != "metadata.parquet")
    if "state.json" in names:
        files = _json(Path(folder, "state.json")).get("_data_files")
        if isinstance(files, list):
            listed = {str(file.get("filename")) for file in files if isinstance(file, dict)}
            gone = sorted(listed - set(names))
            if gone:
                seen = f"lacks {gone[0]}, which its state.json names"
                return [], SampleProblem(Path(folder), "no-table", seen, "Copy the dataset again.")
            return [name for name in tables if name in listed or name.lower().endswith(".parquet")], None
    return [name for name in tables if not name.startswith("cache-")], None


def measure(path: Path) -> tuple[Table, SampleProblem | None]:
    """Rows and columns of one table, as far as they can be told without pyarrow."""
    try:
        if path.suffix.lower() == ".parquet":
            rows, columns = _footer(path)
            return Table(path, rows, columns), None
        with open(path, "rb", opener=at_once) as file:
            empty = not file.read(1)
    except OSError as error:
        return Table(path), SampleProblem(path, "unreadable", f"cannot be read: {error.strerror}", "Allow reading it.")
    except (ValueError, IndexError, struct.error, RecursionError) as error:
        seen = f"is not a whole parquet file: {error}"
        return Table(path), SampleProblem(path, "bad-table", seen, "Copy it again.")
    if empty:
        return Table(path), SampleProblem(path, "bad-table", "is empty (0 bytes)", "Copy it again.")
    return Table(path, *_saved(path)), None


def lacking(table: Table, columns: tuple[str, str]) -> SampleProblem | None:
    """What is said of a table that has no column of images or none of captions."""
    if table.columns is None:
        return None
    keys = ("image_column", "caption_column")
    for key, column in zip(keys, columns, strict=True):
        if column not in table.columns:
            has = ", ".join(table.columns[:8])
            seen = f'has no column "{column}", only {has}'
            return SampleProblem(table.path, "no-column", seen, f"Set {key} to the one that is meant.")
    return None


def _saved(path: Path) -> tuple[int | None, tuple[str, ...] | None]:
    """Rows and columns of an arrow file of a saved dataset, from its dataset_info.json where that is of one file."""
    info = _json(path.with_name("dataset_info.json"))
    features, splits = info.get("features"), info.get("splits")
    columns = tuple(map(str, features)) if isinstance(features, dict) else None
    alone = len(list(path.parent.glob("*.arrow"))) == 1
    if not alone or not isinstance(splits, dict) or len(splits) != 1:
        return None, columns
    split = next(iter(splits.values()))
    rows = split.get("num_examples") if isinstance(split, dict) else None
    return rows if isinstance(rows, int) else None, columns


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


# A parquet file's footer --------------------------------------------------------------------------------


def _footer(path: Path) -> tuple[int, tuple[str, ...]]:
    """(rows, names of the columns at the top). Raises ValueError where the file is not whole."""
    with open(path, "rb", opener=at_once) as file:
        size = os.fstat(file.fileno()).st_size
        if size < 12 or file.read(4) not in (b"PAR1", b"PARE"):
            raise ValueError("it does not begin as one")
        file.seek(size - 8)
        length, mark = struct.unpack("<I4s", file.read(8))
        if mark == b"PARE":
            raise ValueError("it is encrypted")
        if mark != b"PAR1" or length > min(size - 12, _MOST_FOOTER):
            raise ValueError("its end is missing")
        file.seek(size - 8 - length)
        reader = _Compact(file.read(length))
    rows, schema = reader.footer()
    return rows, _top(schema)


def _top(schema: list[tuple[str, int]]) -> tuple[str, ...]:
    """The children of the first element; the others are listed depth first, each with its number of children."""
    names, place = [], 1

    def skip(place: int) -> int:
        children, place = schema[place][1], place + 1
        for _ in range(children):
            place = skip(place)
        return place

    while place < len(schema):
        names.append(schema[place][0])
        place = skip(place)
    return tuple(names)


class _Compact:
    """As much of Thrift's compact protocol as a footer's first three fields need."""

    def __init__(self, data: bytes) -> None:
        self.data, self.place = data, 0

    def footer(self) -> tuple[int, list[tuple[str, int]]]:
        schema: list[tuple[str, int]] = []
        field = 0
        while True:
            field, kind = self._header(field)
            if kind == 0:
                raise ValueError("its footer does not tell its rows")
            if field == 2 and kind == 9:
                schema = [self._element() for _ in range(self._list()[0])]
            elif field == 3 and kind == 6:
                return self._signed(), schema
            else:
                self._skip(kind)

    def _element(self) -> tuple[str, int]:
        name, children, field = "", 0, 0
        while True:
            field, kind = self._header(field)
            if kind == 0:
                return name, children
            if field == 4 and kind == 8:
                name = self._bytes().decode("utf-8", "replace")
            elif field == 5 and kind == 5:
                children = self._signed()
            else:
                self._skip(kind)

    def _header(self, field: int) -> tuple[int, int]:
        byte = self._byte()
        delta, kind = byte >> 4, byte & 15
        return (field + delta if delta or kind == 0 else self._signed()), kind

    def _list(self) -> tuple[int, int]:
        byte = self._byte()
        return (self._varint() if byte >> 4 == 15 else byte >> 4), byte & 15

    def _skip(self, kind: int) -> None:
        if kind in (1, 2):
            return
        if kind in (3, 7):
            self.place += 1 if kind == 3 else 8
        elif kind in (4, 5, 6):
            self._varint()
        elif kind == 8:
            self._bytes()
        elif kind in (9, 10):
            count, of = self._list()
            for _ in range(count):
                self._skip(of) if of not in (1, 2) else self._byte()
        elif kind == 12:
            field = 0
            while True:
                field, inner = self._header(field)
                if inner == 0:
                    return
                self._skip(inner)
        else:
            raise ValueError("its footer is not one")

    def _byte(self) -> int:
        self.place += 1
        return self.data[self.place - 1]

    def _varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    def _signed(self) -> int:
        value = self._varint()
        return value >> 1 ^ -(value & 1)

    def _bytes(self) -> bytes:
        length = self._varint()
        self.place += length
        if self.place > len(self.data):
            raise ValueError("its footer is cut")
        return self.data[self.place - length : self.place]
