"""Guessed schemas: right by column, readable by the schema loader, and good enough to read the data with."""

from __future__ import annotations

import datetime
import math
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from rechub_dist.cli.main import app
from rechub_dist.data.columns.hashing import hash_ids
from rechub_dist.data.columns.strings import hash_strings
from rechub_dist.data.columns.vocabulary import read_vocabulary, vocabulary_of
from rechub_dist.data.parquet.manifest import Manifest
from rechub_dist.data.reader import ParquetReader
from rechub_dist.data.spec import BatchSpec
from rechub_dist.data.tools import guess as guessing
from rechub_dist.data.tools.guess import collisions, guess_schema
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
    guess = guess_schema(path)
    assert parse_schema(yaml.safe_load(guess.text)) == guess.schema
    return guess.schema


def read_all(path: str) -> int:
    """Every row through the reader, for training on all features of the schema that was written beside the data."""
    for file in guess_schema(path).write():
        if file.name == "dataset.yaml":
            schema = parse_schema(yaml.safe_load(file.read_text()), str(file.parent))
            file.unlink()
    read_vocabulary.cache_clear()
    features = [f for f in schema.features if not isinstance(f, DenseFeature)]
    spec = BatchSpec(
        features=tuple(features),
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


def words(name: str) -> dict[str, Any]:
    """What a feature with a vocabulary says."""
    return {"vocabulary": f"_vocabularies/{name}.parquet", "out_of_range": "unknown"}


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
            SparseFeature("wide", Table("wide", 8), **words("wide")),
            SparseFeature("hashes", Table("hashes", N + 1), **words("hashes")),
            DenseFeature("change"),
            SparseFeature("gappy", Table("gappy", 10), missing="unknown", unknown_id=9),
            SparseFeature("city", Table("city", 10), **words("city"), missing="unknown"),
            SparseFeature("coded", Table("coded", 31), **words("coded")),
            SequenceFeature("history", Table("history", 71), 50),
            SequenceFeature("holes", Table("holes", N), 2, missing="drop"),
            SequenceFeature("tags", Table("tags", 4), 2, **words("tags")),
            SparseFeature("gender", Table("gender", 2)),
            DenseFeature("price", missing="fill"),
            DenseFeature("amount", transform="log"),
            DenseFeature("vector", dim=2),
            DenseFeature("flag"),
        ),
        (Label("click"), Label("target", type="regression")),
        "weight",
    )
    text = guess_schema(path).text
    assert text.startswith("# Guessed from ")
    assert "\nname: my_data\n" in text
    assert "  user: {kind: sparse, rows: 60}  # ids 0 to 59\n" in text
    assert "  gender: {kind: sparse, rows: 2}  # ids 0 to 1; or a label?\n" in text
    assert "# not used: 'ragged' (list<element: double> of 0 to 2 numbers; dense lists are of one length)" in text
    assert "# not used: 'time' (timestamp[us])" in text
    assert "# not used: 'empty' (double, has no value)" in text
    assert read_all(path) == N


def test_columns_of_zeros_and_ones_are_labels_where_none_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, user=[0, 1, 2, 3], finished=[0, 1, 1, 0], liked_it=[0.0, 1.0, 0.0, 0.0], never=[0] * 4)
    schema = guessed(path)
    assert schema.labels == (Label("finished"), Label("liked_it"))
    assert [feature.name for feature in schema.features] == ["user", "never"]


def test_ids_of_a_wide_range_are_looked_up_and_dense_ones_kept(tmp_path: Path) -> None:
    schema = guessed(write(tmp_path, small=[0, 999_999], large=[0, 1_000_000], label=[0, 1]))
    assert schema.features == (
        SparseFeature("small", Table("small", 1_000_000)),
        SparseFeature("large", Table("large", 3), **words("large")),
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
    assert read_all(path) == rows


def test_the_command(tmp_path: Path) -> None:
    path = write(tmp_path, user=[0, 1, 2, 3], label=[0, 1, 1, 0])
    result = CliRunner().invoke(app, ["data", "inspect", path, "--schema"])
    assert result.exit_code == 0
    assert parse_schema(yaml.safe_load(result.stdout)).labels == (Label("label"),)


def test_a_written_guess_works_as_it_is(tmp_path: Path) -> None:
    """Each value of train has an id of its own, and what is missing, or new in another split, has none of theirs."""
    (tmp_path / "train").mkdir()
    (tmp_path / "valid").mkdir()
    races = ["White", "Black", None, "Asian", "a/b", "White"]
    pq.write_table(pa.table({"race": races, "item": [1, 2, 3, 4, 5, 6], "y": [0, 1, 0, 1, 0, 1]}),
                   tmp_path / "train" / "p.parquet")  # fmt: skip
    pq.write_table(pa.table({"race": ["New", None], "item": [1, 99], "y": [0, 1]}), tmp_path / "valid" / "p.parquet")
    result = CliRunner().invoke(app, ["data", "inspect", str(tmp_path), "--schema", "--write"])
    assert result.exit_code == 0, result.output
    schema = parse_schema(yaml.safe_load((tmp_path / "dataset.yaml").read_text()), str(tmp_path))
    item, race = schema.features[1], schema.features[0]
    assert item == SparseFeature("item", Table("item", 100))  # the largest of all splits
    assert isinstance(race, SparseFeature)
    vocabulary = vocabulary_of(race)
    assert vocabulary is not None
    assert dict(zip(vocabulary.values.to_pylist(), vocabulary.ids.tolist(), strict=True)) == {
        "White": 1, "Asian": 2, "Black": 3, "a/b": 4,
    }  # fmt: skip
    assert race.table.rows == 5
    assert (race.missing, race.out_of_range, race.unknown_id) == ("unknown", "unknown", 0)
    # nothing of the user's is written over
    (tmp_path / "dataset.yaml").write_text("mine")
    result = CliRunner().invoke(app, ["data", "inspect", str(tmp_path), "--schema", "--write"])
    assert isinstance(result.exception, UserError)
    assert (tmp_path / "dataset.yaml").read_text() == "mine"


def test_the_printed_command_makes_the_vocabularies(tmp_path: Path) -> None:
    path = write(tmp_path, **{"a b/c": ["x", "y", None, "x"], "z*": ["p", "q", "p", "q"], "label": [0, 1, 1, 0]})
    text = guess_schema(path).text
    command = next(line for line in text.splitlines() if line.startswith("#   rechub-dist "))
    assert CliRunner().invoke(app, shlex.split(command)[2:]).exit_code == 0
    (tmp_path / "dataset.yaml").write_text(text)
    schema = parse_schema(yaml.safe_load(text), str(tmp_path))
    assert [feature.name for feature in schema.features] == ["a b_c", "z*"]
    for feature in schema.features:
        assert isinstance(feature, SparseFeature)
        found = vocabulary_of(feature)
        assert found is not None
        assert found.limits == (1, 2)
        assert feature.table.rows == 3


@pytest.mark.parametrize("statistics", [True, False])
def test_what_would_be_learnt_by_heart_is_left_out(tmp_path: Path, statistics: bool) -> None:
    rows = 200
    frame = {
        "user": [i % 9 for i in range(rows)],
        "place": [i * 3 + 7 for i in range(rows)],  # a value a row
        "request": [f"r{i}" for i in range(rows)],
        "Unnamed: 0": [i % 5 for i in range(rows)],
        "event_time": [1_700_000_000_000 + i // 2 for i in range(rows)],
        "day": [20_240_100 + i % 20 for i in range(rows)],
        "created": [f"2024-01-{i % 20 + 1:02d}" for i in range(rows)],
        "date_of": [f"2024-01-{i % 20 + 1:02d}" for i in range(rows)],
        "daytime": [i % 4 for i in range(rows)],  # of no times
        "label": [i % 2 for i in range(rows)],
    }
    table = pa.table(frame)
    index = {b"pandas": b'{"index_columns": ["kept", {"kind": "range"}], "columns": []}'}
    table = table.append_column("kept", pa.array([i % 11 for i in range(rows)])).replace_schema_metadata(index)
    pq.write_table(table, tmp_path / "data.parquet", write_statistics=statistics)
    guess = guess_schema(str(tmp_path / "data.parquet"))
    assert [feature.name for feature in guess.schema.features] == ["user", "created", "daytime"]
    assert list(guess.unused) == ["place", "request", "Unnamed: 0", "event_time", "day", "date_of", "kept"]


@pytest.mark.parametrize(
    ("column", "values", "label"),
    [
        ("rating", [1, 5, 3, 4], Label("rating", type="regression")),
        ("stars", [1.0, 4.5, 3.0, 2.0], Label("stars", type="regression")),
        ("conversion", [0, 1, 0, 0], Label("conversion")),
        ("is_follow", [0, 1, 0, 0], Label("is_follow")),
        ("is_follow", [0, 1, 2, 0], None),
        ("finished", [0, 1, 0, 0], None),
    ],
)
def test_labels_beside_a_named_one(tmp_path: Path, column: str, values: list[float], label: Label | None) -> None:
    schema = guessed(write(tmp_path, **{"user": [0, 1, 2, 3], column: values, "click": [0, 1, 1, 0]}))
    assert schema.labels == ((label,) if label else ()) + (Label("click"),)


def test_words_that_may_be_a_label_are_told(tmp_path: Path) -> None:
    guess = guess_schema(write(tmp_path, user=[0, 1, 2, 3], income=[">50K", "<=50K", ">50K", "<=50K"]))
    assert guess.unused == {"income": "'<=50K' or '>50K': write it as 0 and 1 to make it the label"}


def test_a_hashed_column_says_what_collides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guessing, "SMALL_TABLE", 500)
    values = [f"v{i}" for i in range(600)]
    guess = guess_schema(write(tmp_path, wide=[*values, *values[:99], None], label=[0, 1] * 350))
    (wide,) = guess.schema.features
    assert wide == SparseFeature("wide", Table("wide", 6000), hash=True, missing="drop")
    assert "600 distinct strings, hashed: about 9.5% of rows share their bucket with another value" in guess.text
    assert read_all(guess.path) == 700
    buckets = hash_ids(hash_strings(pa.array(values)), "wide", 6000)
    shared = np.bincount(buckets, minlength=6000)[buckets] > 1
    assert abs(shared.mean() - collisions(600, 6000)) < 0.04


def test_half_floats_are_dense(tmp_path: Path) -> None:
    score = pa.array(np.array([0.5, 0.25, np.nan], np.float16))
    schema = guessed(write(tmp_path, user=[0, 1, 1], score=score, label=[0, 1, 1]))
    assert schema.features[1] == DenseFeature("score", missing="fill")


def test_names_that_no_table_can_have(tmp_path: Path) -> None:
    path = write(tmp_path, **{"a/b": [1, 2, 1], "a_b": [1, 2, 2], "": [0.5, 1.0, 0.1], "label": [0, 1, 1]})
    schema = guessed(path)
    assert guess_schema(path).unused == {"": "it has no name: give it one"}
    assert [(feature.name, feature.source) for feature in schema.features] == [  # type: ignore[union-attr]
        ("a_b_2", "a/b"), ("a_b", "a_b"),
    ]  # fmt: skip
