"""Reads published files, and encodes their values as dense ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pcsv

from rechub_dist.errors import UserError, one_line


def source_file(source: Path, name: str, origin: str) -> Path:
    """The file `name` in the folder `source`.

    Raises:
        UserError: it does not exist; the message says where the data set is from (`origin`).
    """
    path = source / name
    if not path.is_file():
        raise UserError(f"missing source file {path} ({origin})")
    return path


def read_delimited(path: Path, columns: dict[str, pa.DataType], *, delimiter: str, encoding: str = "utf8") -> pa.Table:
    """The table in a text file without header or quoting, with a delimiter of any length.

    Raises:
        UserError: the file does not have such columns.
    """
    data = path.read_bytes()
    if len(delimiter) > 1:
        data = data.replace(delimiter.encode(), b"\t")
        delimiter = "\t"
    try:
        return pcsv.read_csv(
            pa.BufferReader(data),
            read_options=pcsv.ReadOptions(column_names=list(columns), encoding=encoding),
            parse_options=pcsv.ParseOptions(delimiter=delimiter, quote_char=False),
            convert_options=pcsv.ConvertOptions(column_types=columns, strings_can_be_null=False, null_values=[]),
        )
    except pa.ArrowInvalid as error:
        raise UserError(f"{path} is not in the published format ({', '.join(columns)}): {one_line(error)}") from None


def array(values: Any) -> pa.Array:
    """A column as one Arrow array."""
    return values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values


def vocabulary(values: Any) -> pa.Array:
    """The distinct values, sorted, without nulls: a value's id is its index."""
    distinct = array(pc.unique(pc.drop_null(array(values))))
    return distinct.take(pc.sort_indices(distinct))


def encode(values: Any, words: pa.Array, *, unknown: int | None = None, shift: int = 0) -> pa.Array:
    """The values' indices in the vocabulary `words`, plus `shift`, int32 [n]; lists become lists of them.

    Nulls and values that are not in the vocabulary become `unknown`.

    Raises:
        UserError: there are such values, and `unknown` is None.
    """
    values = array(values)
    if pa.types.is_list(values.type):
        offsets = pc.subtract(values.offsets, values.offsets[0])
        return pa.ListArray.from_arrays(offsets, encode(values.flatten(), words, unknown=unknown, shift=shift))
    ids = pc.index_in(values, value_set=words.cast(values.type))
    if unknown is None and ids.null_count:
        raise UserError(f"value {values.filter(pc.is_null(ids))[0].as_py()!r} is in none of the data set's tables")
    ids = pc.add(ids, shift)
    if unknown is not None:
        ids = pc.fill_null(ids, unknown)
    return ids.cast(pa.int32())


def numpy(values: Any) -> np.ndarray[Any, Any]:
    """A column without nulls as a NumPy array."""
    result: np.ndarray[Any, Any] = array(values).to_numpy(zero_copy_only=False)
    return result
