"""The deal against one that is played round by round."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rechub_dist.data.order.deal import Deal, longest_lag
from rechub_dist.data.order.epoch import RowOrder


def played(deal: Deal) -> list[tuple[int, int]]:
    """(lane, row) in the order of the deal, from its sizes and beginnings alone."""
    cards = []
    for turn in range(int((deal.begins + deal.sizes).max())):
        for lane, (begin, size) in enumerate(zip(deal.begins.tolist(), deal.sizes.tolist(), strict=True)):
            if begin <= turn < begin + size:
                cards.append((lane, turn - begin))
    return cards


@settings(max_examples=200, deadline=None)
@given(rows=st.integers(0, 600), lanes=st.integers(1, 40), lag=st.integers(0, 12))
def test_round_by_round(rows: int, lanes: int, lag: int) -> None:
    deal = Deal(rows, lanes, lag)
    cards = played(deal)
    assert len(cards) == int(deal.sizes.sum()) == rows
    assert deal.sizes.max() - deal.sizes.min() <= 1
    if cards:
        lane, row = map(np.array, zip(*cards, strict=True))
        assert deal.place(lane, row).tolist() == list(range(rows))
    for dealt in range(rows + 1):
        given_rows = np.bincount([lane for lane, _ in cards[:dealt]], minlength=lanes)
        assert deal.given(dealt).tolist() == given_rows.tolist()


@pytest.mark.parametrize("lanes", [1, 5, 8, 9, 16, 24, 64, 100, 256])
def test_lanes_join_8_at_first_and_then_as_many_as_are_there(lanes: int) -> None:
    deal = Deal(1_000_000, lanes, 10)
    joined = [int((deal.begins <= at).sum()) for at in range(0, 10 * 7, 10)]
    assert joined == [min(lanes, max(8, lanes // 8) << stage) for stage in range(7)]
    for at in range(0, 10 * 7, 10):  # each half of the lanes has half of those that are there, each quarter a quarter
        there = np.flatnonzero(deal.begins <= at)
        for parts in (2, 4, 8):
            if lanes % parts == 0 and lanes & (lanes - 1) == 0:
                assert len(set(np.bincount(there * parts // lanes, minlength=parts).tolist())) == 1


def test_all_have_joined_after_an_eighth_of_the_rounds() -> None:
    for rows in (0, 100, 5_000, 10**6):
        for lanes in (1, 8, 16, 64, 256):
            deal = Deal(rows, lanes, longest_lag(rows, lanes))
            assert deal.begins.max() <= rows / lanes / 8
            first, end = deal.settled()
            assert 0 <= first <= end <= rows
            assert end - first >= 0.7 * rows - lanes


def test_the_first_batch_waits_for_8_row_groups() -> None:
    for ranks in (1, 2, 8):
        epoch = RowOrder([65_536] * 2000, 8192).epoch(0)
        for rank in range(ranks):
            assert len(epoch.share(0, rank, ranks).slices) == 8 // ranks
    assert len(epoch.share(200).slices) == 64
