"""A row group that is decoded lazily, a few columns at a time.

Columns that are converted one by one are then still in the processor's cache, and Arrow reuses the memory of those
before: decoding flat columns takes a seventh less time than decoding the whole row group, long lists a fifth less
(`benchmarks/reader.py`).
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Container, Iterator, Sequence
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from rechub_dist.data.parquet.kinds import plain_schema, plain_table

Rows = TypeVar("Rows", pa.ChunkedArray, pa.Table)
Bounds = dict[str, tuple[int, int]]  # the least and the greatest value by column, as signed integers

_VALUES = 1 << 18  # values decoded at once: 2 MB


class UndecodableError(Exception):
    """Arrow cannot fetch or decode the bytes: `reason` is its error."""

    def __init__(self, reason: Exception) -> None:
        super().__init__(reason)
        self.reason = reason


class RowGroup:
    """A row group, or a piece of it, with those parts of the interface of `pa.Table` that `open_window` uses.

    Args:
        parquet: the open file.
        group: the row group's index.
        uses: the columns in the order of their use, each as often as it is used; after its last use it is freed.
        whole: decode all columns at once, for stores where requests are expensive.

    Attributes:
        schema: of the file, with the types of `plain_type`.
        num_rows: of the piece.
    """

    def __init__(self, parquet: pq.ParquetFile, group: int, uses: Sequence[str], *, whole: bool = False) -> None:
        self._parquet = parquet
        self._group = group
        self._uses = Counter(uses)
        metadata = parquet.metadata.row_group(group)
        self._rows: int = metadata.num_rows
        self._chunks = column_chunks(metadata, self._uses)
        self._runs = [list(self._uses)] if whole else list(self._together())
        self._decoded: dict[str, pa.ChunkedArray] = {}
        self._offset = 0
        self._taken: NDArray[np.int64] | None = None
        self._added: dict[str, pa.ChunkedArray] = {}
        self.schema: pa.Schema = plain_schema(parquet.schema_arrow)
        self.num_rows = self._rows

    def slice(self, offset: int, length: int) -> RowGroup:
        """Rows `offset` .. `offset + length - 1` of this piece."""
        if self._taken is not None:
            return self.take(self._taken[offset : offset + length])
        piece = copy.copy(self)
        piece._offset, piece.num_rows = self._offset + offset, length
        return piece

    def take(self, rows: NDArray[np.int64]) -> RowGroup:
        """Rows of the whole row group by index, int64 [n]."""
        piece = copy.copy(self)
        piece._taken, piece.num_rows = rows, len(rows)
        return piece

    def with_columns(self, table: pa.Table) -> RowGroup:
        """The piece with the columns of `table`, which has its rows, beside its own. It is not cut any further."""
        piece = copy.copy(self)
        piece._added = self._added | dict(zip(table.column_names, table.columns, strict=True))
        piece.schema = pa.schema([*self.schema, *table.schema])
        return piece

    def column(self, name: str) -> pa.ChunkedArray:
        """A column of the piece. Raises UndecodableError."""
        if name in self._added:
            return self._added[name]
        if name not in self._decoded:
            self._decode(next(run for run in self._runs if name in run))
        self._uses[name] -= 1
        column = self._decoded[name] if self._uses[name] else self._decoded.pop(name)
        return self._own(column)

    def table(self) -> pa.Table:
        """All columns, decoded at once. Raises UndecodableError."""
        return self._own(self._read(list(self._uses)))

    @property
    def bounds(self) -> Bounds:
        """The least and the greatest value by column, for columns of integers (or lists of them) with statistics."""
        bounds: Bounds = {}
        for name, chunk in self._chunks.items():
            if chunk.physical_type in ("INT32", "INT64") and chunk.is_stats_set:
                statistics = chunk.statistics
                if statistics.has_min_max:
                    bounds[name] = statistics.min_raw, statistics.max_raw
        return bounds

    def _own(self, rows: Rows) -> Rows:
        return rows.slice(self._offset, self.num_rows) if self._taken is None else rows.take(pa.array(self._taken))

    def _decode(self, run: list[str]) -> None:
        table = self._read(run)
        self._decoded.update(zip(table.column_names, table.columns, strict=True))

    def _read(self, columns: list[str]) -> pa.Table:
        try:
            table = self._parquet.read_row_group(self._group, columns=columns, use_threads=False)
        except Exception as error:  # of any client library
            raise UndecodableError(error) from error
        if any(len(column) != self._rows for column in table.columns):
            raise UndecodableError(OSError("a column has more or fewer rows than the row group"))
        return plain_table(table)

    def _together(self) -> Iterator[list[str]]:
        """The columns in the order of their use, grouped into those that are decoded at once."""
        run: list[str] = []
        size = 0
        for name in self._uses:
            values = self._chunks[name].num_values if name in self._chunks else self._rows
            if run and size + values > _VALUES:
                yield run
                run, size = [], 0
            run.append(name)
            size += values
        yield run


def path_of(chunk: pq.ColumnChunkMetaData) -> str:
    """The path of a column in the schema, as the footer has it beside its place. Raises UndecodableError."""
    try:
        return str(chunk.path_in_schema)
    except UnicodeDecodeError as error:
        raise UndecodableError(error) from error


def column_chunks(metadata: pq.RowGroupMetaData, names: Container[str]) -> dict[str, pq.ColumnChunkMetaData]:
    """The footer's metadata of those of the columns that hold single values, or lists of them.

    Raises:
        UndecodableError: the path of a column is not text.
    """
    chunks = {}
    for index in range(metadata.num_columns):
        chunk = metadata.column(index)
        name = path_of(chunk).removesuffix(".list.element").removesuffix(".list.item")
        if name in names:
            chunks[name] = chunk
    return chunks
