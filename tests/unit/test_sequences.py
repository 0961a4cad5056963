"""Sequences as splits of next-item prediction, against plain loops; what must not leak; the data sets of this kind."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rechub_dist.config import read_yaml
from rechub_dist.data.prepare import preparation
from rechub_dist.data.prepare.sequences import (
    Sequences,
    Split,
    Splits,
    by_session,
    check_splits,
    leave_one_out,
    rows,
    sequence_schema,
    sessions,
    temporal,
    write_sequences,
)
from rechub_dist.data.prepare.writer import PREFIXES, ROW_GROUP, SPLITS
from rechub_dist.errors import UserError
from rechub_dist.schema import parse_schema

DATA = Path(__file__).parents[2] / os.environ.get("RECHUB_DATA", "../shared/data")
ALL = ("train", PREFIXES, "valid", "test")

Row = tuple[int, list[int], int]  # user, history, item


def unpack(table: pa.Table) -> list[Row]:
    columns = (table[name].to_pylist() for name in ("user_id", "history", "item"))
    return list(zip(*columns, strict=True))


def stored(folder: Path, split: str) -> list[Row]:
    return unpack(pq.read_table(folder / split))


def sequences_of(users: list[list[int]], times: list[list[int]] | None = None) -> Sequences:
    flat = np.array([item for items in users for item in items], np.int32)
    lengths = np.array([len(items) for items in users], np.int64)
    return Sequences(flat, lengths, None if times is None else np.array([t for row in times for t in row], np.int64))


def loop(users: list[list[int]], wanted: Any) -> list[Row]:
    """The rows of all events that have one before them and that `wanted(user, place)`."""
    return [
        (user, items[:place], items[place])
        for user, items in enumerate(users)
        for place in range(1, len(items))
        if wanted(user, place)
    ]


def cut(found: list[Row], limit: int) -> list[Row]:
    return [(user, history[-limit:], item) for user, history, item in found]


user_lists = st.lists(st.lists(st.integers(0, 5), max_size=7), max_size=8)


# grouping


def test_events_are_grouped_by_user_and_stable_in_time() -> None:
    users = np.array([1, 0, 1, 3, 1, 0])
    items = np.array([5, 6, 7, 8, 9, 4])
    found = Sequences.group(users, items, np.array([2, 2, 1, 0, 2, 1]))
    assert found.items.tolist() == [4, 6, 7, 5, 9, 8]
    assert found.lengths.tolist() == [2, 3, 0, 1]
    assert found.times is not None
    assert found.times.tolist() == [1, 2, 1, 2, 2, 0]
    assert Sequences.group(users, items).items.tolist() == [6, 4, 5, 7, 9, 8]


@given(user_lists)
def test_places_of_users_and_events(users: list[list[int]]) -> None:
    found = sequences_of(users)
    assert found.users.tolist() == [user for user, items in enumerate(users) for _ in items]
    assert found.before.tolist() == [place for items in users for place in range(len(items))]


# the splits, each against a loop over users and places


def last_to_learn(items: list[int]) -> int:
    """The place of the train row's target by the rule of leave-one-out; -1 where there is none."""
    return 1 if len(items) == 2 else len(items) - 3 if len(items) > 3 else -1


@given(user_lists, st.integers(1, 4))
@settings(max_examples=200, deadline=None)
def test_leave_one_out(users: list[list[int]], limit: int) -> None:
    found = sequences_of(users)
    splits = leave_one_out(found)
    check_splits(found, splits, items=6)
    expected = {
        "train": loop(users, lambda u, p: p == last_to_learn(users[u])),
        PREFIXES: loop(users, lambda u, p: p <= last_to_learn(users[u])),
        "valid": loop(users, lambda u, p: p == len(users[u]) - 2 > 0),
        "test": loop(users, lambda u, p: p == len(users[u]) - 1 > 1),
    }
    assert tuple(splits) == tuple(expected)
    for name, (targets, overlap) in splits.items():
        assert overlap == (name == PREFIXES)
        assert unpack(rows(found, targets)) == expected[name], name
        assert unpack(rows(found, targets, limit)) == cut(expected[name], limit), name


timed = st.lists(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 5)), max_size=7), max_size=8)


def part_of(time: int, valid_from: int, test_from: int) -> int:
    return 0 if time < valid_from else 1 if time < test_from else 2


def expected_by_part(users: list[list[int]], part: Any) -> dict[str, list[Row]]:
    learned = [sum(part(user, place) == 0 for place in range(len(items))) for user, items in enumerate(users)]
    return {
        "train": loop(users, lambda u, p: p == learned[u] - 1),
        PREFIXES: loop(users, lambda u, p: p < learned[u]),
        "valid": loop(users, lambda u, p: part(u, p) == 1),
        "test": loop(users, lambda u, p: part(u, p) == 2),
    }


@given(timed, st.integers(0, 9), st.integers(1, 5))
@settings(max_examples=200, deadline=None)
def test_temporal(events: list[list[tuple[int, int]]], valid_from: int, gap: int) -> None:
    events = [sorted(of_user, key=lambda event: event[0]) for of_user in events]
    users = [[item for _, item in of_user] for of_user in events]
    found = sequences_of(users, [[time for time, _ in of_user] for of_user in events])
    splits = temporal(found, valid_from, valid_from + gap)
    check_splits(found, splits, items=6)
    expected = expected_by_part(users, lambda u, p: part_of(events[u][p][0], valid_from, valid_from + gap))
    assert {name: unpack(rows(found, split.targets)) for name, split in splits.items()} == expected


@given(timed, st.integers(0, 9), st.integers(1, 5))
@settings(max_examples=200, deadline=None)
def test_sessions(events: list[list[tuple[int, int]]], valid_from: int, gap: int) -> None:
    events = [sorted(of_user, key=lambda event: event[0]) for of_user in events]
    users = [[item for _, item in of_user] for of_user in events]
    found = sequences_of(users, [[time for time, _ in of_user] for of_user in events])
    if not any(users):
        return
    splits = sessions(found, valid_from, valid_from + gap)
    check_splits(found, splits, items=6)
    expected = expected_by_part(users, lambda u, _: part_of(events[u][-1][0], valid_from, valid_from + gap))
    assert {name: unpack(rows(found, split.targets)) for name, split in splits.items()} == expected


def test_session_across_a_boundary_teaches_nothing_later() -> None:
    """A session that begins before `valid_from` and ends after it is no training session."""
    found = sequences_of([[0, 1, 2], [3, 4]], [[1, 2, 10], [3, 4]])
    splits = sessions(found, 5, 20)
    assert unpack(rows(found, splits["train"].targets)) == [(1, [3], 4)]
    assert unpack(rows(found, splits["valid"].targets)) == [(0, [0], 1), (0, [0, 1], 2)]


# what must not leak


def broken(splits: Splits, **targets: list[int]) -> Splits:
    changed = {name: Split(np.array(places), splits[name].overlap) for name, places in targets.items()}
    return splits | changed


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ({"train": [3, 6]}, "a valid target stands in a train row"),  # as target
        ({"train": [4, 6]}, "a valid target stands in a train row"),  # as history
        ({PREFIXES: [1, 2, 3, 6]}, "a valid target stands in a train row"),
        ({"valid": [2, 8]}, "a valid target stands in a train row"),
        ({"valid": [4, 8]}, "a test target stands in a valid row"),
        ({"test": [2, 9]}, "a test target stands in a train row"),
        ({"test": [3, 9]}, "a test target stands in a valid row"),
        ({"test": [4, 5]}, "test: a row has no history"),
        ({"test": [4, 10]}, "test: a target is no event"),
        ({"train": [1, 2, 7]}, "train: a user has several rows"),
    ],
)
def test_leaks_are_found(targets: dict[str, list[int]], message: str) -> None:
    found = sequences_of([[0, 1, 2, 3, 4], [4, 3, 2, 1, 0]])
    splits = leave_one_out(found)
    assert {name: split.targets.tolist() for name, split in splits.items()} == {
        "train": [2, 7], PREFIXES: [1, 2, 6, 7], "valid": [3, 8], "test": [4, 9]
    }  # fmt: skip
    check_splits(found, splits, items=5)
    with pytest.raises(AssertionError, match=message):
        check_splits(found, broken(splits, **targets), items=5)


def test_items_beyond_the_catalogue_and_times_out_of_order_are_found(tmp_path: Path) -> None:
    found = sequences_of([[0, 1, 2, 7]])
    with pytest.raises(AssertionError, match="not in the catalogue"):
        write_sequences(tmp_path, "small", found, leave_one_out(found), items=7, max_length=3)
    assert list(tmp_path.iterdir()) == []
    late = sequences_of([[0, 1, 2, 3], [4, 5, 6, 7]], [[5, 6, 7, 7], [0, 1, 3, 2]])
    with pytest.raises(AssertionError, match="not in time order"):
        check_splits(late, leave_one_out(late), items=8)
    fine = sequences_of([[0, 1, 2, 3], [4, 5, 6, 7]], [[5, 6, 7, 7], [0, 1, 2, 2]])
    check_splits(fine, leave_one_out(fine), items=8)


# writing


def test_written_folder(tmp_path: Path) -> None:
    """Histories of overlapping rows are cut as they are stored, the others are whole; rows go over row groups."""
    users = [[place % 11 for place in range(ROW_GROUP + 500)], [1, 2, 3, 4, 5]]
    found = sequences_of(users)
    write_sequences(tmp_path, "small", found, leave_one_out(found), items=11, max_length=3)
    prefixes = stored(tmp_path, PREFIXES)
    long = ROW_GROUP + 500 - 3
    assert len(prefixes) == long + 2
    picked = [0, 1, 5, ROW_GROUP - 1, ROW_GROUP, ROW_GROUP + 1, long - 1]
    assert [prefixes[row] for row in picked] == [
        (0, users[0][max(0, row - 2) : row + 1], users[0][row + 1]) for row in picked
    ]
    assert prefixes[-2:] == [(1, [1], 2), (1, [1, 2], 3)]
    assert stored(tmp_path, "train")[1] == (1, [1, 2], 3)
    assert [len(history) for _, history, _ in stored(tmp_path, "test")] == [ROW_GROUP + 499, 4]
    assert parse_schema(read_yaml(tmp_path / "dataset.yaml")) == sequence_schema(2, 11, 3)


def test_split_without_rows_is_written_with_its_columns(tmp_path: Path) -> None:
    found = sequences_of([[0, 1], [2]])
    write_sequences(tmp_path, "small", found, leave_one_out(found), items=3, max_length=3)
    assert [len(stored(tmp_path, split)) for split in ALL] == [1, 1, 0, 0]
    assert pq.read_schema(tmp_path / "test" / "part-00000.parquet") == pq.read_schema(
        tmp_path / "train" / "part-00000.parquet"
    )


def test_by_session_with_parts_in_any_order() -> None:
    found = sequences_of([[0, 1], [2], [], [3, 4, 5], [6, 7]])
    splits = by_session(found, np.array([2, 0, 0, 0, 1]))
    assert {name: split.targets.tolist() for name, split in splits.items()} == {
        "train": [5], PREFIXES: [4, 5], "valid": [7], "test": [1]
    }  # fmt: skip


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
    tables = {split: pq.read_table(out / split) for split in ALL}
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
