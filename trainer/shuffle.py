"""`random.Random.shuffle`, with the same result bit for bit, several times as fast and in a quarter of the memory."""

from __future__ import annotations

import random
from array import array

import numpy as np
from numpy.typing import NDArray

_CHUNK = 1 << 16
"""Numbers that are drawn at once."""


class Shuffler:
    """Takes over where a `random.Random` stands, which is not to be used any more.

    Python draws below n as so many bits as n has, again and again until the number is below n; the bits are the upper
    ones of the Mersenne Twister's next 32 (CPython's `_randbelow_with_getrandbits`, alike from 3.2 on).
    """

    def __init__(self, dice: random.Random) -> None:
        *key, place = dice.getstate()[1]
        self._twister = np.random.MT19937()
        self._twister.state = {
            "bit_generator": "MT19937", "state": {"key": np.array(key, np.uint32), "pos": place},
        }  # fmt: skip
        self._drawn: NDArray[np.uint32] = np.zeros(0, np.uint32)

    def shuffle(self, items: array[int]) -> None:
        """In place."""
        left = len(items)
        while left > 1:
            bits = left.bit_length()
            lowest = 1 << bits - 1  # below it numbers of fewer bits are drawn
            used = 0
            for number in (self._ahead(min(2 * (left - lowest) + 8, _CHUNK)) >> np.uint32(32 - bits)).tolist():
                used += 1
                if number < left:
                    left -= 1
                    items[left], items[number] = items[number], items[left]
                    if left < lowest:
                        break
            self._drawn = self._drawn[used:]

    def _ahead(self, count: int) -> NDArray[np.uint32]:
        if len(self._drawn) < count:
            more = self._twister.random_raw(_CHUNK).astype(np.uint32)
            self._drawn = np.concatenate([self._drawn, more])
        return self._drawn[:count]
