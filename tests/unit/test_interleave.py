"""Interleaving in closed form, against the same done round by round."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rechub_dist.data.order.epoch import RowOrder
from rechub_dist.data.order.interleave import Interleave, longest_lag


def simulated(interleave: Interleave) -> list[tuple[int, int]]:
    """(stream, row) in the interleaved order, from the sizes and starts alone."""
    rows = []
    for number in range(int((interleave.starts + interleave.sizes).max())):
        for stream, (start, size) in enumerate(zip(interleave.starts.tolist(), interleave.sizes.tolist(), strict=True)):
            if start <= number < start + size:
                rows.append((stream, number - start))
    return rows


@settings(max_examples=200, deadline=None)
@given(rows=st.integers(0, 600), streams=st.integers(1, 40), lag=st.integers(0, 12))
def test_round_by_round(rows: int, streams: int, lag: int) -> None:
    interleave = Interleave(rows, streams, lag)
    order = simulated(interleave)
    assert len(order) == int(interleave.sizes.sum()) == rows
    assert interleave.sizes.max() - interleave.sizes.min() <= 1
    if order:
        stream, row = map(np.array, zip(*order, strict=True))
        assert interleave.place(stream, row).tolist() == list(range(rows))
    for count in range(rows + 1):
        given_rows = np.bincount([stream for stream, _ in order[:count]], minlength=streams)
        assert interleave.given(count).tolist() == given_rows.tolist()


@pytest.mark.parametrize("streams", [1, 5, 8, 9, 16, 24, 64, 100, 256])
def test_ramp_up_begins_with_8_streams_and_doubles(streams: int) -> None:
    interleave = Interleave(1_000_000, streams, 10)
    started = [int((interleave.starts <= at).sum()) for at in range(0, 10 * 7, 10)]
    assert started == [min(streams, max(8, streams // 8) << stage) for stage in range(7)]
    for at in range(
        0, 10 * 7, 10
    ):  # each half of the streams has half of those that are active, each quarter a quarter
        active = np.flatnonzero(interleave.starts <= at)
        for parts in (2, 4, 8):
            if streams % parts == 0 and streams & (streams - 1) == 0:
                assert len(set(np.bincount(active * parts // streams, minlength=parts).tolist())) == 1


def test_the_ramp_up_ends_after_an_eighth_of_the_rounds() -> None:
    for rows in (0, 100, 5_000, 10**6):
        for streams in (1, 8, 16, 64, 256):
            interleave = Interleave(rows, streams, longest_lag(rows, streams))
            assert interleave.starts.max() <= rows / streams / 8
            first, end = interleave.settled()
            assert 0 <= first <= end <= rows
            assert end - first >= 0.7 * rows - streams


def test_the_first_batch_waits_for_8_row_groups() -> None:
    for ranks in (1, 2, 8):
        epoch = RowOrder([65_536] * 2000, 8192).epoch(0)
        for rank in range(ranks):
            assert len(epoch.share(0, rank, ranks).slices) == 8 // ranks
    assert len(epoch.share(200).slices) == 64
