from __future__ import annotations

from pathlib import Path

import pytest

from xflux_doctor.explain.log import MAX_LINE, Line, lines, pieces, text_of


def test_numbers() -> None:
    assert list(lines("a\n\nb")) == [Line(1, None, "a"), Line(2, None, ""), Line(3, None, "b")]
    assert list(lines("a\nb\n")) == [Line(1, None, "a"), Line(2, None, "b")]
    assert list(lines(["a\n", "\n", "b"])) == list(lines("a\n\nb"))
    assert list(lines(["a", "", "b"])) == list(lines("a\n\nb"))


def test_progress_bars_share_a_number() -> None:
    assert list(lines("\r1%\r2%\nx\r\n")) == [Line(1, None, "1%"), Line(1, None, "2%"), Line(2, None, "x")]


@pytest.mark.parametrize(
    ("text", "rank", "rest"),
    [
        ("[rank3]: Traceback", 3, "Traceback"),
        ("[rank12]:[E1123 x", 12, "[E1123 x"),
        ("[default0]:hello", 0, "hello"),
        ("7: Traceback (most", 7, "Traceback (most"),
        ("12: 34", None, "12: 34"),
        ("[Rank 0] step", None, "[Rank 0] step"),
        ("\x1b[31m[rank1]: red\x1b[0m", 1, "red"),
        ("a\x00b", None, "ab"),
    ],
)
def test_ranks(text: str, rank: int | None, rest: str) -> None:
    assert list(lines(text)) == [Line(1, rank, rest)]


def test_long_lines_are_cut() -> None:
    assert [len(line.text) for line in lines("x" * (MAX_LINE * 3))] == [MAX_LINE]


def test_a_file_without_line_ends_does_not_fill_the_memory(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"y" * (5 << 20) + b"\nend\n")
    with path.open("rb") as file:
        found = list(pieces(file))
    assert max(map(len, found)) <= 2 << 20
    assert found[-1].endswith(b"end\n")
    assert [line.number for line in lines(text_of(piece) for piece in found)][-1] == 2
