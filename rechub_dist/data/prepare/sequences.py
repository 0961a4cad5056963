"""Event sequences as next-item prediction: the rows of each split, and the prepared folder.

A row is a *target* event with what its user (or session) did before: the columns are `user_id`, `history` (ids of
items, oldest first) and `item`, the target's. As the index of the target determines the row, a split is just an array
of indices, and rows are cut from the sequences when they are written.

Every way of splitting gives the same four folders:

- `train`: one row per user, with its last training event as target, for models that learn at every position;
- `train_prefixes`: a row for each of these events except a user's first, for models that learn at the last position;
- `valid` and `test`.

Splits whose rows overlap (`train_prefixes`, and where a user has several `valid` or `test` rows) store the newest
`max_length` items of a history; the others store it whole, and the schema's `max_length` cuts it when it is read.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rechub_dist.data.prepare.writer import PREFIXES, ROW_GROUP, ShardWriter, write_schema
from rechub_dist.features import FeatureSchema, SequenceFeature, SparseFeature, Table

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Sequences:
    """The events of all users: those of user 0 in time order, then those of user 1, ...

    Attributes:
        items: the item of each event, integers [E].
        lengths: the number of events of each user, int64 [U]; may be 0.
        times: the time of each event, numbers [E]; None if only the order is known.
    """

    items: NDArray[Any]
    lengths: Ints
    times: NDArray[Any] | None = None

    @classmethod
    def group(cls, users: NDArray[Any], items: NDArray[Any], times: NDArray[Any] | None = None) -> Sequences:
        """The sequences of events in any order; a user's events with equal times (or none) keep their order."""
        order = np.argsort(users, kind="stable") if times is None else np.lexsort((times, users))
        lengths = np.bincount(users).astype(np.int64)
        return cls(items[order], lengths, None if times is None else times[order])

    @cached_property
    def starts(self) -> Ints:
        """Index of each user's first event, int64 [U]."""
        return np.cumsum(self.lengths) - self.lengths

    @cached_property
    def users(self) -> Ints:
        """The user of each event, int64 [E]."""
        return np.repeat(np.arange(len(self.lengths)), self.lengths)

    @cached_property
    def before(self) -> Ints:
        """The number of events of the same user before each event, int64 [E]."""
        return np.arange(len(self.items)) - self.starts[self.users]


class Split(NamedTuple):
    """The rows of a split: the indices of their targets among the events, ascending, int64.

    `overlap`: whether users have several rows, of which each contains most of the one before.
    """

    targets: Ints
    overlap: bool


Splits = dict[str, Split]


def leave_one_out(sequences: Sequences) -> Splits:
    """The last event of each user in test, the last but one in valid, the others in train.

    A user with three events has valid and test rows only (the first event has no history). A user with two has a train
    row only, as there is too little to hold out. A user with one has none.
    """
    lengths, ends = sequences.lengths, sequences.starts + sequences.lengths
    pairs = lengths == 2
    train = np.where(pairs, ends - 1, ends - 3)[pairs | (lengths > 3)]
    return {
        "train": Split(train, overlap=False),
        PREFIXES: Split(_up_to(sequences, train), overlap=True),
        "valid": Split((ends - 2)[lengths > 2], overlap=False),
        "test": Split((ends - 1)[lengths > 2], overlap=False),
    }


def temporal(sequences: Sequences, valid_from: float, test_from: float) -> Splits:
    """Events before `valid_from` in train, later ones in valid, and those from `test_from` on in test.

    Each event in valid and test is the target of a row, with everything that its user did before, in whatever split:
    what a model faces that is trained once and then serves. A user's very first event has no row.
    """
    assert sequences.times is not None
    return _by_part(sequences, _parts(sequences.times, valid_from, test_from))


def sessions(sequences: Sequences, valid_from: float, test_from: float) -> Splits:
    """Whole sequences (sessions) by time: those that end before `valid_from` in train, before `test_from` in valid.

    So nothing in train is later than the boundary, even if a session spans it.
    """
    assert sequences.times is not None
    ends = np.maximum(sequences.starts + sequences.lengths - 1, 0)
    return by_session(sequences, _parts(sequences.times[ends], valid_from, test_from))


def by_session(sequences: Sequences, part: Ints) -> Splits:
    """Whole sequences in train, valid or test (0, 1, 2 in `part` [U]); valid and test have a row per position."""
    return _by_part(sequences, part[sequences.users])


def _parts(times: NDArray[Any], valid_from: float, test_from: float) -> Ints:
    assert valid_from < test_from
    return np.searchsorted(np.array([valid_from, test_from]), times, side="right")


def _by_part(sequences: Sequences, part: Ints) -> Splits:
    """Splits by the part of each event, int64 [E], which never decreases within a user's events."""
    rows = sequences.before > 0
    learned = np.bincount(sequences.users[part == 0], minlength=len(sequences.lengths))
    train = (sequences.starts + learned - 1)[learned > 1]
    return {
        "train": Split(train, overlap=False),
        PREFIXES: Split(_up_to(sequences, train), overlap=True),
        "valid": Split(np.flatnonzero(rows & (part == 1)), overlap=True),
        "test": Split(np.flatnonzero(rows & (part == 2)), overlap=True),
    }


def _up_to(sequences: Sequences, last: Ints) -> Ints:
    """The indices of all events up to `last` (one per user that has any), without the users' first."""
    return np.flatnonzero(covered(sequences, last) & (sequences.before > 0))


def covered(sequences: Sequences, targets: Ints) -> NDArray[np.bool_]:
    """Which events are in the rows of these targets, with full histories: bool [E]."""
    change = np.zeros(len(sequences.items) + 1, np.int64)
    np.add.at(change, sequences.starts[sequences.users[targets]], 1)
    np.add.at(change, targets + 1, -1)
    return np.cumsum(change)[:-1] > 0


def check_splits(sequences: Sequences, splits: Splits, items: int) -> None:
    """Assert that nothing leaks; a leak would be a bug here, so AssertionError is raised.

    - Each row has a history, of the same user and before its target.
    - No valid or test target is in a train row, and no test target in a valid row, neither as target nor in a history.
    - All items are below `items`.
    """
    if sequences.times is not None:
        falls = np.flatnonzero(np.diff(sequences.times) < 0) + 1
        assert (sequences.before[falls] == 0).all(), "the events of a user are not in time order"
    ids = sequences.items
    assert len(ids) == sequences.lengths.sum(), "the lengths do not add up to the events"
    assert not len(ids) or (ids.min() >= 0 and ids.max() < items), "an item is not in the catalogue"
    for name, split in splits.items():
        inside = (split.targets >= 0) & (split.targets < len(ids))
        assert inside.all(), f"{name}: a target is not an event"
        assert (sequences.before[split.targets] > 0).all(), f"{name}: a row has no history"
        owners = sequences.users[split.targets]
        assert split.overlap or len(np.unique(owners)) == len(owners), f"{name}: a user has several rows"
    learned = covered(sequences, np.concatenate([splits["train"].targets, splits[PREFIXES].targets]))
    for name, known in (("valid", learned), ("test", learned), ("test", covered(sequences, splits["valid"].targets))):
        where = "train" if known is learned else "valid"
        assert not known[splits[name].targets].any(), f"a {name} target is in a {where} row"


def write_sequences(
    folder: Path, name: str, sequences: Sequences, splits: Splits, *, items: int, max_length: int
) -> None:
    """Write splits and schema into a folder that is being prepared, after `check_splits`."""
    check_splits(sequences, splits, items)
    for split, (targets, overlap) in splits.items():
        limit = max_length if overlap else None
        first = rows(sequences, targets[:ROW_GROUP], limit)
        with ShardWriter(folder, split, first.schema) as writer:
            writer.write(first)
            for start in range(ROW_GROUP, len(targets), ROW_GROUP):
                writer.write(rows(sequences, targets[start : start + ROW_GROUP], limit))
    write_schema(folder, name, sequence_schema(len(sequences.lengths), items, max_length))


def sequence_schema(users: int, items: int, max_length: int) -> FeatureSchema:
    """The schema of such a folder; target and history share a table."""
    item = Table("item", items)
    return FeatureSchema(
        (
            SparseFeature("user_id", Table("user_id", users)),
            SparseFeature("item", item),
            SequenceFeature("history", item, max_length=max_length),
        )
    )


def rows(sequences: Sequences, targets: Ints, limit: int | None = None) -> pa.Table:
    """The rows of these targets, with at most the newest `limit` items of each history."""
    sizes = sequences.before[targets]
    if limit is not None:
        sizes = np.minimum(sizes, limit)
    ends = np.cumsum(sizes)
    places = np.arange(sizes.sum()) + np.repeat(targets - ends, sizes)
    offsets = np.concatenate(([0], ends)).astype(np.int32)
    items = sequences.items.astype(np.int32, copy=False)
    return pa.table(
        {
            "user_id": pa.array(sequences.users[targets].astype(np.int32)),
            "item": pa.array(items[targets]),
            "history": pa.ListArray.from_arrays(pa.array(offsets), pa.array(items[places])),
        }
    )
