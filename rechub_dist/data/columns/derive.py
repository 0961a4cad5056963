"""Derived columns, computed from the others of their rows: when data is prepared, read, or given as rows.

Vectorised with Arrow and NumPy; needs neither torch nor torchrec. Columns may be chunked, sliced, dictionary-encoded,
of any width of strings and lists, or of nulls only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from rechub_dist.data.columns.derived_types import derived_schema, has_all
from rechub_dist.data.columns.strings import is_string
from rechub_dist.data.parquet.kinds import is_list, plain_type
from rechub_dist.derived import Age, Bucket, Derived, Hour, KeyValues, Lookup, Overlap, Ratio, Split, Weekday
from rechub_dist.errors import UserError, one_line, shown

Ints = NDArray[np.int64]
Mask = NDArray[np.bool_]

_ROWS: Final = 1 << 18  # computed at once
_PER_SECOND: Final = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
_SECONDS: Final = {"second": 1, "minute": 60, "hour": 3600, "day": 86400}
_NUMBER: Final = r"^[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?$"


def derive(table: pa.Table, derived: Sequence[Derived], where: str) -> pa.Table:
    """The table with those of the derived columns that it lacks appended, in their order.

    A column that the table has already stays as it is.

    Args:
        table: the rows.
        derived: what to compute; each may read the table's columns and those of the ones before it.
        where: the file's name, for errors.

    Raises:
        UserError: a column is missing, has an unsuitable type or an unsuitable value.
    """
    schema = derived_schema(table.schema, derived, where)
    names = schema.names[len(table.schema) :]
    if not names:
        return table
    wanted = [one for one in derived if not has_all(table.schema, one.outputs)]
    read = [name for name in dict.fromkeys(name for one in wanted for name in one.inputs) if name in table.schema.names]
    pieces: dict[str, list[pa.Array]] = {name: [] for name in names}
    for batch in table.select(read).to_batches(max_chunksize=_ROWS):
        columns = dict(zip(read, batch.columns, strict=True))
        for one in wanted:
            try:
                made = _MAKE[one.kind](one, *(columns[name] for name in one.inputs), where=where)
            except pa.ArrowException as error:
                raise UserError(f"{where}: derived column {one.name!r}: {one_line(error)}; fix the data") from error
            columns = dict(zip(one.outputs, made, strict=True)) | columns
        for name in names:
            pieces[name].append(columns[name])
    for name in names:
        table = table.append_column(schema.field(name), pa.chunked_array(pieces[name], schema.field(name).type))
    return table


def _split(one: Split, column: pa.Array, *, where: str) -> list[pa.Array]:
    def split(strings: pa.Array) -> list[pa.Array]:
        counts, pieces = _pieces(strings, one.by)
        return [_lists(counts, pieces.cast(pa.string()), strings, where)]

    return _each_once(split, column)


def _key_values(one: KeyValues, column: pa.Array, *, where: str) -> list[pa.Array]:
    def split(strings: pa.Array) -> list[pa.Array]:
        counts, pieces = _pieces(strings, one.by)
        halves = pc.split_pattern(pieces, one.between, max_splits=1, reverse=True)
        sizes = pc.list_value_length(halves).to_numpy(zero_copy_only=False).astype(np.int64)
        first, parts = np.cumsum(sizes) - sizes, pc.utf8_trim_whitespace(halves.flatten())
        keys, weighted = parts.take(pa.array(first)), sizes == 2
        weights = np.ones(len(keys), np.float32)
        weights[weighted] = _weights(one, parts.take(pa.array(first[weighted] + 1)), where)
        kept = _not_empty(keys)
        counts = np.bincount(np.repeat(np.arange(len(counts)), counts)[kept], minlength=len(counts))
        found = (keys.filter(pa.array(kept)).cast(pa.string()), pa.array(weights[kept]))
        return [_lists(counts, values, strings, where) for values in found]

    return _each_once(split, column)


def _weights(one: KeyValues, texts: pa.Array, where: str) -> NDArray[np.float32]:
    """The weights that are written, float32 [texts]."""
    wrong = ~pc.match_substring_regex(texts, _NUMBER).to_numpy(zero_copy_only=False)
    if not wrong.any():
        with np.errstate(over="ignore"):
            weights = texts.cast(pa.float64()).to_numpy(zero_copy_only=False).astype(np.float32)
        wrong = ~np.isfinite(weights)
    if wrong.any():
        text = f"{shown(texts[int(wrong.argmax())].as_py())} is no weight of 32 bits"
        raise UserError(
            f"{where}: column {one.column!r}: {text}; derived column {one.name!r} needs keys, or KEY{one.between}NUMBER"
        )
    return weights


def _hour(one: Hour, column: pa.Array, *, where: str) -> list[pa.Array]:  # noqa: ARG001 - all kinds are called alike
    return [_of_day(one, column, _SECONDS["day"], lambda seconds: seconds // _SECONDS["hour"])]


def _weekday(one: Weekday, column: pa.Array, *, where: str) -> list[pa.Array]:  # noqa: ARG001
    thursday = 3  # the first of January 1970
    return [_of_day(one, column, 7 * _SECONDS["day"], lambda seconds: (seconds // _SECONDS["day"] + thursday) % 7)]


def _of_day(one: Hour | Weekday, column: pa.Array, period: int, part: Callable[[Ints], Ints]) -> pa.Array:
    """Of the seconds since a period of days began, `part`."""
    times, per_second = _times(column, one.unit)
    there = times.is_valid().to_numpy(zero_copy_only=False)
    values = pc.fill_null(times, 0).to_numpy(zero_copy_only=False)
    # within the period before the offset is added: no sum is then too large
    seconds = (np.floor(values / per_second) if values.dtype.kind == "f" else values // per_second) % period
    local = (seconds.astype(np.int64) + round(one.utc_offset * _SECONDS["hour"])) % period
    return pa.array(part(local), mask=~there)


def _age(one: Age, column: pa.Array, now: pa.Array, *, where: str) -> list[pa.Array]:  # noqa: ARG001
    (then, then_per_second), (since, now_per_second) = _times(column, one.unit), _times(now, one.unit)
    finest = max(then_per_second, now_per_second)
    if then.type != since.type:
        then, since = (times.cast(pa.float64(), safe=False) for times in (then, since))
    gaps = pc.subtract_checked(
        pc.multiply_checked(since, pa.scalar(finest // now_per_second, since.type)),
        pc.multiply_checked(then, pa.scalar(finest // then_per_second, then.type)),
    )
    return [pc.divide(gaps.cast(pa.float64(), safe=False), float(finest * _SECONDS[one.per]))]


def _bucket(one: Bucket, column: pa.Array, *, where: str) -> list[pa.Array]:  # noqa: ARG001
    numbers = _numbers(column)
    there = numbers.is_valid().to_numpy(zero_copy_only=False)
    values = pc.fill_null(numbers, 0).to_numpy(zero_copy_only=False)
    edges = np.array(one.boundaries)
    if values.dtype.kind != "f":  # exact beyond 2^53, too: an integer reaches what the next integer reaches
        info = np.iinfo(values.dtype)
        whole = [max(math.ceil(boundary), info.min) for boundary in one.boundaries if math.ceil(boundary) <= info.max]
        edges = np.array(whole, values.dtype)
    return [pa.array(np.searchsorted(edges, values, side="right").astype(np.int64), mask=~there)]


def _ratio(one: Ratio, column: pa.Array, over: pa.Array, *, where: str) -> list[pa.Array]:  # noqa: ARG001
    above, below = (_numbers(array).cast(pa.float64(), safe=False) for array in (column, over))
    there = (pc.is_valid(above).to_numpy(zero_copy_only=False)) & (pc.is_valid(below).to_numpy(zero_copy_only=False))
    with np.errstate(all="ignore"):
        ratio = _float64(above) / (divisor := _float64(below))
    return [pa.array(ratio, mask=~there | (divisor == 0) | np.isnan(ratio))]


def _overlap(one: Overlap, left: pa.Array, right: pa.Array, *, where: str) -> list[pa.Array]:  # noqa: ARG001
    rows = len(left)
    (left_rows, lefts), (right_rows, rights) = _elements(left), _elements(right)
    mine, theirs, distinct = _pairs((left_rows, lefts), (right_rows, rights))
    different = pc.unique(pa.array(mine[mine >= 0]))
    there = pc.is_in(different, value_set=pa.array(theirs[theirs >= 0])).to_numpy(zero_copy_only=False)
    of_row = different.to_numpy() // distinct
    counts = np.bincount(of_row[there], minlength=rows)
    if not one.share:
        return [pa.array(counts.astype(np.int64))]
    return [pa.array(counts / np.maximum(np.bincount(of_row, minlength=rows), 1))]


def _lookup(one: Lookup, keys: pa.Array, of: pa.Array, values: pa.Array, *, where: str) -> list[pa.Array]:
    rows = len(keys)
    (key_rows, asked), (of_rows, known), (value_rows, numbers) = map(_elements, (keys, of, values))
    if len(of_rows) != len(value_rows) or (of_rows != value_rows).any():
        counts, wanted = (np.bincount(found, minlength=rows) for found in (value_rows, of_rows))
        row = int((counts != wanted).argmax())
        raise UserError(
            f"{where}: columns {one.of!r} and {one.values!r} have {wanted[row]} and {counts[row]} elements in one row; "
            f"derived column {one.name!r} needs one value per key"
        )
    weights = _float64(_numbers(numbers))
    wanted, held, distinct = _pairs((key_rows, asked), (of_rows, known))
    usable = (held >= 0) & ~np.isnan(weights)
    wanted, weights = wanted[wanted >= 0], weights[usable]
    places = pc.index_in(pa.array(wanted), value_set=pa.array(held[usable]))  # of two equal ones, the first
    found = places.is_valid().to_numpy(zero_copy_only=False)
    of_row = wanted[found] // distinct
    weights = weights[places.drop_null().to_numpy()]
    result = np.full(rows, float(one.default))
    first = np.flatnonzero(np.diff(of_row, prepend=-1))  # rows ascend
    having = of_row[first]
    if one.combine == "first":
        result[having] = weights[first]
    elif one.combine == "max":
        result[having] = np.maximum.reduceat(weights, first) if len(first) else weights
    else:
        result[having] = np.bincount(of_row, weights, minlength=rows)[having]
        if one.combine == "mean":
            result[having] /= np.bincount(of_row, minlength=rows)[having]
    return [pa.array(result)]


_MAKE: dict[str, Callable[..., list[pa.Array]]] = {
    "split": _split,
    "key_values": _key_values,
    "hour": _hour,
    "weekday": _weekday,
    "age": _age,
    "bucket": _bucket,
    "ratio": _ratio,
    "overlap": _overlap,
    "lookup": _lookup,
}


def _each_once(work: Callable[[pa.Array], list[pa.Array]], column: pa.Array) -> list[pa.Array]:
    """The results of `work` on a column's strings, as large_string; where they recur, on each different one once."""
    plain = column.dictionary_decode() if pa.types.is_dictionary(column.type) else column
    strings = plain.cast(pa.large_string())
    encoded = strings.dictionary_encode()
    if 2 * len(encoded.dictionary) > len(strings):
        return work(strings)
    return [made.take(encoded.indices) for made in work(encoded.dictionary)]


def _pieces(strings: pa.Array, by: str) -> tuple[Ints, pa.Array]:
    """The number of pieces of each string, int64 [n], and the pieces: stripped, without empty ones."""
    split = pc.split_pattern(strings, by)
    counts = pc.fill_null(pc.list_value_length(split), 0).to_numpy(zero_copy_only=False)
    pieces = pc.utf8_trim_whitespace(split.flatten())
    kept = _not_empty(pieces)
    if not kept.all():
        counts = np.bincount(np.repeat(np.arange(len(counts)), counts)[kept], minlength=len(counts))
        pieces = pieces.filter(pa.array(kept))
    return counts.astype(np.int64), pieces


def _not_empty(strings: pa.Array) -> Mask:
    found: Mask = pc.greater(pc.binary_length(strings), 0).to_numpy(zero_copy_only=False)
    return found


def _lists(counts: Ints, values: pa.Array, like: pa.Array, where: str) -> pa.Array:
    """Lists of `counts` of the values; null where `like` is."""
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
    if offsets[-1] > np.iinfo(np.int32).max:
        raise UserError(f"{where}: {len(counts):,} rows have {offsets[-1]:,} pieces; write smaller row groups")
    nulls = like.is_null() if like.null_count else None
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), values, mask=nulls)


def _times(column: pa.Array, unit: str) -> tuple[pa.Array, int]:
    """Times since 1970, int64 or float64 [n], null where they are missing, and how many of them make a second."""
    kind = column.type
    if pa.types.is_date(kind):
        column = column.cast(pa.timestamp("s" if pa.types.is_date32(kind) else "ms"))
    if pa.types.is_timestamp(column.type):
        return column.cast(pa.int64()), _PER_SECOND[column.type.unit]
    numbers = _numbers(column)
    if not pa.types.is_floating(numbers.type):
        return numbers.cast(pa.int64()), _PER_SECOND[unit]
    return pc.if_else(pc.is_finite(numbers), numbers, pa.scalar(None, pa.float64())), _PER_SECOND[unit]


def _numbers(column: pa.Array) -> pa.Array:
    """Integers of the column's width, or float64 [n], with null for NaN."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_boolean(column.type):
        return column.cast(pa.int8())
    if pa.types.is_integer(column.type):
        return column
    if pa.types.is_float16(column.type):
        column = column.cast(pa.float32())
    column = column.cast(pa.float64())
    return pc.if_else(pc.is_nan(column), pa.scalar(None, pa.float64()), column)


def _float64(numbers: pa.Array) -> NDArray[np.float64]:
    """The numbers, float64 [n], NaN for nulls."""
    found: NDArray[np.float64] = numbers.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    return found


def _elements(column: pa.Array) -> tuple[Ints, pa.Array]:
    """The elements of a column of lists, or the values of another, and the row of each, ascending, int64."""
    rows = np.arange(len(column))
    kind = column.type
    if is_list(plain_type(kind)):
        lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False)
        rows, column = np.repeat(rows, lengths), column.flatten()
    elif pa.types.is_null(kind):  # of null lists, which are empty
        rows, column = rows[:0], column[:0]
    return rows, column.dictionary_decode() if pa.types.is_dictionary(column.type) else column


def _pairs(*columns: tuple[Ints, pa.Array]) -> tuple[Any, ...]:
    """For the elements of each column a number that stands for their row and value; -1 for a null.

    Returns:
        int64 [elements] for each column, and the divisor that gives the row.
    """
    strings = any(is_string(array.type) for _, array in columns)
    kind = pa.large_string() if strings else pa.int64()
    encoded = pa.concat_arrays([array.cast(kind) for _, array in columns]).dictionary_encode()
    codes = pc.fill_null(encoded.indices.cast(pa.int64()), -1).to_numpy(zero_copy_only=False)
    distinct = max(len(encoded.dictionary), 1)
    ends = np.cumsum([len(array) for _, array in columns])[:-1]
    pairs = [
        np.where(own >= 0, rows * distinct + own, -1)
        for (rows, _), own in zip(columns, np.split(codes, ends), strict=True)
    ]
    return *pairs, distinct
