"""MovieLens-1M as next-item prediction, leave-one-out.

The source is `ml-1m.txt` as sequential recommenders publish it: `user item` per line, each user's items in time order,
ids from 1. One row per user and split; `history` has what the user saw before `item`:

- train: `item` is the last but two, so that a model that learns at every position sees all but the last two items;
- valid: `item` is the last but one;
- test: `item` is the last.

`train_prefixes` has a row for each position of the train part (see `sequences`, and there for users of few items; in
the published file every user has enough).

Histories are stored whole, except in `train_prefixes`; the schema's `max_length` keeps the newest 200.
"""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from rechub_dist.data.prepare.sequences import Sequences, leave_one_out, write_sequences
from rechub_dist.data.prepare.source import encode, numpy, read_delimited, source_file, vocabulary
from rechub_dist.data.prepare.writer import prepared_folder

NAME = "movielens_1m_sequence"
SUMMARY = "MovieLens-1M, next item, leave-one-out (ml-1m.txt)"
ORIGIN = "the user-item sequence file of SASRec: https://github.com/pmixer/SASRec.pytorch"
MAX_LENGTH = 200


def prepare(source: Path, out: Path) -> None:
    """Prepare `ml-1m.txt` in the folder `source` in the folder `out`."""
    path = source_file(source, "ml-1m.txt", ORIGIN)
    table = read_delimited(path, {"user": pa.int32(), "item": pa.int32()}, delimiter=" ")
    item_words = vocabulary(table["item"])
    users = numpy(encode(table["user"], vocabulary(table["user"])))
    sequences = Sequences.group(users, numpy(encode(table["item"], item_words)))
    with prepared_folder(out, NAME, [source]) as folder:
        write_sequences(folder, NAME, sequences, leave_one_out(sequences), items=len(item_words), max_length=MAX_LENGTH)
