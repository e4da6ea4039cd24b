"""Signals that come while no training runs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from xflux_doctor.between import Between, Stopped

BOTH = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])


@BOTH
def test_what_takes_its_time_ends(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with Between() as between:
        with pytest.raises(Stopped) as stop, between.open():
            os.kill(os.getpid(), number)
            raise AssertionError("it went on")
        assert stop.value.number == between.number == number
        os.kill(os.getpid(), number)  # a second one does not break what cleans up
    assert signal.getsignal(number) is before


@BOTH
def test_one_that_came_before_is_not_lost(number: signal.Signals) -> None:
    """While a training is started, or its end is written down."""
    with Between() as between:
        os.kill(os.getpid(), number)
        assert between.number == number
        with pytest.raises(Stopped), between.open():
            raise AssertionError("it went on")


def test_a_hangup_ends_nothing() -> None:
    said: list[str] = []
    with Between(lambda: said.append("gone")) as between, between.open():
        os.kill(os.getpid(), signal.SIGHUP)
    assert said == ["gone"] and between.number is None


def test_a_third_one_ends_all() -> None:
    code = (
        "import os, signal, time\nfrom xflux_doctor.between import Between\n"
        "with Between():\n    for _ in range(3):\n        os.kill(os.getpid(), signal.SIGTERM)\n    time.sleep(60)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == -signal.SIGTERM
