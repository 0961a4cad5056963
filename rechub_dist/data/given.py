"""Rows in memory, as their caller has them -> windows, by the same code as a data set's row groups. Without torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from rechub_dist.data.columns.derive import derive
from rechub_dist.data.columns.fit import check_schema, column_names, reading
from rechub_dist.data.columns.window import Window, open_window
from rechub_dist.data.parquet.kinds import plain_schema, plain_table
from rechub_dist.data.spec import BatchSpec
from rechub_dist.errors import UserError, one_line

GIVEN = "the rows given"


def windows(rows: Any, spec: BatchSpec, size: int, where: str = GIVEN) -> Iterator[Window]:
    """The rows in their order, `size` per window; one empty window if there are none.

    Vocabularies, hashes, crosses, transforms and derived columns are those of `spec`; the result is the same, value by
    value, as that of the reader for the same columns in a file.

    Args:
        rows: see `table_of`; columns that the spec does not read are ignored.
        spec: what to convert.
        size: at least 1.
        where: begins the message of an error.

    Raises:
        UserError: a column is missing or has a wrong type, or a value is invalid.
    """
    sources = [name for one in reading(spec, ()).computed for name in one.inputs]
    table = table_of(rows, list(dict.fromkeys([*column_names(spec), *sources])))
    check_schema(plain_schema(table.schema), spec, where)
    plan = reading(spec, table.column_names)
    table = plain_table(table.select(list(dict.fromkeys(plan.uses))))
    for first in range(0, max(1, table.num_rows), size):
        yield open_window(derive(table.slice(first, size), plan.computed, where), spec, None, where)


def table_of(rows: Any, columns: list[str]) -> pa.Table:
    """An Arrow table of those of `columns` that `rows` has.

    Args:
        rows: a pandas DataFrame, an Arrow table or record batch, anything that exports an Arrow stream (polars does),
            or a dict of columns: lists, NumPy or Arrow arrays.
        columns: their names.

    Raises:
        UserError: `rows` is none of these, or cannot be converted.
    """
    if is_pandas(rows):
        rows = rows[[name for name in columns if name in rows.columns]]
    elif isinstance(rows, Mapping):
        rows = {name: rows[name] for name in columns if name in rows}
    table = all_of(rows, GIVEN)
    # by number: a name may occur twice, which is reported where it is read
    return table.select([place for place, name in enumerate(table.schema.names) if name in set(columns)])


def all_of(rows: Any, where: str) -> pa.Table:
    """An Arrow table of all columns; `rows` as in `table_of`, `where` begins a message.

    Raises:
        UserError: as `table_of`.
    """
    try:
        if is_pandas(rows):
            return pa.Table.from_pandas(rows, preserve_index=False)
        if isinstance(rows, Mapping):
            return pa.table({name: _column(values) for name, values in rows.items()})
        if isinstance(rows, pa.RecordBatch):
            return pa.Table.from_batches([rows])
        if not isinstance(rows, pa.Table) and hasattr(rows, "__arrow_c_stream__"):
            return pa.table(rows)
    except (pa.ArrowException, ValueError, TypeError) as error:
        raise UserError(f"{where}: cannot be converted to an Arrow table: {one_line(error)}") from error
    if not isinstance(rows, pa.Table):
        raise UserError(
            f"{where}: got a {type(rows).__name__}; give a pandas DataFrame, an Arrow table, a dict of columns, or the "
            "path of Parquet files"
        )
    return rows


def like(rows: Any, table: pa.Table) -> Any:
    """`table`, which has a row for each of `rows`, in their type: a DataFrame with their index, a dict, else Arrow."""
    if is_pandas(rows):
        return table.to_pandas().set_axis(rows.index, axis=0)
    if isinstance(rows, Mapping):
        return {name: table[name].to_numpy() for name in table.column_names}
    return table


def is_pandas(rows: Any) -> bool:
    """Whether this is a pandas DataFrame; pandas itself is not imported."""
    return type(rows).__name__ == "DataFrame" and type(rows).__module__.partition(".")[0] == "pandas"


def _column(values: Any) -> Any:
    """The values as Arrow takes them: a matrix as a list of its rows."""
    return list(values) if isinstance(values, np.ndarray) and values.ndim > 1 else values
