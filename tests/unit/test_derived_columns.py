"""Derived columns that the files hold, or that are computed as they are read; and ids that the files hold already."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from rechub_dist.assembly.identity import identity, other_than, vocabularies_of
from rechub_dist.assembly.parts import build, plan
from rechub_dist.batch import Batch
from rechub_dist.config import Selection
from rechub_dist.data.columns.extremes import check_extremes
from rechub_dist.data.columns.fit import file_columns, reading
from rechub_dist.data.columns.values import read_dense, read_ids
from rechub_dist.data.columns.vocabulary import read_vocabulary, vocabulary_fingerprint, vocabulary_of
from rechub_dist.data.counts import count_positives
from rechub_dist.data.parquet.manifest import Manifest
from rechub_dist.data.reader import ParquetReader
from rechub_dist.data.rows import RowEncoder
from rechub_dist.data.run_file import load_run
from rechub_dist.data.spec import BatchSpec
from rechub_dist.derived import Overlap, Split
from rechub_dist.embedded import Lookup
from rechub_dist.errors import UserError
from rechub_dist.features import CrossFeature, DenseFeature, SequenceFeature, SparseFeature, Table
from rechub_dist.inference.predict import words
from rechub_dist.objectives import Ranking
from rechub_tests.derived import DERIVED, FEATURES, held_rows, raw_rows, write_derived
from rechub_tests.runs import run_file

SMALL = {"model": {"features": FEATURES, "embedding_dim": 4}}


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("derived")
    return write_derived(folder / "raw", held=False), write_derived(folder / "held", held=True)


@pytest.fixture(scope="module")
def spec(roots: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> BatchSpec:
    path = run_file(tmp_path_factory.mktemp("run"), roots[0], "DeepFM", **SMALL)
    return replace(plan(load_run(path), device="cpu", world_size=1).spec, keys=("liked",))


def tensors(batch: Batch) -> list[Any]:
    jagged = [
        tensor for each in batch.jagged.values() for tensor in (each.values(), each.lengths(), each.weights_or_none())
    ]
    keys = [key.to_pylist() for key in batch.keys.values()]
    return [batch.dense, batch.labels, *jagged, *batch.id_weights.values(), keys]


def same(one: Batch, other: Batch) -> bool:
    pairs = list(zip(tensors(one), tensors(other), strict=True))
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


def read(path: Path, spec: BatchSpec, **how: Any) -> list[Batch]:
    manifest = Manifest.read(str(path), fit=lambda schema, where: file_columns(schema, spec, where))
    return list(ParquetReader(manifest, spec, batch_size=64, **how).batches(0))


@pytest.mark.parametrize("how", [{"shuffle": False}, {"seed": 3}, {"rank": 1, "world_size": 3, "prefetch": 0}])
def test_computed_columns_are_those_that_files_hold(
    roots: tuple[Path, Path], spec: BatchSpec, how: dict[str, Any]
) -> None:
    raw, held = (read(root / "train", spec, **how) for root in roots)
    assert len(raw) == len(held) > 3
    assert all(map(same, raw, held))
    assert raw[0].dense.abs().sum() > 0


def test_only_what_is_read_is_computed(roots: tuple[Path, Path], spec: BatchSpec) -> None:
    raw, held = (Manifest.read(str(root / "train")).schema.names for root in roots)
    some = replace(spec, keys=(), features=(), dense=(DenseFeature("liked"),), labels=(), collections={})
    assert reading(some, held) == ((), (), ["liked"])
    computed, inputs, uses = reading(some, raw)
    assert [one.name for one in computed] == ["genres", "taste", "liked"]
    assert inputs == ("genre_text", "taste_text")
    assert uses == ["genre_text", "taste_text"]
    both = replace(
        some, dense=(DenseFeature("liked"), DenseFeature("age"), DenseFeature("time"), DenseFeature("time2", "time"))
    )
    assert reading(both, raw).uses == ["genre_text", "taste_text", "released", "time", "time", "time"]
    # one output of two is there, and stays
    taste = replace(some, dense=(), features=tuple(f for f in spec.features if f.name == "taste"))
    computed, inputs, uses = reading(taste, ["taste", "taste_text"])
    assert [one.name for one in computed] == ["taste"]
    assert (inputs, uses) == (("taste_text",), ["taste_text", "taste"])


def test_half_of_what_is_derived_is_held(tmp_path: Path) -> None:
    feature = SparseFeature("taste", Table("t", 9, dim=4), hash=True, weights="taste_weights")
    spec = BatchSpec((feature,), collections={"weighted": ("taste",)}, derived=DERIVED)
    table = pa.table({"taste": [["a"], ["b"]], "taste_text": ["x:3", "y:0.5"]})
    pq.write_table(table, tmp_path / "a.parquet")
    [batch] = read(tmp_path, spec, shuffle=False)
    own = RowEncoder(spec).batches(table, 10)
    assert same(batch, next(own))
    assert batch.id_weights["taste"].tolist() == [3.0, 0.5]
    hashed, _ = read_ids(pa.array(["a", "b"]), feature, "f")
    assert batch.feature("taste").values().tolist() == hashed.tolist()


def test_what_a_derived_column_reads_may_be_given_derived_or_not() -> None:
    bucket = SparseFeature("age_bucket", Table("a", 9, dim=4))
    encoder = RowEncoder(BatchSpec((bucket,), collections={"c": ("age_bucket",)}, derived=DERIVED))
    for rows in ({"age": [50, 2000]}, {"time": [86400 * 50, 86400 * 2000], "released": [0, 0]}, {"age_bucket": [1, 3]}):
        assert next(encoder.batches(rows, 9)).feature("age_bucket").values().tolist() == [1, 3]


def test_rows_given_are_derived_from_as_files_are(roots: tuple[Path, Path], spec: BatchSpec) -> None:
    rows = raw_rows(90, seed=1)
    expected = read(roots[1] / "valid", spec, shuffle=False)
    for given in (rows, rows.to_pandas(), rows.to_pydict(), held_rows(rows)):
        assert all(map(same, RowEncoder(spec).batches(given, 64), expected))
    with pytest.raises(
        UserError, match="the rows given: there is no column 'genre_text', which derived column 'genres'"
    ):
        list(RowEncoder(spec).batches(rows.drop_columns("genre_text"), 64))
    empty = next(RowEncoder(spec).batches(rows.slice(0, 0), 64))
    assert empty.rows == 0


def test_rows_that_meet_conditions(roots: tuple[Path, Path], spec: BatchSpec) -> None:
    found = []
    for root in roots:
        where = Selection(path=str(root / "train"), where=(("price", "<", 30), ("click", "=", 1)))
        manifest = Manifest.read(where, fit=lambda schema, name: file_columns(schema, spec, name))
        found.append(list(ParquetReader(manifest, spec, batch_size=20).batches(0)))
    assert len(found[0]) == len(found[1]) > 1
    assert all(map(same, *found))


def test_files_that_hold_other_columns(tmp_path: Path, spec: BatchSpec) -> None:
    for part, table in enumerate((raw_rows(30), raw_rows(20, 1), held_rows(raw_rows(9, 2)))):
        pq.write_table(table, tmp_path / f"{part}.parquet")
    with pytest.raises(
        UserError, match=r"2.parquet: its columns differ from those of .*0.parquet: column 'age' is numb"
    ):
        read(tmp_path, spec)
    fit = lambda schema, where: file_columns(schema, spec, where)  # noqa: E731 - as a reader's caller gives it
    assert [file.name for file in Manifest.read(str(tmp_path), fit=fit, skip_bad=True).files] == [
        "0.parquet",
        "1.parquet",
    ]


def test_what_a_value_cannot_be_derived_from(tmp_path: Path, spec: BatchSpec) -> None:
    table = raw_rows(9)
    pq.write_table(table.set_column(2, "taste_text", pa.array(["a:b"] * 9)), tmp_path / "a.parquet")
    with pytest.raises(
        UserError, match=r"a.parquet: column 'taste_text': 'b' is no weight of 32 bits; derived column 't"
    ):
        read(tmp_path, spec)
    pq.write_table(table.set_column(2, "taste_text", pa.array([1] * 9)), tmp_path / "a.parquet")
    with pytest.raises(
        UserError, match=r"a.parquet: column 'taste_text' is int64, but derived column 'taste' \(kind: key"
    ):
        read(tmp_path, spec)
    with pytest.raises(UserError, match=r"column 'hour': 1 key\(s\) are missing"):
        list(
            RowEncoder(replace(spec, keys=("hour",))).batches(
                table.set_column(3, "time", pa.array([None, *range(8)])), 9
            )
        )


def test_statistics_are_those_of_columns_that_are_held(tmp_path: Path) -> None:
    spec = BatchSpec((SparseFeature("hour", Table("h", 5, dim=4)),), derived=DERIVED)
    for name, column in (("time", [0, 3600 * 9]), ("hour", [1, 9])):
        pq.write_table(pa.table({name: column}), tmp_path / f"{name}.parquet")
    check_extremes(Manifest.read(str(tmp_path / "time.parquet")).files, spec)
    with pytest.raises(UserError, match="id 9 is outside table 'h'"):
        check_extremes(Manifest.read(str(tmp_path / "hour.parquet")).files, spec)


def test_positives_are_counted_in_derived_columns(tmp_path: Path) -> None:
    pq.write_table(pa.table({"time": [0, 3600, 3600 * 25]}), tmp_path / "a.parquet")
    hour = SparseFeature("hour", Table("h", 24, dim=4))
    counts = count_positives(Manifest.read(str(tmp_path)), hour, None, derived=(replace(DERIVED[2], utc_offset=0.0),))
    assert counts.tolist() == [1, 2, *[0] * 22]


def test_how_columns_are_derived_makes_another_run(roots: tuple[Path, Path], tmp_path: Path) -> None:
    """Only where both runs compute them: files that hold them are the same data."""
    config = load_run(run_file(tmp_path, roots[0], "DeepFM", **SMALL))
    parts = build(config, device="cpu", world_size=1)
    other = tuple(replace(one, by="#") if isinstance(one, Split) else one for one in DERIVED)
    held, computed, differently = (identity(parts, "data", derived) for derived in ((), DERIVED, other))
    assert "derived" not in held["data"]

    def differing(saved: Any, wanted: Any) -> list[str]:
        return other_than({"config": config.dump(), "identity": saved}, wanted, "here")

    assert differing(computed, differently) == ['data.derived.genres.by "|" -> "#"']
    for saved, wanted in ((held, computed), (computed, held), (held, held), (computed, computed), (differently, held)):
        assert differing(saved, wanted) == []


# --- ids that the files hold already

WORDS = ["a", "b", "c"]


@pytest.fixture
def vocabulary(tmp_path: Path) -> str:
    path = tmp_path / "words.parquet"
    pq.write_table(pa.table({"value": WORDS, "id": [3, 1, 2]}), path)
    read_vocabulary.cache_clear()
    return str(path)


@pytest.mark.parametrize("policy", ["error", "drop", "unknown"])
def test_encoded_ids_are_read_as_they_are(vocabulary: str, policy: Any) -> None:
    feature = SparseFeature(
        "x", Table("x", 4), vocabulary=vocabulary, encoded=True, missing=policy, out_of_range=policy, unknown_id=0
    )
    values = replace(feature, encoded=False)
    assert vocabulary_of(feature) is None
    assert vocabulary_of(values) is not None
    assert vocabulary_fingerprint(feature) == vocabulary_fingerprint(values)
    ids, keep = read_ids(pa.array([1, 3, 2], pa.int32()), feature, "f")
    assert (ids.tolist(), keep) == ([1, 3, 2], None)
    assert read_ids(pa.array(["b", "a", "c"]), values, "f")[0].tolist() == [1, 3, 2]
    for array, of in ((pa.array([1, 9, None]), feature), (pa.array(["b", "z", None]), values)):
        if policy == "error":
            message = "'z' is not in vocabulary" if of is values else "id 9 is outside table 'x' of 4 rows"
            with pytest.raises(UserError, match=message):
                read_ids(array[:2], of, "f")
            with pytest.raises(UserError, match=r"1 id\(s\) are missing"):
                read_ids(array[2:], of, "f")
            continue
        ids, keep = read_ids(array, of, "f")
        if policy == "unknown":
            assert (ids.tolist(), keep) == ([1, 0, 0], None)
        else:
            assert keep is not None
            assert ids[keep].tolist() == [1]


def test_what_the_files_of_an_encoded_feature_hold(vocabulary: str, tmp_path: Path) -> None:
    feature = SequenceFeature("x", Table("x", 4, dim=4), 3, vocabulary=vocabulary, encoded=True)
    spec = BatchSpec((feature,), collections={"c": ("x",)})
    (tmp_path / "data").mkdir()
    pq.write_table(pa.table({"x": [[1, 3], [2]]}), tmp_path / "data" / "a.parquet")
    [batch] = read(tmp_path / "data", spec, shuffle=False)
    assert same(batch, next(RowEncoder(spec.of_values()).batches({"x": [["b", "a"], ["c"]]}, 9)))
    pq.write_table(pa.table({"x": [["a"]]}), tmp_path / "data" / "a.parquet")
    with pytest.raises(
        UserError, match=r"'x' needs a list of integers; for strings, leave encoded out: they are looked"
    ):
        read(tmp_path / "data", spec)
    derived = replace(spec, dense=(DenseFeature("both"),), derived=(Overlap("both", "x", "x2"),))
    pq.write_table(pa.table({"x": [[1]], "x2": [[1]]}), tmp_path / "data" / "a.parquet")
    with pytest.raises(
        UserError, match=r"column 'x' holds ids \(feature 'x' is encoded\), but derived column 'both' is"
    ):
        read(tmp_path / "data", derived)


def test_crosses_and_items_of_encoded_features(vocabulary: str) -> None:
    one = SparseFeature("x", Table("x", 4, dim=4), vocabulary=vocabulary, encoded=True)
    cross = CrossFeature("both", (one, SparseFeature("y", Table("y", 9, dim=4))), buckets=99, dim=4)
    spec = BatchSpec((*cross.inputs, cross), collections={"c": ("x", "y", "both")})
    ids = next(RowEncoder(spec).batches({"x": [1, 3], "y": [5, 6]}, 9))
    values = next(RowEncoder(spec.of_values()).batches({"x": ["b", "a"], "y": [5, 6]}, 9))
    assert same(ids, values)
    ranking = Ranking((Lookup("x", one, one.table, "sum"),), (), None, *[no_vectors] * 4)
    assert words(torch.tensor([3, 1, 0]), ranking).to_pylist() == ["a", "b", None]


def no_vectors(_: Any) -> Any:
    raise NotImplementedError


def test_encoded_is_the_same_run(roots: tuple[Path, Path], tmp_path: Path, vocabulary: str) -> None:
    """As long as the vocabulary is the same."""
    runs = []
    other = tmp_path / "other.parquet"
    pq.write_table(pa.table({"value": WORDS, "id": [1, 2, 3]}), other)
    for path, encoded in ((vocabulary, False), (vocabulary, True), (str(other), True)):
        features = {"user": {"kind": "sparse", "rows": 40, "vocabulary": path, "encoded": encoded}}
        config = load_run(run_file(tmp_path / "run", roots[0], "DeepFM", **SMALL, data={"features": features}))
        parts = build(config, device="cpu", world_size=1)
        one = identity(parts, "data")
        assert vocabularies_of(parts).keys() == {"user"}
        runs.append((one, {"config": config.dump(), "identity": one}))
    (values, record), (ids, _), (others, _) = runs
    assert values == ids
    assert other_than(record, ids, "here") == []
    assert [line.split()[0] for line in other_than(record, others, "here")] == ["data.vocabularies.user"]


# --- standardised numbers


def dense(values: Any, **settings: Any) -> Any:
    return read_dense(values, DenseFeature("x", **settings), "f")


def test_mean_and_std() -> None:
    values = pa.array([1.0, None, 5.0])
    found = dense(values, missing="fill", fill=3.0, mean=3.0, std=2.0)
    assert found.dtype == np.float32
    assert found[:, 0].tolist() == [-1.0, 0.0, 1.0]
    logs = dense(values, missing="fill", fill=3.0, transform="log", mean=0.5, std=0.25)
    np.testing.assert_allclose(logs[:, 0], (np.log1p([1.0, 3.0, 5.0]) - 0.5) / 0.25, rtol=1e-7)
    for kind in (pa.int8(), pa.bool_(), pa.decimal128(19), pa.float32()):
        assert dense(pa.array([1, 0]).cast(kind), mean=0.5, std=0.5)[:, 0].tolist() == [1.0, -1.0]
    pair = pa.array([[1.0, 2.0], [3.0, 4.0]])
    assert dense(pair, dim=2, mean=1.0, std=2.0).tolist() == [[0.0, 0.5], [1.0, 1.5]]
    # what float32 cannot tell apart: the difference is taken before
    assert dense(pa.array([1e9 + 1, 1e9]), mean=1e9, std=1.0)[:, 0].tolist() == [1.0, 0.0]
    with pytest.raises(
        UserError, match=r"f: column 'x': a value less mean 0.0, divided by std 1e-30, is beyond float32"
    ):
        dense(pa.array([1e20]), std=1e-30)


def test_mean_and_std_make_another_run(roots: tuple[Path, Path], tmp_path: Path) -> None:
    def found(**how: Any) -> Any:
        features = {"price": {"kind": "dense", "missing": "fill", **how}}
        config = load_run(run_file(tmp_path, roots[0], "DeepFM", **SMALL, data={"features": features}))
        one = identity(build(config, device="cpu", world_size=1), "data")
        return one, {"config": config.dump(), "identity": one}

    plain, record = found()
    assert not {"mean", "std", "encoded"} & plain["data"]["features"]["price"].keys()
    assert not {"mean", "std", "encoded"} & plain["data"]["features"]["user"].keys()
    assert other_than(record, found(mean=2)[0], "here") == ["data.features.price.mean null -> 2.0"]
