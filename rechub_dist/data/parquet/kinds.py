"""Arrow types as the reader takes them: what a column is read as, and which types stand for the same."""

from __future__ import annotations

import pyarrow as pa


def plain_type(kind: pa.DataType) -> pa.DataType:
    """What a column of this type is read as: of the types that hold the same, one that Arrow can compute with.

    Views become strings and lists, a half float a float, and the dictionaries of lists' elements are resolved. Whether
    list elements may be missing is no part of a type here.
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
    """The schema with each column as it is read, without metadata."""
    return pa.schema([pa.field(field.name, plain_type(field.type)) for field in schema])


def is_list(kind: pa.DataType) -> bool:
    """Whether a column holds a list a row."""
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
    """Whether values are timestamps, or numbers, which may stand for times."""
    return bool(pa.types.is_timestamp(kind) or is_number(kind))


def family(kind: pa.DataType) -> str:
    """One word for all types that hold the same values: `integer` for int32 and int64, for one.

    A dictionary is what its values are. `null`, of a column without a value, may stand for any.
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
    """As `family`, of a list its elements', and `number` for all of integers, floats, decimals and booleans."""
    found = family(kind).removeprefix("list of ")
    numbers = ("integer", "float", "bool")
    return "number" if found in numbers or found.startswith("decimal") else found


def agree(one: str, other: str) -> bool:
    """Whether two families may stand in one column: they are the same, or one of them holds no value."""
    if one.startswith("list of ") and other.startswith("list of "):
        return agree(one.removeprefix("list of "), other.removeprefix("list of "))
    return one == other or "null" in (one, other)
