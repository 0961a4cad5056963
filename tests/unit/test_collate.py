from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rechub_dist.data.collate import assemble
from rechub_dist.data.columns.window import open_window
from rechub_dist.data.spec import BatchSpec
from rechub_dist.features import DenseFeature, Label, NegativeFeature, SequenceFeature, SparseFeature
from rechub_tests.batches import ITEM, NOWHERE, USER, batch_of, lists

SPEC = BatchSpec(
    features=(
        SparseFeature("user", USER),
        SparseFeature("item", ITEM),
        SparseFeature("tags", ITEM),
        SequenceFeature("history", ITEM, max_length=3),
        NegativeFeature("negative", ITEM, like="history", count=2, exclude=("item", "history")),
        SparseFeature("maybe", USER, out_of_range="drop"),
    ),
    dense=(DenseFeature("x"), DenseFeature("v", dim=2)),
    labels=(Label("click"), Label("price", type="regression")),
    weight="w",
    collections={
        "flat": ("item", "user"),
        "one": ("maybe",),
        "mixed": ("item", "tags", "negative", "history", "user"),
        "gap": ("user", "item"),
    },
)
ids = st.integers(0, 9)
rows = st.fixed_dictionaries(
    {
        "user": st.integers(0, 19),
        "item": ids,
        "tags": st.lists(ids, max_size=3),
        "history": st.lists(ids, max_size=5),
        "maybe": st.integers(0, 21),
        "x": st.integers(-9, 9),
        "v": st.lists(st.integers(0, 9), min_size=2, max_size=2),
        "click": st.integers(0, 1),
        "price": st.integers(0, 99),
        "w": st.integers(0, 5),
    }
)
TYPES = pa.schema(
    [
        *[(name, pa.int64()) for name in ("user", "item", "maybe", "click", "w")],
        *[(name, pa.list_(pa.int32())) for name in ("tags", "history")],
        *[(name, pa.float64()) for name in ("x", "price")],
        ("v", pa.list_(pa.float32(), 2)),
    ]
)


@settings(max_examples=60, deadline=None)
@given(
    pieces=st.lists(st.lists(rows, min_size=1, max_size=6), max_size=4),
    data=st.data(),
    padding=st.integers(0, 2),
    shuffle=st.booleans(),
)
def test_batches_equal_the_reference(
    pieces: list[list[dict[str, Any]]], data: st.DataObject, padding: int, shuffle: bool
) -> None:
    parts, expected, reuse = [], [], None
    for piece in pieces:
        order = np.array(data.draw(st.permutations(range(len(piece)))), np.int64) if shuffle else None
        window = open_window(pa.Table.from_pylist(piece, TYPES), SPEC, order, "a.parquet")
        # the same window in memory that another one has used
        again = open_window(pa.Table.from_pylist(piece, TYPES), SPEC, order, "a.parquet", reuse)
        np.testing.assert_array_equal(again.ids, window.ids)
        np.testing.assert_array_equal(again.floats, window.floats)
        reuse = again
        start = data.draw(st.integers(0, len(piece)))
        stop = data.draw(st.integers(start, len(piece)))
        parts.append((window, start, stop))
        expected += [piece[i] for i in (range(len(piece)) if order is None else order)[start:stop]]
    n = len(expected)
    stride = n + padding
    batch = assemble(SPEC, parts, stride, NOWHERE)

    assert batch.rows == n
    assert tuple(batch.dense.shape) == (n, 3)
    assert batch.dense.tolist() == [[row["x"], *row["v"]] for row in expected]
    assert tuple(batch.labels.shape) == (n, 2)
    assert batch.labels.tolist() == [[row["click"], row["price"]] for row in expected]
    assert batch.weights.tolist() == [row["w"] for row in expected]
    wanted = {
        "user": [[row["user"]] for row in expected],
        "item": [[row["item"]] for row in expected],
        "tags": [row["tags"] for row in expected],
        "history": [row["history"][-3:] for row in expected],
        "maybe": [[row["maybe"]] if row["maybe"] < 20 else [] for row in expected],
    }
    for name, kjt in batch.jagged.items():
        assert tuple(kjt.keys()) == SPEC.collections[name]
        assert (kjt.values().dtype, kjt.lengths().dtype) == (torch.int64, torch.int32)
        assert kjt.stride() == stride
        assert len(kjt.lengths()) == stride * len(kjt.keys())
        for key in SPEC.collections[name]:
            got = [p.tolist() for p in torch.split(kjt[key].values(), kjt[key].lengths().tolist())]
            if key in wanted:
                assert got == wanted[key] + [[]] * padding
            else:
                assert [len(row) for row in got] == [2 * len(row) for row in wanted["history"]] + [0] * padding
                for row, history, item in zip(got, wanted["history"], wanted["item"], strict=False):
                    assert not {*row} & {*history, *item}


def test_neighbours_are_not_copied_twice() -> None:
    """Two collections whose keys are neighbours share the memory of one concatenation."""
    names = [f"f{i}" for i in range(4)]
    spec = BatchSpec(
        features=tuple(SparseFeature(name, ITEM) for name in reversed(names)),
        collections={"a": ("f0", "f1"), "b": ("f2", "f3"), "c": ("f1", "f2")},
    )
    batch = batch_of(pa.table({name: [i, i + 1] for i, name in enumerate(names)}), spec)
    a, b, c = (batch.jagged[key].values() for key in "abc")
    assert a.tolist() == [0, 1, 1, 2]
    assert b.tolist() == [2, 3, 3, 4]
    assert c.tolist() == [1, 2, 2, 3]
    assert b.data_ptr() - a.data_ptr() == 2 * (c.data_ptr() - a.data_ptr()) == 4 * a.element_size()


@pytest.mark.parametrize("order", [None, np.arange(2)])
def test_a_batch_does_not_share_memory_with_its_windows(order: np.ndarray | None) -> None:
    spec = BatchSpec(features=(SparseFeature("item", ITEM),), weight="w", collections={"c": ("item",)})
    item, w = np.array([1, 2]), np.array([1.0, 2.0], np.float32)
    window = open_window(pa.table({"item": item, "w": w}), spec, order, "a.parquet")
    batch = assemble(spec, [(window, 0, 2)], 2, NOWHERE)
    for memory in (item, w, *(window.memory or ())):
        memory[:] = 0
    assert lists(batch, "item") == [[1], [2]]
    assert batch.weights.tolist() == [1.0, 2.0]
