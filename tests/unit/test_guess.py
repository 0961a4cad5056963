"""Guessed schemas: right by column, readable by the schema loader, and good enough to read the data with."""

from __future__ import annotations

import datetime
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from rechub_dist.cli import app
from rechub_dist.data.guess import guess_schema
from rechub_dist.data.manifest import Manifest
from rechub_dist.data.reader import ParquetReader
from rechub_dist.data.spec import BatchSpec
from rechub_dist.errors import UserError
from rechub_dist.features import DenseFeature, FeatureSchema, Label, SequenceFeature, SparseFeature, Table
from rechub_dist.schema import parse_schema

N = 60


def write(folder: Path, **columns: Any) -> str:
    table = pa.table(columns)
    pq.write_table(table, folder / "data.parquet", row_group_size=max(1, table.num_rows // 4))
    return str(folder / "data.parquet")


def guessed(path: str) -> FeatureSchema:
    """The schema as the loader reads it from the printed text; it must be the one that was meant."""
    text, schema = guess_schema(path)
    assert parse_schema(yaml.safe_load(text)) == schema
    return schema


def read_all(path: str, schema: FeatureSchema) -> int:
    """Every row through the reader, for training on all features."""
    features = [f for f in schema.features if not isinstance(f, DenseFeature)]
    spec = BatchSpec(
        features=tuple(features),  # type: ignore[arg-type]
        dense=tuple(f for f in schema.features if isinstance(f, DenseFeature)),
        labels=schema.labels,
        weight=schema.weight,
        collections={"c": tuple(f.name for f in features)},
    )
    rows = 0
    for batch in ParquetReader(Manifest.read(path), spec, batch_size=16).batches(0):
        assert torch.isfinite(batch.dense).all()
        for feature in features:
            ids = batch.feature(feature.name).values()
            assert ((ids >= 0) & (ids < feature.table.rows)).all()
        rows += batch.rows
    return rows


COLUMNS: dict[str, Any] = {
    "user": list(range(N)),
    "wide": pa.array([2**63 + i % 7 for i in range(N)], pa.uint64()),
    "hashes": [-(2**40), *range(N - 1)],
    "change": [-5, *range(N - 1)],
    "gappy": [None, *[i % 9 for i in range(N - 1)]],
    "city": pa.array([None, *[f"c{i % 9}" for i in range(N - 1)]]),
    "coded": pa.array([f"c{i % 30}" for i in range(N)]).dictionary_encode(),
    "history": [[i, 70] * (i % 40) for i in range(N)],
    "holes": [[i, None] for i in range(N)],
    "tags": pa.array([["a", "b"], None, *[["c"]] * (N - 2)], pa.list_(pa.string())),
    "gender": [i % 2 for i in range(N)],
    "price": [math.nan, *[i / 7 for i in range(N - 1)]],
    "amount": [i * 1e4 for i in range(N)],
    "vector": pa.array([[0.5, 1.0]] * N, pa.list_(pa.float32(), 2)),
    "ragged": [[0.5] * (i % 3) for i in range(N)],
    "flag": [i % 2 == 0 for i in range(N)],
    "time": [datetime.datetime(2020, 1, 1)] * N,
    "empty": pa.array([None] * N, pa.float64()),
    "click": [i % 3 == 0 for i in range(N)],
    "target": [i % 5 for i in range(N)],
    "weight": [0.5] * N,
}


@pytest.mark.parametrize("statistics", [True, False])
def test_every_kind_of_column(tmp_path: Path, statistics: bool) -> None:
    """The guess is the same whether the footers have statistics or not."""
    path = str(tmp_path / "my data.parquet")
    pq.write_table(pa.table(COLUMNS), path, row_group_size=16, write_statistics=statistics)
    schema = guessed(path)
    assert schema == FeatureSchema(
        (
            SparseFeature("user", Table("user", N)),
            SparseFeature("wide", Table("wide", 14), hash=True),
            SparseFeature("hashes", Table("hashes", 2 * N), hash=True),
            DenseFeature("change"),
            SparseFeature("gappy", Table("gappy", 10), missing="unknown", unknown_id=9),
            SparseFeature("city", Table("city", 18), hash=True, missing="unknown"),
            SparseFeature("coded", Table("coded", 60), hash=True),
            SequenceFeature("history", Table("history", 71), 50),
            SequenceFeature("holes", Table("holes", N), 2, missing="drop"),
            SequenceFeature("tags", Table("tags", 10), 2, hash=True),
            SparseFeature("gender", Table("gender", 2)),
            DenseFeature("price", missing="fill"),
            DenseFeature("amount", transform="log"),
            DenseFeature("vector", dim=2),
            DenseFeature("flag"),
        ),
        (Label("click"), Label("target", type="regression")),
        "weight",
    )
    text, _ = guess_schema(path)
    assert text.startswith("# Guessed from ")
    assert "\nname: my_data\n" in text
    assert "  user: {kind: sparse, rows: 60}  # ids 0 to 59\n" in text
    assert "  gender: {kind: sparse, rows: 2}  # ids 0 to 1; or a label?\n" in text
    assert "# not used: ragged (list<element: double> of 0 to 2 numbers; dense lists are of one length)" in text
    assert "# not used: time (timestamp[us])" in text
    assert "# not used: empty (double, has no value)" in text
    assert read_all(path, schema) == N


def test_columns_of_zeros_and_ones_are_labels_where_none_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, user=[0, 1, 2, 3], finished=[0, 1, 1, 0], liked_it=[0.0, 1.0, 0.0, 0.0], never=[0] * 4)
    schema = guessed(path)
    assert schema.labels == (Label("finished"), Label("liked_it"))
    assert [feature.name for feature in schema.features] == ["user", "never"]


def test_large_sparse_ids_are_hashed_and_dense_ones_kept(tmp_path: Path) -> None:
    schema = guessed(write(tmp_path, small=[0, 999_999], large=[0, 1_000_000], label=[0, 1]))
    assert schema.features == (
        SparseFeature("small", Table("small", 1_000_000)),
        SparseFeature("large", Table("large", 10), hash=True),
    )


def test_names_that_yaml_takes_for_something_else(tmp_path: Path) -> None:
    schema = guessed(write(tmp_path, **{"on": [1, 2], "a: {b": [3, 4], "5": [5, 6], "label": [0, 1]}))
    assert [feature.name for feature in schema.features] == ["on", "a: {b", "5"]


def test_nothing_to_learn_from(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no column can be a feature: time: date32"):
        guess_schema(write(tmp_path, time=[datetime.date(2020, 1, 1)], label=[1]))


cells = {
    pa.int64(): st.integers(-(2**63), 2**63 - 1) | st.integers(0, 9),
    pa.uint64(): st.integers(0, 2**64 - 1) | st.integers(0, 9),
    pa.int8(): st.integers(0, 127),
    pa.float32(): st.floats(width=32, allow_infinity=False),
    pa.string(): st.text(max_size=4),
    pa.bool_(): st.booleans(),
}


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_whatever_the_data_it_can_be_read(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    rows = data.draw(st.integers(1, 12))
    columns: dict[str, Any] = {"first": list(range(rows))}
    for kind, cell in cells.items():
        gaps = data.draw(st.booleans())
        values = st.lists(st.none() | cell if gaps else cell, min_size=rows, max_size=rows)
        columns[f"flat_{kind}"] = pa.array(data.draw(values), kind)
        lists = st.lists(
            st.none() | st.lists(st.none() | cell if gaps else cell, max_size=3), min_size=rows, max_size=rows
        )
        columns[f"list_{kind}"] = pa.array(data.draw(lists), pa.list_(kind))
    path = write(tmp_path_factory.mktemp("guess"), **columns)
    assert read_all(path, guessed(path)) == rows


def test_the_command(tmp_path: Path) -> None:
    path = write(tmp_path, user=[0, 1, 2, 3], label=[0, 1, 1, 0])
    result = CliRunner().invoke(app, ["data", "inspect", path, "--schema"])
    assert result.exit_code == 0
    assert parse_schema(yaml.safe_load(result.stdout)).labels == (Label("label"),)
