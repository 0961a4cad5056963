"""The types of derived columns, and which types their inputs may have: what can be checked without any row."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pyarrow as pa

from rechub_dist.data.columns.strings import is_string
from rechub_dist.data.parquet.kinds import is_list, is_number, plain_type
from rechub_dist.derived import Age, Derived, Lookup, Overlap
from rechub_dist.errors import UserError, nearest


def derived_schema(schema: pa.Schema, derived: Sequence[Derived], where: str) -> pa.Schema:
    """The schema of a table of this schema with the derived columns that it lacks.

    Raises:
        UserError: a column is missing or has an unsuitable type.
    """
    types: dict[str, pa.DataType] = dict(zip(schema.names, schema.types, strict=True))
    for one in derived:
        if has_all(schema, one.outputs):
            continue
        user = f"derived column {one.name!r} (kind: {one.kind})"
        needs, makes = _TYPES[one.kind]
        for name, need in zip(one.inputs, needs, strict=True):
            if name not in types:
                raise UserError(f"{where}: there is no column {name!r}, which {user} needs; {nearest(name, types)}")
            if schema.names.count(name) > 1:
                raise UserError(f"{where}: {schema.names.count(name)} columns are named {name!r}; rename all but one")
            if not (pa.types.is_null(types[name]) or _FITS[need](plain_type(types[name]))):
                raise UserError(f"{where}: column {name!r} is {types[name]}, but {user} needs {need}")
        _check_alike(one, types, user, where)
        if isinstance(one, Overlap) and one.share:
            makes = (pa.float64(),)
        for name, kind in zip(one.outputs, makes, strict=True):
            if name not in types:
                types[name] = kind
                schema = schema.append(pa.field(name, kind))
    return schema


def has_all(schema: pa.Schema, names: Sequence[str]) -> bool:
    """Whether a table has all of the columns."""
    return set(names) <= set(schema.names)


def _is_time(kind: pa.DataType) -> bool:
    types = pa.types
    counts = types.is_integer(_value(kind)) or types.is_floating(_value(kind)) or types.is_decimal(_value(kind))
    return bool(counts or types.is_timestamp(kind) or types.is_date(kind))


def _is_value(kind: pa.DataType) -> bool:
    return bool(is_string(kind) or pa.types.is_integer(_value(kind)) or pa.types.is_null(kind))


def _value(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _list_of(fits: Callable[[pa.DataType], bool]) -> Callable[[pa.DataType], bool]:
    return lambda kind: is_list(kind) and (fits(kind.value_type) or bool(pa.types.is_null(kind.value_type)))


# What a column must hold, in the words of messages.
_STRING, _TIME, _NUM = "strings", "timestamps, dates or numbers", "numbers"
_LIST, _LIST_OR_ONE = "lists of strings or integers", "strings or integers, or lists of them"
_NUMBERS = "lists of numbers"
_FITS: dict[str, Callable[[pa.DataType], bool]] = {
    _STRING: is_string,
    _TIME: _is_time,
    _NUM: is_number,
    _LIST: _list_of(_is_value),
    _LIST_OR_ONE: lambda kind: _is_value(kind) or _list_of(_is_value)(kind),
    _NUMBERS: _list_of(is_number),
}
_WORDS = pa.list_(pa.string())
# By kind: what its inputs must hold, and the types of its outputs.
_TYPES: dict[str, tuple[tuple[str, ...], tuple[pa.DataType, ...]]] = {
    "split": ((_STRING,), (_WORDS,)),
    "key_values": ((_STRING,), (_WORDS, pa.list_(pa.float32()))),
    "hour": ((_TIME,), (pa.int64(),)),
    "weekday": ((_TIME,), (pa.int64(),)),
    "age": ((_TIME, _TIME), (pa.float64(),)),
    "bucket": ((_NUM,), (pa.int64(),)),
    "ratio": ((_NUM, _NUM), (pa.float64(),)),
    "overlap": ((_LIST_OR_ONE, _LIST), (pa.int64(),)),
    "lookup": ((_LIST_OR_ONE, _LIST, _NUMBERS), (pa.float64(),)),
}


def _check_alike(one: Derived, types: dict[str, pa.DataType], user: str, where: str) -> None:
    """Raise UserError if the columns whose values are compared do not hold the same kind of values."""
    if isinstance(one, Age):
        kinds = [types[name] for name in one.inputs]
        if all(pa.types.is_timestamp(kind) for kind in kinds) and (kinds[0].tz is None) != (kinds[1].tz is None):
            text = f"columns {one.column!r} and {one.now!r} are {kinds[0]} and {kinds[1]}"
            raise UserError(f"{where}: {text}, but {user} needs timestamps that both have a time zone, or both none")
    elif isinstance(one, Overlap | Lookup):
        first, second = one.inputs[:2]
        found = [plain_type(types[name]) for name in (first, second)]
        values = [kind.value_type if is_list(kind) else kind for kind in found]
        known = [is_string(kind) for kind in values if not pa.types.is_null(kind)]
        if len(set(known)) > 1:
            text = f"columns {first!r} and {second!r} are {types[first]} and {types[second]}"
            raise UserError(f"{where}: {text}, but {user} needs strings in both, or integers in both")
