"""Amazon Beauty (5-core) as next-item prediction, leave-one-out.

The source is `Beauty.txt` as sequential recommenders publish it: one user per line, `user item item ...` in time order,
ids from 1; users and items have at least five events. The rows are as in `movielens_1m_sequence`: the last item is in
test, the last but one in valid, the rest in train, once with one row per user and once with one per position
(`train_prefixes`).

Histories are stored whole, except in `train_prefixes`; the schema's `max_length` keeps the newest 50, as in the
published results.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rechub_dist.data.prepare.sequences import Sequences, leave_one_out, write_sequences
from rechub_dist.data.prepare.source import array, encode, numpy, read_delimited, source_file, vocabulary
from rechub_dist.data.prepare.writer import prepared_folder
from rechub_dist.errors import UserError, one_line

NAME = "amazon_beauty"
SUMMARY = "Amazon Beauty (5-core), next item, leave-one-out (Beauty.txt)"
ORIGIN = "the user-item sequence file of S3-Rec: https://github.com/RUCAIBox/CIKM2020-S3Rec"
MAX_LENGTH = 50


def prepare(source: Path, out: Path) -> None:
    """Prepare `Beauty.txt` in the folder `source` in the folder `out`."""
    path = source_file(source, "Beauty.txt", ORIGIN)
    lines = array(read_delimited(path, {"line": pa.string()}, delimiter="\t")["line"])
    try:
        fields = pc.split_pattern(lines, " ")
        numbers = fields.flatten().cast(pa.int32())
    except pa.ArrowInvalid as error:
        raise UserError(f"{path} is not in the published format (user item item ...): {one_line(error)}") from None
    starts = numpy(fields.offsets)[:-1]
    is_item = np.ones(len(numbers), bool)
    is_item[starts] = False
    lengths = numpy(pc.list_value_length(fields)).astype(np.int64) - 1
    users = numbers.take(pa.array(starts))
    if len(pc.unique(users)) < len(users):
        raise UserError(f"{path} is not in the published format: a user has several lines")
    items = numbers.filter(pa.array(is_item))
    words = vocabulary(items)
    by_id = np.repeat(numpy(encode(users, vocabulary(users))), lengths)
    sequences = Sequences.group(by_id, numpy(encode(items, words)))
    with prepared_folder(out, NAME, [source]) as folder:
        write_sequences(folder, NAME, sequences, leave_one_out(sequences), items=len(words), max_length=MAX_LENGTH)
