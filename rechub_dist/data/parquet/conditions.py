"""Conditions that select rows: on their columns, or on the partition keys in the path of their file."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from rechub_dist.errors import UserError

Condition = tuple[str, str, Any]  # name, operator, value (a list of values for `in` and `not in`)


@dataclass(frozen=True)
class Conditions:
    """A conjunction of conditions. No condition holds for a null.

    Attributes:
        items: (name, operator, value), with the operators of `Selection.where`.
    """

    items: tuple[Condition, ...]

    @property
    def names(self) -> list[str]:
        """The names in the conditions, without duplicates."""
        return list(dict.fromkeys(name for name, _, _ in self.items))

    def rows(self, table: pa.Table, where: str) -> NDArray[np.int64]:
        """The indices of the table's rows that meet them, int64, ascending.

        Raises:
            UserError: naming `where`, if a column cannot be compared with its value.
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
    """A value from YAML, converted to a column's type where possible: dates to strings, and strings to dates."""
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
