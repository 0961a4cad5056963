"""Reading the published files, and turning their values into dense ids."""

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
        UserError: where it is not there; the message says where the data set comes from (`origin`).
    """
    path = source / name
    if not path.is_file():
        raise UserError(f"missing source file {path} ({origin})")
    return path


def read_delimited(path: Path, columns: dict[str, pa.DataType], *, delimiter: str, encoding: str = "utf8") -> pa.Table:
    """A text file without header or quoting, with a delimiter of any length.

    Raises:
        UserError: where the file does not hold such columns.
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
    """A column in one piece."""
    return values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values


def vocabulary(values: Any) -> pa.Array:
    """The distinct values, sorted, nulls left out: a value's id is its place."""
    distinct = array(pc.unique(pc.drop_null(array(values))))
    return distinct.take(pc.sort_indices(distinct))


def encode(values: Any, words: pa.Array, *, unknown: int | None = None, shift: int = 0) -> pa.Array:
    """The values' places in the vocabulary `words`, plus `shift`, as int32; lists stay lists.

    A null, or a value that is not in the vocabulary, becomes `unknown`; without one it is a `UserError`.
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
