"""Diginetica's shopping sessions as next-item prediction, in the protocol of NARM and SR-GNN.

The source is the output of their preparation: `train_sessions.parquet` (a session's items in time order) and
`test.parquet`, the sessions of the last week, as all their prefixes with the next item. Sessions are anonymous:
`user_id` is a session's number, which says which rows belong together and is not a feature.

- train: the first nine tenths of the training sessions, one row per session; `item` is the last one;
- train_prefixes: the same with a row per position except the first, as NARM and SR-GNN train;
- valid: the last tenth of the training sessions, a row per position, like the test rows;
- test: the published prefixes with their next items.

The file has no times, but its sessions are in the order of their dates, as their items are numbered by first
appearance. So the valid sessions, the last ones in the file, are later than the train sessions, as the test sessions
are later than both. (The papers hold out a random tenth to choose hyperparameters, and finally train on everything; a
model trained on `train_prefixes` alone has seen a tenth less than theirs.)

Ids are dense over the items of both files. All items of the test sessions are in the published training sessions, but
164 of the 43,097 occur in valid or test rows only, and so are never learned.

The schema's `max_length` keeps the newest 19 items of a history, which is all of it in 99 of 100 rows.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rechub_dist.data.parquet.pages import read_parquet
from rechub_dist.data.prepare.sequences import Ints, Sequences, by_session, write_sequences
from rechub_dist.data.prepare.source import array, encode, numpy, source_file, vocabulary
from rechub_dist.data.prepare.writer import prepared_folder
from rechub_dist.errors import UserError

NAME = "diginetica"
SUMMARY = "Diginetica, next item in sessions, NARM's and SR-GNN's protocol (train_sessions.parquet, test.parquet)"
ORIGIN = "Diginetica as prepared by SR-GNN: https://github.com/CRIPAC-DIG/SR-GNN"
MAX_LENGTH = 19
VALID_SHARE = 0.1


def prepare(source: Path, out: Path) -> None:
    """Prepare the two files in the folder `source` in the folder `out`."""
    train, test = (source_file(source, name, ORIGIN) for name in ("train_sessions.parquet", "test.parquet"))
    learned = _lists(train, "session")
    held_out, held_out_lengths = _test_sessions(test)
    values = pa.concat_arrays([array(learned.flatten()).cast(pa.int64()), pa.array(held_out)])
    words = vocabulary(values)
    lengths = np.concatenate([numpy(pc.list_value_length(learned)).astype(np.int64), held_out_lengths])
    sequences = Sequences(numpy(encode(values, words)), lengths)
    part = np.full(len(lengths), 2)
    part[: len(learned)] = 1
    part[: len(learned) - round(len(learned) * VALID_SHARE)] = 0
    with prepared_folder(out, NAME, [source]) as folder:
        write_sequences(folder, NAME, sequences, by_session(sequences, part), items=len(words), max_length=MAX_LENGTH)


def _lists(path: Path, name: str) -> pa.ListArray:
    """A column of lists of ids."""
    table = _columns(path, [name])
    lists = array(table[name])
    if not pa.types.is_list(lists.type) or not pa.types.is_integer(lists.type.value_type):
        raise UserError(f"{path}: column {name!r} is {lists.type}, not a list of integers")
    if lists.null_count or lists.flatten().null_count:
        raise UserError(f"{path}: column {name!r} has nulls")
    return lists


def _columns(path: Path, names: list[str]) -> pa.Table:
    present = pq.read_schema(path).names
    for name in names:
        if name not in present:
            raise UserError(f"{path} has no column {name!r}")
    return read_parquet(path, names)


def _test_sessions(path: Path) -> tuple[Ints, Ints]:
    """The items of the test sessions and the sessions' lengths, from their prefixes.

    A session of the items a b c stands in the file as (a b -> c), (a -> b).
    """
    prefixes = _lists(path, "prefix")
    following = numpy(_columns(path, ["next_item"])["next_item"].cast(pa.int64()))
    items = numpy(prefixes.flatten()).astype(np.int64)
    lengths = numpy(pc.list_value_length(prefixes)).astype(np.int64)
    first = np.ones(len(lengths), bool)  # rows that begin a session
    first[1:] = lengths[:-1] == 1
    ends = np.cumsum(lengths)
    # each row must be the one before without its last item, which is then the row's next item
    shorter = np.flatnonzero(~first)
    row = np.repeat(shorter, lengths[shorter])
    within = np.arange(len(row)) - np.repeat(np.cumsum(lengths[shorter]) - lengths[shorter], lengths[shorter])
    starts = ends - lengths
    right = (
        len(lengths) > 0
        and lengths[-1] == 1
        and (lengths > 0).all()
        and (lengths[shorter] == lengths[shorter - 1] - 1).all()
        and (following[shorter] == items[ends[shorter - 1] - 1]).all()
        and (items[starts[row] + within] == items[starts[row - 1] + within]).all()
    )
    if not right:
        raise UserError(f"{path} is not in the published format: sessions as all their prefixes, the longest first")
    longest = np.flatnonzero(first)
    whole = lengths[longest] + 1
    sessions = np.empty(whole.sum(), np.int64)
    last = np.cumsum(whole) - 1
    is_last = np.zeros(len(sessions), bool)
    is_last[last] = True
    sessions[last] = following[longest]
    sessions[~is_last] = items[np.repeat(first, lengths)]
    return sessions, whole
