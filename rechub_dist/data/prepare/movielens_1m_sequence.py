"""MovieLens-1M as next-item prediction, leave-one-out.

The source is `ml-1m.txt` as sequential recommenders publish it: `user item` a line, each user's items in time order,
ids from 1. One row a user and split; `history` holds what the user saw before `item`:

- train: `item` is the last but two, so a model that learns at every position sees all but the user's last two items;
- valid: `item` is the last but one;
- test: `item` is the last.

A user of three items has valid and test rows only (nothing precedes the first item). A user of two has a train row
only: there is too little to hold out. A user of one has none. (In the published file every user has more.)

Histories are stored whole; the schema's `max_length` keeps the newest 200.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from rechub_dist.data.prepare.source import encode, numpy, read_delimited, source_file, vocabulary
from rechub_dist.data.prepare.writer import prepared_folder, write_schema, write_split
from rechub_dist.features import FeatureSchema, SequenceFeature, SparseFeature, Table

NAME = "movielens_1m_sequence"
SUMMARY = "MovieLens-1M, next item, leave-one-out (ml-1m.txt)"
ORIGIN = "the user-item sequence file of SASRec: https://github.com/pmixer/SASRec.pytorch"
MAX_LENGTH = 200


def prepare(source: Path, out: Path) -> None:
    """Prepares `ml-1m.txt` of the folder `source` into the folder `out`."""
    path = source_file(source, "ml-1m.txt", ORIGIN)
    table = read_delimited(path, {"user": pa.int32(), "item": pa.int32()}, delimiter=" ")
    user_words, item_words = vocabulary(table["user"]), vocabulary(table["item"])
    users = numpy(encode(table["user"], user_words))
    items = numpy(encode(table["item"], item_words))
    order = np.argsort(users, kind="stable")
    items = items[order]
    lengths = np.bincount(users, minlength=len(user_words))
    starts = np.cumsum(lengths) - lengths

    # where each user's item of a split stands in the user's own sequence, and who has such a row
    places = {
        "train": (np.where(lengths == 2, 1, lengths - 3), (lengths == 2) | (lengths > 3)),
        "valid": (lengths - 2, lengths > 2),
        "test": (lengths - 1, lengths > 2),
    }
    movie = Table("item", len(item_words))
    schema = FeatureSchema(
        (
            SparseFeature("user_id", Table("user_id", len(user_words))),
            SparseFeature("item", movie),
            SequenceFeature("history", movie, max_length=MAX_LENGTH),
        )
    )
    with prepared_folder(out, NAME) as folder:
        for split, (place, chosen) in places.items():
            write_split(folder, split, _rows(items, starts, place, np.flatnonzero(chosen)))
        write_schema(folder, NAME, schema)


def _rows(items: np.ndarray, starts: np.ndarray, place: np.ndarray, users: np.ndarray) -> pa.Table:
    """The rows of `users`: the item at `place` of each one's sequence, and the items before it."""
    sizes = place[users]
    ends = np.cumsum(sizes)
    within = np.arange(sizes.sum()) - np.repeat(ends - sizes, sizes)
    values = items[np.repeat(starts[users], sizes) + within]
    offsets = np.concatenate(([0], ends)).astype(np.int32)
    return pa.table(
        {
            "user_id": pa.array(users.astype(np.int32)),
            "item": pa.array(items[starts[users] + sizes]),
            "history": pa.ListArray.from_arrays(pa.array(offsets), pa.array(values)),
        }
    )
