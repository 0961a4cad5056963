"""Ids made in collate: hashed crosses, time-gap buckets, and the weights of ids."""

from __future__ import annotations

import datetime
from itertools import product
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_windows import fails

from rechub_dist.data.collate import assemble
from rechub_dist.data.columns.fit import column_names
from rechub_dist.data.columns.hashing import mix64, name_salt
from rechub_dist.data.columns.window import open_window
from rechub_dist.data.negatives import Draw
from rechub_dist.data.spec import BatchSpec
from rechub_dist.features import CrossFeature, SequenceFeature, SparseFeature, Table, TimeGapFeature
from rechub_tests.batches import batch_of, lists

USER, TAG, SHOP = Table("user", 1000), Table("tag", 50), Table("shop", 9)
user, shop = SparseFeature("user", USER), SparseFeature("shop", SHOP)
tags = SparseFeature("tags", TAG, pooling="mean")
RAGGED = st.lists(st.lists(st.integers(0, 49), max_size=4), min_size=1, max_size=8)


def spec_of(cross: CrossFeature) -> BatchSpec:
    return BatchSpec(features=(cross, *cross.inputs), collections={"c": (cross.name,)})


def bucket(cross: CrossFeature, *ids: int) -> int:
    """The hash of a combination, one word at a time."""
    word = np.array([name_salt(cross.name)])
    for i in ids:
        word = mix64(word ^ np.uint64(i))
    return int(word[0] % np.uint64(cross.buckets))


@settings(max_examples=60, deadline=None)
@given(RAGGED, st.booleans(), st.data())
def test_crosses_are_all_combinations_of_a_row(rows: list[list[int]], shuffled: bool, data: st.DataObject) -> None:
    n = len(rows)
    users = data.draw(st.lists(st.integers(0, 999), min_size=n, max_size=n))
    more = data.draw(st.lists(st.lists(st.integers(0, 8), max_size=3), min_size=n, max_size=n))
    shops = SparseFeature("shops", SHOP)
    cross = CrossFeature("x", (user, tags, shops), 1 << 20)
    table = pa.table(
        {"user": users, "tags": pa.array(rows, pa.list_(pa.int64())), "shops": pa.array(more, pa.list_(pa.int64()))}
    )
    order = np.random.default_rng(0).permutation(n) if shuffled else np.arange(n)
    found = lists(batch_of(table, spec_of(cross), order if shuffled else None), "x")
    assert found == [[bucket(cross, users[i], *pair) for pair in product(rows[i], more[i])] for i in order]


def test_a_cross_of_single_ids_is_flat() -> None:
    cross = CrossFeature("x", (user, shop), 77)
    table = pa.table({"user": [5, 999, 5], "shop": [0, 8, 1]})
    window = open_window(table, spec_of(cross), np.array([2, 0, 1]), "a.parquet")
    assert "x" in window.flat
    batch = assemble(spec_of(cross), [(window, 1, 3)], 4, Draw(0, 0, 0))
    assert lists(batch, "x") == [[bucket(cross, 5, 0)], [bucket(cross, 999, 8)], [], []]
    assert batch.feature("x").values().dtype == torch.int64


def test_crosses_scatter_and_depend_on_order_and_name() -> None:
    grid = [(a, b) for a in range(100) for b in range(9)]
    table = pa.table({"user": [a for a, _ in grid], "shop": [b for _, b in grid]})

    def ids(cross: CrossFeature) -> list[int]:
        return [row[0] for row in lists(batch_of(table, spec_of(cross)), cross.name)]

    plain = ids(CrossFeature("x", (user, shop), 1 << 30))
    assert len(set(plain)) == len(grid)
    assert plain != ids(CrossFeature("y", (user, shop), 1 << 30))
    assert plain != ids(CrossFeature("x", (shop, user), 1 << 30))
    small = np.bincount(ids(CrossFeature("x", (user, shop), 10)), minlength=10)
    assert small.min() > 60  # 90 expected in each
    assert small.max() < 125


def test_a_cross_where_an_input_has_no_id_is_empty() -> None:
    dropping = SparseFeature("user", USER, out_of_range="drop")
    cross = CrossFeature("x", (dropping, shop), 77)
    table = pa.table({"user": [5, 5000, 7], "shop": [0, 8, 1]})
    assert lists(batch_of(table, spec_of(cross)), "x") == [[bucket(cross, 5, 0)], [], [bucket(cross, 7, 1)]]


def test_crosses_of_slices_and_of_no_rows() -> None:
    cross = CrossFeature("x", (user, tags), 77)
    spec = spec_of(cross)
    table = pa.table({"user": [1, 2, 3], "tags": [[4], [], [5, 6]]})
    window = open_window(table, spec, None, "a.parquet")
    batch = assemble(spec, [(window, 2, 3), (window, 0, 2)], 3, Draw(0, 0, 0))
    assert lists(batch, "x") == [[bucket(cross, 3, 5), bucket(cross, 3, 6)], [bucket(cross, 1, 4)], []]
    assert lists(assemble(spec, [], 2, Draw(0, 0, 0)), "x") == [[], []]


def test_wrong_crosses() -> None:
    with pytest.raises(ValueError, match=r"'x': inputs are \['user'\], must be two or more different"):
        CrossFeature("x", (user,), 10)
    with pytest.raises(ValueError, match="must be two or more different features"):
        CrossFeature("x", (user, shop, user), 10)
    with pytest.raises(ValueError, match="rows is 0"):
        CrossFeature("x", (user, shop), 0)


# --- time gaps

GAP = TimeGapFeature("gap", times="then", now="time", boundaries=(1, 60, 3600), max_length=3)
history = SequenceFeature("history", TAG, max_length=3)


def gaps(then: pa.Array, now: pa.Array, feature: TimeGapFeature = GAP, permutation: Any = None) -> list[list[int]]:
    spec = BatchSpec(features=(feature,), collections={"c": (feature.name,)})
    return lists(batch_of(pa.table({"then": then, "time": now}), spec, permutation), feature.name)


def test_time_gaps_are_counted_boundaries() -> None:
    then = pa.array([[100, 41, 99], [], [0, 40, 99, 100]])
    assert gaps(then, pa.array([100, 5, 3700])) == [[0, 1, 1], [], [3, 3, 3]]
    assert gaps(then, pa.array([100, 5, 3700]), permutation=np.array([2, 0, 1])) == [[3, 3, 3], [0, 1, 1], []]
    first = TimeGapFeature("gap", "then", "time", (1, 60, 3600), max_length=2, keep="first")
    assert gaps(then, pa.array([101.5, 5.0, 3700.0]), first) == [[1, 2], [], [3, 3]]


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
def test_timestamps_count_in_seconds(unit: str) -> None:
    start = datetime.datetime(2022, 4, 25, tzinfo=datetime.UTC)
    then = [[start, start + datetime.timedelta(seconds=59)]]
    now = pa.array([start + datetime.timedelta(seconds=60)], pa.timestamp(unit, "UTC"))
    assert gaps(pa.array(then, pa.list_(pa.timestamp(unit, "UTC"))), now) == [[2, 1]]


def test_bad_times() -> None:
    spec = BatchSpec(features=(GAP,), collections={"c": ("gap",)})
    assert column_names(spec) == ["then", "time"]
    fails(
        spec,
        "column 'then': 1 time(s) are later than their row's in column 'time', which would leak the future; cut the "
        "histories at the row's time",
        then=[[5, 7]],
        time=[6],
    )
    fails(spec, "column 'then': 1 time(s) are missing (null); fill them in", then=[[None, 7]], time=[8])
    fails(
        spec, "column 'time': 1 time(s) are missing (null); fill them in", then=[[7]], time=pa.array([None], pa.int8())
    )
    stamp = pa.array([0], pa.timestamp("s"))
    fails(
        spec,
        "column 'time' is timestamp[s], but time gap feature 'gap' needs the type of the elements of column 'then', "
        "int64",
        then=[[7]],
        time=stamp,
    )
    fails(
        spec,
        "column 'then' is int64, but time gap feature 'gap' needs a list of numbers or timestamps",
        then=[7],
        time=[8],
    )


def test_time_gaps_are_in_step_with_the_history() -> None:
    spec = BatchSpec(features=(history, GAP), collections={"c": ("history", "gap")}, aligned=(("history", "gap"),))
    batch_of(pa.table({"history": [[1, 2, 3, 4]], "then": [[1, 2, 3, 4]], "time": [9]}), spec)
    fails(
        spec,
        "columns 'history' and 'then' have 2 and 1 ids in one row; behaviours of a row must have equal lengths (with "
        "the same max_length, keep and no drop)",
        history=[[1, 2]],
        then=[[1]],
        time=[9],
    )


@pytest.mark.parametrize("boundaries", [(), (3, 1), (2, 2)])
def test_boundaries_must_ascend(boundaries: Any) -> None:
    with pytest.raises(ValueError, match=r"'gap': boundaries are .* must be ascending"):
        TimeGapFeature("gap", "then", "time", boundaries, max_length=3)


# --- weights of ids

weighted = SparseFeature("tags", TAG, weights="share", pooling="mean", out_of_range="drop")
SPEC = BatchSpec(features=(weighted, user), collections={"weighted": ("user", "tags"), "other": ("user",)})


def test_weights_follow_their_ids() -> None:
    table = pa.table(
        {"tags": [[1, 99, 2], [], [3, 4]], "share": [[0.5, 9, 0], [], [1, 2.5]], "user": [7, 8, 9]},
        schema=pa.schema({"tags": pa.list_(pa.int64()), "share": pa.list_(pa.float64()), "user": pa.int64()}),
    )
    window = open_window(table, SPEC, np.array([2, 0, 1]), "a.parquet")
    batch = assemble(SPEC, [(window, 1, 3), (window, 0, 1)], 4, Draw(0, 0, 0))
    assert lists(batch, "tags") == [[1, 2], [], [3, 4], []]
    assert batch.id_weights["tags"].tolist() == [0.5, 0, 1, 2.5]
    assert batch.jagged["weighted"].weights().tolist() == [1, 1, 1, 0.5, 0, 1, 2.5]
    assert batch.jagged["other"].weights_or_none() is None
    assert batch.jagged["weighted"]["tags"].weights().tolist() == [0.5, 0, 1, 2.5]
    empty = assemble(SPEC, [], 2, Draw(0, 0, 0))
    assert empty.jagged["weighted"].weights().shape == (0,)


def test_weights_of_single_ids() -> None:
    table = pa.table({"tags": [1, 99, 2], "share": [1, 2, 3], "user": [7, 8, 9]})
    batch = batch_of(table, SPEC)
    assert lists(batch, "tags") == [[1], [], [2]]
    assert batch.id_weights["tags"].tolist() == [1, 3]


def test_bad_weights() -> None:
    spec = BatchSpec(features=(weighted,), collections={"weighted": ("tags",)})
    fails(
        spec,
        "column 'share': a row has 1 weights for 2 ids in column 'tags'; give one per id",
        tags=[[1], [1, 2]],
        share=[[1.0], [1.0]],
    )
    fails(
        spec,
        "column 'share': weight -1.0 in 1 row(s); a weight must be finite and not negative; use 0 for none",
        tags=[[1], [2]],
        share=[[1.0], [-1.0]],
    )
    fails(
        spec,
        "column 'share' is double, but the weight column of feature 'tags' needs a list of numbers",
        tags=[[1]],
        share=[1.0],
    )
