"""Prepared folders: complete or not there, and never in the place of something else."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rechub_dist.data.parquet.outputs import MARK
from rechub_dist.data.prepare.writer import (
    ROW_GROUP,
    ShardWriter,
    prepared_folder,
    schema_text,
    write_schema,
    write_split,
)
from rechub_dist.derived import Age, Bucket, Hour, KeyValues, Lookup, Overlap, Ratio, Split, Weekday
from rechub_dist.errors import UserError
from rechub_dist.features import (
    CrossFeature,
    DenseFeature,
    FeatureSchema,
    Label,
    SequenceFeature,
    SparseFeature,
    Table,
    TimeGapFeature,
)
from rechub_tests.prepared import column, digest, rows, schema


def break_down(out: Path) -> None:
    with prepared_folder(out, "small") as folder:
        small(folder)
        raise RuntimeError


def small(folder: Path) -> None:
    write_split(folder, "train", pa.table({"x": [1]}))
    write_schema(folder, "small", FeatureSchema((DenseFeature("x"),)))


def test_schema_text_is_what_the_parser_reads() -> None:
    movie, own = Table("movie", 10), Table("genre", 5, dim=8)
    declared = FeatureSchema(
        (
            SparseFeature("user", Table("user", 3), missing="unknown", unknown_id=2),
            SparseFeature("movie", movie, column="movie_id"),
            SequenceFeature("history", movie, max_length=4, keep="first"),
            SparseFeature("genre", own, pooling="mean", hash=True),
            DenseFeature("price", dim=2, transform="log", missing="fill", fill=-1.0),
        ),
        (Label("click"), Label("watch", column="seconds", type="regression")),
        weight="w",
    )
    text = schema_text("small", declared)
    assert text.splitlines()[:6] == [
        "name: small",
        "tables:",
        "  movie: {rows: 10}",
        "  genre: {rows: 5, dim: 8}",
        "features:",
        "  user: {kind: sparse, rows: 3, missing: unknown, unknown_id: 2}",
    ]
    assert "  click: {type: classification}" in text.splitlines()


def test_schema_text_round_trip(tmp_path: Path) -> None:
    movie = Table("movie", 10, init_std=0.5)
    declared = FeatureSchema(
        (
            SparseFeature("user", Table("user", 3)),
            SparseFeature("item", movie),
            SequenceFeature("history", movie, max_length=4, missing="drop"),
            DenseFeature("price", missing="fill", fill=2.5),
        ),
        (Label("y", type="regression"),),
        weight="w",
    )
    write_schema(tmp_path, "small", declared)
    assert schema(tmp_path) == declared


def test_schema_text_of_what_is_made_of_other_columns(tmp_path: Path) -> None:
    user, item = SparseFeature("user", Table("user", 3)), SparseFeature("item", Table("item", 9, dim=8))
    declared = FeatureSchema(
        (
            user,
            item,
            CrossFeature("user_x_item", (user, item), buckets=50),
            TimeGapFeature("gap", "times", "now", (1.0, 60.0), max_length=5, dim=4),
            SparseFeature("genres", Table("genre", 7), vocabulary="genre.parquet", encoded=True),
            SequenceFeature("seen", Table("genre", 7), max_length=4, vocabulary="genre.parquet", encoded=True),
            DenseFeature("age", mean=2.5, std=0.5),
        ),
        (Label("y"),),
        derived=(
            Split("genres", "genre_text", by=";"),
            KeyValues("taste", "weights", "taste_text"),
            Hour("hour", "time", utc_offset=5.5),
            Weekday("weekday", "time", unit="ms"),
            Age("age", "released", "time"),
            Bucket("age_bucket", "age", (1.0, 10.0)),
            Ratio("relative", "price", "usual"),
            Overlap("liked", "genres", "taste", share=True),
            Lookup("liking", "genres", "taste", "weights", combine="max"),
        ),
    )
    write_schema(tmp_path, "small", declared)
    assert schema(tmp_path) == declared
    text = (tmp_path / "dataset.yaml").read_text()
    assert "  weekday: {kind: weekday, column: time, unit: ms}\n" in text
    assert text.index("derive:") < text.index("features:")


def test_shards_and_row_groups(tmp_path: Path) -> None:
    total = ROW_GROUP + 50_000
    with ShardWriter(tmp_path, "train", pa.schema([("x", pa.int32())]), shard_rows=ROW_GROUP + 10_000) as writer:
        writer.write(pa.table({"x": pa.array(range(10_000), pa.int64())}))
        writer.write(pa.table({"x": pa.array(range(10_000, total), pa.int64())}))
    sizes = [pq.ParquetFile(file).metadata.num_rows for file in sorted((tmp_path / "train").iterdir())]
    assert sizes == [ROW_GROUP + 10_000, 40_000]
    assert column(rows(tmp_path, "train"), "x").tolist() == list(range(total))


def test_split_without_rows_has_its_columns(tmp_path: Path) -> None:
    write_split(tmp_path, "test", pa.table({"x": pa.array([], pa.int32())}))
    assert rows(tmp_path, "test").schema == pa.schema([("x", pa.int32())])


def test_failure_leaves_nothing_and_keeps_the_earlier(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with pytest.raises(RuntimeError):
        break_down(out)
    assert list(out.parent.iterdir()) == []
    with prepared_folder(out, "small") as folder:
        small(folder)
    before = digest(out)
    with pytest.raises(RuntimeError):
        break_down(out)
    assert digest(out) == before
    with prepared_folder(out, "small") as folder:
        small(folder)
        write_split(folder, "valid", pa.table({"x": [1]}))
    assert (out / "valid").is_dir()
    assert list(out.parent.iterdir()) == [out]


def test_killed_preparation_is_cleared_by_the_next(tmp_path: Path) -> None:
    with prepared_folder(tmp_path / "out", "small") as folder:
        small(folder)
    debris = tmp_path / ".out.writing"
    (tmp_path / "out").rename(debris)
    (debris / "train/part-00099.parquet").touch()
    with prepared_folder(tmp_path / "out", "small") as folder:
        small(folder)
    assert sorted(digest(tmp_path / "out")) == [MARK, "dataset.yaml", "train/part-00000.parquet"]


@pytest.mark.parametrize("files", [["notes.txt"], ["dataset.yaml", "notes.txt"], ["train"], ["dataset.yaml", "train"]])
def test_foreign_folder_is_refused(tmp_path: Path, files: list[str]) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name in files:
        (out / name).write_text("name: smaller\n")
    with pytest.raises(UserError, match="is not an output"), prepared_folder(out, "small"):
        pass
    assert sorted(path.name for path in out.iterdir()) == sorted(files)


def test_file_as_folder_is_refused_and_empty_folder_is_fine(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file"), prepared_folder(tmp_path / "file", "small"):
        pass
    (tmp_path / "out").mkdir()
    with prepared_folder(tmp_path / "out", "small") as folder:
        small(folder)
    assert (tmp_path / "out" / "dataset.yaml").is_file()
