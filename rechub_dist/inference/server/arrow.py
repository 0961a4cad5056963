"""Arrow IPC streams from the network: whatever their bytes say, reading one takes no more memory than it has bytes."""

from __future__ import annotations

import struct
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from rechub_dist.data.parquet.kinds import is_list
from rechub_dist.errors import UserError, one_line

STREAM: Final = "application/vnd.apache.arrow.stream"
# Places in Arrow's Message.fbs and its tables' fields.
_HEADER_TYPE, _HEADER, _DATA, _COMPRESSION = 1, 2, 1, 3
_DICTIONARY, _RECORDS = 2, 3


def read_stream(body: bytes) -> pa.Table:
    """The table of a stream; columns of types that no feature reads are left out.

    Raises:
        UserError: it is no Arrow stream, is damaged, compressed, or its lists are longer than its bytes.
    """
    try:
        _refuse_compression(body)
        table = pa.ipc.open_stream(pa.py_buffer(body)).read_all()
        # by number: a name may occur twice, which is reported where it is read
        table = table.select([place for place, kind in enumerate(table.schema.types) if _is_plain(kind)])
        table.validate(full=True)
    except UserError:
        raise
    except (pa.ArrowException, OSError, ValueError, TypeError, KeyError, struct.error) as error:
        raise UserError(f"the body is no Arrow stream: {one_line(error)}") from None
    for name, column in zip(table.column_names, table.columns, strict=True):
        if is_list(column.type) and sum(len(chunk.flatten()) for chunk in column.chunks) > len(body):
            raise UserError(f"column {name!r}: its lists have more elements than the body has bytes")
    return table


def write_stream(table: pa.Table) -> bytes:
    """The table as a stream."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    found: bytes = sink.getvalue().to_pybytes()
    return found


def _is_plain(kind: pa.DataType) -> bool:
    """Whether it is of the types of features, none of which takes more room in use than in the stream."""
    types = pa.types
    if types.is_dictionary(kind):
        return _is_plain(kind.value_type) and not is_list(kind.value_type) and not types.is_dictionary(kind.value_type)
    if is_list(kind):
        inner = kind.value_type
        return _is_plain(inner) and not is_list(inner) and not types.is_dictionary(inner)
    return bool(
        types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind) or types.is_null(kind)
        or types.is_string(kind) or types.is_large_string(kind) or types.is_timestamp(kind) or types.is_date(kind)
        or types.is_decimal(kind)
    )  # fmt: skip


def _refuse_compression(body: bytes) -> None:
    """Raise UserError if a message is compressed: a few bytes could become any number."""
    messages = pa.ipc.MessageReader.open_stream(pa.py_buffer(body))
    for message in messages:
        data = message.metadata.to_pybytes()
        root = _unpack("<I", data, 0)
        kind, header = _field(data, root, _HEADER_TYPE), _field(data, root, _HEADER)
        if kind is None or header is None or (number := data[kind]) not in (_DICTIONARY, _RECORDS):
            continue
        table: int | None = header + _unpack("<I", data, header)
        if number == _DICTIONARY and (table := _field(data, table, _DATA)) is not None:  # type: ignore[arg-type]
            table += _unpack("<I", data, table)
        if table is not None and _field(data, table, _COMPRESSION) is not None:
            raise UserError("the body is a compressed Arrow stream; send it without compression")


def _field(data: bytes, table: int, number: int) -> int | None:
    """Where a field of a flatbuffer's table is; None if it is left out."""
    entries = table - _unpack("<i", data, table)
    if 4 + 2 * number >= _unpack("<H", data, entries):
        return None
    offset = _unpack("<H", data, entries + 4 + 2 * number)
    return table + offset if offset else None


def _unpack(form: str, data: bytes, place: int) -> Any:
    return struct.unpack_from(form, data, place)[0]


def list_lengths(column: pa.ChunkedArray) -> Any:
    """The number of elements in each row, [n], 1 where it has none but a value."""
    if not is_list(column.type):
        return 1
    return pc.fill_null(pc.list_value_length(column), 0).to_numpy()
