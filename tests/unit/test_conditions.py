"""Rows by conditions, against data that never had the others."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from rechub_dist.batch import Batch
from rechub_dist.config import Selection
from rechub_dist.data.parquet.conditions import Conditions
from rechub_dist.data.parquet.manifest import Manifest
from rechub_dist.data.parquet.scan import scan
from rechub_dist.data.reader import ParquetReader
from rechub_dist.data.spec import BatchSpec
from rechub_dist.data.stored import StoredRows
from rechub_dist.errors import UserError
from rechub_dist.features import DenseFeature, Label, SequenceFeature, SparseFeature, Table
from rechub_tests.damage import spoil_pages

SPEC = BatchSpec(
    (SparseFeature("row", Table("row", 10_000)), SequenceFeature("history", Table("item", 50), max_length=3)),
    (DenseFeature("x"),),
    (Label("y"),),
    collections={"a": ("row",), "b": ("history",)},
)
WHERE = (("x", "<", 0.7), ("kind", "in", ["a", "b"]))


SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("history", pa.list_(pa.int64())),
        ("x", pa.float64()),
        ("y", pa.int64()),
        ("kind", pa.string()),
    ]
)


def rows(count: int, seed: int) -> pa.Table:
    rng = np.random.default_rng(seed)
    columns = {
        "row": rng.permutation(10_000)[:count],
        "history": [rng.integers(0, 50, n).tolist() for n in rng.integers(0, 5, count)],
        "x": rng.random(count),
        "y": rng.integers(0, 2, count),
        "kind": [None if k == 3 else "abc"[k] for k in rng.integers(0, 4, count)],
    }
    return pa.table(columns, SCHEMA)


def kept(table: pa.Table) -> pa.Table:
    """By plain Python."""
    return table.filter(pa.array([r["x"] < 0.7 and r["kind"] in ("a", "b") for r in table.to_pylist()], pa.bool_()))


def write(folder: Path, layout: list[list[int]]) -> tuple[Manifest, Manifest, list[list[pa.Table]]]:
    """The same data with conditions, and without the rows that do not meet them; and its row groups."""
    groups = [[rows(n, 100 * f + g) for g, n in enumerate(counts)] for f, counts in enumerate(layout)]
    for name, change in (("all", lambda table: table), ("kept", kept)):
        (folder / name).mkdir(parents=True)
        for number, tables in enumerate(groups):
            with pq.ParquetWriter(folder / name / f"{number}.parquet", SCHEMA) as writer:
                for table in tables:
                    writer.write_table(change(table))
    return Manifest.read(Selection(path=str(folder / "all"), where=WHERE)), Manifest.read(str(folder / "kept")), groups


def contents(batch: Batch) -> list[Any]:
    return [
        batch.rows,
        batch.dense.tolist(),
        batch.labels.tolist(),
        *((jagged.values().tolist(), jagged.lengths().tolist()) for jagged in batch.jagged.values()),
    ]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    layout=st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=3), min_size=1, max_size=3),
    batch=st.integers(1, 30),
    world=st.integers(1, 3),
    shuffle=st.booleans(),
    begin=st.floats(0, 1),
)
def test_as_if_the_others_were_not_there(
    tmp_path_factory: pytest.TempPathFactory,
    layout: list[list[int]],
    batch: int,
    world: int,
    shuffle: bool,
    begin: float,
) -> None:
    groups = [kept(rows(n, 100 * f + g)) for f, counts in enumerate(layout) for g, n in enumerate(counts)]
    assume(any(table.num_rows for table in groups))
    chosen, reference, _ = write(tmp_path_factory.mktemp("data"), layout)
    assert chosen.rows == reference.rows == sum(table.num_rows for table in groups)
    for rank in range(world):
        readers = [
            ParquetReader(m, SPEC, batch_size=batch, rank=rank, world_size=world, shuffle=shuffle, prefetch=0)
            for m in (chosen, reference)
        ]
        step = int(begin * readers[0].steps)
        mine, theirs = ([contents(b) for b in reader.batches(1, step)] for reader in readers)
        assert mine == theirs


def test_where_the_rows_are_stored(tmp_path: Path) -> None:
    chosen, _, groups = write(tmp_path, [[40, 30], [50]])
    reader = ParquetReader(chosen, SPEC, batch_size=16, prefetch=0, seed=2)
    stored = StoredRows(reader, 0)
    for step, batch in enumerate(reader.batches(0)):
        found = [
            groups[int(Path(piece.path).stem)][piece.group]["row"][row].as_py()
            for piece in stored.of(step)
            for row in piece.rows
        ]
        assert found == batch.feature("row").values().tolist()


def test_a_scan_sees_the_same_rows(tmp_path: Path) -> None:
    chosen, reference, _ = write(tmp_path, [[40, 30], [50]])
    seen = [
        sorted(row for count, part in scan(m, ["row"], lambda t: t["row"].to_pylist()) for row in part)
        for m in (chosen, reference)
    ]
    assert seen[0] == seen[1]


def test_rows_are_counted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("rechub_dist.data.parquet.footers._SETTLED", -60.0)
    first, _, _ = write(tmp_path, [[40, 30], [50]])
    reads: list[list[str]] = []
    plain = pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        pq.ParquetFile,
        "read_row_group",
        lambda self, group, columns, **more: reads.append(columns) or plain(self, group, columns=columns, **more),
    )
    again = Manifest.read(Selection(path=str(tmp_path / "all"), where=WHERE))
    assert (again.counts, again.fingerprint(), reads) == (first.counts, first.fingerprint(), [])
    other = Manifest.read(Selection(path=str(tmp_path / "all"), where=(("x", "<", 0.3),)))
    assert reads == [["x"]] * 3
    whole = Manifest.read(str(tmp_path / "all"))
    assert len({m.fingerprint() for m in (first, other, whole)}) == 3


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        (("int", ">=", 2), [1, 2]),
        (("int", "==", 2.0), [1]),
        (("int", ">", 1.5), [1, 2]),
        (("int", "in", [1, 3]), [0, 2]),
        (("int", "not in", [1, 3]), [1]),
        (("number", "!=", 0.5), [0]),  # a missing value meets nothing
        (("text", "=", "b"), [1]),
        (("text", ">=", "b"), [1, 2]),
        (("word", "in", ["a", "c"]), [0, 2]),
        (("word", "!=", "a"), [1, 2]),
        (("yes", "=", True), [0, 2]),
        (("day", ">=", "2022-04-25"), [1, 2]),
        (("day", "=", datetime.date(2022, 4, 25)), [1]),
        (("day", "in", ["2022-04-24", "2022-04-26"]), [0, 2]),
        (("time", "<", "2022-04-25T12:00:00"), [0, 1]),
        (("time", ">", datetime.date(2022, 4, 25)), [2]),
        (("day_text", ">", datetime.date(2022, 4, 24)), [1, 2]),
    ],
)
def test_types(condition: Any, expected: list[int]) -> None:
    days = [datetime.date(2022, 4, day) for day in (24, 25, 26)]
    table = pa.table(
        {
            "int": pa.array([1, 2, 3], pa.int32()),
            "number": [1.0, 0.5, None],
            "text": ["a", "b", "c"],
            "word": pa.array(["a", "b", "c"]).dictionary_encode(),
            "yes": [True, False, True],
            "day": days,
            "time": pa.array(days).cast(pa.timestamp("us")),
            "day_text": [day.isoformat() for day in days],
        }
    )
    assert Conditions((condition,)).rows(table, "data").tolist() == expected


@pytest.mark.parametrize(
    ("condition", "words"),
    [
        (("knd", "=", "a"), "neither a partition nor a column 'knd', which where: .* needs; did you mean 'kind'"),
        (("x", "=", "high"), r"does not fit: x is double"),
        (("history", "=", 3), r"does not fit: history is list"),
        (("x", ">", 2.0), "none of its 40 rows meets where: .*; check 'where'"),
    ],
)
def test_conditions_that_do_not_fit(tmp_path: Path, condition: Any, words: str) -> None:
    write(tmp_path, [[40]])
    with pytest.raises(UserError, match=words) as caught:
        Manifest.read(Selection(path=str(tmp_path / "all"), where=(condition,)))
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_counted_is_left_out(tmp_path: Path) -> None:
    write(tmp_path, [[40], [30]])
    spoil_pages(tmp_path / "all" / "1.parquet", 0, column=4)
    source = Selection(path=str(tmp_path / "all"), where=WHERE)
    with pytest.raises(UserError, match=r"1\.parquet: row group 0 is truncated or corrupt"):
        Manifest.read(source)
    manifest = Manifest.read(source, skip_bad=True)
    assert [skipped.reason for skipped in manifest.left_out] == ["corrupt"]
    assert manifest.counts == (kept(rows(40, 0)).num_rows,)


@pytest.mark.parametrize("kind", [pa.string_view(), pa.large_string(), pa.dictionary(pa.int8(), pa.string())])
@pytest.mark.parametrize("where", [("x", ">", 0.5), ("a", "=", "p")])
def test_strings_and_floats_of_any_type(tmp_path: Path, kind: pa.DataType, where: Any) -> None:
    strings = pa.array(["p", "q", "p", None])
    strings = strings.dictionary_encode().cast(kind) if pa.types.is_dictionary(kind) else strings.cast(kind)
    table = pa.table({"a": strings, "x": pa.array(np.array([1, 0.25, 0.75, 0.5], np.float16))})
    pq.write_table(table, tmp_path / "p.parquet")
    spec = BatchSpec((SparseFeature("a", Table("a", 50), hash=True),), (DenseFeature("x"),), collections={"c": ("a",)})
    manifest = Manifest.read(Selection(path=str(tmp_path), where=(where,)))
    reader = ParquetReader(manifest, spec, batch_size=4, shuffle=False, streams=1)
    [batch] = list(reader.batches(0))
    assert batch.dense[:, 0].tolist() == [1.0, 0.75]
    assert len(set(batch.feature("a").values().tolist())) == 1
