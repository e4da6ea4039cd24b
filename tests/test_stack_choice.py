"""Which stack is chosen for every driver, Python and card that people rent."""

from __future__ import annotations

import pytest
from conftest import CARDS, machine

from xflux_doctor.choose import choose
from xflux_doctor.matrix import Matrix

DRIVERS = ("525.147.05", "535.183.06", "550.127.05", "560.35.05", "570.26", "570.211.01", "580.159.04", "595.58.03")
PYTHONS = ("3.10.13", "3.11.7", "3.12.3", "3.13.0", "3.14.0")


def expected(driver: str, python: str, card: str | None) -> str | None:
    """The answer by what the stacks' own sources say, written apart from the code under test."""
    minor = int(python.split(".")[1])
    if card is None:
        return "cpu" if minor >= 11 else "xflux-2024"
    major = int(driver.split(".")[0])
    capability = CARDS[card][2]
    if major >= 580 and minor >= 11 and capability >= (7, 5):
        return "cuda13"
    if minor >= 11 and (capability < (10, 0) or major >= 570):
        return "cuda12"
    if minor <= 12 and capability < (10, 0):
        return "xflux-2024"
    return None


@pytest.mark.parametrize("card", [*CARDS, None])
@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("driver", DRIVERS)
def test_table(matrix: Matrix, driver: str, python: str, card: str | None) -> None:
    choice = choose(matrix, machine(matrix, card=card, driver=driver, python=python))
    assert choice.stack == expected(driver, python, card), choice
    if choice.stack is None:
        # one sentence, with a reason for each stack
        assert choice.because.startswith("No stack fits") and choice.because.count(".") >= 1
        assert set(choice.refused) == {stack.name for stack in matrix.stacks}
        assert all(f"{name} {why}" in choice.because for name, why in choice.refused.items())
    else:
        assert choice.stack not in choice.refused and len(choice.refused) == len(matrix.stacks) - 1


def test_cpu_is_never_chosen_beside_gpus_unless_asked(matrix: Matrix) -> None:
    facts = machine(matrix, card="H100", driver="470.82.01", python="3.12.3")
    assert choose(matrix, facts).stack is None
    assert choose(matrix, facts, cpu=True).stack == "cpu"


def test_no_python_fits(matrix: Matrix) -> None:
    choice = choose(matrix, machine(matrix, card=None, python="3.9.18"))
    assert choice.stack is None
    assert "this is 3.9.18" in choice.because


def test_a_driver_out_of_order_is_no_machine_without_gpus(matrix: Matrix) -> None:
    why = "driver and library versions differ (the driver was upgraded without a reboot)"
    facts = machine(matrix, card=None, unknown={"gpus": why, "driver": why})
    choice = choose(matrix, facts)
    assert choice.stack is None and why in choice.because
    assert choose(matrix, facts, cpu=True).stack == "cpu"
