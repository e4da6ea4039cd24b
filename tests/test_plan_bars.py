"""The plans as bars in a terminal: each term has its group, no line is too long, a bar says what its verdict says."""

from __future__ import annotations

from pathlib import Path

import click
import pytest
from conftest import GIB
from picture_kit import Planned, planned, trainer_names, xflux_names

from xflux_doctor.matrix import Matrix
from xflux_doctor.plans import Card, Row
from xflux_doctor.report import groups
from xflux_doctor.report.bars import lines

JOBS = {
    "free": {"free": 70, "gradient_checkpointing": False},
    "tight": {"gpu": "A card:26.5"},
    "small": {"gpu": "RTX 4090:24"},
    "far too small": {"gpu": "RTX 3050:8"},
    "finetune": {"gpu": "A100:40", "mode": "finetune", "train_batch_size": 4},
    "no card": {"card": None},
    "known card": {"card": "H200", "gradient_checkpointing": False},
}
WIDTHS = (60, 61, 79, 80, 81, 100, 137, 200)


@pytest.fixture(scope="module", params=JOBS)
def job(request: pytest.FixtureRequest, matrix: Matrix) -> Planned:
    return planned(matrix, **JOBS[request.param])


def drawn(job: Planned, width: int, encoding: str | None = "utf-8") -> list[str]:
    return [click.unstyle(line) for line in lines(job.rows, job.cards, job.chosen, width=width, encoding=encoding)]


def bars(text: list[str], rows: list[Row]) -> list[str]:
    """Of each row the line below its name."""
    return text[2 : 2 + 2 * len(rows) : 2]


def test_every_name_of_every_bill_is_in_a_group(matrix: Matrix, tmp_path: Path) -> None:
    made = trainer_names() | xflux_names(matrix, tmp_path)
    assert {name for name in made if groups.place_of(name) is None} == set()
    # And no group lists a name that no bill makes any more.
    listed = {name for group in groups.GROUPS for name in group.terms}
    whole = {groups._PART.sub("", name) for name in made}
    assert listed - whole == set()
    assert len(listed) == sum(len(group.terms) for group in groups.GROUPS)


def test_an_unknown_name_goes_to_the_rest() -> None:
    found = groups.sizes({"transformer": 100, "something new": 50}, 7, 3)
    assert found == (100, 0, 0, 50, 3, 7) and groups.place_of("something new") is None
    assert groups.place_of("optimizer states and fp32 weights, 1/8 of them") == 1


def test_groups_sum_up_to_what_the_card_shows(job: Planned) -> None:
    for row in job.rows:
        assert sum(groups.sizes(row.terms, row.context, row.reserve)) == row.device


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1", None, "no such encoding"])
def test_no_line_is_longer_than_the_width(job: Planned, width: int, encoding: str | None) -> None:
    text = drawn(job, width, encoding)
    assert max(map(len, text)) <= width
    assert text == [line.rstrip() for line in text]
    if encoding != "utf-8":
        assert "".join(text).isascii()
    assert drawn(job, 20, encoding) == drawn(job, 60, encoding) and drawn(job, 999) == drawn(job, 200)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(("encoding", "limit", "cut"), [("utf-8", "│", "▶"), ("ascii", "|", ">")])
def test_a_bar_crosses_the_limit_where_the_plan_does_not_fit(
    job: Planned, width: int, encoding: str, limit: str, cut: str
) -> None:
    for row, line in zip(job.rows, bars(drawn(job, width, encoding), job.rows), strict=True):
        word = row.verdict(job.cards)
        assert f"{row.device / GIB:.1f} GiB" in line and line.endswith(word or "GiB")
        if word is None:
            assert limit not in line
            continue
        after = line.split(limit, 1)[1]
        assert (after[0] not in " ┆:") == (word == "does not fit"), line
        reach = groups.scale(
            (row.device for row in job.rows), min(card.limit for card in job.cards), job.cards[0].total
        )
        assert (cut in line) == (row.device > reach)


def test_the_longest_bar_is_as_long_as_the_picture_or_cut(matrix: Matrix) -> None:
    card = planned(matrix, gpu="RTX 4090:24")
    assert groups.scale((row.device for row in card.rows), 24 * GIB, None) == 36 * GIB
    assert groups.scale([30 * GIB], 24 * GIB, 24 * GIB) == 30 * GIB
    assert groups.scale([30 * GIB], 70 * GIB, 79 * GIB) == 79 * GIB
    assert groups.scale([30 * GIB], None, None) == 30 * GIB and groups.scale([], None, None) == 1
    assert any("▶" in line for line in drawn(card, 100)) and not any("▶" in line for line in drawn(
        planned(matrix, card="H200"), 100))  # fmt: skip


def test_segments_are_as_long_as_their_share(matrix: Matrix) -> None:
    """To the nearest cell, of all that stand before the numbers."""
    job = planned(matrix, card="H200", gradient_checkpointing=False)
    row, line = job.rows[0], bars(drawn(job, 200), job.rows)[0]
    cells = line.index(f" {row.device / GIB:>5.1f} GiB") - len("  │┆")
    reach = max(card.total or 0 for card in job.cards)
    for fill, size in zip("█▓▒", groups.sizes(row.terms, row.context, row.reserve), strict=False):
        assert abs(line.count(fill) - cells * size / reach) <= 1, fill


def test_the_words_of_a_plan_stay_when_its_name_is_cut(matrix: Matrix) -> None:
    job = planned(matrix, gpu="RTX 4090:24")
    names = drawn(job, 60)[1 : 1 + 2 * len(job.rows) : 2]
    assert [name.endswith("(lossy)") for name in names] == [row.lossy for row in job.rows]
    assert any("…" in name for name in names)
    kept = planned(matrix, free=70)
    assert "▸ 1024 px, keeping every activation (chosen)" in drawn(kept, 60)
    assert "* 1024 px, keeping every activation (chosen)" in drawn(kept, 60, "ascii")


def test_the_legend_has_the_chosen_plan_s_sizes(matrix: Matrix) -> None:
    job = planned(matrix, free=70)
    assert job.chosen is not None
    legend = " ".join(drawn(job, 100)[-2:])
    for group, size in zip(
        groups.GROUPS, groups.sizes(job.chosen.terms, job.chosen.context, job.chosen.reserve), strict=True
    ):
        assert f"{group.name} {size / GIB:.1f}" in legend
    assert "│ limit 70.0" in legend and "┆ total 79.0" in legend and "▶" not in legend
    assert "on 70.0 of 79.0 GiB of NVIDIA H100 80GB HBM3" in drawn(job, 100)[0]


def test_time_where_it_is_known(matrix: Matrix) -> None:
    timed, unknown = planned(matrix, card="H200"), planned(matrix, gpu="RTX 5090:32")
    assert timed.rows[0].seconds is not None
    assert f"{timed.rows[0].seconds:.2f} s/step" in bars(drawn(timed, 100), timed.rows)[0]
    assert not any("s/step" in line for line in drawn(unknown, 100))


def test_one_color_for_each_segment(matrix: Matrix) -> None:
    job = planned(matrix, free=70)
    colored = list(lines(job.rows, job.cards, job.chosen, width=100))[2]
    assert colored.count("\x1b[34m█") == colored.count("\x1b[34m") == 1 and colored.count("\x1b[36m▒") == 1
    assert colored.index("│") < colored.index("┆")


@pytest.mark.parametrize(
    "name", ["a\rb\x1b[31m", "名" * 80, "x" * 300, "caf\N{LATIN SMALL LETTER E WITH ACUTE}", "\ud800"]
)
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_card_s_name_breaks_nothing(matrix: Matrix, name: str, encoding: str) -> None:
    job = planned(matrix, free=70)
    card = Card(name, 80 * GIB, 70 * GIB)
    first = click.unstyle(next(lines(job.rows, (card,), None, width=60, encoding=encoding)))
    first.encode(encoding)
    assert first.isprintable() and len(first) + first.count("名") <= 60


def test_a_card_with_nothing_free_and_no_plan() -> None:
    row = Row("as it is", {}, {"transformer": 22 * GIB}, GIB // 2)
    text = [click.unstyle(line) for line in lines([row], (Card("H100", 79 * GIB, 0),), None, width=60)]
    assert "does not fit" in text[2] and "█│█" in text[2]
    assert list(lines([], (), None, width=80)) == []
