"""What a rule is: the marks that one cause leaves in a log, and what to say about it."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Literal

import msgspec

Level = Literal["machine", "error", "stop", "killed", "consequence", "warning"]
"""How near to the root a mark stands. When several causes left marks, the nearest level wins:

- `machine`: the hardware or the kernel says so itself; whatever the programs said follows from it
- `error`: a program says what it could not do
- `stop`: somebody or something outside ended the job
- `killed`: a process died without a word
- `consequence`: what the others say when one has died, or when it does not come
- `warning`: harmless in itself; counts only when the job failed and nothing better is known
"""

LEVELS: tuple[Level, ...] = ("machine", "error", "stop", "killed", "consequence", "warning")


class Sign(msgspec.Struct, frozen=True):
    """One mark in a log line."""

    key: str
    """Text that must be in the line. No digits: lines that differ in digits only are looked up once."""
    regex: str = ""
    """What the line must match beyond that."""
    within: str = ""
    """What must be found in the traceback above the line."""
    near: str = ""
    """What must be found in the last lines before it."""
    after: str = ""
    """Text that some earlier line must have held."""
    when: Callable[[re.Match[str]], bool] | None = None
    """A last word on the match of `regex`, where numbers have to be compared."""
    level: Level | None = None
    weight: int | None = None
    code: str | None = None
    """The check that foresees what this mark shows, where it is another than the cause's own (codes.py)."""


class Rule(msgspec.Struct, frozen=True):
    """One cause of failure. `level` and `weight` hold for all signs that do not have their own."""

    id: str
    title: str
    signs: tuple[Sign, ...]
    because: str
    """What it means."""
    hint: str
    """What to do next."""
    commands: tuple[str, ...] = ()
    docs: str = ""
    level: Level = "error"
    weight: int = 50
    """Decides between causes that are seen at the same place."""
