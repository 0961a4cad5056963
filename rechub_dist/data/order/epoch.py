"""Which row comes when: pure arithmetic over the sizes of row groups, without I/O.

The row groups, permuted by (seed, epoch), form one sequence of N rows, which is cut into L contiguous *streams* of
`N // L + (l < N % L)` rows. The global batches interleave their rows (see `Interleave`). A stream's *windows* are the
pieces of row groups that it holds: whole row groups, except where a stream's boundary cuts one. The rows of a window
are permuted by (seed, epoch, window). Within a global batch the rows are in stream order, and a rank takes a
contiguous slice of it.

With row groups of equal size all streams can reach their next windows at once, which would take twice the memory at
that step, and leave the reader nothing to do in between. Where this happens each stream gets a *phase*: it begins in
the middle of a row group, and reads what comes before that point at its end.

L and the permutations never depend on the world size, so neither do the rows of a global batch nor their order. All
permutations come from the raw 64-bit output of PCG64, seeded by SeedSequence; numpy guarantees that both stay the same
across versions and platforms (`Generator.permutation` has no such guarantee).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rechub_dist.config.data import MAX_STREAMS, SHUFFLE_ROWS
from rechub_dist.data.order.interleave import FIRST_STREAMS, Interleave, longest_lag

IntArray = NDArray[np.int64]

# Version of the order of rows, in which checkpoints have a position, and of draws and hashes: to be raised with every
# change of these, which golden hashes guard (tests/golden/order-<version>.json).
ORDER_VERSION = 4

_MANY_GROUPS = 32  # per stream: then decoding one more hardly matters
_GROUPS, _ROWS = 0, 1  # the purpose of a permutation, a part of its seed


class ShuffleWindow(NamedTuple):
    """A piece of a row group: the unit that is read, permuted and kept open.

    Attributes:
        group: index of the row group in the manifest.
        start, stop: its rows within the row group.
        stream: the stream that it belongs to.
        first_step, last_step: the steps of the epoch whose global batches have its first and its last row.
    """

    group: int
    start: int
    stop: int
    stream: int
    first_step: int
    last_step: int


class ShuffleWindows(NamedTuple):
    """All windows of an epoch, each field as in `ShuffleWindow`: int64 [windows]."""

    group: IntArray
    start: IntArray
    stop: IntArray
    stream: IntArray
    first_step: IntArray
    last_step: IntArray


class Slice(NamedTuple):
    """Rows `start` .. `stop - 1` of the window with index `window`, in its permuted order."""

    window: int
    start: int
    stop: int


class Share(NamedTuple):
    """One rank's share of a global batch.

    Attributes:
        slices: the rank's rows in order; empty for a rank without rows.
        rows: their number.
        stride: ceil(total / world_size), the number of rows to pad to, equal on all ranks.
        position: the position in the epoch of the rank's first row: step * batch_size + first.
        first: the index of that row in the global batch.
        total: the number of rows of the global batch.
    """

    slices: list[Slice]
    rows: int
    stride: int
    position: int
    first: int
    total: int


def check_share(step: int, steps: int, rank: int, world_size: int) -> None:
    """Raise IndexError if `step` or `rank` is out of range."""
    if not 0 <= step < steps:
        raise IndexError(f"step {step} is outside 0..{steps - 1}")
    if not 0 <= rank < world_size:
        raise IndexError(f"rank {rank} is outside a world of {world_size}")


def rank_rows(n: int, rank: int, world_size: int) -> tuple[int, int]:
    """The first of rank `rank`'s rows among n, and their number; the ranks' numbers differ by one at most."""
    return rank * (n // world_size) + min(rank, n % world_size), n // world_size + (rank < n % world_size)


def permutation(n: int, *seed: int) -> IntArray:
    """A random permutation of 0 .. n - 1, int64 [n]; a function of `seed` (non-negative integers) on all platforms."""
    bits = max(1, int(n - 1).bit_length())
    words = np.random.PCG64(np.random.SeedSequence(seed)).random_raw(n)
    # the index is in the low bits: one plain sort, without ties whose order would depend on the algorithm
    mask = np.uint64((1 << bits) - 1)
    words &= ~mask
    words |= np.arange(n, dtype=np.uint64)
    words.sort()
    words &= mask
    return words.view(np.int64)


def stream_count(counts: Sequence[int], shuffle_rows: int = SHUFFLE_ROWS, max_streams: int = MAX_STREAMS) -> int:
    """The number of streams, a power of two.

    At most `max_streams`, one per non-empty row group, and as many of the largest row groups as have `shuffle_rows`
    rows; at least 1.
    """
    sizes = [count for count in counts if count]
    most = min(max_streams, len(sizes), shuffle_rows // max(sizes, default=1))
    return int(1 << (most.bit_length() - 1)) if most > 0 else 1


class RowOrder:
    """The order of the rows of a data set in global batches of `batch_size`.

    Args:
        counts: rows of each row group, in the manifest's order; may be 0.
        batch_size: rows of a global batch; the last one of an epoch has the rest.
        shuffle: False keeps the stored order (with one stream).
        seed: of the permutations.
        shuffle_rows: bound on the rows in open windows over all ranks.
        max_streams: bound on the number of streams. If there are more ranks, they share streams, and decode them more
            than once.
        streams: overrides the number of streams. For an unshuffled pass in which the order of rows does not matter, a
            multiple of the world size lets each rank read its own row groups rather than a part of each.
        drop_last: leave out the last batch of an epoch if it is short; with shuffling, different rows in each epoch.

    Attributes:
        total: rows of the data set.
        rows: rows of an epoch's batches.
        steps: batches of an epoch.
        streams: number of streams.

    Raises:
        ValueError: a batch size or number of streams below 1, or a negative seed.
    """

    def __init__(
        self,
        counts: Sequence[int],
        batch_size: int,
        *,
        shuffle: bool = True,
        seed: int = 0,
        shuffle_rows: int = SHUFFLE_ROWS,
        max_streams: int = MAX_STREAMS,
        streams: int | None = None,
        drop_last: bool = False,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, must be at least 1")
        if seed < 0:
            raise ValueError(f"seed is {seed}, must not be negative")
        if streams is not None and streams < 1:
            raise ValueError(f"streams is {streams}, must be at least 1")
        self.counts: IntArray = np.asarray(counts, dtype=np.int64).reshape(-1)
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.total = int(self.counts.sum())
        self.steps = self.total // batch_size if drop_last else -(-self.total // batch_size)
        self.rows = min(self.total, self.steps * batch_size)
        self.streams = streams or (stream_count(self.counts.tolist(), shuffle_rows, max_streams) if shuffle else 1)
        self.interleave = Interleave(self.total, self.streams, self._lag() if shuffle else 0)
        # Whether streams that reach their next windows at once get phases: where without they would hold more than the
        # bound and a quarter, or where the extra decoding is cheap.
        self.phased = shuffle and (
            2 * self.streams * int(self.counts.max(initial=0)) > shuffle_rows + shuffle_rows // 4
            or np.count_nonzero(self.counts) >= _MANY_GROUPS * self.streams
        )

    def _lag(self) -> int:
        """Rounds between two stages of the ramp-up: time enough to open the next row groups.

        A stage begins between two batches where possible, so that ranks need not share streams.
        """
        even = -(-self.batch_size // FIRST_STREAMS)
        lag = min(self.batch_size, longest_lag(self.total, self.streams))
        return lag // even * even or lag

    def batch_rows(self, step: int) -> int:
        """Number of rows of global batch `step`."""
        return min(self.batch_size, self.rows - step * self.batch_size)

    def rows_before(self, epoch: int, step: int) -> int:
        """Number of rows of all global batches before `step` of `epoch`."""
        return epoch * self.rows + min(self.rows, step * self.batch_size)

    def epoch(self, epoch: int) -> EpochOrder:
        """The order of epoch `epoch`, from 0. Raises ValueError for a negative one."""
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
        self._stream_sizes = order.interleave.sizes
        self._stream_starts = np.cumsum(self._stream_sizes) - self._stream_sizes
        bounds = np.concatenate([np.zeros(1, np.int64), np.cumsum(order.counts[groups])])
        self._lay_out(groups, bounds, np.zeros(order.streams, np.int64))
        if order.phased and self._crowded():
            self._lay_out(groups, bounds, self._phases(bounds))

    def _lay_out(self, groups: IntArray, bounds: IntArray, phases: IntArray) -> None:
        """Cut the sequence of `groups`, which begin at `bounds`, into windows, in the order of reading.

        Stream l begins with its row `phases[l]`, and wraps around from its last row to its first.
        """
        N, stream_starts = self.order.total, self._stream_starts
        # windows in the order of the sequence: cut at the boundaries of row groups and streams, and at the phases
        cuts = np.unique(np.concatenate([bounds, stream_starts, stream_starts + phases]))
        starts = cuts[:-1]
        # streams without rows share their start with the next one: side="right" gives the last, which holds the rows
        # (unless it starts at N, past all windows)
        stream = np.searchsorted(stream_starts, starts, side="right") - 1
        # and in the order of reading, in which a stream has the same places, its rows rotated by its phase
        read = stream_starts[stream] + (starts - stream_starts[stream] - phases[stream]) % self._stream_sizes[stream]
        by_reading = np.argsort(read)
        starts, self._stream, read = starts[by_reading], stream[by_reading], read[by_reading]
        self._cuts = np.append(read, N)
        place = np.searchsorted(bounds, starts, side="right") - 1
        self._group = groups[place] if N else groups
        self._offset = starts - bounds[place]
        first, last = read - stream_starts[self._stream], self._cuts[1:] - 1 - stream_starts[self._stream]
        self._first_step = self.order.interleave.place(self._stream, first) // self.order.batch_size
        self._last_step = self.order.interleave.place(self._stream, last) // self.order.batch_size
        beginnings = np.flatnonzero(first == 0)
        self._beginnings = beginnings[np.argsort(self._first_step[beginnings], kind="stable")]

    def _crowded(self) -> bool:
        """Whether more than streams // 4 + 1 streams change windows within an eighth of a window's duration."""
        later = np.delete(self._first_step, self._beginnings)
        span = max(1, int(self._last_step.max(initial=0)) * self.order.streams // max(1, self.windows) // 8)
        return len(later) > 0 and int(np.bincount(later // span).max()) > self.order.streams // 4 + 1

    def _phases(self, bounds: IntArray) -> IntArray:
        """The row that each stream begins with, so that streams change windows at different times, int64 [L].

        It lies within the stream's first whole row group; the fractions of it that are left are multiples of the golden
        ratio, any consecutive of which are well spread: a rank reads neighbouring streams.
        """
        ends = self._stream_starts + self._stream_sizes
        first = np.minimum(np.searchsorted(bounds, self._stream_starts), len(bounds) - 2)
        begin, size = bounds[first], bounds[first + 1] - bounds[first]
        golden = np.arange(self.order.streams, dtype=np.int64) * 40503 % 65536  # 65536 / 1.618
        left = (golden * (size - 1) // 65536 - self.order.interleave.starts) % np.maximum(size, 1)
        phase = begin - self._stream_starts + size - 1 - left
        # a stream that is just that row group never changes windows
        return np.where((begin >= self._stream_starts) & (begin + size <= ends) & (size < self._stream_sizes), phase, 0)

    @property
    def windows(self) -> int:
        """Number of windows of the epoch."""
        return len(self._cuts) - 1

    def all_windows(self) -> ShuffleWindows:
        """All windows, by index."""
        stop = self._offset + np.diff(self._cuts)
        return ShuffleWindows(self._group, self._offset, stop, self._stream, self._first_step, self._last_step)

    def following(self, index: int) -> int | None:
        """The window after window `index` in its stream, by index; None if no batch needs another."""
        after = index + 1
        if after == self.windows or self._stream[after] != self._stream[index]:
            return None
        return after if self._first_step[after] < self.order.steps else None

    def ramp_up(self, step: int) -> list[int]:
        """The first windows, by index, of the streams that start after `step`, soonest first."""
        later = np.searchsorted(self._first_step[self._beginnings], step, side="right")
        return [int(index) for index in self._beginnings[later:] if self._first_step[index] < self.order.steps]

    def window(self, index: int) -> ShuffleWindow:
        """The window with index `index`; those of a stream are numbered consecutively, in the order of use."""
        start = int(self._offset[index])
        return ShuffleWindow(
            group=int(self._group[index]),
            start=start,
            stop=start + int(self._cuts[index + 1] - self._cuts[index]),
            stream=int(self._stream[index]),
            first_step=int(self._first_step[index]),
            last_step=int(self._last_step[index]),
        )

    def permutation(self, index: int) -> IntArray | None:
        """The permutation of the rows of window `index`, int64 [rows of the window]; None for the stored order."""
        if not self.order.shuffle:
            return None
        rows = int(self._cuts[index + 1] - self._cuts[index])
        return permutation(rows, self.order.seed, _ROWS, self.epoch, index)

    def share(self, step: int, rank: int = 0, world_size: int = 1) -> Share:
        """The rows of rank `rank` of `world_size` in global batch `step`.

        Of n rows rank r gets n // world_size + (r < n % world_size), in the order of the batch.

        Raises:
            IndexError: `step` or `rank` is out of range.
        """
        order = self.order
        check_share(step, order.steps, rank, world_size)
        n = order.batch_rows(step)
        low, rows = rank_rows(n, rank, world_size)
        slices = self.slices(step, low, low + rows) if rows else []
        return Share(slices, rows, -(-n // world_size), step * order.batch_size + low, low, n)

    def slices(self, step: int, low: int, high: int) -> list[Slice]:
        """Rows low .. high - 1 of global batch `step`; at least one."""
        begin, n = step * self.order.batch_size, self.order.batch_rows(step)
        if self.order.streams == 1:
            return self._pieces(begin + low, begin + high)
        given = self.order.interleave.given(begin)
        takes = self.order.interleave.given(begin + n) - given
        ends = np.cumsum(takes)
        streams = slice(np.searchsorted(ends, low, side="right"), np.searchsorted(ends, high, side="left") + 1)
        ends, begins = ends[streams], (ends - takes)[streams]
        base = self._stream_starts[streams] + given[streams] - begins
        start, stop = base + np.maximum(begins, low), base + np.minimum(ends, high)
        first = np.searchsorted(self._cuts, start, side="right") - 1
        if ((stop <= self._cuts[first + 1]) & (start < stop)).all():  # the usual case: no stream changes windows
            cuts = self._cuts[first]
            return list(map(Slice, first.tolist(), (start - cuts).tolist(), (stop - cuts).tolist()))
        places = zip(start.tolist(), stop.tolist(), strict=True)
        return [piece for a, b in places if a < b for piece in self._pieces(a, b)]

    def _pieces(self, start: int, stop: int) -> list[Slice]:
        """Rows start .. stop - 1 in the order of reading; at least one."""
        first = int(self._cuts.searchsorted(start, side="right")) - 1
        last = int(self._cuts.searchsorted(stop, side="left")) - 1
        pieces = []
        for window in range(first, last + 1):
            cut, end = int(self._cuts[window]), int(self._cuts[window + 1])
            pieces.append(Slice(window, max(start, cut) - cut, min(stop, end) - cut))
        return pieces
