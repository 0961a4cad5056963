"""How the rows of several streams are interleaved: pure arithmetic.

Round robin: in each round every active stream gives one row, in the order of the streams. At the start only 8 are
active (an eighth, of more than 64), and every `lag` rounds their number doubles, so that the first batch waits for 8
row groups instead of one per stream. This is the ramp-up. All streams have equally many rows, so those that started
first end first. The active ones are always spread evenly, so that a rank, whose part of a batch is contiguous, has its
share of them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]

FIRST_STREAMS = 8


class Interleave:
    """The interleaving of `rows` rows from `streams` streams, with `lag` rounds between two stages of the ramp-up.

    Attributes:
        sizes: rows of each stream, int64 [streams].
        starts: the round in which each stream starts, int64 [streams].
    """

    def __init__(self, rows: int, streams: int, lag: int) -> None:
        stream = np.arange(streams)
        self.sizes: IntArray = rows // streams + (stream < rows % streams)
        self.starts: IntArray = _stages(streams) * lag
        end = self.starts + self.sizes
        # between two of these rounds the same streams are active
        self._rounds = np.unique(np.concatenate([self.starts, end]))
        active = (self.starts <= self._rounds[:, np.newaxis]) & (self._rounds[:, np.newaxis] < end)
        self._active: IntArray = active.sum(axis=1)
        # active streams that come before each one in a round
        self._before = np.where(active, active.cumsum(axis=1) - 1, streams)
        given = np.cumsum(self._active[:-1] * np.diff(self._rounds))
        self._given = np.concatenate([np.zeros(1, np.int64), given])  # rows before each of the rounds

    def given(self, rows: int) -> IntArray:
        """How many of the first `rows` rows come from each stream, int64 [streams]."""
        part = int(self._given.searchsorted(rows, side="right")) - 1
        rounds, rest = divmod(rows - int(self._given[part]), max(1, int(self._active[part])))
        given: IntArray = np.clip(self._rounds[part] + rounds - self.starts, 0, self.sizes) + (
            self._before[part] < rest
        )
        return given

    def settled(self) -> tuple[int, int]:
        """The rows that are given while most streams are active: index of the first, and of the one after the last."""
        part = int(self._active.argmax())
        return int(self._given[part]), int(self._given[min(part + 1, len(self._given) - 1)])

    def place(self, stream: IntArray, row: IntArray) -> IntArray:
        """The index in the interleaved order of row `row` of stream `stream`, elementwise, int64."""
        rounds = self.starts[stream] + row
        part = self._rounds.searchsorted(rounds, side="right") - 1
        place: IntArray = (
            self._given[part] + (rounds - self._rounds[part]) * self._active[part] + self._before[part, stream]
        )
        return place


def longest_lag(rows: int, streams: int) -> int:
    """The lag with which the ramp-up takes an eighth of the rounds of a stream."""
    last = int(_stages(streams).max())
    return rows // (8 * streams * last) if last else 0


def _stages(streams: int) -> IntArray:
    """The stage of the ramp-up, from 0, in which each stream starts, int64 [streams].

    They start in the bit-reversed order of their numbers, so that those that are active are spread evenly.
    """
    bits = (streams - 1).bit_length()
    numbers = np.arange(1 << bits)
    reverse = np.zeros_like(numbers)
    for bit in range(bits):
        reverse |= (numbers >> bit & 1) << (bits - 1 - bit)
    stages = np.empty(streams, np.int64)
    # 0 for the first 8, 1 for the 8 after them, 2 for the next 16, ...
    stages[reverse[reverse < streams]] = np.frexp(np.arange(streams) // max(FIRST_STREAMS, streams // 8))[1]
    return stages
