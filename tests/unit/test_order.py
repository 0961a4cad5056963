from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rechub_dist.data.order.epoch import EpochOrder, RowOrder, permutation, stream_count

WORLDS = (1, 2, 3, 4, 7)
layouts = st.lists(st.integers(0, 40), min_size=1, max_size=12)


def rows_of(epoch: EpochOrder, step: int, rank: int, world: int) -> list[tuple[int, int]]:
    """The (row group, row) pairs of a rank's share."""
    rows: list[tuple[int, int]] = []
    share = epoch.share(step, rank, world)
    for piece in share.slices:
        window = epoch.window(piece.window)
        order = epoch.permutation(piece.window)
        local = np.arange(window.stop - window.start) if order is None else order
        assert 0 <= piece.start < piece.stop <= len(local)
        assert window.first_step <= step <= window.last_step
        rows += [(window.group, window.start + int(i)) for i in local[piece.start : piece.stop]]
    assert len(rows) == share.rows
    return rows


def batches(epoch: EpochOrder, world: int = 1) -> list[list[tuple[int, int]]]:
    return [
        [row for rank in range(world) for row in rows_of(epoch, step, rank, world)] for step in range(epoch.order.steps)
    ]


def stored(counts: list[int]) -> list[tuple[int, int]]:
    return [(group, row) for group, count in enumerate(counts) for row in range(count)]


@settings(max_examples=80, deadline=None)
@given(
    counts=layouts,
    batch_size=st.integers(1, 50),
    shuffle=st.booleans(),
    shuffle_rows=st.integers(1, 400),
    streams=st.none() | st.integers(1, 9),
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 3),
)
def test_each_row_once_and_the_same_batches_for_every_world_size(
    *, counts: list[int], batch_size: int, shuffle: bool, shuffle_rows: int, streams: int | None, seed: int, epoch: int
) -> None:
    order = RowOrder(counts, batch_size, shuffle=shuffle, seed=seed, shuffle_rows=shuffle_rows, streams=streams)
    reference = batches(order.epoch(epoch))
    assert sorted(row for batch in reference for row in batch) == stored(counts)
    assert [len(batch) for batch in reference[:-1]] == [batch_size] * (len(reference) - 1)
    for world in WORLDS[1:]:
        assert batches(order.epoch(epoch), world) == reference


@settings(max_examples=60, deadline=None)
@given(counts=layouts, batch_size=st.integers(1, 50), world=st.sampled_from(WORLDS), seed=st.integers(0, 99))
def test_shares_differ_by_one_row_at_most(counts: list[int], batch_size: int, world: int, seed: int) -> None:
    order = RowOrder(counts, batch_size, seed=seed, shuffle_rows=100)
    epoch = order.epoch(0)
    for step in range(order.steps):
        shares = [epoch.share(step, rank, world) for rank in range(world)]
        n = sum(share.rows for share in shares)
        assert [share.rows for share in shares] == [n // world + (r < n % world) for r in range(world)]
        assert {share.stride for share in shares} == {-(-n // world)}
        before = [sum(s.rows for s in shares[:r]) for r in range(world)]
        assert [share.position for share in shares] == [step * batch_size + b for b in before]


@settings(max_examples=60, deadline=None)
@given(counts=layouts, batch_size=st.integers(1, 50), streams=st.none() | st.integers(1, 9))
def test_windows_know_their_first_and_last_step(counts: list[int], batch_size: int, streams: int | None) -> None:
    epoch = RowOrder(counts, batch_size, shuffle_rows=100, streams=streams).epoch(1)
    used: dict[int, list[int]] = {}
    for step in range(epoch.order.steps):
        for piece in epoch.share(step).slices:
            used.setdefault(piece.window, []).append(step)
    assert sorted(used) == list(range(epoch.windows))
    for index, steps in used.items():
        assert (epoch.window(index).first_step, epoch.window(index).last_step) == (min(steps), max(steps))


@settings(max_examples=40, deadline=None)
@given(counts=layouts, batch_size=st.integers(1, 50))
def test_unshuffled_is_the_stored_order(counts: list[int], batch_size: int) -> None:
    order = RowOrder(counts, batch_size, shuffle=False)
    assert order.streams == 1
    assert [row for batch in batches(order.epoch(0)) for row in batch] == stored(counts)


def test_epochs_and_seeds_differ() -> None:
    counts = [50] * 8
    orders = [batches(RowOrder(counts, 32, seed=seed).epoch(epoch)) for seed, epoch in ((0, 0), (0, 1), (1, 0), (1, 1))]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])
    assert orders[0] == batches(RowOrder(counts, 32, seed=0).epoch(0))
    groups = [[row[0] for batch in order for row in batch] for order in orders]
    assert all(a != b for i, a in enumerate(groups) for b in groups[:i])


def test_rows_of_a_batch_come_from_all_over_the_data() -> None:
    order = RowOrder([100] * 64, 64)
    epoch = order.epoch(0)
    first, end = (rows // 64 for rows in order.interleave.settled())
    assert first <= 10
    assert end >= 90
    for step in range(100):
        groups = {epoch.window(piece.window).group for piece in epoch.share(step).slices}
        assert len(groups) == 64 if first < step < end else len(groups) >= 8


@pytest.mark.parametrize(
    ("counts", "shuffle_rows", "streams"),
    [
        ([100_000] * 1000, 8_000_000, 64),
        ([1_000_000] * 64, 8_000_000, 8),
        ([1_000_000] * 10, 8_000_000, 8),
        ([100] * 7, 8_000_000, 4),
        ([100, 0, 0, 0], 8_000_000, 1),
        ([100] * 10, 50, 1),
        ([], 50, 1),
    ],
)
def test_stream_count(counts: list[int], shuffle_rows: int, streams: int) -> None:
    assert stream_count(counts, shuffle_rows) == streams
    assert RowOrder(counts, 10, shuffle_rows=shuffle_rows).streams == streams


def test_a_rank_opens_only_what_it_needs() -> None:
    counts = [1000] * 64
    for order in (RowOrder(counts, 256), RowOrder(counts, 256, shuffle=False, streams=4)):
        epoch = order.epoch(0)
        opened = [{s.window for step in range(order.steps) for s in epoch.share(step, r, 4).slices} for r in range(4)]
        # while not all streams are active, ranks may share some
        assert all(16 <= len(windows) <= 16 + 6 * order.shuffle for windows in opened)
        assert len(set().union(*opened)) == 64


def peak_rows(epoch: EpochOrder) -> int:
    """Rows in open windows, of all streams, in the step that has most."""
    open_rows = np.zeros(epoch.order.steps + 1, np.int64)
    for window in map(epoch.window, range(epoch.windows)):
        open_rows[window.first_step : window.last_step + 1] += window.stop - window.start
    return int(open_rows.max())


@settings(max_examples=100, deadline=None)
@given(
    groups=st.integers(1, 200),
    size=st.integers(20, 400),
    last=st.integers(1, 400),
    batch_size=st.integers(1, 64),
    shuffle_rows=st.integers(400, 20_000),
    epoch=st.integers(0, 2),
)
def test_open_rows_are_bounded_where_row_groups_are_equal(
    *, groups: int, size: int, last: int, batch_size: int, shuffle_rows: int, epoch: int
) -> None:
    order = RowOrder([size] * groups + [min(size, last)], batch_size, shuffle_rows=shuffle_rows)
    ahead = order.streams // 4 + 1
    assert order.streams * size <= shuffle_rows
    bound = max((order.streams + ahead) * size, shuffle_rows * 5 // 4)
    # the row group that ends within a batch stands beside the next one of its stream until then
    assert peak_rows(order.epoch(epoch)) <= bound + max(batch_size, size)


@pytest.mark.parametrize(
    ("counts", "most"),
    [
        ([1_000_000] * 64, 9_000_000),
        ([100_000] * 1024, 6_500_000),
        ([65_536] * 2048, 65 * 65_536),
        ([100_000] * 1000, 7_200_000),
    ],
)
def test_streams_change_windows_at_different_times(counts: list[int], most: int) -> None:
    order = RowOrder(counts, 8192)
    epoch = order.epoch(0)
    assert order.streams * max(counts) <= 8_000_000
    assert peak_rows(epoch) <= most
    for ranks in (2, 4):  # for each rank too
        streams = order.streams // ranks
        for rank in range(ranks):
            windows = list(map(epoch.window, range(epoch.windows)))
            own = [b for a, b in pairwise(windows) if a.stream == b.stream and b.stream // streams == rank]
            crossings = np.bincount([w.first_step for w in own])
            assert crossings.max() <= max(1, streams // 4)


def test_few_row_groups_are_not_decoded_twice_where_memory_suffices() -> None:
    assert RowOrder([65_536] * 32, 8192).epoch(0).windows == 32
    assert RowOrder([1_000_000] * 32, 8192).epoch(0).windows > 32  # its streams would hold 16 M rows at once


@settings(max_examples=50, deadline=None)
@given(counts=layouts, batch_size=st.integers(1, 50), seed=st.integers(0, 99))
def test_the_last_short_batch_can_be_left_out(counts: list[int], batch_size: int, seed: int) -> None:
    whole = RowOrder(counts, batch_size, seed=seed, shuffle_rows=100)
    order = RowOrder(counts, batch_size, seed=seed, shuffle_rows=100, drop_last=True)
    full = [batch for batch in batches(whole.epoch(0)) if len(batch) == batch_size]
    assert batches(order.epoch(0)) == full
    assert (order.rows, order.total) == (len(full) * batch_size, sum(counts))


def test_permutations_are_fixed_for_good() -> None:
    # a change of these numbers would change the rows of every run that resumes
    assert permutation(8, 1, 2, 3).tolist() == [1, 3, 7, 5, 2, 0, 4, 6]
    assert permutation(0, 1).tolist() == []
    assert permutation(1, 1).tolist() == [0]
    assert batches(RowOrder([2, 3, 1], 4, seed=5, shuffle_rows=6).epoch(1)) == [
        [(1, 2), (1, 1), (2, 0), (0, 1)],
        [(1, 0), (0, 0)],
    ]


def test_permutations_are_uniform() -> None:
    first = np.bincount([permutation(5, seed)[0] for seed in range(5000)], minlength=5)
    assert ((first - 1000) ** 2 / 1000).sum() < 18.5  # chi-squared, 4 degrees of freedom, p = 0.001


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"batch_size": 0}, "batch_size is 0"), ({"seed": -1}, "seed is -1"), ({"streams": 0}, "streams is 0")],
)
def test_refuses_impossible_settings(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RowOrder([10], **{"batch_size": 4, **arguments})
    with pytest.raises(ValueError, match="epoch is -1"):
        RowOrder([10], 4).epoch(-1)
    with pytest.raises(IndexError, match="step 3"):
        RowOrder([10], 4).epoch(0).share(3)
    with pytest.raises(IndexError, match="rank 2"):
        RowOrder([10], 4).epoch(0).share(0, 2, 2)
