"""Writes the rows of an import; derived columns and ids are made by the code that a caller's row meets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rechub_dist.data.columns.derive import derive
from rechub_dist.data.columns.values import one_array
from rechub_dist.data.columns.vocabulary import Vocabulary
from rechub_dist.data.importing.engine import BATCH_ROWS, Engine, quoted
from rechub_dist.data.importing.rows import ROW, ROWS, SPLIT
from rechub_dist.data.parquet.kinds import is_list
from rechub_dist.data.prepare.writer import ShardWriter
from rechub_dist.derived import Derived
from rechub_dist.errors import UserError


@dataclass
class Written:
    """The rows of a split that were written.

    Attributes:
        rows: how many.
        unknown: by column of ids, the share of values that are missing or have no id of their own.
    """

    rows: int
    unknown: dict[str, float]


Progress = Callable[[str, int, int], None]  # what is done, how much of it, and of how much


def derived_rows(engine: Engine, derived: tuple[Derived, ...]) -> None:
    """Add derived columns to ROWS."""
    if not derived:
        return
    batches = engine.stream(f"select * from {ROWS}")
    schema = derive(batches.schema.empty_table(), derived, "the rows").schema

    failed: list[UserError] = []  # of a value; DuckDB, which reads the rows, would wrap the error in its own

    def added() -> Iterator[pa.RecordBatch]:
        try:
            for batch in batches:
                table = derive(pa.Table.from_batches([batch]), derived, "the rows").cast(schema)
                yield from table.combine_chunks().to_batches()
        except UserError as error:
            failed.append(error)
            raise

    try:
        engine.create(f"{ROWS}_derived", pa.RecordBatchReader.from_batches(schema, added()))
    except UserError:
        if failed:
            raise failed[0] from None
        raise
    engine.run(f"drop table {ROWS}")
    engine.run(f"alter table {ROWS}_derived rename to {ROWS}")


def encode(column: pa.ChunkedArray | pa.Array, vocabulary: Vocabulary, unknown: int = 0) -> pa.Array:
    """The ids of values, int32 [n] or lists of them; `unknown` for nulls and values that are not in the vocabulary."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if is_list(array.type):
        lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False)
        offsets = np.zeros(len(array) + 1, np.int32)
        np.cumsum(lengths, out=offsets[1:])
        return pa.ListArray.from_arrays(pa.array(offsets), encode(array.flatten(), vocabulary, unknown))
    if pa.types.is_null(array.type):
        return pa.array(np.full(len(array), unknown, np.int32))
    ids = vocabulary.find(array)
    kind = np.int32 if vocabulary.limits[1] < 2**31 else np.int64
    return pa.array(np.where(ids < 0, unknown, ids).astype(kind))


def write_rows(
    engine: Engine,
    folder: Path,
    split: tuple[str, int],
    order: str,
    columns: list[str],
    late: tuple[Derived, ...],
    lookup: Mapping[str, Vocabulary],
    progress: Progress | None = None,
) -> Written:
    """Write the rows of a split, with the derived columns `late` that are not yet among them.

    Args:
        engine: with the table ROWS.
        folder: the folder that is written.
        split: its name, and its number in ROWS.
        order: an SQL expression to sort by.
        columns: the columns to write, derived ones included.
        late: derived columns to compute.
        lookup: vocabularies by the column that is written as ids.
        progress: called with each batch.
    """
    name, number = split
    made = {output for one in late for output in one.outputs}
    read = list(
        dict.fromkeys(
            [*(c for c in columns if c not in made), *(c for one in late for c in one.inputs if c not in made)]
        )
    )
    rows: int = engine.value(f"select count(*) from {ROWS} where {SPLIT} = {number}")
    batches = engine.stream(
        f"select {', '.join(map(quoted, read))} from {ROWS} where {SPLIT} = {number} order by {order}", BATCH_ROWS
    )

    counts = {c: [0, 0] for c in columns if c in lookup}  # of unknown values, and of all

    def finished(table: pa.Table) -> pa.Table:
        table = derive(table, late, f"split {name}") if late else table
        arrays = {c: one_array(table, c) for c in columns}
        for column, vocabulary in lookup.items():
            if column in arrays:
                ids = arrays[column] = encode(arrays[column], vocabulary)
                values = ids.values if is_list(ids.type) else ids
                counts[column][0] += len(values) - int(np.count_nonzero(values.to_numpy(zero_copy_only=False)))
                counts[column][1] += len(values)
        return pa.table(arrays)

    schema = finished(batches.schema.empty_table()).schema
    done = 0
    with ShardWriter(folder, name, schema) as writer:
        for batch in batches:
            writer.write(finished(pa.Table.from_batches([batch])))
            done += batch.num_rows
            if progress is not None:
                progress(f"write {name}", done, rows)
    return Written(rows, {c: unknown / total for c, (unknown, total) in counts.items() if total})


def order_of(order: str, seed: int, time: str | None) -> str:
    """What the rows of a split are sorted by."""
    if order == "time":
        return f"{quoted(time or '')}, {ROW}"
    return f"md5_number_lower({ROW}::VARCHAR || '/{seed}'), {ROW}" if order == "random" else ROW
