"""Filters: the rows of a Parquet file of which an SQL expression is true, by DuckDB, which may read nothing else."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from rechub_dist.errors import UserError, shown

_MEMORY: Final = 1 << 30
_ROW: Final = "file_row_number"


def rows_where(path: Path, expression: str) -> NDArray[np.int64]:
    """The numbers of the rows of a file of which an expression over their columns is true, int64, ascending.

    Raises:
        UserError: it is no expression of one row that is true or false, or DuckDB is missing.
    """
    try:
        from rechub_dist.data.importing.engine import Engine, as_path, literal  # noqa: PLC0415
    except ImportError:
        raise UserError("where: filters need DuckDB: pip install duckdb") from None
    with tempfile.TemporaryDirectory(prefix="rechub-where-") as folder:
        engine = Engine(Path(folder), _MEMORY, threads=1)
        try:
            file = str(path.absolute())
            engine.confine([file])
            engine.run(f"create view items as select * from read_parquet({literal(as_path(file))}, {_ROW} = true)")
            kind = engine.expression_type(expression, "items", "where")
            if kind != "BOOLEAN":
                raise UserError(f"where: {shown(expression)} is {kind}, not true or false; compare it with something")
            found = engine.table(f"select {_ROW} as row from items where ({expression}\n) order by row")
        finally:
            engine.close()
    numbers: NDArray[np.int64] = found["row"].to_numpy().astype(np.int64)
    return numbers
