"""Conditions that a row must meet to be read: on its columns, or on the partition keys in its file's path."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from rechub_dist.errors import UserError

Condition = tuple[str, str, Any]  # a name, a sign, a value (`in`, `not in`: a list of them)


@dataclass(frozen=True)
class Conditions:
    """All of these must hold. A condition on a missing value does not.

    Attributes:
        items: (name, sign, value), the signs those of `Selection.where`.
    """

    items: tuple[Condition, ...]

    @property
    def names(self) -> list[str]:
        """What they are about, each once."""
        return list(dict.fromkeys(name for name, _, _ in self.items))

    def rows(self, table: pa.Table, where: str) -> NDArray[np.int64]:
        """The rows of a table with these columns that meet them, int64, ascending.

        Raises:
            UserError: naming `where`, for a value that a column cannot be compared with.
        """
        if not self.items:
            return np.arange(table.num_rows)
        fitting = [(name, sign, _fitting(value, table.schema.field(name).type)) for name, sign, value in self.items]
        numbered = table.select(self.names).append_column("", pa.array(np.arange(table.num_rows)))
        try:
            kept = numbered.filter(pq.filters_to_expression([fitting])).column("")
        except (pa.ArrowException, TypeError, ValueError) as error:
            types = ", ".join(f"{name} is {table.schema.field(name).type}" for name in self.names)
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(f"{where}: {self} does not fit: {types} ({reason}); write a value of that type") from None
        rows: NDArray[np.int64] = kept.to_numpy()
        return rows

    def __str__(self) -> str:
        return "where: " + str([list(condition) for condition in self.items])


def _fitting(value: Any, kind: pa.DataType) -> Any:
    """A value as YAML has it, as a column's type has it where it can: dates as strings, and the other way round."""
    if isinstance(value, list | tuple):
        return [_fitting(item, kind) for item in value]
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if isinstance(value, datetime.date) and (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        return value.isoformat()
    if isinstance(value, str | datetime.date) and (pa.types.is_date(kind) or pa.types.is_timestamp(kind)):
        try:
            return pa.scalar(value).cast(kind).as_py()
        except pa.ArrowException:
            return value  # the comparison will say what is wrong
    return value
