"""What becomes of columns: ids, dense values, labels and weights, and what is refused."""

from __future__ import annotations

import math
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from rechub_dist.data.columns.fit import check_schema, column_names
from rechub_dist.data.columns.hashing import hash_ids
from rechub_dist.data.columns.window import open_window
from rechub_dist.data.spec import BatchSpec
from rechub_dist.errors import UserError
from rechub_dist.features import DenseFeature, Label, NegativeFeature, SequenceFeature, SparseFeature, Table
from rechub_tests.batches import ITEM, USER, batch_of, lists


def one(feature: Any, values: Any, kind: pa.DataType) -> list[list[int]]:
    spec = BatchSpec(features=(feature,), collections={"c": (feature.name,)})
    return lists(batch_of(pa.table({feature.source: pa.array(values, kind)}), spec), feature.name)


def read(table: pa.Table, spec: BatchSpec) -> None:
    """Check and open, as the reader does."""
    check_schema(table.schema, spec, "data/a.parquet")
    open_window(table, spec, None, "data/a.parquet")


def fails(spec: BatchSpec, message: str, **columns: Any) -> None:
    table = pa.table(columns)
    with pytest.raises(UserError) as caught:
        read(table, spec)
    assert str(caught.value) == f"data/a.parquet: {message}"


# --- ids


@pytest.mark.parametrize("kind", [pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint16(), pa.uint64()])
@pytest.mark.parametrize("wrap", [pa.list_, pa.large_list, lambda kind: pa.list_(kind, 2), None])
def test_every_integer_type(kind: pa.DataType, wrap: Any) -> None:
    feature = SparseFeature("item", ITEM)
    if wrap is None:
        assert one(feature, [1, 9, 0], kind) == [[1], [9], [0]]
    else:
        assert one(feature, [[1, 9], [0, 0]], wrap(kind)) == [[1, 9], [0, 0]]


def test_dictionary_encoded_ids() -> None:
    codes = pa.array([3, 3, 5, 3]).dictionary_encode()
    assert one(SparseFeature("item", ITEM), codes, codes.type) == [[3], [3], [5], [3]]
    inner = pa.ListArray.from_arrays([0, 2, 2, 4], codes)
    assert one(SparseFeature("item", ITEM), inner, inner.type) == [[3, 3], [], [5, 3]]


@pytest.mark.parametrize("kind", [pa.list_(pa.int64()), pa.large_list(pa.int32())])
def test_missing_and_sliced_lists(kind: pa.DataType) -> None:
    array = pa.array([[8], [1, 2], None, [], [3], [9]], kind)
    assert one(SparseFeature("item", ITEM), array.slice(1, 4), kind) == [[1, 2], [], [], [3]]


def test_missing_fixed_size_list_is_an_empty_one() -> None:
    assert one(SparseFeature("item", ITEM), [[1, 2], None, [3, 4]], pa.list_(pa.int32(), 2)) == [[1, 2], [], [3, 4]]


@pytest.mark.parametrize(("keep", "kept"), [("last", [[2, 3], [4], []]), ("first", [[1, 2], [4], []])])
def test_sequences_are_cut(keep: Any, kept: list[list[int]]) -> None:
    feature = SequenceFeature("h", ITEM, max_length=2, keep=keep)
    assert one(feature, [[1, 2, 3], [4], []], pa.list_(pa.int64())) == kept


def test_cutting_counts_the_ids_that_are_kept() -> None:
    feature = SequenceFeature("h", ITEM, max_length=2, out_of_range="drop", missing="drop")
    assert one(feature, [[1, 2, 3, -1, None], [None]], pa.list_(pa.int64())) == [[2, 3], []]


@pytest.mark.parametrize(
    ("null", "outside", "expected"),
    [
        ("drop", "drop", [[1], [], [], []]),
        ("unknown", "unknown", [[1], [7], [7], [7]]),
        ("drop", "unknown", [[1], [], [7], [7]]),
        ("unknown", "drop", [[1], [7], [], []]),
    ],
)
def test_policies(null: Any, outside: Any, expected: list[list[int]]) -> None:
    feature = SparseFeature("item", ITEM, missing=null, out_of_range=outside, unknown_id=7)
    for kind in (pa.int8(), pa.int64()):
        assert one(feature, [1, None, 10, -1], kind) == expected
    assert one(feature, [1, None, 10, 2**63 + 1], pa.uint64()) == expected
    in_list = [[i for ids in expected for i in ids], []]
    assert one(feature, [[1, None, 10, -1], []], pa.list_(pa.int32())) == in_list


def test_the_id_for_the_unknown_may_exceed_the_columns_type() -> None:
    feature = SparseFeature("item", Table("item", 1000), missing="unknown", unknown_id=999)
    assert one(feature, [1, None], pa.int8()) == [[1], [999]]


def test_a_null_is_not_out_of_range() -> None:
    null = pa.Array.from_buffers(pa.int64(), 2, [pa.py_buffer(b"\x01"), pa.py_buffer(np.array([1, 99]))])
    assert one(SparseFeature("item", ITEM, missing="unknown"), null, pa.int64()) == [[1], [0]]


@pytest.mark.parametrize("values", [[1, -1, 2**62, 300], [[1, -1], [2**62, 300]]])
def test_hashing(values: Any) -> None:
    feature = SparseFeature("item", ITEM, hash=True)
    ids = one(feature, values, pa.list_(pa.int64()) if isinstance(values[0], list) else pa.int64())
    flat = [i for row in values for i in row] if isinstance(values[0], list) else values
    assert [i for row in ids for i in row] == hash_ids(np.array(flat), "item", 10).tolist()


def test_hashing_of_large_unsigned_and_missing_ids() -> None:
    feature = SparseFeature("item", ITEM, hash=True, missing="unknown", unknown_id=3)
    assert one(feature, [2**63 + 5, None], pa.uint64()) == [hash_ids(np.array([5 - 2**63]), "item", 10).tolist(), [3]]


def test_a_large_table_keeps_its_ids() -> None:
    feature = SparseFeature("item", Table("item", 2**40))
    assert one(feature, [2**39, 2**31, 5], pa.int64()) == [[2**39], [2**31], [5]]
    with pytest.raises(UserError, match=f"id {2**40} is outside"):
        one(feature, [2**40], pa.int64())
    with pytest.raises(UserError, match=f"id {-(2**31)} is outside"):
        one(feature, [-(2**31)], pa.int32())


def test_errors_of_ids() -> None:
    spec = BatchSpec(features=(SparseFeature("user", USER, column="user_id"),))
    outside = "outside table 'user' of 20 rows (ids 0..19); raise the table's rows, or set out_of_range: drop | unknown"
    fails(spec, f"column 'user_id': id 20 is {outside}, or hash: true", user_id=[0, 20, 21])
    fails(spec, f"column 'user_id': id -1 is {outside}, or hash: true", user_id=[[0, 3], [-1]])
    fails(spec, f"column 'user_id': id {2**63} is {outside}, or hash: true", user_id=pa.array([1, 2**63], pa.uint64()))
    missing = "column 'user_id': 2 id(s) are missing (null); fill them in, or set missing: drop | unknown"
    fails(spec, missing, user_id=[0, None, None])
    fails(spec, missing, user_id=[[0, None], [None]])


# --- dense, labels, weights


def dense_of(feature: DenseFeature, values: Any, kind: pa.DataType | None = None) -> list[list[float]]:
    array = pa.array(values, kind)
    batch = batch_of(pa.table({feature.source: array}), BatchSpec(dense=(feature,)))
    assert batch.dense.dtype == torch.float32
    assert batch.dense.is_contiguous()
    return batch.dense.tolist()


@pytest.mark.parametrize(
    "kind", [pa.int8(), pa.uint64(), pa.float16(), pa.float32(), pa.float64(), pa.decimal128(9, 2)]
)
def test_dense_types(kind: pa.DataType) -> None:
    values = np.array([1, 2], np.float16) if kind == pa.float16() else [1, 2]
    assert dense_of(DenseFeature("x"), values, kind) == [[1.0], [2.0]]


def test_dense_vectors_and_booleans() -> None:
    assert dense_of(DenseFeature("x"), [True, False]) == [[1.0], [0.0]]
    for kind in (pa.list_(pa.float32(), 2), pa.list_(pa.float64()), pa.large_list(pa.int32())):
        assert dense_of(DenseFeature("x", dim=2), [[1, 2], [3, 4]], kind) == [[1.0, 2.0], [3.0, 4.0]]


def test_dense_filling_and_logarithm() -> None:
    fill = DenseFeature("x", missing="fill", fill=math.e - 1, transform="log")
    assert dense_of(fill, [1.0, None, math.nan, -1.0]) == pytest.approx(
        np.array([[math.log(2)], [1.0], [1.0], [-math.log(2)]])
    )
    assert dense_of(DenseFeature("x", missing="fill", fill=7), [1, None]) == [[1.0], [7.0]]
    assert dense_of(DenseFeature("x", missing="fill", fill=7), [True, None]) == [[1.0], [7.0]]
    pair = DenseFeature("x", dim=2, missing="fill", fill=7)
    for kind in (pa.list_(pa.float64()), pa.list_(pa.float32(), 2)):
        assert dense_of(pair, [[1, 2], None, [3, None]], kind) == [[1.0, 2.0], [7.0, 7.0], [3.0, 7.0]]


def test_errors_of_dense() -> None:
    missing = "column 'x': 2 value(s) are missing (null or NaN); fill them in, or set missing: fill"
    fails(BatchSpec(dense=(DenseFeature("x"),)), missing, x=[1.0, None, math.nan])
    pair = BatchSpec(dense=(DenseFeature("p", "x", dim=2),))
    fails(pair, "column 'x': a row has 1 values; feature 'p' needs 2", x=[[1.0, 2.0], [1.0]])
    fails(pair, missing, x=[[1.0, 2.0], None])


@pytest.mark.parametrize("values", [[0, 1], [False, True], [0.0, 1.0], pa.array([0, 1], pa.uint8())])
def test_labels(values: Any) -> None:
    spec = BatchSpec(labels=(Label("y"), Label("z", "y", type="regression")))
    assert batch_of(pa.table({"y": values}), spec).labels.tolist() == [[0.0, 0.0], [1.0, 1.0]]


NUMBERS = [
    *[pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64()],
    *[pa.float16(), pa.float32(), pa.float64(), pa.decimal128(5, 2), pa.bool_(), pa.dictionary(pa.int8(), pa.int64())],
]


@pytest.mark.parametrize("kind", NUMBERS)
def test_labels_and_weights_of_every_type(kind: pa.DataType) -> None:
    column = pa.array([0, 1, 1]).cast(pa.float32() if kind == pa.float16() else pa.int64())
    if pa.types.is_dictionary(kind):
        column = column.dictionary_encode()
    elif pa.types.is_decimal(kind):
        column = pa.array([Decimal(0), Decimal(1), Decimal(1)], kind)
    else:
        column = column.cast(kind)
    labels = (Label("y"), Label("z", "y", type="regression"))
    batch = batch_of(pa.table({"y": column}), BatchSpec(labels=labels, weight="y"))
    assert batch.labels.tolist() == [[0.0, 0.0], [1.0, 1.0], [1.0, 1.0]]
    assert batch.weights.tolist() == [0.0, 1.0, 1.0]
    missing = pa.concat_arrays([column, pa.nulls(1, column.type)])
    fails(BatchSpec(labels=labels[1:]), "column 'y': 1 label(s) are missing; remove the rows without one", y=missing)
    dense = DenseFeature("x", missing="fill", fill=5)
    assert dense_of(dense, missing) == [[0.0], [1.0], [1.0], [5.0]]


def test_errors_of_labels_and_weights() -> None:
    click = BatchSpec(labels=(Label("y"),))
    wanted = "a classification label must be 0 or 1; fix the data, or set type: regression"
    fails(click, f"column 'y': label 2 in 2 row(s); {wanted}", y=[0, 2, 3])
    fails(click, f"column 'y': label 0.5 in 1 row(s); {wanted}", y=[0, 0.5])
    fails(click, "column 'y': 1 label(s) are missing; remove the rows without one", y=[0, None])
    fails(click, "column 'y': 1 label(s) are missing; remove the rows without one", y=[True, None])
    price = BatchSpec(labels=(Label("y", type="regression"),))
    fails(
        price, "column 'y': label nan in 1 row(s); a label must be a finite number; remove the row", y=[0.5, math.nan]
    )
    fails(price, "column 'y': 1 label(s) are missing; remove the rows without one", y=[7, None])
    weight = BatchSpec(weight="w")
    fix = "in 1 row(s); a weight must be finite and not negative; use 0 for none"
    for value in (-1.0, math.nan, math.inf):
        fails(weight, f"column 'w': weight {value} {fix}", w=[0.5, value])
    fails(weight, f"column 'w': weight null {fix}", w=[0.5, None])
    assert batch_of(pa.table({"w": [0, 2]}), weight).weights.tolist() == [0.0, 2.0]
    assert batch_of(pa.table({"y": [0, 1]}), click).weights is None


# --- schema


def test_schema_errors_need_no_data() -> None:
    def refused(spec: BatchSpec, message: str, **types: pa.DataType) -> None:
        with pytest.raises(UserError) as caught:
            check_schema(pa.schema(list(types.items())), spec, "data")
        assert str(caught.value) == f"data: {message}"

    sparse = BatchSpec(features=(SparseFeature("user", USER, column="user_id"),))
    refused(sparse, "there is no column 'user_id'; did you mean 'userid'?", userid=pa.int64(), x=pa.int64())
    refused(sparse, "there is no column 'user_id'; valid: x", x=pa.int64())
    needs = "but sparse feature 'user' needs an integer or a list of integers"
    for kind in (pa.float64(), pa.bool_(), pa.list_(pa.list_(pa.int64()))):
        refused(sparse, f"column 'user_id' is {kind}, {needs}", user_id=kind)
    for kind in (pa.string(), pa.list_(pa.large_string()), pa.dictionary(pa.int8(), pa.string())):
        hint = "; for strings, set hash: true or name a vocabulary"
        refused(sparse, f"column 'user_id' is {kind}, {needs}{hint}", user_id=kind)
    history = BatchSpec(features=(SequenceFeature("h", ITEM, 3),))
    refused(history, "column 'h' is int64, but sequence feature 'h' needs a list of integers", h=pa.int64())
    dense = BatchSpec(dense=(DenseFeature("x"),))
    refused(dense, "column 'x' is string, but dense feature 'x' needs a number", x=pa.string())
    refused(dense, "column 'x' is list<item: float>, but dense feature 'x' needs a number", x=pa.list_(pa.float32()))
    pair = BatchSpec(dense=(DenseFeature("x", dim=2),))
    refused(pair, "column 'x' is float, but dense feature 'x' needs a list of 2 numbers", x=pa.float32())
    three = pa.list_(pa.float32(), 3)
    refused(pair, f"column 'x' is {three}, but dense feature 'x' needs a list of 2 numbers", x=three)
    label = BatchSpec(labels=(Label("y"),))
    kind = pa.list_(pa.int64())
    refused(label, f"column 'y' is {kind}, but label 'y' needs a number or a boolean", y=kind)
    refused(BatchSpec(weight="w"), "column 'w' is string, but the row weight needs a number", w=pa.string())
    with pytest.raises(UserError, match="2 columns are named 'x'"):
        check_schema(pa.schema([("x", pa.int64()), ("x", pa.int64())]), dense, "data")


def test_column_names() -> None:
    spec = BatchSpec(
        features=(SparseFeature("a", ITEM, "x"), SparseFeature("b", ITEM, "x"), NegativeFeature("n", ITEM, "a")),
        dense=(DenseFeature("d"),),
        labels=(Label("y"),),
        weight="w",
    )
    assert column_names(spec) == ["x", "d", "y", "w"]
    assert column_names(BatchSpec()) == []
