"""What earlier starts found out about the images of a run, so that only new and changed files are read again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from xflux_trainer import digests
from xflux_trainer.digests import ID, ROW, Content, Digests, Rows
from xflux_trainer.entries import KEY, Keys
from xflux_trainer.imagework import Item, Recipe, View


class Recall:
    """Every image's content and its condition's, in the order of the items."""

    def __init__(self, recipe: Recipe, items: Sequence[Item]) -> None:
        self.recipe, self.items = recipe, items
        self.contents: Rows = np.zeros(len(items), ROW)
        """Of an image that nothing is known of, the width is 0."""
        self.controls: Keys = np.zeros(len(items), KEY)
        self._states: dict[Path, list[int] | None] = {}
        self._digests: dict[Path, Digests] = {}

    def recall(self) -> list[int]:
        """Fill in what is remembered; the items that must be read, because they are not known or lack an entry."""
        wanted = []
        tables: dict[Path, Rows | None] = {}
        there: set[View] = set()  # copies of an image share their entries
        for index, item in enumerate(self.items):
            known = self._of(item.root)
            path, row = item.sample.image, item.sample.row or 0
            if path not in tables:
                tables = {path: known.rows(path)}  # a table's rows follow each other
                self._states[path] = digests.state(path)
            rows = tables[path]
            control = self._control(item)
            if rows is None or row >= len(rows) or not rows[row]["width"] or control is None:
                wanted.append(index)
                continue
            self.contents[index] = rows[row]
            self.controls[index] = np.void(control.ljust(ID, b"\0"))
            views = self.recipe.views(item, digests.content(rows[row]), control)
            for view in views:
                if view in there:
                    continue
                flips, lacks = self.recipe.missing(view)
                if flips or lacks:
                    wanted.append(index)
                    break
                there.add(view)
        return wanted

    def keep(self, wanted: list[int]) -> None:
        """Remember what was read. Only called where `recall` was."""
        by_file: dict[Path, list[int]] = {}
        for index in wanted:
            by_file.setdefault(self.items[index].sample.image, [])
        for index, item in enumerate(self.items):
            if item.sample.image in by_file:
                by_file[item.sample.image].append(index)
        for path, indices in by_file.items():
            first = self.items[indices[0]]
            size = 1 + max(self.items[k].sample.row or 0 for k in indices)
            rows = np.zeros(size, ROW)
            for k in indices:
                rows[self.items[k].sample.row or 0] = self.contents[k]
            self._of(first.root).put_rows(path, rows, self._states[path])
            place = self.recipe.condition_of(first)
            if place is not None and self.recipe.control is not None:
                row = digests.pack([Content(bytes(self.controls[indices[0]]), 1, 1)])
                self._of(self.recipe.control.folder).put_rows(place, row, self._states[place])
        for known in self._digests.values():
            known.write()

    def _control(self, item: Item) -> bytes | None:
        """The hash of the condition's file; empty where there is none, None where it is not known."""
        place = self.recipe.condition_of(item)
        if place is None or self.recipe.control is None:
            return b""
        self._states[place] = digests.state(place)
        found = self._of(self.recipe.control.folder).image(place)
        return None if found is None else found.id

    def _of(self, root: Path) -> Digests:
        if root not in self._digests:
            self._digests[root] = Digests(self.recipe.folder, f"images {root.absolute()}")
        return self._digests[root]
