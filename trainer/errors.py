"""The errors that a user is meant to see: one sentence of what was seen, one of what to do next."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple


class UserError(Exception):
    """An expected failure; `code` is the exit code that it ends the program with."""

    code = 1
    everywhere = False
    """Whether every rank raises this very error, so that one of them saying it is enough; `Ranks.agree` sees to it."""

    said = False
    """Whether it stands on the terminal already."""

    def __init__(self, seen: str, hint: str = "") -> None:
        super().__init__(f"{seen} {hint}".strip())
        self.seen = seen
        self.hint = hint


def tell(error: UserError) -> None:
    """Say it, once."""
    if not error.said:
        error.said = True
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr, flush=True)


class Problem(NamedTuple):
    """One thing wrong with one key of a config file; `key` is empty when it is the file as a whole."""

    key: str
    seen: str
    hint: str = ""

    def __str__(self) -> str:
        text = f"{self.seen}. {self.hint}".strip() if self.hint else f"{self.seen}."
        return f"{self.key}: {text}" if self.key else text


class ConfigError(UserError):
    """Everything that is wrong with a config file, at once."""

    everywhere = True

    def __init__(self, path: str | Path, problems: tuple[Problem, ...]) -> None:
        super().__init__("\n".join(f"{path}: {problem}" for problem in problems))
        self.path = Path(path)
        self.problems = problems

    def __reduce__(self) -> tuple[type[ConfigError], tuple[Path, tuple[Problem, ...]]]:
        # Errors are told to other ranks; the default would make the copy from the message alone.
        return (ConfigError, (self.path, self.problems))


def first_line(error: BaseException) -> str:
    """What a foreign error says first, without a full stop; its kind where it says nothing."""
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__).rstrip(".")


class DataError(UserError):
    """The images or captions cannot be trained on."""


class ModelError(UserError):
    """The base model's files are missing, broken or of a kind that cannot be trained."""


class CheckpointError(UserError):
    """A checkpoint or adapter file cannot be read, or does not belong to this run."""


class WriteError(UserError):
    """A file cannot be written: the disk is full, or the folder may not be written to."""


class Unsupported(UserError):
    """The launcher asks for something that this trainer does not do."""


class Interrupted(BaseException):
    """SIGINT or SIGTERM; not an `Exception`, so that nothing on the way takes it for a failure."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"interrupted by signal {signum}")
        self.signum = signum
        self.code = 128 + signum
