"""How the excerpts of tracebacks are written down."""

from __future__ import annotations


def crash(error: str, *frames: str, rank: int | None = None) -> str:
    """A traceback as Python prints it; a frame is `file:line:function: source`."""
    mark = "" if rank is None else f"[rank{rank}]: "
    lines = ["Traceback (most recent call last):"]
    for frame in frames or ("/workspace/train.py:59:<module>: main()",):
        file, line, function, source = frame.split(":", 3)
        lines += [f'  File "{file}", line {line}, in {function}', f"    {source.strip()}"]
    return "".join(f"{mark}{line}\n" for line in [*lines, *error.split("\n")])
