"""How well the layout of a data set's row groups suits shuffling, and what it costs, from the order of rows alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from rechub_dist.config.data import MAX_STREAMS, SHUFFLE_ROWS
from rechub_dist.data.order.epoch import EpochOrder, IntArray, RowOrder

GOOD_STREAMS = 32  # with fewer, the mean of a batch of sorted data strays well beyond that of a true shuffle
_LITTLE = 1_000_000  # rows, of which any layout is read soon enough
_DECODED_OFTEN = 1.4
_MUCH_BETTER = 1.25
_SAMPLED_ROWS = 500_000
_SAMPLED_RANKS = 8


@dataclass(frozen=True)
class LayoutQuality:
    """Figures of an epoch over a data set.

    Attributes:
        rows, row_groups, largest: of the data set; `largest` is the number of rows of the largest row group.
        streams: number of streams.
        open_share: the largest share of the rows that is open at a time, over all ranks.
        groups_per_batch: row groups of which a batch has rows, on average.
        rank_correlation: Spearman's, between the stored and the read order; 0 for a true shuffle, 1 for the stored
            order.
        amplification: decoded rows / rows. Row groups are decoded whole, by each rank that has rows of them.
        peak_rows: rows in open windows of the rank with the most; up to a quarter more are opened ahead.
    """

    rows: int
    row_groups: int
    largest: int
    streams: int
    open_share: float
    groups_per_batch: float
    rank_correlation: float
    amplification: float
    peak_rows: int


def layout_quality(
    counts: Sequence[int],
    batch_size: int,
    world_size: int = 1,
    *,
    shuffle: bool = True,
    shuffle_rows: int = SHUFFLE_ROWS,
    max_streams: int = MAX_STREAMS,
) -> LayoutQuality:
    """Simulate the first epoch over row groups of these sizes; if there are many batches or ranks, some are sampled.

    Raises:
        ValueError: a batch size or world size below 1, or no rows.
    """
    order = RowOrder(counts, batch_size, shuffle=shuffle, shuffle_rows=shuffle_rows, max_streams=max_streams)
    if world_size < 1 or not order.total:
        raise ValueError(f"{order.total} rows over {world_size} ranks: there must be at least one of each")
    epoch = order.epoch(0)
    windows = epoch.all_windows()
    sizes = windows.stop - windows.start
    sampled = np.unique(np.linspace(0, world_size - 1, _SAMPLED_RANKS).astype(int))
    read = [_windows(epoch, rank, world_size) for rank in sampled.tolist()]
    decoded = [int(order.counts[windows.group[own]].sum()) for own in read]
    groups, correlation = _mixed(epoch)
    return LayoutQuality(
        rows=order.total,
        row_groups=int(np.count_nonzero(order.counts)),
        largest=int(order.counts.max()),
        streams=order.streams,
        open_share=_peak(epoch, sizes, np.arange(epoch.windows)) / order.total,
        groups_per_batch=groups,
        rank_correlation=correlation,
        amplification=float(np.mean(decoded)) * world_size / order.total,
        peak_rows=max(_peak(epoch, sizes, own) for own in read),
    )


def layout_warning(
    path: str,
    counts: Sequence[int],
    batch_size: int,
    world_size: int,
    *,
    shuffle_rows: int = SHUFFLE_ROWS,
    max_streams: int = MAX_STREAMS,
) -> str | None:
    """One line about what is bad in a layout, and much better with other row groups or settings; None if nothing is.

    Args:
        path: of the data, for the line.
        counts, batch_size, world_size, shuffle_rows, max_streams: see `layout_quality`.
    """

    def quality(counts: Sequence[int], shuffle_rows: int = shuffle_rows, streams: int = max_streams) -> LayoutQuality:
        return layout_quality(counts, batch_size, world_size, shuffle_rows=shuffle_rows, max_streams=streams)

    found = quality(counts)
    if found.rows < _LITTLE:
        return None
    size = _suggested(found.rows)
    mended = [size] * (found.rows // size) + [found.rows % size]
    better = quality(mended)
    faults = []
    if found.streams < min(GOOD_STREAMS, better.streams) and found.open_share < 0.5:
        faults.append(f"a batch mixes rows of only {found.groups_per_batch:.0f} row groups")
    if found.amplification >= max(_DECODED_OFTEN, _MUCH_BETTER * better.amplification):
        faults.append(f"{world_size} rank(s) decode each row {found.amplification:.1f} times")
    if not faults and world_size > max_streams:
        # sharing streams is not the layout's fault: it may do well with a stream per rank
        streams = 1 << (world_size - 1).bit_length()
        rows = max(shuffle_rows, streams * found.largest)
        if found.amplification >= max(_DECODED_OFTEN, _MUCH_BETTER * quality(counts, rows, streams).amplification):
            more = f" and data.shuffle_rows: {rows}" if rows > shuffle_rows else ""
            return (
                f"{path}: {world_size} ranks decode each row {found.amplification:.1f} times, as they share "
                f"{found.streams} streams; begin the run with data.max_streams: {streams}{more}"
            )
    if not faults:
        return None
    return (
        f"{path}: {' and '.join(faults)}, as it has {found.row_groups:,} row groups of up to {found.largest:,} rows; "
        f"write it with smaller ones: rechub-dist data rechunk {path} --out FOLDER --row-group-rows {size}"
    )


def _suggested(rows: int) -> int:
    """Suggested rows of a row group, a power of two: few enough for 8 row groups per stream, within 16,384 .. 65,536.

    Smaller row groups are slower to read, column by column.
    """
    return min(65_536, max(16_384, 1 << (rows // (8 * MAX_STREAMS)).bit_length() - 1))


def _windows(epoch: EpochOrder, rank: int, world_size: int) -> IntArray:
    """The indices of the windows that a rank reads, int64."""
    order, windows = epoch.order, epoch.all_windows()

    def met(steps: Iterable[int]) -> list[int]:
        return [piece.window for step in steps for piece in epoch.share(step, rank, world_size).slices]

    # while all streams are active, their places within the batch recur after so many steps
    period = order.streams // math.gcd(order.streams, order.batch_size)
    first, end = order.interleave.settled()
    first, end = -(-first // order.batch_size), min(end // order.batch_size, order.steps)
    if end <= first:
        return np.unique(np.array(met(range(order.steps)), np.int64))
    streams = np.unique(windows.stream[met(range(first, min(first + period, end)))])
    settled = np.isin(windows.stream, streams) & (windows.last_step >= first) & (windows.first_step < end)
    others = met(chain(range(first), range(end, order.steps)))
    return np.union1d(np.flatnonzero(settled), np.array(others, np.int64))


def _peak(epoch: EpochOrder, sizes: IntArray, own: IntArray) -> int:
    """The largest number of rows of these windows that are open at a step."""
    windows = epoch.all_windows()
    change = np.zeros(epoch.order.steps + 1, np.int64)
    np.add.at(change, windows.first_step[own], sizes[own])
    np.add.at(change, windows.last_step[own] + 1, -sizes[own])
    return int(np.cumsum(change).max())


def _mixed(epoch: EpochOrder) -> tuple[float, float]:
    """Row groups per batch, and the rank correlation of stored and read order, from sampled batches."""
    order, windows = epoch.order, epoch.all_windows()
    steps = np.unique(np.linspace(0, order.steps - 1, max(2, min(64, _SAMPLED_ROWS // order.batch_size))).astype(int))
    begins = np.concatenate([np.zeros(1, np.int64), np.cumsum(order.counts)])
    random = np.random.default_rng(0)
    stored: list[IntArray] = []
    groups = []
    for step in steps.tolist():
        slices = epoch.share(step).slices
        groups.append(len({int(windows.group[piece.window]) for piece in slices}))
        for window, start, stop in slices:
            first = begins[windows.group[window]] + windows.start[window]
            size = int(windows.stop[window] - windows.start[window])
            # random rows of the window stand for those of its permutation, which takes long to compute
            within = random.integers(size, size=stop - start) if order.shuffle else np.arange(start, stop)
            stored.append(first + within)
    places = np.concatenate(stored)
    ranks = np.argsort(np.argsort(places, kind="stable"), kind="stable")
    correlation = np.corrcoef(ranks, np.arange(len(ranks)))[0, 1] if len(ranks) > 1 else 1.0
    return float(np.mean(groups)), float(correlation)
