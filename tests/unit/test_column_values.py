"""Values at the edges of their types: times, dense values, labels, and what statistics tell of them beforehand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rechub_dist.data.columns.extremes import check_extremes
from rechub_dist.data.columns.values import read_dense, read_label, read_time_gaps, read_weight
from rechub_dist.data.parquet.manifest import Manifest
from rechub_dist.data.spec import BatchSpec
from rechub_dist.errors import UserError
from rechub_dist.features import DenseFeature, Label, SequenceFeature, SparseFeature, Table, TimeGapFeature

GAP = TimeGapFeature("gap", "then", "now", (5, 60, 3600), max_length=5)


def buckets(then: list[Any], now: Any, kind: pa.DataType, now_kind: pa.DataType | None = None) -> list[int]:
    times = pa.array([then], pa.list_(kind))
    return read_time_gaps(times, pa.array([now], now_kind or kind), GAP, "f")[0].tolist()


@pytest.mark.parametrize(
    "kind", [pa.int8(), pa.uint8(), pa.int16(), pa.uint16(), pa.uint32(), pa.int64(), pa.uint64(), pa.float16()]
)
def test_a_behaviour_after_its_row_is_refused_whatever_the_type(kind: pa.DataType) -> None:
    now = np.float16(100) if kind == pa.float16() else 100
    assert buckets([now, now - 4, now - 5, now - 60], now, kind) == [0, 0, 1, 2]
    with pytest.raises(UserError, match=r"column 'then': 1 time\(s\) are later than their row's in column 'now'"):
        buckets([now, now + 1], now, kind)


def test_narrow_times_do_not_wrap_around() -> None:
    assert buckets([-128], 127, pa.int8()) == [2]
    assert buckets([-(2**63)], 2**63 - 1, pa.int64()) == [3]
    with pytest.raises(UserError, match=r"1 time\(s\) are later"):
        buckets([2**63 - 1], -(2**63), pa.int64())
    with pytest.raises(UserError, match="column 'then': a time does not fit 64 bits"):
        buckets([2**63], 2**63, pa.uint64())


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_times_that_are_no_finite_numbers_are_refused(wrong: float) -> None:
    with pytest.raises(UserError, match=r"column 'then': 1 time\(s\) are missing \(NaN\) or infinite; fill them in"):
        buckets([1.0, wrong], 2.0, pa.float64())
    with pytest.raises(UserError, match=r"column 'now': 1 time\(s\) are missing"):
        buckets([1.0], wrong, pa.float64())


def test_timestamps_of_any_unit_and_of_two() -> None:
    base = 1_700_000_000 * 10**9
    then = [base - 5 * 10**9 + 1, base - 5 * 10**9, base - 60 * 10**9, base]
    assert buckets(then, base, pa.timestamp("ns")) == [0, 1, 2, 0]
    seconds, fine = pa.timestamp("s"), pa.timestamp("ns")
    assert buckets([base // 10**9 - 5], base - 1, seconds, fine) == [0]
    assert buckets([base // 10**9 - 5], base, seconds, fine) == [1]
    with pytest.raises(UserError, match=r"1 time\(s\) are later"):
        buckets([base // 10**9], base - 1, seconds, fine)
    # far-off years do not fit nanoseconds, and are no matter where all is in seconds
    assert buckets([-(10**12)], 10**12, pa.timestamp("s")) == [3]
    with pytest.raises(UserError, match="does not fit 64 bits"):
        buckets([-(10**12)], base, pa.timestamp("s"), pa.timestamp("ns"))


def dense(values: list[Any], kind: pa.DataType, **settings: Any) -> list[float]:
    return read_dense(pa.array(values, kind), DenseFeature("x", **settings), "f")[:, 0].tolist()


@pytest.mark.parametrize("kind", [pa.float32(), pa.float64()])
@pytest.mark.parametrize("wrong", [math.inf, -math.inf])
@pytest.mark.parametrize("transform", ["none", "log"])
def test_infinite_dense_values_are_refused_or_filled(kind: pa.DataType, wrong: float, transform: str) -> None:
    with pytest.raises(UserError, match=r"column 'x': 1 value\(s\) are infinite or beyond float32 \(-?inf\); fill"):
        dense([0.0, wrong], kind, transform=transform)
    assert dense([0.0, wrong], kind, transform=transform, missing="fill") == [0.0, 0.0]


def test_values_beyond_float32() -> None:
    with pytest.raises(UserError, match="are infinite or beyond float32"):
        dense([1e300], pa.float64())
    assert dense([1e300, -1e300], pa.float64(), transform="log") == pytest.approx([690.7755, -690.7755])
    assert dense([2**62], pa.int64(), transform="log") == pytest.approx([math.log(2**62)])
    label = Label("y", type="regression")
    with pytest.raises(UserError, match=r"label 1e\+300 in 1 row"):
        read_label(pa.array([1.0, 1e300]), label, "f")
    with pytest.raises(UserError, match=r"weight 1e\+300 in 1 row"):
        read_weight(pa.array([1.0, 1e300]), "f", "w")


ITEM = Table("item", 10)


@pytest.mark.parametrize(
    ("spec", "column", "message"),
    [
        (BatchSpec((SparseFeature("a", ITEM),)), pa.array([1, 10]), "id 10 is outside table 'item' of 10 rows"),
        (BatchSpec((SparseFeature("a", ITEM),)), pa.array([1, -1], pa.int8()), "id -1 is outside"),
        (BatchSpec((SparseFeature("a", ITEM),)), pa.array([2**32 - 1], pa.uint32()), "id 4294967295 is outside"),
        (BatchSpec((SparseFeature("a", ITEM),)), pa.array([1, None, None]), r"2 id\(s\) are missing"),
        (BatchSpec((SequenceFeature("a", ITEM, 5),)), pa.array([[1], [], [2, 10], None]), "id 10 is outside"),
        (BatchSpec(dense=(DenseFeature("a"),)), pa.array([1.0, math.inf]), "are infinite"),
        (BatchSpec(dense=(DenseFeature("a", dim=2),)), pa.array([[1.0, math.inf]]), "are infinite"),
        (BatchSpec(labels=(Label("a"),)), pa.array([1, 2]), "label 2 in 1 row"),
        (BatchSpec(weight="a"), pa.array([0.5, -1.0]), "weight -1.0 in 1 row"),
    ],
)
def test_statistics_tell_beforehand(tmp_path: Path, spec: BatchSpec, column: pa.Array, message: str) -> None:
    pq.write_table(pa.table({"a": column}), tmp_path / "a.parquet", row_group_size=1)
    files = Manifest.read(str(tmp_path)).files
    with pytest.raises(UserError, match=rf"a.parquet \(by its statistics, each value once\): column 'a': .*{message}"):
        check_extremes(files, spec)
    pq.write_table(pa.table({"a": column}), tmp_path / "a.parquet", write_statistics=False)
    check_extremes(Manifest.read(str(tmp_path)).files, spec)


@pytest.mark.parametrize(
    ("spec", "column"),
    [
        (BatchSpec((SparseFeature("a", ITEM),)), pa.array([0, 9])),
        (BatchSpec((SparseFeature("a", ITEM, out_of_range="drop", missing="unknown"),)), pa.array([0, 99, None])),
        (BatchSpec((SparseFeature("a", ITEM, hash=True),)), pa.array(["x", "y"])),
        (BatchSpec((SequenceFeature("a", ITEM, 5),)), pa.array([[], None, [9, 0]])),
        (BatchSpec(dense=(DenseFeature("a", missing="fill"),)), pa.array([1.0, math.inf, None])),
        (BatchSpec(labels=(Label("a"),)), pa.array([True, False])),
    ],
)
def test_statistics_of_what_is_right(tmp_path: Path, spec: BatchSpec, column: pa.Array) -> None:
    pq.write_table(pa.table({"a": column}), tmp_path / "a.parquet")
    check_extremes(Manifest.read(str(tmp_path)).files, spec)
