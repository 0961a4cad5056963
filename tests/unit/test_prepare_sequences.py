"""The public data sets of sequences: on small files in the published formats, and (marked `data`) on the real ones."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rechub_dist.config import read_yaml
from rechub_dist.data.prepare import preparation
from rechub_dist.data.prepare.sequences import sequence_schema
from rechub_dist.data.prepare.writer import PREFIXES, SPLITS
from rechub_dist.errors import UserError
from rechub_dist.schema import parse_schema

DATA = Path(__file__).parents[2] / os.environ.get("RECHUB_DATA", "../shared/data")


def stored(folder: Path, split: str) -> list[tuple[int, list[int], int]]:
    """User, history and item of a split's rows."""
    columns = (pq.read_table(folder / split)[name].to_pylist() for name in ("user_id", "history", "item"))
    return list(zip(*columns, strict=True))


# Amazon Beauty


def test_amazon_beauty(tmp_path: Path) -> None:
    (tmp_path / "Beauty.txt").write_text("7 30 10 20 10 40\n2 10 30 20 40\n9 20 10\n")
    out = tmp_path / "out"
    preparation("amazon_beauty").prepare(tmp_path, out)
    assert stored(out, "train") == [(0, [0], 2), (1, [2, 0], 1), (2, [1], 0)]
    assert sorted(stored(out, PREFIXES)) == [(0, [0], 2), (1, [2], 0), (1, [2, 0], 1), (2, [1], 0)]
    assert stored(out, "valid") == [(0, [0, 2], 1), (1, [2, 0, 1], 0)]
    assert stored(out, "test") == [(0, [0, 2, 1], 3), (1, [2, 0, 1, 0], 3)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 2 3\n2 x 3\n", "user item item"),
        ("1 2  3\n", "user item item"),
        ("1 2 3\n1 4 5\n", "a user has several lines"),
        ("1 2\t3\n", "not in the published format"),
    ],
)
def test_amazon_beauty_broken_source(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "Beauty.txt").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        preparation("amazon_beauty").prepare(tmp_path, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


# Diginetica


def diginetica(source: Path, learned: list[list[int]], held_out: list[tuple[list[int], int]]) -> Path:
    lists = pa.list_(pa.int32())
    pq.write_table(pa.table({"session": pa.array(learned, lists)}), source / "train_sessions.parquet")
    table = {"prefix": pa.array([prefix for prefix, _ in held_out], lists), "next_item": [item for _, item in held_out]}
    pq.write_table(pa.table(table), source / "test.parquet")
    return source


HELD_OUT = [([9, 3, 9], 3), ([9, 3], 9), ([9], 3), ([1], 2)]


def test_diginetica(tmp_path: Path) -> None:
    learned = [[1, 2, 3], *[[1, 2]] * 17, [5, 5, 4], [2, 6, 1]]
    out = tmp_path / "out"
    preparation("diginetica").prepare(diginetica(tmp_path, learned, HELD_OUT), out)
    train = stored(out, "train")
    assert len(train) == 18
    assert train[0] == (0, [0, 1], 2)
    assert stored(out, PREFIXES)[:3] == [(0, [0], 1), (0, [0, 1], 2), (1, [0], 1)]
    assert stored(out, "valid") == [(18, [4], 4), (18, [4, 4], 3), (19, [1], 5), (19, [1, 5], 0)]
    assert stored(out, "test") == [(20, [6], 2), (20, [6, 2], 6), (20, [6, 2, 6], 2), (21, [0], 1)]
    assert parse_schema(read_yaml(out / "dataset.yaml")) == sequence_schema(22, 7, 19)


@pytest.mark.parametrize(
    "held_out",
    [
        HELD_OUT[1:2],  # the shortest is missing
        HELD_OUT[:2] + HELD_OUT[3:],
        [([9, 3, 9], 3), ([9], 9)],  # a prefix is missing
        [([9, 3, 9], 3), ([9, 3], 8), ([9], 3)],  # another next item
        [([9, 3, 9], 3), ([8, 3], 9), ([8], 3)],  # another session
        [([], 3)],
        [],
    ],
)
def test_diginetica_broken_prefixes(tmp_path: Path, held_out: list[tuple[list[int], int]]) -> None:
    with pytest.raises(UserError, match=r"test\.parquet is not in the published format"):
        preparation("diginetica").prepare(diginetica(tmp_path, [[1, 2]] * 10, held_out), tmp_path / "out")


def test_diginetica_broken_columns(tmp_path: Path) -> None:
    source = diginetica(tmp_path, [[1, 2]] * 10, HELD_OUT)
    path = source / "train_sessions.parquet"
    for column, values, message in (
        ("sessions", [[1, 2]], "has no column 'session'"),
        ("session", [["a"]], "not a list of integers"),
        ("session", [[1, None]], "has nulls"),
        ("session", [[1, 2], None], "has nulls"),
    ):
        pq.write_table(pa.table({column: values}), path)
        with pytest.raises(UserError, match=message):
            preparation("diginetica").prepare(source, tmp_path / "out")
    pq.write_table(pa.table({"session": [[1, 2]] * 10}), path)
    pq.write_table(pa.table({"prefix": [[1]]}), source / "test.parquet")
    with pytest.raises(UserError, match=r"test\.parquet has no column 'next_item'"):
        preparation("diginetica").prepare(source, tmp_path / "out")


# the real data sets


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Any:
    if not DATA.is_dir():
        pytest.skip(f"no data sets at {DATA} (RECHUB_DATA)")
    done: dict[str, Path] = {}

    def prepared(name: str, source: str) -> Path:
        if name not in done:
            done[name] = tmp_path_factory.mktemp(name) / "out"
            preparation(name).prepare(DATA / source, done[name])
        return done[name]

    return prepared


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "source", "counts", "longest"),
    [
        ("movielens_1m_sequence", "movielens-1m", (6_040, 981_491, 6_040, 6_040), 200),
        ("amazon_beauty", "amazon-beauty", (22_363, 131_413, 22_363, 22_363), 50),
        ("diginetica", "diginetica", (168_003, 649_944, 69_526, 60_858), 19),
    ],
)
def test_real_rows(real: Any, name: str, source: str, counts: tuple[int, ...], longest: int) -> None:
    """The numbers of rows; and the prefixes are the train rows' own, one for each item but the first."""
    out = real(name, source)
    tables = {split: pq.read_table(out / split) for split in ("train", PREFIXES, "valid", "test")}
    assert tuple(table.num_rows for table in tables.values()) == counts
    lengths = {split: np.diff(table["history"].combine_chunks().offsets) for split, table in tables.items()}
    assert all(found.min() > 0 for found in lengths.values())
    assert lengths[PREFIXES].max() == longest
    assert lengths["train"].sum() == counts[1]
    users = {split: table["user_id"].to_numpy() for split, table in tables.items()}
    assert np.array_equal(users[PREFIXES], np.repeat(users["train"], lengths["train"]))
    last = np.cumsum(lengths["train"]) - 1
    assert np.array_equal(tables[PREFIXES]["item"].to_numpy()[last], tables["train"]["item"].to_numpy())
    rest = np.delete(np.arange(counts[1]), last)
    # a row's item is the last one of the next row's history
    ends = tables[PREFIXES]["history"].combine_chunks().offsets.to_numpy()[1:]
    values = tables[PREFIXES]["history"].combine_chunks().values.to_numpy()
    assert np.array_equal(tables[PREFIXES]["item"].to_numpy()[rest], values[ends[rest + 1] - 1])


@pytest.mark.data
def test_real_amazon_beauty(real: Any) -> None:
    """History and item of the test rows are the source itself; the earlier splits' are its beginnings."""
    out = real("amazon_beauty", "amazon-beauty")
    lines = [[int(x) - 1 for x in line.split()] for line in (DATA / "amazon-beauty" / "Beauty.txt").open()]
    assert [(user, [*history, item]) for user, history, item in stored(out, "test")] == [(u, i) for u, *i in lines]
    assert [(user, [*history, item]) for user, history, item in stored(out, "valid")] == [
        (u, i[:-1]) for u, *i in lines
    ]
    assert [(user, [*history, item]) for user, history, item in stored(out, "train")] == [
        (u, i[:-2]) for u, *i in lines
    ]


@pytest.mark.data
def test_real_diginetica(real: Any) -> None:
    """The test rows are the published ones; sessions stand on one side each; what is never learned is as told."""
    out = real("diginetica", "diginetica")
    published = pq.read_table(DATA / "diginetica" / "test.parquet")
    pairs = zip(published["prefix"].to_pylist(), published["next_item"].to_pylist(), strict=True)
    expected = sorted(([i - 1 for i in prefix][-19:], item - 1) for prefix, item in pairs)
    assert sorted((history, item) for _, history, item in stored(out, "test")) == expected
    users = [{user for user, _, _ in stored(out, split)} for split in SPLITS]
    assert [len(found) for found in users] == [168_003, 18_667, 15_963]
    assert max(users[0]) < min(users[1])
    assert max(users[1]) < min(users[2])
    learned = {item for _, history, item in stored(out, "train") for item in (*history, item)}
    assert 43_097 - len(learned) == 164
