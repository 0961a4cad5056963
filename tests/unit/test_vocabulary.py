"""Vocabularies from counts: of any column, in any number of row groups, threads and merges."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from rechub_dist.cli.main import app
from rechub_dist.data.columns import frequencies
from rechub_dist.data.columns.frequencies import (
    Frequencies,
    build_vocabularies,
    count_values,
    frequent,
    scattered,
    value_type,
)
from rechub_dist.errors import UserError


def ranked(values: list[Any], min_count: int = 1) -> list[tuple[Any, int]]:
    """The reference: values and counts, by count, then by value."""
    counts = Counter(values)
    return sorted(((v, n) for v, n in counts.items() if n >= min_count), key=lambda item: (-item[1], item[0]))


def rows(path: Path) -> list[tuple[Any, int, int]]:
    return [tuple(row.values()) for row in pq.read_table(path).to_pylist()]


@settings(max_examples=40, deadline=None)
@given(
    pieces=st.lists(st.lists(st.none() | st.text("abé", max_size=2), max_size=20), max_size=6),
    form=st.sampled_from([pa.string(), pa.large_string(), pa.dictionary(pa.int8(), pa.string())]),
    waiting=st.integers(1, 30),
)
def test_counts_of_strings(pieces: list[list[str | None]], form: pa.DataType, waiting: int) -> None:
    """However often the counts are merged."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frequencies, "_WAITING", waiting)
        found = Frequencies(pa.large_string())
        for piece in pieces:
            found.add(count_values(pa.chunked_array([pa.array(piece, pa.string()).cast(form)]), pa.large_string()))
        values = [value for piece in pieces for value in piece if value is not None]
        assert [tuple(row.values()) for row in found.sorted().to_pylist()] == ranked(values)
        assert len(found) == len(set(values))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two files of several row groups; strings, integers, lists, and a column of wide unsigned ids."""
    draw = random.Random(0)
    folder = tmp_path / "data"
    folder.mkdir()
    for part in range(2):
        n = 500
        values = [draw.randint(0, 30) ** 2 for _ in range(n)]
        lists = [[draw.randint(0, 40) for _ in range(draw.randint(0, 3))] for _ in range(n)]
        words = [f"w{draw.randint(0, 9)}" if draw.random() < 0.9 else None for _ in range(n)]
        table = pa.table(
            {
                "item": pa.array(values, pa.int16()),
                "history": pa.array(lists, pa.list_(pa.int32())),
                "word": pa.array(words).dictionary_encode(),
                "words": pa.ListArray.from_arrays(list(range(n + 1)), pa.array(words).dictionary_encode()),
                "wide": pa.array([2**63 + v for v in values], pa.uint64()),
                "price": [0.5] * n,
            }
        )
        pq.write_table(table, folder / f"{part}.parquet", row_group_size=70)
    return folder


def flat(folder: Path, *columns: str) -> list[Any]:
    values: list[Any] = []
    for column in columns:
        for value in pq.read_table(folder)[column].to_pylist():
            values += value if isinstance(value, list) else [value]
    return [value for value in values if value is not None]


@pytest.mark.parametrize("columns", [["item"], ["history"], ["word"], ["words"], ["wide"], ["item", "history"]])
@pytest.mark.parametrize("threads", [1, 3])
def test_one_vocabulary(data: Path, tmp_path: Path, columns: list[str], threads: int) -> None:
    out = tmp_path / "deep" / "v.parquet"
    done: list[tuple[int, int]] = []
    (summary,) = build_vocabularies(
        str(data), columns, out, min_count=20, progress=lambda *at: done.append(at), threads=threads
    )
    every, kept = ranked(flat(data, *columns)), ranked(flat(data, *columns), 20)
    assert len(kept) > 0
    assert rows(out) == [(value, i + 1, count) for i, (value, count) in enumerate(kept)]
    assert (summary.distinct, summary.kept, summary.rows) == (len(every), len(kept), len(kept) + 1)
    assert (summary.occurrences, summary.covered) == (sum(n for _, n in every), sum(n for _, n in kept))
    assert done == [(i + 1, 16) for i in range(16)]
    assert [path.name for path in out.parent.iterdir()] == ["v.parquet"]


def test_one_a_column(data: Path, tmp_path: Path) -> None:
    build_vocabularies(str(data), ["item", "word"], tmp_path / "v", max_size=3, first_id=0)
    for name in ("item", "word"):
        assert rows(tmp_path / "v" / f"{name}.parquet") == [
            (value, i, count) for i, (value, count) in enumerate(ranked(flat(data, name))[:3])
        ]


def test_what_is_no_vocabulary(data: Path, tmp_path: Path) -> None:
    def refused(message: str, columns: list[str], **options: Any) -> None:
        with pytest.raises(UserError, match=message):
            build_vocabularies(str(data), columns, tmp_path / "v.parquet", **options)
        assert not (tmp_path / "v.parquet").exists()

    refused("no column 'items'; did you mean 'item'", ["items"])
    refused("column 'price' is double, but a vocabulary needs integers or strings", ["price"])
    refused("one type, but column 'item' is int16, 'word' is dictionary", ["item", "word"])
    refused("no value of item occurs 1000 times", ["item"], min_count=1000)
    refused("min_count is 0, must be at least 1", ["item"], min_count=0)
    refused("first_id is -1", ["item"], first_id=-1)
    assert value_type(pa.list_(pa.list_(pa.int8()))) is None


def test_negative_and_wide_ids_do_not_go_together(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": [-1], "b": pa.array([2**63], pa.uint64())}), tmp_path / "x.parquet")
    with pytest.raises(UserError, match="cannot be counted together"):
        build_vocabularies(str(tmp_path / "x.parquet"), ["a", "b"], tmp_path / "v.parquet")


def test_the_command(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "_words" / "v.parquet"
    arguments = ["data", "vocabulary", str(data), "--column", "item", "--column", "history", "--min-count", "20"]
    result = CliRunner().invoke(app, [*arguments, "--out", str(out)])
    assert result.exit_code == 0
    kept = ranked(flat(data, "item", "history"), 20)
    assert f"{len(kept)} of" in result.stdout
    assert f"{{rows: {len(kept) + 1}, vocabulary: _words/v.parquet, out_of_range: unknown}}" in result.stdout
    assert [value for value, _, _ in rows(out)] == [value for value, _ in kept]


def test_nothing_but_an_earlier_vocabulary_is_written_over(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    part = data / "part-0.parquet"
    pq.write_table(pa.table({"item": [1, 2, 2], "a/b": [3, 4, 4]}), part)
    (tmp_path / "link.parquet").symlink_to(part)
    before = part.read_bytes()
    for out in (part, data / "new.parquet", data, tmp_path / "link.parquet"):
        with pytest.raises(UserError, match="the input"):
            build_vocabularies(str(data), ["item"], out)
    theirs = tmp_path / "theirs.parquet"
    theirs.write_bytes(before)
    with pytest.raises(UserError, match="exists and is not a vocabulary that rechub-dist has written"):
        build_vocabularies(str(data), ["item"], theirs)
    with pytest.raises(UserError, match="is an address"):
        build_vocabularies(str(data), ["item"], Path("s3://bucket/item.parquet"))
    assert part.read_bytes() == theirs.read_bytes() == before
    assert sorted(path.name for path in tmp_path.rglob("*")) == sorted(
        ["data", "part-0.parquet", "link.parquet", "theirs.parquet"]
    )
    for kept in (2, 1):
        (found, slashed) = build_vocabularies(str(data), ["item", "a/b"], data / "_words", max_size=kept)
        assert found.kept == kept
    assert slashed.path == data / "_words" / "a%2Fb.parquet"


@pytest.mark.parametrize("count", [1, 2, 3, 10, 999, 1000, 1_000_001])
def test_scattered_places_are_all_places(count: int) -> None:
    assert np.array_equal(np.sort(scattered(count)), np.arange(count))


@pytest.mark.parametrize("ranks", [2, 4, 8, 16])
def test_ranks_of_a_table_by_rows_have_equal_work_where_values_are_scattered(ranks: int) -> None:
    """Of a power law: the different rows that a batch of 8,192 looks up and updates, by ranges of rows."""
    values = 200_000
    share = 1 / np.arange(1, values + 1) ** 1.05
    counts = pa.table({"value": np.arange(values), "count": np.round(1e9 * share / share.sum()).astype(np.int64)})
    ids = np.random.default_rng(3).choice(values, 8_192, p=share / share.sum())

    def busiest(scatter: bool) -> float:
        table = frequent(counts, 0, scatter=scatter)
        rows = np.unique(table["id"].to_numpy()[ids])
        work = np.bincount(rows // -(-(values + 1) // ranks), minlength=ranks)
        return float(work.max() / work.mean())

    assert busiest(scatter=True) < 1.1
    assert busiest(scatter=False) > 1.5


def test_a_million_values_are_scattered_by_default() -> None:
    for count, expected in ((999_999, False), (1_000_000, True)):
        counts = pa.table({"value": np.arange(count), "count": np.full(count, 7)})
        ids = frequent(counts, 1)["id"].to_numpy()
        assert (ids[:3].tolist() != [1, 2, 3]) is expected
        assert (frequent(counts, 1, scatter=not expected)["id"][1].as_py() == 2) is expected
