"""Which files make one data set: those whose columns hold the same, or convert to what is read of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rechub_dist.data.columns.fit import check_schema
from rechub_dist.data.parquet.manifest import Manifest
from rechub_dist.data.reader import ParquetReader
from rechub_dist.data.spec import BatchSpec
from rechub_dist.errors import UserError
from rechub_dist.features import DenseFeature, SparseFeature, Table


def shards(folder: Path, *columns: pa.Array) -> Path:
    folder.mkdir(exist_ok=True)
    for number, column in enumerate(columns):
        pq.write_table(pa.table({"a": column}), folder / f"{number}.parquet")
    return folder


STRINGS = pa.array(["p", "q", None])
LISTS = pa.array([[1], [], [2, 3]])


@pytest.mark.parametrize(
    ("columns", "kind"),
    [
        ([pa.array([1], pa.int32()), pa.array([2])], pa.int64()),
        ([pa.nulls(2), pa.array([1.0, 2.0]), pa.nulls(1)], pa.float64()),
        ([pa.array([1.0], pa.float16()), pa.array([1.0], pa.float32())], pa.float32()),
        ([STRINGS, STRINGS.cast(pa.large_string())], pa.large_string()),
        ([STRINGS.cast(pa.string_view()), STRINGS], pa.large_string()),
        ([STRINGS.dictionary_encode(), STRINGS], None),
        ([STRINGS.dictionary_encode().cast(pa.dictionary(w, pa.string())) for w in (pa.int8(), pa.int16())], None),
        ([LISTS, LISTS.cast(pa.list_(pa.field("element", pa.int64(), nullable=False)))], pa.list_(pa.int64())),
        ([LISTS, LISTS.cast(pa.list_(pa.int32()))], pa.list_(pa.int64())),
        ([pa.array([[1], None], pa.list_view(pa.int64())), LISTS.cast(pa.large_list(pa.int64()))], None),
        ([pa.array([[], None], pa.list_(pa.null())), LISTS], pa.list_(pa.int64())),
    ],
)
def test_files_agree_where_their_types_hold_the_same(
    tmp_path: Path, columns: list[pa.Array], kind: pa.DataType | None
) -> None:
    manifest = Manifest.read(str(shards(tmp_path / "data", *columns)))
    assert manifest.rows == sum(map(len, columns))
    assert kind is None or manifest.schema.field("a").type == kind


def fit_of(*features: Any, **rest: Any) -> Any:
    spec = BatchSpec(features=features, **rest)
    return lambda schema, where: check_schema(schema, spec, where)


def test_what_no_feature_reads_may_differ(tmp_path: Path) -> None:
    for number, extra in enumerate(({"b": pa.nulls(1)}, {"b": ["x"]}, {"b": [1], "c": [2]}, {})):
        pq.write_table(pa.table({"a": [1], **extra}), tmp_path / f"{number}.parquet")
    feature = SparseFeature("a", Table("a", 10))
    assert Manifest.read(str(tmp_path), fit=fit_of(feature)).rows == 4
    with pytest.raises(
        UserError, match=r"2.parquet: its columns differ from those of .*: column 'b' is integer, not s"
    ):
        Manifest.read(str(tmp_path))
    (tmp_path / "2.parquet").unlink()
    other = SparseFeature("b", Table("b", 10), hash=True)
    with pytest.raises(UserError, match=r"/3.parquet: there is no column 'b'"):
        Manifest.read(str(tmp_path), fit=fit_of(feature, other))


def test_strings_beside_integers_are_hashed_to_other_ids(tmp_path: Path) -> None:
    folder = shards(tmp_path / "data", pa.array([1, 2]), pa.array(["1", "2"]))
    with pytest.raises(UserError, match=r"1.parquet: its columns differ .*'a' is string, not number"):
        Manifest.read(str(folder), fit=fit_of(SparseFeature("a", Table("a", 10), hash=True)))
    kept = Manifest.read(str(folder), fit=fit_of(SparseFeature("a", Table("a", 10))), skip_bad=True)
    assert [file.name for file in kept.files] == ["0.parquet"]
    assert [(skipped.reason, skipped.file) for skipped in kept.left_out] == [("schema", str(folder / "1.parquet"))]


def test_numbers_of_any_type_are_dense_values(tmp_path: Path) -> None:
    folder = shards(tmp_path / "data", pa.array([1, 2]), pa.array([0.5], pa.float16()), pa.array([True]), pa.nulls(2))
    spec = BatchSpec(dense=(DenseFeature("a", missing="fill", fill=7.0),))
    manifest = Manifest.read(str(folder), fit=lambda schema, where: check_schema(schema, spec, where))
    reader = ParquetReader(manifest, spec, batch_size=10, shuffle=False, streams=1)
    assert next(reader.batches(0)).dense[:, 0].tolist() == [1.0, 2.0, 0.5, 1.0, 7.0, 7.0]
