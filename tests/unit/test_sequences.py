"""Sequences as splits of next-item prediction, against plain loops, and what must not leak."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rechub_dist.config import read_yaml
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
from rechub_dist.data.prepare.writer import PREFIXES, ROW_GROUP
from rechub_dist.schema import parse_schema

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
        ({"train": [3, 6]}, "a valid target is in a train row"),  # as target
        ({"train": [4, 6]}, "a valid target is in a train row"),  # as history
        ({PREFIXES: [1, 2, 3, 6]}, "a valid target is in a train row"),
        ({"valid": [2, 8]}, "a valid target is in a train row"),
        ({"valid": [4, 8]}, "a test target is in a valid row"),
        ({"test": [2, 9]}, "a test target is in a train row"),
        ({"test": [3, 9]}, "a test target is in a valid row"),
        ({"test": [4, 5]}, "test: a row has no history"),
        ({"test": [4, 10]}, "test: a target is not an event"),
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
