"""Rows in memory -> batches, by the very code that a data set's row groups go through."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from rechub_dist.batch import Batch
from rechub_dist.data.collate import assemble
from rechub_dist.data.columns.fit import check_schema, column_names
from rechub_dist.data.columns.window import open_window
from rechub_dist.data.negatives import Draw
from rechub_dist.data.parquet.kinds import plain_schema
from rechub_dist.data.spec import BatchSpec
from rechub_dist.errors import UserError, one_line

GIVEN = "the rows given"


class RowEncoder:
    """Turns rows into ids and numbers as `spec` says: with its vocabularies, hashes, crosses and transforms.

    What the reader makes of a row group's columns, this makes of the same columns in memory, value by value.
    """

    def __init__(self, spec: BatchSpec) -> None:
        self.spec = spec

    def batches(self, rows: Any, size: int) -> Iterator[Batch]:
        """The rows in their order, `size` to a batch; without rows one empty batch.

        Args:
            rows: see `table_of`; columns that the spec does not read are left alone.
            size: at least 1.

        Raises:
            UserError: a column is missing or of a wrong type, or a value of it does not fit.
        """
        table = table_of(rows, column_names(self.spec))
        check_schema(table.schema, self.spec, GIVEN)
        plain = plain_schema(table.schema)
        if not plain.equals(table.schema):
            table = table.cast(plain)
        for first in range(0, max(1, table.num_rows), size):
            piece = table.slice(first, size)
            window = open_window(piece, self.spec, None, GIVEN)
            n = piece.num_rows
            yield assemble(self.spec, [(window, 0, n)], n, Draw(0, 0, first, 0, n))


def table_of(rows: Any, columns: list[str]) -> pa.Table:
    """Those of `columns` that are there, as Arrow has them.

    Args:
        rows: a pandas DataFrame, an Arrow table or record batch, whatever gives an Arrow stream (polars does), or a
            dict of columns: lists, NumPy or Arrow arrays.
        columns: names.

    Raises:
        UserError: it is none of these, or a column of it cannot be converted.
    """
    try:
        if is_pandas(rows):
            there = rows[[name for name in columns if name in rows.columns]]
            return pa.Table.from_pandas(there, preserve_index=False)
        if isinstance(rows, Mapping):
            return pa.table({name: _column(rows[name]) for name in columns if name in rows})
        if isinstance(rows, pa.RecordBatch):
            rows = pa.Table.from_batches([rows])
        if not isinstance(rows, pa.Table) and hasattr(rows, "__arrow_c_stream__"):
            rows = pa.table(rows)
    except (pa.ArrowException, ValueError, TypeError) as error:
        raise UserError(f"{GIVEN}: no Arrow table can be made of them: {one_line(error)}") from error
    if not isinstance(rows, pa.Table):
        raise UserError(
            f"{GIVEN}: are a {type(rows).__name__}; give a pandas DataFrame, an Arrow table, a dict of columns, or the "
            "path of Parquet files"
        )
    # by number: a name may be there twice, which is told where it is read
    return rows.select([place for place, name in enumerate(rows.schema.names) if name in set(columns)])


def like(rows: Any, table: pa.Table) -> Any:
    """A table with a row for each of `rows`, as what these are: a DataFrame with their index, a dict, else Arrow."""
    if is_pandas(rows):
        return table.to_pandas().set_axis(rows.index, axis=0)
    if isinstance(rows, Mapping):
        return {name: table[name].to_numpy() for name in table.column_names}
    return table


def is_pandas(rows: Any) -> bool:
    """Whether this is a pandas DataFrame; pandas itself is not imported."""
    return type(rows).__name__ == "DataFrame" and type(rows).__module__.partition(".")[0] == "pandas"


def _column(values: Any) -> Any:
    """A matrix has a list in each row."""
    return list(values) if isinstance(values, np.ndarray) and values.ndim > 1 else values
