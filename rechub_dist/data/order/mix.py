"""The order of rows of a mix of several sources: pure arithmetic, as in `epoch`.

A global batch has a fixed number of rows of each source, those of the first source first, and each source has its own
order of rows. So the run's batch g has, of a source whose pass has S steps, batch `g % S` of its pass `g // S`. An
epoch is a pass over that source, of those that are not repeated, whose pass is shortest; the others continue in the
next epoch where they are. The rows of a batch do not depend on the world size.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from rechub_dist.config.data import MAX_STREAMS, SHUFFLE_ROWS
from rechub_dist.data.order.epoch import (
    EpochOrder,
    IntArray,
    RowOrder,
    Share,
    ShuffleWindow,
    Slice,
    check_share,
    rank_rows,
)

_SEEDS = 1 << 40  # difference between the seeds of two sources


class Mix(NamedTuple):
    """How the row groups of a manifest are mixed.

    Attributes:
        groups: number of row groups of each source, in the manifest's order.
        weights: of each source, which its rows in a batch are in proportion to.
        repeat: whether a source is repeated as often as needed, instead of limiting the epoch.
    """

    groups: tuple[int, ...]
    weights: tuple[float, ...]
    repeat: tuple[bool, ...]


def quotas(batch_size: int, weights: Sequence[float]) -> list[int]:
    """The number of rows of each source in a batch: in proportion to the weights, by the largest-remainder method."""
    exact = [batch_size * weight / sum(weights) for weight in weights]
    found = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda s: (found[s] - exact[s], s))
    for source in by_remainder[: batch_size - sum(found)]:
        found[source] += 1
    return found


class MixOrder:
    """The order of the rows of several sources in global batches; with the interface of `RowOrder`.

    Args:
        counts: rows of each row group of all sources.
        batch_size: rows of a global batch; fewer where a source is at the last batch of its pass.
        mix: the sources.
        shuffle, seed, shuffle_rows, max_streams, drop_last: see `RowOrder`; a source gets its share of `shuffle_rows`.

    Attributes:
        sources: the order of each source.
        rows: rows of the first epoch's batches; other epochs may differ, see `rows_before`.
        steps: batches of an epoch.
        streams: number of streams of all sources.

    Raises:
        ValueError: as `RowOrder`; a source with so little weight that a batch has no row of it, or with too few rows
            for one batch; or all sources are repeated.
    """

    def __init__(
        self,
        counts: Sequence[int],
        batch_size: int,
        mix: Mix,
        *,
        shuffle: bool = True,
        seed: int = 0,
        shuffle_rows: int = SHUFFLE_ROWS,
        max_streams: int = MAX_STREAMS,
        drop_last: bool = False,
    ) -> None:
        self.batch_size = batch_size
        self.seed = seed
        self.first_groups = [sum(mix.groups[:s]) for s in range(len(mix.groups))]
        self.sources = []
        for number, quota in enumerate(quotas(batch_size, mix.weights)):
            if not quota:
                raise ValueError(f"the weight {mix.weights[number]} of source {number} gives it no row of a batch")
            order = RowOrder(
                counts[self.first_groups[number] :][: mix.groups[number]],
                quota,
                shuffle=shuffle,
                seed=seed + number * _SEEDS,
                shuffle_rows=max(1, shuffle_rows * quota // batch_size),
                max_streams=max_streams,
                drop_last=drop_last,
            )
            if not order.steps:
                raise ValueError(f"source {number} has {order.total} rows, but gives {quota} to a batch")
            self.sources.append(order)
        passes = [order.steps for order, repeated in zip(self.sources, mix.repeat, strict=True) if not repeated]
        if not passes:
            raise ValueError("all sources are repeated: an epoch would have no end")
        self.steps = min(passes)
        self.streams = sum(order.streams for order in self.sources)
        self.rows = self.rows_before(1, 0)

    def rows_before(self, epoch: int, step: int) -> int:
        """Number of rows of all global batches before `step` of `epoch`."""
        batches = epoch * self.steps + step
        return sum(order.rows_before(*divmod(batches, order.steps)) for order in self.sources)

    def epoch(self, epoch: int) -> MixEpoch:
        """The order of epoch `epoch`, from 0. Raises ValueError for a negative one."""
        if epoch < 0:
            raise ValueError(f"epoch is {epoch}, must not be negative")
        return MixEpoch(self, epoch)


class MixEpoch:
    """The order of one epoch of a mix; with the interface of `EpochOrder`.

    The index of a window encodes the source, its pass, and the index of the window in that pass.
    """

    def __init__(self, order: MixOrder, epoch: int) -> None:
        self.order = order
        self.epoch = epoch
        self._begin = epoch * order.steps  # batches of the run before this epoch
        self._stride = max(len(source.counts) + 2 * source.streams + 1 for source in order.sources)
        # for each source its current pass, and one that ends or begins
        self._pass = lru_cache(2 * len(order.sources))(lambda source, number: order.sources[source].epoch(number))

    def share(self, step: int, rank: int = 0, world_size: int = 1) -> Share:
        """The rows of rank `rank` of `world_size` in global batch `step`, as `EpochOrder.share`.

        Raises:
            IndexError: `step` or `rank` is out of range.
        """
        order = self.order
        check_share(step, order.steps, rank, world_size)
        places = [divmod(self._begin + step, source.steps) for source in order.sources]
        sizes = [source.batch_rows(at) for source, (_, at) in zip(order.sources, places, strict=True)]
        n = sum(sizes)
        low, rows = rank_rows(n, rank, world_size)
        slices: list[Slice] = []
        first = 0
        for source, ((number, at), size) in enumerate(zip(places, sizes, strict=True)):
            begin, end = max(low, first) - first, min(low + rows, first + size) - first
            if begin < end:
                base = (number * len(order.sources) + source) * self._stride
                found = self._pass(source, number).slices(at, begin, end)
                slices += [piece._replace(window=base + piece.window) for piece in found]
            first += size
        return Share(slices, rows, -(-n // world_size), step * order.batch_size + low, low, n)

    def window(self, index: int) -> ShuffleWindow:
        """The window with index `index`; its steps may be outside the epoch, as a source's pass may span several."""
        source, number, within, one = self._find(index)
        begin = number * self.order.sources[source].steps - self._begin
        window = one.window(within)
        return window._replace(
            group=self.order.first_groups[source] + window.group,
            first_step=begin + window.first_step,
            last_step=begin + window.last_step,
        )

    def permutation(self, index: int) -> IntArray | None:
        """The permutation of the rows of window `index`, as `EpochOrder.permutation`."""
        _, _, within, one = self._find(index)
        return one.permutation(within)

    def following(self, index: int) -> int | None:
        """The window after window `index` in its stream, by index; None if this epoch and pass need no other."""
        _, _, within, one = self._find(index)
        after = one.following(within)
        if after is None:
            return None
        after += index - within
        return after if self.window(after).first_step < self.order.steps else None

    def ramp_up(self, step: int) -> list[int]:
        """The first windows, by index, of the streams that start after `step` in this epoch and the sources' passes."""
        order = self.order
        found = []
        for source, one in enumerate(order.sources):
            number, at = divmod(self._begin + step, one.steps)
            base = (number * len(order.sources) + source) * self._stride
            found += [base + index for index in self._pass(source, number).ramp_up(at)]
        return [index for index in found if self.window(index).first_step < order.steps]

    def _find(self, index: int) -> tuple[int, int, int, EpochOrder]:
        """The source of a window, the pass's number, the index in the pass, and the order of the pass."""
        place, within = divmod(index, self._stride)
        number, source = divmod(place, len(self.order.sources))
        return source, number, within, self._pass(source, number)
