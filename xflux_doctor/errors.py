"""The errors that a user is meant to see: one sentence of what was seen, one of what to do next."""

from __future__ import annotations


class DoctorError(Exception):
    """An expected failure. `code` is the exit code: 1 a finding about content, 2 usage."""

    def __init__(self, seen: str, hint: str = "", *, code: int = 1) -> None:
        super().__init__(f"{seen} {hint}".strip())
        self.seen = seen
        self.hint = hint
        self.code = code


class UsageError(DoctorError):
    """The command line asks for something that is not there."""

    def __init__(self, seen: str, hint: str = "") -> None:
        super().__init__(seen, hint, code=2)
