"""A training set's samples in a few arrays: some dozen bytes for each, which can lie in a file that is mapped."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray
from xflux_trainer.samples import Sample

Arrays = Mapping[str, NDArray[Any]]


class Texts(Sequence[str]):
    """Texts behind each other as bytes, and where each ends."""

    def __init__(self, data: NDArray[np.uint8], ends: NDArray[np.int64]) -> None:
        self.data, self.ends = data, ends

    @classmethod
    def pack(cls, texts: Iterable[str]) -> Texts:
        # Names of files need not be UTF-8.
        parts = [text.encode("utf-8", "surrogateescape") for text in texts]
        ends = np.cumsum(np.fromiter(map(len, parts), np.int64, len(parts)), dtype=np.int64)
        return cls(np.frombuffer(b"".join(parts), np.uint8), ends)

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, number: int) -> str: ...
    @overload
    def __getitem__(self, number: slice) -> list[str]: ...
    def __getitem__(self, number: int | slice) -> str | list[str]:
        if isinstance(number, slice):
            return [self[k] for k in range(*number.indices(len(self)))]
        k = range(len(self))[number]
        start = int(self.ends[k - 1]) if k else 0
        return self.data[start : int(self.ends[k])].tobytes().decode("utf-8", "surrogateescape")


class Samples(Sequence[Sample]):
    """The samples of one folder. A `Sample` is made when it is asked for."""

    def __init__(self, arrays: Arrays, caption_type: str, stamp: str | None = None, digest: str | None = None) -> None:
        """`arrays` are those that `arrays` gives. `stamp`: see `snapshot.stamp`; `digest`: see `digest_of`."""
        self.arrays = dict(arrays)
        self.caption_type, self.stamp, self.digest = caption_type, stamp, digest
        self._paths = Texts(arrays["paths"], arrays["path_ends"])
        self.captions = Texts(arrays["captions"], arrays["caption_ends"])
        """Every caption once."""

    @classmethod
    def pack(cls, samples: Sequence[Sample], caption_type: str, stamp: str | None = None) -> Samples:
        """`caption_type` is the ending of the files that captions stand in, where they do."""
        paths: dict[str, int] = {}
        captions: dict[str, int] = {}
        path_of = np.fromiter((paths.setdefault(str(one.image), len(paths)) for one in samples), np.int32, len(samples))
        caption_of = (captions.setdefault(one.caption, len(captions)) for one in samples)
        packed, said = Texts.pack(paths), caption_of
        arrays: dict[str, NDArray[Any]] = {
            "paths": packed.data, "path_ends": packed.ends, "path_of": path_of,
            "caption_of": np.fromiter(said, np.int32, len(samples)),
            "rows": np.fromiter((-1 if one.row is None else one.row for one in samples), np.int32, len(samples)),
        }  # fmt: skip
        texts = Texts.pack(captions)
        return cls({**arrays, "captions": texts.data, "caption_ends": texts.ends}, caption_type, stamp)

    def __len__(self) -> int:
        return len(self.arrays["path_of"])

    def __iter__(self) -> Iterator[Sample]:
        return map(self._make, range(len(self)))

    @overload
    def __getitem__(self, number: int) -> Sample: ...
    @overload
    def __getitem__(self, number: slice) -> list[Sample]: ...
    def __getitem__(self, number: int | slice) -> Sample | list[Sample]:
        if isinstance(number, slice):
            return [self._make(k) for k in range(*number.indices(len(self)))]
        return self._make(range(len(self))[number])

    def _make(self, number: int) -> Sample:
        image = self._paths[self.arrays["path_of"][number]]
        caption = self.captions[self.arrays["caption_of"][number]]
        row = int(self.arrays["rows"][number])
        if row >= 0:
            return Sample(Path(image), Path(image), caption, row)
        return Sample(Path(image), Path(f"{image.rpartition('.')[0]}.{self.caption_type}"), caption)


def digest_of(samples: Sequence[Sample], root: str) -> str:
    """Which images below the folder, by their paths from there on, with which captions, in which order."""
    if isinstance(samples, Samples) and samples.digest:
        return samples.digest
    digest = hashlib.sha256()
    top = os.path.join(Path(root), "")  # noqa: PTH118 - a text, for there may be many thousands
    for sample in samples:
        text = str(sample.name)
        name = os.fsencode(text[len(top) :] if text.startswith(top) else os.path.relpath(text, root))
        digest.update(b"%d:%b%d:" % (len(name), name, len(sample.caption)) + sample.caption.encode())
    digest.update(b"#%d" % len(samples))
    return digest.hexdigest()
