"""Arrow types in the reader: the type that a column is read as, and which types hold the same kind of values."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


def plain_type(kind: pa.DataType) -> pa.DataType:
    """The type that a column of this type is read as: an equivalent one that Arrow can compute with.

    Views become strings and lists, half floats become floats, and dictionary-encoded list elements are decoded. The
    nullability of list elements is dropped.
    """
    types = pa.types
    if types.is_fixed_size_list(kind):
        return pa.list_(_element(kind), kind.list_size)
    if types.is_large_list(kind) or types.is_large_list_view(kind):
        return pa.large_list(_element(kind))
    if types.is_list(kind) or types.is_list_view(kind):
        return pa.list_(_element(kind))
    if types.is_dictionary(kind) and plain_type(kind.value_type) != kind.value_type:
        return plain_type(kind.value_type)
    return _PLAIN.get(kind, kind)


_PLAIN = {pa.string_view(): pa.large_string(), pa.binary_view(): pa.large_binary(), pa.float16(): pa.float32()}


def _element(kind: pa.DataType) -> pa.Field:
    value = plain_type(kind.value_type)
    return pa.field("element", value.value_type if pa.types.is_dictionary(value) else value)


def plain_schema(schema: pa.Schema) -> pa.Schema:
    """The schema with the types of `plain_type`, without metadata."""
    return pa.schema([pa.field(field.name, plain_type(field.type)) for field in schema])


def plain_table(table: pa.Table) -> pa.Table:
    """The table with the types of `plain_type`, without metadata."""
    schema = plain_schema(table.schema)
    if schema.equals(table.schema):
        return table
    columns = [_plain(column, kind) for column, kind in zip(table.columns, schema.types, strict=True)]
    return pa.table(columns, schema=schema)


def _plain(column: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray:
    types = pa.types
    if types.is_list_view(column.type) or types.is_large_list_view(column.type):  # Arrow's cast makes invalid arrays
        return pa.chunked_array([_lists(chunk, kind) for chunk in column.chunks], kind)
    return column.cast(kind)


def _lists(views: pa.Array, kind: pa.DataType) -> pa.Array:
    lengths = pc.fill_null(pc.list_value_length(views), 0)
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths.to_numpy(zero_copy_only=False))])
    make = pa.LargeListArray if pa.types.is_large_list(kind) else pa.ListArray
    offset_type = pa.int64() if pa.types.is_large_list(kind) else pa.int32()
    nulls = views.is_null() if views.null_count else None
    return make.from_arrays(pa.array(offsets).cast(offset_type), views.flatten(), mask=nulls).cast(kind)


def is_list(kind: pa.DataType) -> bool:
    """Whether a column holds lists."""
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def is_integer(kind: pa.DataType) -> bool:
    """Whether values are integers, dictionary-encoded or not."""
    return bool(pa.types.is_integer(kind.value_type if pa.types.is_dictionary(kind) else kind))


def is_number(kind: pa.DataType) -> bool:
    """Whether values are numbers or booleans, dictionary-encoded or not."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    types = pa.types
    return bool(types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind) or types.is_decimal(kind))


def is_time(kind: pa.DataType) -> bool:
    """Whether values are timestamps, or numbers, which may be times."""
    return bool(pa.types.is_timestamp(kind) or is_number(kind))


def family(kind: pa.DataType) -> str:
    """One word for all types with the same kind of values: `integer` for int32 and int64, for example.

    Dictionary-encoded types are those of their values. `null`, of a column without any value, agrees with all.
    """
    types, kind = pa.types, plain_type(kind)
    if types.is_dictionary(kind):
        kind = kind.value_type
    if is_list(kind):
        return f"list of {family(kind.value_type)}"
    if types.is_string(kind) or types.is_large_string(kind):
        return "string"
    if types.is_integer(kind):
        return "integer"
    if types.is_floating(kind):
        return "float"
    if types.is_timestamp(kind):
        return "timestamp with a time zone" if kind.tz else "timestamp"
    return str(kind)


def values_family(kind: pa.DataType) -> str:
    """As `family`, but of a list's elements, and `number` for integers, floats, decimals and booleans."""
    found = family(kind).removeprefix("list of ")
    numbers = ("integer", "float", "bool")
    return "number" if found in numbers or found.startswith("decimal") else found


def agree(one: str, other: str) -> bool:
    """Whether two families may occur in one column: they are equal, or one of them has no values."""
    if one.startswith("list of ") and other.startswith("list of "):
        return agree(one.removeprefix("list of "), other.removeprefix("list of "))
    return one == other or "null" in (one, other)
