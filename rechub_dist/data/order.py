"""Which row comes when: pure arithmetic over the sizes of row groups, without I/O.

The row groups, permuted by (seed, epoch), form one virtual stream, which is cut into L contiguous *lanes* of
`N // L + (l < N % L)` rows. Rows are dealt to the global batches like cards: the k-th row of the deal comes from lane
`k % L`, and is that lane's row `k // L`. A lane's *windows* are the pieces of row groups that it holds, whole row
groups but for those that a lane's boundary cuts; the rows of a window are permuted by (seed, epoch, window). Within a
global batch the rows stand in lane order, and a rank takes a contiguous slice of it.

L and the permutations never depend on the world size, so neither do the rows of a global batch nor their order. All
permutations come from the raw 64-bit stream of PCG64, seeded by SeedSequence, both of which numpy guarantees to stay
the same over versions and platforms (`Generator.permutation` has no such guarantee).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]

MAX_LANES = 64
SHUFFLE_ROWS = 8_000_000
_GROUPS, _ROWS = 0, 1  # what a permutation is for: the last word but one of its seed


class Window(NamedTuple):
    """A piece of one row group, the unit that is read, permuted and kept open.

    Attributes:
        group: index of the row group in the manifest's order.
        start, stop: its rows within the row group.
        lane: the lane that it belongs to.
        first_step, last_step: the steps whose global batches take its first and its last row.
    """

    group: int
    start: int
    stop: int
    lane: int
    first_step: int
    last_step: int


class Slice(NamedTuple):
    """Rows `start` .. `stop - 1` of window `window`, counted after the window's permutation."""

    window: int
    start: int
    stop: int


class Share(NamedTuple):
    """One rank's share of a global batch.

    Attributes:
        slices: the rank's rows in order; empty for a rank without rows.
        rows: how many they are.
        stride: ceil(n / W), the number of rows to pad to, equal on all ranks.
        position: the position in the epoch of the rank's first row: step * batch_size + its index in the batch.
    """

    slices: list[Slice]
    rows: int
    stride: int
    position: int


def permutation(n: int, *seed: int) -> IntArray:
    """A random order of 0 .. n - 1, int64 [n], the same for the same `seed` (non-negative integers) everywhere."""
    bits = max(1, int(n - 1).bit_length())
    words = np.random.PCG64(np.random.SeedSequence(seed)).random_raw(n)
    # the index rides in the low bits: one plain sort, and no ties whose order would depend on the sorting algorithm
    mask = np.uint64((1 << bits) - 1)
    words &= ~mask
    words |= np.arange(n, dtype=np.uint64)
    words.sort()
    words &= mask
    return words.view(np.int64)


def lane_count(counts: Sequence[int], shuffle_rows: int = SHUFFLE_ROWS) -> int:
    """The number of lanes: the largest power of two within 64, the row groups, and `shuffle_rows` // largest group."""
    sizes = [count for count in counts if count]
    most = min(MAX_LANES, len(sizes), shuffle_rows // max(sizes, default=1))
    return int(1 << (most.bit_length() - 1)) if most > 0 else 1


class RowOrder:
    """The order of the rows of a data set in global batches of `batch_size`.

    Args:
        counts: rows of each row group, in the manifest's order; empty row groups are fine.
        batch_size: rows of a global batch; the last one of an epoch holds what is left.
        shuffle: False keeps the stored order (with one lane).
        seed: of the permutations.
        shuffle_rows: bound on the rows that stand in open windows over all ranks.
        lanes: overrides the number of lanes. For an unshuffled pass where the order of rows is of no matter, a
            multiple of the world size lets each rank read its own row groups instead of a part of every one.

    Raises:
        ValueError: for a batch size or number of lanes below 1, or a negative seed.
    """

    def __init__(
        self,
        counts: Sequence[int],
        batch_size: int,
        *,
        shuffle: bool = True,
        seed: int = 0,
        shuffle_rows: int = SHUFFLE_ROWS,
        lanes: int | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, must be at least 1")
        if seed < 0:
            raise ValueError(f"seed is {seed}, must not be negative")
        if lanes is not None and lanes < 1:
            raise ValueError(f"lanes is {lanes}, must be at least 1")
        self.counts: IntArray = np.asarray(counts, dtype=np.int64).reshape(-1)
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.rows = int(self.counts.sum())
        self.steps = -(-self.rows // batch_size)
        self.lanes = lanes or (lane_count(self.counts.tolist(), shuffle_rows) if shuffle else 1)

    def epoch(self, epoch: int) -> EpochOrder:
        """The order of one epoch. Raises ValueError for a negative one."""
        if epoch < 0:
            raise ValueError(f"epoch is {epoch}, must not be negative")
        return EpochOrder(self, epoch)


class EpochOrder:
    """The order of one epoch: its windows, and each rank's share of each global batch."""

    def __init__(self, order: RowOrder, epoch: int) -> None:
        self.order = order
        self.epoch = epoch
        groups = np.flatnonzero(order.counts)
        if order.shuffle:
            groups = groups[permutation(len(groups), order.seed, _GROUPS, epoch)]
        L, N = order.lanes, order.rows
        lane = np.arange(L, dtype=np.int64)
        self._lane_starts = lane * (N // L) + np.minimum(lane, N % L)
        bounds = np.concatenate([np.zeros(1, np.int64), np.cumsum(order.counts[groups])])
        # windows by their place in the virtual stream: cut at every row group's and every lane's boundary
        self._cuts = np.unique(np.concatenate([bounds, self._lane_starts]))
        starts, stops = self._cuts[:-1], self._cuts[1:]
        place = np.searchsorted(bounds, starts, side="right") - 1
        self._group = groups[place] if N else groups
        self._offset = starts - bounds[place]
        # lanes without rows share their start with the next one: side="right" gives the last, which holds the rows
        # (lanes without rows are the last of all, and start at N, beyond every window)
        self._lane = np.searchsorted(self._lane_starts, starts, side="right") - 1
        first, last = starts - self._lane_starts[self._lane], stops - 1 - self._lane_starts[self._lane]
        self._first_step = (first * L + self._lane) // order.batch_size
        self._last_step = (last * L + self._lane) // order.batch_size

    @cached_property
    def windows(self) -> int:
        """How many windows the epoch has."""
        return len(self._cuts) - 1

    def window(self, index: int) -> Window:
        """Window `index`; those of a lane are numbered consecutively, in the order of use."""
        start = int(self._offset[index])
        return Window(
            group=int(self._group[index]),
            start=start,
            stop=start + int(self._cuts[index + 1] - self._cuts[index]),
            lane=int(self._lane[index]),
            first_step=int(self._first_step[index]),
            last_step=int(self._last_step[index]),
        )

    def permutation(self, index: int) -> IntArray | None:
        """The order in which window `index` gives its rows, int64 [rows of the window]; None for the stored one."""
        if not self.order.shuffle:
            return None
        rows = int(self._cuts[index + 1] - self._cuts[index])
        return permutation(rows, self.order.seed, _ROWS, self.epoch, index)

    def share(self, step: int, rank: int = 0, world_size: int = 1) -> Share:
        """The rows of rank `rank` of `world_size` in global batch `step`.

        Rank r gets n // W + (r < n % W) of the n rows, so that sizes differ by one at most.

        Raises:
            IndexError: where `step` or `rank` is outside its range.
        """
        order = self.order
        if not 0 <= step < order.steps:
            raise IndexError(f"step {step} is outside 0..{order.steps - 1}")
        if not 0 <= rank < world_size:
            raise IndexError(f"rank {rank} is outside a world of {world_size}")
        begin = step * order.batch_size
        n = min(order.batch_size, order.rows - begin)
        low = rank * (n // world_size) + min(rank, n % world_size)
        rows = n // world_size + (rank < n % world_size)
        slices = self._slices(begin, n, low, low + rows) if rows else []
        return Share(slices, rows, -(-n // world_size), begin + low)

    def _slices(self, begin: int, n: int, low: int, high: int) -> list[Slice]:
        """Rows low .. high - 1 of the batch of n rows that begins with row `begin` of the deal."""
        given = self._given(begin)
        takes = self._given(begin + n) - given
        ends = np.cumsum(takes)
        lanes = slice(np.searchsorted(ends, low, side="right"), np.searchsorted(ends, high, side="left") + 1)
        ends, begins = ends[lanes], (ends - takes)[lanes]
        base = self._lane_starts[lanes] + given[lanes] - begins
        start, stop = base + np.maximum(begins, low), base + np.minimum(ends, high)
        first = np.searchsorted(self._cuts, start, side="right") - 1
        last = np.searchsorted(self._cuts, stop, side="left") - 1
        if ((first == last) & (start < stop)).all():  # the usual case: no lane crosses to its next window
            cuts = self._cuts[first]
            return list(map(Slice, first.tolist(), (start - cuts).tolist(), (stop - cuts).tolist()))
        slices: list[Slice] = []
        for a, b, i, j in zip(start.tolist(), stop.tolist(), first.tolist(), last.tolist(), strict=True):
            for window in range(i, j + 1) if a < b else ():
                cut, end = int(self._cuts[window]), int(self._cuts[window + 1])
                slices.append(Slice(window, max(a, cut) - cut, min(b, end) - cut))
        return slices

    def _given(self, rows: int) -> IntArray:
        """Rows that each lane has given when `rows` rows are dealt, int64 [L]."""
        lane = np.arange(self.order.lanes, dtype=np.int64)
        return rows // self.order.lanes + (lane < rows % self.order.lanes)
