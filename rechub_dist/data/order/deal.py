"""How the rows of lanes are dealt, like cards: pure arithmetic.

Round after round, each lane gives one row, in the order of the lanes. Not all are there from the beginning: 8 are (or
an eighth, of more than 64), and after each `lag` rounds as many join as are there, so that the first batch waits for 8
row groups and not for one of each lane. As all have equally many rows, those that were first end first. The lanes that
are there are spread evenly, so that a rank, whose part of a batch is contiguous, has its share of them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]

FIRST_LANES = 8


class Deal:
    """A deal of `rows` rows from `lanes` lanes.

    Attributes:
        sizes: rows of each lane, int64 [lanes].
        begins: the round in which each lane joins, int64 [lanes].
    """

    def __init__(self, rows: int, lanes: int, lag: int) -> None:
        lane = np.arange(lanes)
        self.sizes: IntArray = rows // lanes + (lane < rows % lanes)
        self.begins: IntArray = _stages(lanes) * lag
        end = self.begins + self.sizes
        # between two of these rounds, the lanes that are there are the same
        self._rounds = np.unique(np.concatenate([self.begins, end]))
        there = (self.begins <= self._rounds[:, np.newaxis]) & (self._rounds[:, np.newaxis] < end)
        self._lanes: IntArray = there.sum(axis=1)
        self._before = np.where(there, there.cumsum(axis=1) - 1, lanes)  # lanes that give before each in a round
        dealt = np.cumsum(self._lanes[:-1] * np.diff(self._rounds))
        self._dealt = np.concatenate([np.zeros(1, np.int64), dealt])

    def given(self, rows: int) -> IntArray:
        """Rows that each lane has given when `rows` rows are dealt, int64 [lanes]."""
        part = int(self._dealt.searchsorted(rows, side="right")) - 1
        rounds, rest = divmod(rows - int(self._dealt[part]), max(1, int(self._lanes[part])))
        given: IntArray = np.clip(self._rounds[part] + rounds - self.begins, 0, self.sizes) + (
            self._before[part] < rest
        )
        return given

    def settled(self) -> tuple[int, int]:
        """The rows that are dealt while most lanes are there: the place of the first, and that behind the last."""
        part = int(self._lanes.argmax())
        return int(self._dealt[part]), int(self._dealt[min(part + 1, len(self._dealt) - 1)])

    def place(self, lane: IntArray, row: IntArray) -> IntArray:
        """The place in the deal of each lane's row `row`, int64."""
        rounds = self.begins[lane] + row
        part = self._rounds.searchsorted(rounds, side="right") - 1
        place: IntArray = (
            self._dealt[part] + (rounds - self._rounds[part]) * self._lanes[part] + self._before[part, lane]
        )
        return place


def longest_lag(rows: int, lanes: int) -> int:
    """The lag with which all lanes have joined after an eighth of the rounds that a lane is there."""
    last = int(_stages(lanes).max())
    return rows // (8 * lanes * last) if last else 0


def _stages(lanes: int) -> IntArray:
    """For each lane, after how many lags it joins: lanes in an order of which any beginning is spread evenly.

    That is the order of their numbers with the bits reversed.
    """
    bits = (lanes - 1).bit_length()
    numbers = np.arange(1 << bits)
    reverse = np.zeros_like(numbers)
    for bit in range(bits):
        reverse |= (numbers >> bit & 1) << (bits - 1 - bit)
    stages = np.empty(lanes, np.int64)
    # 0 for the first 8, 1 for the 8 after them, 2 for the next 16, ...
    stages[reverse[reverse < lanes]] = np.frexp(np.arange(lanes) // max(FIRST_LANES, lanes // 8))[1]
    return stages
