from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rechub_dist.data import negatives
from rechub_dist.data.columns.hashing import hash_ids, mix64, name_salt
from rechub_dist.data.negatives import Draw, catalogue_share, draw_weighted, row_keys
from rechub_dist.features import NegativeFeature, Table


def flat(rows: list[list[int]]) -> tuple[Any, Any]:
    return np.array([i for row in rows for i in row], np.int64), np.array([len(row) for row in rows], np.int64)


def feature(rows: int, **settings: Any) -> NegativeFeature:
    return NegativeFeature("negative", Table("item", rows), like="like", **settings)


def draw_negatives(feature: NegativeFeature, like: Any, exclude: Any, draw: Draw) -> Any:
    return negatives.draw_negatives(feature, like, exclude, row_keys(draw, feature.name, len(like)))


def test_splitmix64_is_the_published_one() -> None:
    # the first outputs of the reference generator with seed 1234567
    state = (1234567 + np.arange(3, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)).astype(np.uint64)
    assert mix64(state).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_hashes_are_fixed_for_good() -> None:
    # a change of these numbers would break every trained table of hashed ids
    ids = np.array([0, 1, -1, 2**40], np.int64)
    assert hash_ids(ids, "user", 1000).tolist() == [643, 728, 456, 883]
    assert hash_ids(ids.astype(np.int64), "item", 1000).tolist() != hash_ids(ids, "user", 1000).tolist()
    assert hash_ids(np.array([1], np.int8), "user", 1000)[0] == hash_ids(ids, "user", 1000)[1]
    assert hash_ids(np.array([-1], np.int8), "user", 1000)[0] == hash_ids(ids, "user", 1000)[2]
    assert name_salt("user") == name_salt("user") != name_salt("item")


def test_hashes_are_even() -> None:
    counts = np.bincount(hash_ids(np.arange(50_000), "user", 50), minlength=50)
    assert ((counts - 1000) ** 2 / 1000).sum() < 86  # chi-squared, 49 degrees of freedom, p = 0.001


histories = st.lists(st.lists(st.integers(0, 7), max_size=6), min_size=1, max_size=12)


@settings(max_examples=100, deadline=None)
@given(
    like=histories, data=st.data(), count=st.integers(1, 3), seed=st.integers(0, 2**40), position=st.integers(0, 2**40)
)
def test_draws_belong_to_their_rows(
    *, like: list[list[int]], data: st.DataObject, count: int, seed: int, position: int
) -> None:
    """Any cut of the rows gives the same draws; none is excluded; all are in the table."""
    other = [[data.draw(st.integers(0, 9))] for _ in like]
    negative = feature(9, count=count, exclude=("like", "other"))
    for row, more in zip(like, other, strict=True):
        more[:] = more if len({*row, *more}) < 9 else []

    def draw(a: int, b: int) -> list[int]:
        excluded = [flat(like[a:b]), flat(other[a:b])]
        return draw_negatives(negative, flat(like[a:b])[1], excluded, Draw(seed, 1, position + a)).tolist()

    whole = draw(0, len(like))
    cut = data.draw(st.integers(0, len(like)))
    assert draw(0, cut) + draw(cut, len(like)) == whole
    assert len(whole) == count * sum(map(len, like))
    rest = iter(whole)
    for row, more in zip(like, other, strict=True):
        ids = [next(rest) for _ in range(count * len(row))]
        assert all(0 <= i < 9 for i in ids)
        assert not {*ids} & {*row, *more}


def test_draws_are_uniform_over_what_is_left() -> None:
    rows = [[3, 0, 3, 6]] * 3000
    ids = draw_negatives(feature(8, exclude=("like",)), flat(rows)[1], [flat(rows)], Draw(0, 0, 0))
    counts = np.bincount(ids, minlength=8)
    assert counts[[0, 3, 6]].tolist() == [0, 0, 0]
    left = counts[[1, 2, 4, 5, 7]]
    assert ((left - 2400) ** 2 / 2400).sum() < 18.5  # chi-squared, 4 degrees of freedom, p = 0.001


def test_without_exclusions() -> None:
    ids = draw_negatives(feature(5), np.full(5000, 2), [], Draw(3, 0, 0))
    assert ((np.bincount(ids, minlength=5) - 2000) ** 2 / 2000).sum() < 18.5
    assert draw_negatives(feature(5), np.zeros(0, np.int64), [], Draw(3, 0, 0)).tolist() == []


def test_draws_depend_on_seed_epoch_position_and_name() -> None:
    ones = np.ones(50, np.int64)
    negative = feature(1000)
    draws = [draw_negatives(negative, ones, [], Draw(*key)).tolist() for key in ((0, 0, 0), (1, 0, 0), (0, 1, 0))]
    other = NegativeFeature("other", negative.table, like="like")
    draws.append(draw_negatives(other, ones, [], Draw(0, 0, 0)).tolist())
    assert all(len(set(a) & set(b)) < 20 and a != b for i, a in enumerate(draws) for b in draws[:i])
    assert draw_negatives(negative, ones, [], Draw(0, 0, 1)).tolist()[:-1] == draws[0][1:]


def test_one_id_left_is_found() -> None:
    rows = [[i for i in range(1000) if i != left] for left in (0, 17, 999)]
    like = np.array([2, 1, 1])
    assert draw_negatives(feature(1000, exclude=("like",)), like, [flat(rows)], Draw(0, 0, 0)).tolist() == [
        0,
        0,
        17,
        999,
    ]


def test_a_row_that_holds_the_whole_table_is_drawn_from_all_of_it() -> None:
    negative = feature(3, count=3000, exclude=("like",))
    rows = [[1], [0, 1, 2], [2], [2, 1, 0, 0]]
    drawn = draw_negatives(negative, np.array([1, 1, 0, 1]), [flat(rows)], Draw(0, 0, 0)).reshape(3, -1)
    assert set(drawn[0]) == {0, 2}
    for row in drawn[1:]:
        assert np.abs(np.bincount(row, minlength=3) - 1000).max() < 150
    alone = draw_negatives(negative, np.array([1]), [flat(rows[:1])], Draw(0, 0, 0))
    assert drawn[0].tolist() == alone.tolist()  # the others' draws do not change


def test_weighted_draws_follow_their_weights() -> None:
    weights = np.array([0.0, 3.0, 1.0, 0.0, 4.0, 0.0])
    counts = np.full(4000, 5)
    ids = draw_weighted(np.cumsum(weights), counts, row_keys(Draw(3, 0, 0), "n", len(counts)))
    assert len(ids) == 20_000
    share = np.bincount(ids, minlength=6) / len(ids)
    np.testing.assert_allclose(share, weights / 8, atol=0.015)
    assert not share[weights == 0].any()
    # a row's draws are its own: later rows drawn alone are the same
    later = draw_weighted(np.cumsum(weights), counts[1000:], row_keys(Draw(3, 0, 1000), "n", 3000))
    assert np.array_equal(later, ids[5000:])


@pytest.mark.parametrize(("items", "rows"), [(10, 3), (3, 10), (7, 7), (1000, 64), (5, 1)])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_catalogue_is_dealt_once_over_a_batch(items: int, rows: int, ranks: int) -> None:
    cuts = [rows * r // ranks for r in range(ranks + 1)]
    shares = [catalogue_share(items, Draw(0, 0, 0, a, rows), b - a) for a, b in itertools.pairwise(cuts)]
    assert np.concatenate([ids for ids, _ in shares]).tolist() == list(range(items))
    lengths = np.concatenate([lengths for _, lengths in shares])
    assert len(lengths) == rows
    assert lengths.sum() == items
    assert lengths.max() - lengths.min() <= 1
