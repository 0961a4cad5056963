"""Writes the rows of an import; derived columns and ids are made by the code that a caller's row meets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from rechub_dist.data.columns.derive import derive
from rechub_dist.data.columns.values import one_array
from rechub_dist.data.columns.vocabulary import Vocabulary
from rechub_dist.data.importing.engine import Engine, quoted
from rechub_dist.data.importing.histories import Lists, batch_rows
from rechub_dist.data.importing.ids import encode
from rechub_dist.data.importing.rows import ROW, ROWS, SPLIT
from rechub_dist.data.parquet.kinds import is_list
from rechub_dist.data.prepare.writer import ShardWriter
from rechub_dist.derived import Derived
from rechub_dist.errors import UserError

Progress = Callable[[str, int, int], None]  # what is done, how much of it, and of how much


@dataclass
class Written:
    """The rows of a split that were written.

    Attributes:
        rows: how many.
        unknown: by column of ids, the share of values that are missing or have no id of their own.
    """

    rows: int
    unknown: dict[str, float]


@dataclass(frozen=True)
class Output:
    """What is written of each row.

    Attributes:
        columns: the columns, derived ones included.
        late: derived columns to compute that ROWS lacks.
        lookup: vocabularies by the column that is written as ids.
        lists: the histories' columns; those that are written as ids hold ids already.
    """

    columns: Sequence[str]
    late: tuple[Derived, ...] = ()
    lookup: Mapping[str, Vocabulary] = field(default_factory=dict)
    lists: Mapping[str, Lists] = field(default_factory=dict)

    @property
    def reads(self) -> list[str]:
        """The columns of ROWS that are needed."""
        made = {output for one in self.late for output in one.outputs}
        wanted = [*self.columns, *(column for one in self.late for column in one.inputs)]
        return _of_rows([c for c in wanted if c not in made], self.lists)


def _of_rows(columns: Sequence[str], lists: Mapping[str, Lists]) -> list[str]:
    """The columns of ROWS that the columns are made of."""
    found = ((lists[c].begin, lists[c].length) if c in lists else (c,) for c in columns)
    return [*dict.fromkeys(column for columns in found for column in columns)]


def derived_rows(engine: Engine, derived: tuple[Derived, ...], lists: Mapping[str, Lists] | None = None) -> None:
    """Add derived columns to ROWS; they may read the histories' lists."""
    if not derived:
        return
    read = {name: (lists or {})[name] for one in derived for name in one.inputs if name in (lists or {})}
    batches = engine.stream(f"select * from {ROWS}", batch_rows(read.values()))

    def added(batch: pa.Table) -> pa.Table:
        for name, column in read.items():
            batch = batch.append_column(name, column.of(batch))
        return derive(batch, derived, "the rows").drop_columns([*read])

    schema = added(batches.schema.empty_table()).schema

    failed: list[UserError] = []  # of a value; DuckDB, which reads the rows, would wrap the error in its own

    def pieces() -> Iterator[pa.RecordBatch]:
        try:
            for batch in batches:
                yield from added(pa.Table.from_batches([batch])).cast(schema).combine_chunks().to_batches()
        except UserError as error:
            failed.append(error)
            raise

    try:
        engine.create(f"{ROWS}_derived", pa.RecordBatchReader.from_batches(schema, pieces()))
    except UserError:
        if failed:
            raise failed[0] from None
        raise
    engine.run(f"drop table {ROWS}")
    engine.run(f"alter table {ROWS}_derived rename to {ROWS}")


def encoded_lists(engine: Engine, lists: Mapping[str, Lists], lookup: Mapping[str, Vocabulary]) -> dict[str, Lists]:
    """The histories' columns, with ids in those that are written as ids: each event is looked up once."""
    found = dict(lists)
    for i, (name, column) in enumerate(lists.items()):
        if name in lookup:
            events = column.events.encoded(lookup[name], engine.folder / f"ids_{i}")
            found[name] = replace(column, events=events)
    return found


class Finishing:
    """Makes of rows of ROWS what is written, and counts values without an id of their own.

    Args:
        output: what is written.
        where: for errors.
        extra: further columns of ROWS that are kept as they are.
    """

    def __init__(self, output: Output, where: str, extra: Sequence[str] = ()) -> None:
        self._output, self._where, self._extra = output, where, extra
        self.counts = {c: [0, 0] for c in output.columns if c in output.lookup}  # of unknown values, and of all

    def __call__(self, rows: pa.Table) -> pa.Table:
        """The columns that are written."""
        output = self._output
        table = derive(rows, output.late, self._where) if output.late else rows
        arrays = {}
        for name in output.columns:
            if name in output.lists:
                arrays[name] = output.lists[name].of(table)
            elif name in output.lookup:
                arrays[name] = encode(one_array(table, name), output.lookup[name])
            else:
                arrays[name] = one_array(table, name)
            if name in self.counts:
                ids = arrays[name].values if is_list(arrays[name].type) else arrays[name]
                self.counts[name][0] += len(ids) - int(np.count_nonzero(ids.to_numpy(zero_copy_only=False)))
                self.counts[name][1] += len(ids)
        return pa.table(arrays | {name: table[name] for name in self._extra})


def shares_of_unknown(counts: Iterable[Mapping[str, Sequence[int]]]) -> dict[str, float]:
    """The share of values that are missing or have no id of their own, by column, of the counts of `Finishing`."""
    sums: dict[str, list[int]] = {}
    for one in counts:
        for column, pair in one.items():
            sums[column] = [a + b for a, b in zip(sums.get(column, (0, 0)), pair, strict=True)]
    return {column: unknown / total for column, (unknown, total) in sums.items() if total}


def write_rows(
    engine: Engine,
    folder: Path,
    split: tuple[str, int],
    order: str,
    output: Output,
    progress: Progress | None = None,
) -> Written:
    """Write the rows of a split.

    Args:
        engine: with the table ROWS.
        folder: the folder that is written.
        split: its name, and its number in ROWS.
        order: an SQL expression to sort by.
        output: what is written of a row.
        progress: called with each batch.
    """
    name, number = split
    rows: int = engine.value(f"select count(*) from {ROWS} where {SPLIT} = {number}")
    batches = engine.stream(
        f"select {', '.join(map(quoted, output.reads))} from {ROWS} where {SPLIT} = {number} order by {order}",
        batch_rows(output.lists.values()),
    )
    finish = Finishing(output, f"split {name}")
    schema = finish(batches.schema.empty_table()).schema
    done = 0
    # One thread compresses while this one makes the next rows.
    with ShardWriter(folder, name, schema) as writer, ThreadPoolExecutor(1) as thread:
        writing: Future[None] | None = None
        for batch in batches:
            table = finish(pa.Table.from_batches([batch]))
            if writing is not None:
                writing.result()
            writing = thread.submit(writer.write, table)
            done += batch.num_rows
            if progress is not None:
                progress(f"write {name}", done, rows)
        if writing is not None:
            writing.result()
    return Written(rows, shares_of_unknown([finish.counts]))


def order_of(order: str, seed: int, time: str | None) -> str:
    """What the rows of a split are sorted by."""
    if order == "time":
        return f"{quoted(time or '')}, {ROW}"
    return f"md5_number_lower({ROW}::VARCHAR || '/{seed}'), {ROW}" if order == "random" else ROW
