"""Converts and checks one column at a time: ids, numbers, keys. Vectorised; needs neither torch nor torchrec."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from rechub_dist.data.columns.hashing import hash_ids
from rechub_dist.data.columns.strings import distinct, hash_strings, is_string, python_value, spread
from rechub_dist.data.columns.vocabulary import vocabulary_of
from rechub_dist.data.parquet.kinds import is_list
from rechub_dist.data.parquet.row_group import RowGroup
from rechub_dist.errors import UserError
from rechub_dist.features import DenseFeature, Label, SparseFeature, StoredFeature, TimeGapFeature

Ints = NDArray[np.integer]
Numbers = NDArray[Any]
Floats = NDArray[np.float32]
Mask = NDArray[np.bool_]


def read_ids(
    array: pa.Array, feature: StoredFeature, where: str, bounds: tuple[int, int] | None = None
) -> tuple[Ints, Mask | None]:
    """The ids of an array of integers or strings, after the feature's hash or vocabulary and its policies.

    Args:
        array: the values [n].
        feature: the feature that they belong to.
        where: the file's name, for errors.
        bounds: the least and the greatest value, if known.

    Returns:
        The ids, of any integer type [n], and which of them to keep, bool [n]; None if all.

    Raises:
        UserError: an id is missing, outside the table or not in the vocabulary, and the policy is `error`.
    """
    table = feature.table
    ids, missing, outside = _look_up(array, feature, bounds)
    if missing is not None and feature.missing == "error":
        raise _error(
            where,
            feature.source,
            f"{missing.sum()} id(s) are missing (null); fill them in, or set missing: drop | unknown",
        )
    if outside is not None and feature.out_of_range == "error":
        value = python_value(array[int(outside.argmax())])
        if feature.vocabulary is not None and not feature.encoded:
            raise _error(
                where,
                feature.source,
                f"{value!r} is not in vocabulary {feature.vocabulary}; build it from this data too, or set "
                "out_of_range: drop | unknown",
            )
        raise _error(
            where,
            feature.source,
            f"id {value} is outside table {table.name!r} of {table.rows} rows (ids 0..{table.rows - 1}); "
            "raise the table's rows, or set out_of_range: drop | unknown, or hash: true",
        )
    keep: Mask | None = None
    for bad, policy in ((missing, feature.missing), (outside, feature.out_of_range)):
        if bad is None:
            continue
        if policy == "unknown":
            # the column's type may be too narrow for `unknown_id`
            ids = np.where(bad, np.int64(feature.unknown_id), ids.astype(np.int64))
        else:
            keep = ~bad if keep is None else keep & ~bad
    return ids, keep


def _look_up(
    array: pa.Array, feature: StoredFeature, bounds: tuple[int, int] | None
) -> tuple[Ints, Mask | None, Mask | None]:
    """The ids [n]; which are null; and which are unknown or outside the table: bool [n], or None if none is."""
    table, missing = feature.table, _missing(array)
    vocabulary = vocabulary_of(feature)
    ids: Ints
    if pa.types.is_null(array.type):
        array = array.cast(pa.large_string() if vocabulary is not None and vocabulary.strings else pa.int64())
    if vocabulary is not None:
        ids = vocabulary.find(array)
        unknown = ids < 0 if missing is None else (ids < 0) & ~missing
        return ids, missing, unknown if unknown.any() else None
    if is_string(array.type):
        strings, codes = distinct(array)
        return spread(hash_ids(hash_strings(strings), table.name, table.rows), codes, null=0), missing, None
    array = array if missing is None else pc.fill_null(array, 0)
    ids = array.to_numpy(zero_copy_only=False)
    if feature.hash:
        return hash_ids(ids, table.name, table.rows), missing, None
    known = bounds is not None and 0 <= bounds[0] <= bounds[1] < table.rows
    if known or not len(ids) or _within(ids, table.rows):
        return ids, missing, None
    return ids, missing, (ids < 0) | (ids >= table.rows)


def read_id_weights(array: pa.Array, ids: pa.Array, feature: SparseFeature, where: str) -> Floats:
    """The weight of each id of the column `ids`, float32 [ids], in their order.

    Raises:
        UserError: a row has more or fewer weights than ids, or a weight is missing, negative or not finite.
    """
    assert feature.weights is not None
    if is_list(ids.type):
        counts, wanted = (pc.fill_null(pc.list_value_length(a), 0).to_numpy() for a in (array, ids))
        if (wrong := np.flatnonzero(counts != wanted)).size:
            raise _error(
                where,
                feature.weights,
                f"a row has {counts[wrong[0]]} weights for {wanted[wrong[0]]} ids in column {feature.source!r}; give "
                f"one per id",
            )
        array = array.flatten()
    return read_weight(array, where, feature.weights).astype(np.float32, copy=False)


def read_time_gaps(times: pa.Array, now: pa.Array, feature: TimeGapFeature, where: str) -> tuple[Ints, Ints]:
    """The bucket of each behaviour, int64 [behaviours], and their number in each row, int64 [n].

    Raises:
        UserError: a time is missing, NaN, infinite or beyond 64 bits, or a behaviour is later than its row.
    """
    lengths = pc.fill_null(pc.list_value_length(times), 0).to_numpy().astype(np.int64)
    units = [kind.unit for kind in (times.type.value_type, now.type) if pa.types.is_timestamp(kind)]
    finest = max(units, key=list(_PER_SECOND).index, default=None)
    unit = 1.0 if finest is None else _PER_SECOND[finest]
    then = _times(times.flatten(), finest, where, feature.times)
    since = np.repeat(_times(now, finest, where, feature.now), lengths)
    if then.dtype != since.dtype:
        then, since = then.astype(np.float64), since.astype(np.float64)
    late = then > since
    if late.any():
        raise _error(
            where,
            feature.times,
            f"{late.sum()} time(s) are later than their row's in column {feature.now!r}, which would leak "
            f"the future; cut the histories at the row's time",
        )
    gaps = since - then
    if gaps.dtype == np.float64:
        return np.searchsorted(np.array(feature.boundaries) * unit, gaps, side="right"), lengths
    # As unsigned integers, differences are exact; they reach a boundary where they reach the next integer.
    edges = [math.ceil(min(max(boundary * unit, 0.0), _LARGEST)) for boundary in feature.boundaries]
    return np.searchsorted(np.array(edges, np.uint64), gaps.view(np.uint64), side="right"), lengths


_PER_SECOND = {"s": 1.0, "ms": 1e3, "us": 1e6, "ns": 1e9}
_LARGEST = 2.0**64 - 2.0**11  # the last float below 2^64


def _times(array: pa.Array, unit: str | None, where: str, column: str) -> Numbers:
    """Times as int64 [n], timestamps in `unit`; as float64 if the column holds floats or decimals.

    Raises:
        UserError: a time is missing, not finite, or needs more than 64 bits.
    """
    if array.null_count:
        raise _error(where, column, f"{array.null_count} time(s) are missing (null); fill them in")
    kind = array.type
    if pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        values: Numbers = array.cast(pa.float64()).to_numpy(zero_copy_only=False)
        if not (finite := np.isfinite(values)).all():
            raise _error(where, column, f"{(~finite).sum()} time(s) are missing (NaN) or infinite; fill them in")
        return values
    try:
        if pa.types.is_timestamp(kind):
            array = array.cast(pa.timestamp(unit, kind.tz))
        return array.cast(pa.int64()).to_numpy(zero_copy_only=False)
    except pa.ArrowInvalid as error:
        raise _error(where, column, f"a time does not fit 64 bits ({str(error).splitlines()[0]}); fix it") from None


def read_dense(array: pa.Array, feature: DenseFeature, where: str) -> Numbers:
    """The values of a dense feature, float32 [n, dim]: filled, transformed and standardised.

    Raises:
        UserError: a value is missing, infinite or beyond float32 and the policy is `error`, or a row has more or fewer
            than `dim` values; or a standardised value is beyond float32.
    """
    if feature.dim == 1:
        values = _numbers(array).reshape(-1, 1)
    else:
        lengths = pc.list_value_length(array)
        there = lengths.is_valid().to_numpy(zero_copy_only=False)
        if (wrong := lengths.filter(pc.not_equal(lengths, feature.dim))) and len(wrong):
            raise _error(
                where,
                feature.source,
                f"a row has {wrong[0]} values; feature {feature.name!r} needs {feature.dim}",
            )
        flat = _numbers(array.flatten()).reshape(-1, feature.dim)
        values = flat
        if not there.all():
            values = np.full((len(array), feature.dim), np.nan)
            values[there] = flat
    log = feature.transform == "log"
    if log:  # before the cast to float32, in which 1e300 would be infinite
        values = values.astype(np.float32 if values.dtype.itemsize < 4 else np.float64, copy=values.dtype.kind != "f")
    if values.dtype.kind == "f":
        most = np.finfo(values.dtype).max if log else _MOST
        # with a NaN among them the minimum is NaN: no mask is needed to see that all is well
        if not (values.min(initial=0) >= -most and values.max(initial=0) <= most):
            values = _filled(values, ~(np.abs(values) <= most), feature, where)
    if log:
        values = np.copysign(np.log1p(np.abs(values)), values)
    if (feature.mean, feature.std) != (0.0, 1.0):
        values = (values.astype(np.float64) - feature.mean) / feature.std
        if not (values.min(initial=0) >= -_MOST and values.max(initial=0) <= _MOST):
            text = f"a value less mean {feature.mean}, divided by std {feature.std}, is beyond float32; raise std"
            raise _error(where, feature.source, text)
    return values.astype(np.float32, copy=False)


_MOST = float(np.finfo(np.float32).max)


def _filled(values: Numbers, wrong: NDArray[np.bool_], feature: DenseFeature, where: str) -> Numbers:
    """The values with the feature's `fill` in place of the wrong ones. Raises UserError if the policy is `error`."""
    if feature.missing == "error":
        missing = np.isnan(values).sum()
        what = (
            f"{missing} value(s) are missing (null or NaN)"
            if missing
            else f"{wrong.sum()} value(s) are infinite or beyond float32 ({values[wrong][0]})"
        )
        raise _error(where, feature.source, f"{what}; fill them in, or set missing: fill")
    return np.where(wrong, values.dtype.type(feature.fill), values)


def read_label(array: pa.Array, label: Label, where: str) -> Numbers:
    """The values of a label, of any numeric type [n].

    Raises:
        UserError: a value is missing or not finite, a classification label is neither 0 nor 1, or one of several
            classes is none of them.
    """
    values = _numbers(array)
    if label.type == "classification":
        wrong = ~((values == 0) | (values == 1))
        wanted = "a classification label must be 0 or 1; fix the data, or set type: regression"
    elif label.classes is not None:
        wrong = ~((values >= 0) & (values < label.classes) & (values == np.floor(values)))
        wanted = (
            f"a label of {label.classes} classes must be an integer from 0 to {label.classes - 1}; fix the data, or "
            "the schema's classes"
        )
    else:
        wrong = ~(np.abs(values) <= _MOST)
        wanted = "a label must be a finite number; remove the row"
    if wrong.any():
        if array.null_count:
            raise _error(where, label.source, f"{array.null_count} label(s) are missing; remove the rows without one")
        raise _error(where, label.source, f"label {values[wrong][0]} in {wrong.sum()} row(s); {wanted}")
    return values


def read_weight(array: pa.Array, where: str, column: str) -> Numbers:
    """The row weights, of any numeric type [n].

    Raises:
        UserError: a weight is missing, negative or not finite.
    """
    values = _numbers(array)
    wrong = ~((values >= 0) & (values <= _MOST))
    if wrong.any():
        first = "null" if array.null_count else values[wrong][0]
        fix = "a weight must be finite and not negative; use 0 for none"
        raise _error(where, column, f"weight {first} in {wrong.sum()} row(s); {fix}")
    return values


def read_key(array: pa.Array, where: str, column: str) -> pa.Array:
    """Values to group rows by, as int64 or large_string [n], so that they compare equal across files.

    Raises:
        UserError: a value is missing or beyond int64.
    """
    missing = _missing(array)
    if missing is not None:
        text = f"{missing.sum()} key(s) are missing (null); fill them in, or group by another column"
        raise _error(where, column, text)
    try:
        return array.cast(pa.large_string() if is_string(array.type) else pa.int64())
    except pa.ArrowInvalid:
        raise _error(where, column, "a key is beyond int64; write the column as strings") from None


def one_array(table: pa.Table | RowGroup, column: str, *, lists: bool = False) -> pa.Array:
    """A column as one array [n], dictionary-decoded unless it holds strings.

    A column of type null (no value at all) becomes null lists if `lists` are wanted.
    """
    chunks = table.column(column)
    array = (
        chunks.chunk(0) if chunks.num_chunks == 1 else pa.concat_arrays(chunks.chunks or [pa.array([], chunks.type)])
    )
    if lists and pa.types.is_null(array.type):
        return pa.nulls(len(array), pa.list_(pa.null()))
    if pa.types.is_dictionary(array.type) and not is_string(array.type):
        return array.dictionary_decode()
    return array


def _numbers(array: pa.Array) -> Numbers:
    """The values as a NumPy array [n]; floats with NaN for nulls if there are any."""
    if pa.types.is_boolean(array.type):
        array = array.cast(pa.int8())
    elif pa.types.is_float16(array.type):
        array = array.cast(pa.float32())
    elif pa.types.is_decimal(array.type) or pa.types.is_null(array.type):
        array = array.cast(pa.float64())
    values: Numbers = array.to_numpy(zero_copy_only=False)
    return values


def _missing(array: pa.Array) -> Mask | None:
    """Which values are null, bool [n], those in a dictionary's values included; None if none is."""
    if pa.types.is_dictionary(array.type) and array.dictionary.null_count:
        array = array.dictionary_decode()
    return array.is_null().to_numpy(zero_copy_only=False) if array.null_count else None


def _within(ids: Ints, rows: int) -> bool:
    """Whether all ids are in 0 .. rows - 1, in one pass: as unsigned integers, negative ids are the largest."""
    info = np.iinfo(ids.dtype)
    limit = min(rows, 2 ** (info.bits - 1)) if info.min < 0 else rows
    return bool(ids.view(f"u{ids.dtype.itemsize}").max() < limit)


def _error(where: str, column: str, text: str) -> UserError:
    return UserError(f"{where}: column {column!r}: {text}")
