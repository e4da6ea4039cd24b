"""Batches that are read ahead: in order, as many as are wanted, and no more of them at once than it says."""

from __future__ import annotations

import threading
import time

import pytest

pytest.importorskip("torch")

import torch
from xflux_trainer.ahead import Ahead
from xflux_trainer.order import Order, buckets_of

CPU = torch.device("cpu")


def test_in_order_and_never_more_than_the_depth() -> None:
    begun: list[int] = []

    def make(number: int) -> int:
        begun.append(number)
        time.sleep(0.02 if number % 3 else 0.05)  # they end in another order than they begin
        return number * number

    ahead = Ahead(make, iter(range(5, 50, 5)), CPU, depth=3)
    taken: list[int] = []
    for number in range(5, 50, 5):
        assert set(begun) <= set(range(5, 5 * (len(taken) + 4) + 1, 5))
        taken.append(ahead.take())
        assert taken[-1] == number * number
    with pytest.raises(StopIteration):
        ahead.take()
    ahead.close()
    assert sorted(begun) == list(range(5, 50, 5))


def test_a_slow_disk_is_waited_for_once() -> None:
    """Each batch takes three steps' time, and four are on their way."""
    ahead = Ahead(lambda _: time.sleep(0.06), iter(range(20)), CPU)
    waits = []
    for _ in range(20):
        asked = time.perf_counter()
        ahead.take()
        waits.append(time.perf_counter() - asked)
        time.sleep(0.02)
    ahead.close()
    assert sum(waits[1:]) < 0.5 * 19 * 0.06  # one thread would make every step wait for 40 ms


def test_what_fails_fails_in_its_turn_and_closing_ends_the_threads() -> None:
    def make(number: int) -> int:
        if number == 2:
            raise ValueError("two")
        return number

    ahead = Ahead(make, iter(range(100)), CPU)
    assert [ahead.take(), ahead.take()] == [0, 1]
    with pytest.raises(ValueError, match="two"):
        ahead.take()
    assert ahead.take() == 3
    ahead.close()
    assert not any(thread.name.startswith("ahead") for thread in threading.enumerate())


def test_the_order_is_the_same_from_several_threads() -> None:
    """Around the end of an epoch they ask for either, and get what one thread alone would."""
    buckets = buckets_of([(16, 8, 8 + k % 3) for k in range(50)])
    alone = [Order(buckets, 4, 7)[number] for number in range(60)]
    shared = Order(buckets, 4, 7)
    ahead = Ahead(shared.__getitem__, iter(range(60)), CPU, depth=8)
    assert [ahead.take() for _ in range(60)] == alone
    ahead.close()
    assert len(shared._epochs) <= 2
