"""One column at a time: is it of a fitting type, and what are its ids or numbers. Whole arrays, no loop over rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from rechub_dist.data.negatives import hash_ids
from rechub_dist.data.row_group import RowGroup
from rechub_dist.data.spec import BatchSpec
from rechub_dist.data.strings import distinct, hash_strings, is_string, spread
from rechub_dist.data.vocabulary import vocabulary_of
from rechub_dist.errors import UserError, nearest
from rechub_dist.features import DenseFeature, Label, SequenceFeature, SparseFeature, StoredFeature, TimeGapFeature

Ints = NDArray[np.integer]
Numbers = NDArray[Any]
Floats = NDArray[np.float32]
Mask = NDArray[np.bool_]


def column_uses(spec: BatchSpec) -> list[str]:
    """The columns that `spec` reads, in the order in which a window is made of them, each as often as it is used."""
    names: list[str | None] = []
    for feature in spec.in_key_order:
        names += [feature.source, feature.weights if isinstance(feature, SparseFeature) else None]
    for gap in spec.time_gaps:
        names += [gap.times, gap.now]
    names += [dense.source for dense in spec.dense]
    names += [label.source for label in spec.labels]
    return [name for name in (*names, spec.weight) if name]


def column_names(spec: BatchSpec) -> list[str]:
    """The columns that `spec` reads, each once."""
    return list(dict.fromkeys(column_uses(spec)))


def check_schema(schema: pa.Schema, spec: BatchSpec, where: str) -> None:
    """Check that every column that `spec` reads is there and of a fitting type.

    Raises:
        UserError: naming `where`, the column, and what would fit.
    """
    types: dict[str, pa.DataType] = dict(zip(schema.names, schema.types, strict=True))
    for name in column_names(spec):
        if name not in types:
            raise UserError(f"{where}: there is no column {name!r}; {nearest(name, types)}")
        if schema.names.count(name) > 1:
            raise UserError(f"{where}: column {name!r} is there {schema.names.count(name)} times; rename one")

    for column, kind, fits, user, wanted in _needs(types, spec):
        if not fits:
            raise UserError(f"{where}: column {column!r} is {kind}, but {user} needs {wanted}")


def _needs(types: dict[str, pa.DataType], spec: BatchSpec) -> Iterator[tuple[str, pa.DataType, bool, str, str]]:
    """For each use of a column: the column, its type, whether it fits, who uses it, and what would fit."""
    for feature in spec.stored:
        kind = types[feature.source]
        fits, one, several = _fits_ids(kind.value_type if is_list(kind) else kind, feature)
        if isinstance(feature, SequenceFeature):
            user, wanted = f"sequence feature {feature.name!r}", f"a list of {several}"
            fits = fits and is_list(kind)
        else:
            user, wanted = f"sparse feature {feature.name!r}", f"{one} or a list of {several}"
        yield feature.source, kind, fits, user, wanted
        if isinstance(feature, SparseFeature) and feature.weights:
            of, kind = kind, types[feature.weights]
            fits = is_list(of) == is_list(kind) and is_number(kind.value_type if is_list(kind) else kind)
            wanted = "a list of numbers" if is_list(of) else "a number"
            yield feature.weights, kind, fits, f"the weight column of feature {feature.name!r}", wanted
    for gap in spec.time_gaps:
        kind, now = types[gap.times], types[gap.now]
        user = f"time gap feature {gap.name!r}"
        yield gap.times, kind, is_list(kind) and _is_time(kind.value_type), user, "a list of numbers or timestamps"
        fits = _is_time(now) and pa.types.is_timestamp(now) == pa.types.is_timestamp(kind.value_type)
        yield gap.now, now, fits, user, f"what the elements of column {gap.times!r} are, {kind.value_type}"
    for dense in spec.dense:
        kind = types[dense.source]
        if dense.dim == 1:
            fits = is_number(kind)
        else:
            fits = is_list(kind) and is_number(kind.value_type)
            fits = fits and not (pa.types.is_fixed_size_list(kind) and kind.list_size != dense.dim)
        wanted = "a number" if dense.dim == 1 else f"a list of {dense.dim} numbers"
        yield dense.source, kind, fits, f"dense feature {dense.name!r}", wanted
    for label in spec.labels:
        kind = types[label.source]
        yield label.source, kind, is_number(kind), f"label {label.name!r}", "a number or a boolean"
    if spec.weight:
        kind = types[spec.weight]
        yield spec.weight, kind, is_number(kind), "the row weight", "a number"


def _fits_ids(kind: pa.DataType, feature: StoredFeature) -> tuple[bool, str, str]:
    """Whether a feature's ids may be of this type; what one id, and what several of them would have to be."""
    vocabulary = vocabulary_of(feature)
    if vocabulary is not None:
        what = "a string" if vocabulary.strings else "an integer"
        fits = is_string(kind) if vocabulary.strings else _is_integer(kind)
        return fits, f"{what} as in its vocabulary {vocabulary.path}", f"{what.split()[1]}s"
    if feature.hash:
        return _is_integer(kind) or is_string(kind), "an integer, a string", "integers or strings"
    hint = "; for strings, set hash: true or name a vocabulary" if is_string(kind) else ""
    return _is_integer(kind), "an integer", f"integers{hint}"


def read_ids(
    array: pa.Array, feature: StoredFeature, where: str, bounds: tuple[int, int] | None = None
) -> tuple[Ints, Mask | None]:
    """The ids of an array of integers or strings after the feature's hash or vocabulary and its policies.

    Args:
        array: n values.
        feature: what they are.
        where: the file's name, for errors.
        bounds: the least and the greatest of the values, if they are known.

    Returns:
        The ids, any integer type [n], and which of them to keep, bool [n]; None where all are kept.

    Raises:
        UserError: for a missing id, one outside the table, or a value that is not in the vocabulary, where the policy
            is `error`.
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
        value = array[int(outside.argmax())].as_py()
        if feature.vocabulary is not None:
            raise _error(
                where,
                feature.source,
                f"{value!r} is not in vocabulary {feature.vocabulary}; build that from this data too, or set "
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
            # the type of the column may be too narrow for the id that stands for the unknown
            ids = np.where(bad, np.int64(feature.unknown_id), ids.astype(np.int64))
        else:
            keep = ~bad if keep is None else keep & ~bad
    return ids, keep


def _look_up(
    array: pa.Array, feature: StoredFeature, bounds: tuple[int, int] | None
) -> tuple[Ints, Mask | None, Mask | None]:
    """The ids [n], and which of them are missing and which unknown or outside the table, bool [n]; None for none."""
    table, missing = feature.table, _missing(array)
    vocabulary = vocabulary_of(feature)
    ids: Ints
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
    """The weight of each id of the column `ids`, float32, in the ids' order.

    Raises:
        UserError: for a row with other than one weight an id, or a weight that is missing, negative or not finite.
    """
    assert feature.weights is not None
    if is_list(ids.type):
        counts, wanted = (pc.fill_null(pc.list_value_length(a), 0).to_numpy() for a in (array, ids))
        if (wrong := np.flatnonzero(counts != wanted)).size:
            raise _error(
                where,
                feature.weights,
                f"a row has {counts[wrong[0]]} weights for {wanted[wrong[0]]} ids in column {feature.source!r}; give "
                f"one an id",
            )
        array = array.flatten()
    return read_weight(array, where, feature.weights).astype(np.float32, copy=False)


def read_time_gaps(times: pa.Array, now: pa.Array, feature: TimeGapFeature, where: str) -> tuple[Ints, Ints]:
    """The bucket of each behaviour, int64, and their number in each row.

    Raises:
        UserError: for a missing time, or a behaviour after the row's own time.
    """
    lengths = pc.fill_null(pc.list_value_length(times), 0).to_numpy().astype(np.int64)
    then, since, unit = times.flatten(), now, 1.0
    if pa.types.is_timestamp(now.type):
        then, since = (array.cast(pa.timestamp("us")).cast(pa.int64()) for array in (then, since))
        unit = 1e6
    for column, array in ((feature.times, then), (feature.now, since)):
        if array.null_count:
            raise _error(where, column, f"{array.null_count} time(s) are missing (null); fill them in")
    gaps = np.repeat(_numbers(since), lengths) - _numbers(then)
    if len(gaps) and not gaps.min() >= 0:
        raise _error(
            where,
            feature.times,
            f"{(~(gaps >= 0)).sum()} time(s) are later than their row's in column {feature.now!r}, which would tell "
            f"the future; cut the histories at the row's time",
        )
    return np.searchsorted(np.array(feature.boundaries) * unit, gaps, side="right"), lengths


def read_dense(array: pa.Array, feature: DenseFeature, where: str) -> Numbers:
    """The values of a dense feature, float32 [n, dim].

    Raises:
        UserError: for a missing value where the policy is `error`, or a row with other than `dim` values.
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
                f"a row has {wrong[0]} values; feature {feature.name!r} needs {feature.dim} a row",
            )
        flat = _numbers(array.flatten()).reshape(-1, feature.dim)
        values = flat
        if not there.all():
            values = np.full((len(array), feature.dim), np.nan)
            values[there] = flat
    # the least of values of which one is NaN is NaN: one pass without a mask
    if values.dtype.kind == "f" and np.isnan(values.min(initial=np.inf)):
        missing = np.isnan(values)
        if feature.missing == "error":
            raise _error(
                where,
                feature.source,
                f"{missing.sum()} value(s) are missing (null); fill them in, or set missing: fill",
            )
        values = np.where(missing, values.dtype.type(feature.fill), values)
    with np.errstate(over="ignore"):
        values = values.astype(np.float32, copy=False)
    return np.copysign(np.log1p(np.abs(values)), values) if feature.transform == "log" else values


def read_label(array: pa.Array, label: Label, where: str) -> Numbers:
    """The values of a label, numbers [n].

    Raises:
        UserError: for a missing value, one that is not finite, or a classification label other than 0 and 1.
    """
    values = _numbers(array)
    if label.type == "classification":
        wrong = ~((values == 0) | (values == 1))
        wanted = "a classification label must be 0 or 1; mend the data, or set type: regression"
    else:
        wrong = ~np.isfinite(values)
        wanted = "a label must be a finite number; remove the row"
    if wrong.any():
        if array.null_count:
            raise _error(where, label.source, f"{array.null_count} label(s) are missing; remove the rows without one")
        raise _error(where, label.source, f"label {values[wrong][0]} in {wrong.sum()} row(s); {wanted}")
    return values


def read_weight(array: pa.Array, where: str, column: str) -> Numbers:
    """The row weights, numbers [n].

    Raises:
        UserError: for a weight that is missing, negative or not finite.
    """
    values = _numbers(array)
    wrong = ~((values >= 0) & (values < np.inf))
    if wrong.any():
        first = "null" if array.null_count else values[wrong][0]
        fix = "a weight must be a finite number and not negative; give 0 to leave a row out"
        raise _error(where, column, f"weight {first} in {wrong.sum()} row(s); {fix}")
    return values


def is_list(kind: pa.DataType) -> bool:
    """Whether a column holds a list a row."""
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def one_array(table: pa.Table | RowGroup, column: str) -> pa.Array:
    """A column in one piece, its dictionary (or that of its elements) resolved unless it holds strings."""
    chunks = table.column(column)
    array = (
        chunks.chunk(0) if chunks.num_chunks == 1 else pa.concat_arrays(chunks.chunks or [pa.array([], chunks.type)])
    )
    kind = array.type
    if is_string(kind.value_type if is_list(kind) else kind):
        return array
    if pa.types.is_dictionary(kind):
        return array.dictionary_decode()
    if is_list(kind) and pa.types.is_dictionary(kind.value_type):
        return array.cast(pa.large_list(kind.value_type.value_type))
    return array


def _is_integer(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind.value_type if pa.types.is_dictionary(kind) else kind))


def is_number(kind: pa.DataType) -> bool:
    """Whether values are numbers or booleans, dictionary-encoded or not."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    types = pa.types
    return bool(types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind) or types.is_decimal(kind))


def _is_time(kind: pa.DataType) -> bool:
    return bool(pa.types.is_timestamp(kind) or is_number(kind))


def _numbers(array: pa.Array) -> Numbers:
    """The values as numpy has them; where any are missing, floats with NaN in their places."""
    if pa.types.is_boolean(array.type):
        array = array.cast(pa.int8())
    elif pa.types.is_decimal(array.type):
        array = array.cast(pa.float64())
    values: Numbers = array.to_numpy(zero_copy_only=False)
    return values


def _missing(array: pa.Array) -> Mask | None:
    """Which values are null; None where none is. A null among a dictionary's values counts as well."""
    if pa.types.is_dictionary(array.type) and array.dictionary.null_count:
        array = array.dictionary_decode()
    return array.is_null().to_numpy(zero_copy_only=False) if array.null_count else None


def _within(ids: Ints, rows: int) -> bool:
    """Whether all ids are in 0 .. rows - 1, in one pass: seen as unsigned, negative ids are the largest."""
    info = np.iinfo(ids.dtype)
    limit = min(rows, 2 ** (info.bits - 1)) if info.min < 0 else rows
    return bool(ids.view(f"u{ids.dtype.itemsize}").max() < limit)


def _error(where: str, column: str, text: str) -> UserError:
    return UserError(f"{where}: column {column!r}: {text}")
