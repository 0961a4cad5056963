"""Arrow columns -> a window: a piece of a row group whose columns are checked, converted and permuted, one by one.

Columns with exactly one id per row are adjacent in one block, so that a slice of all of them is one view.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from rechub_dist.data.columns.cross import cross
from rechub_dist.data.columns.kernels import complete_cumsum, permuted_rows
from rechub_dist.data.columns.values import (
    one_array,
    read_dense,
    read_id_weights,
    read_ids,
    read_key,
    read_label,
    read_time_gaps,
    read_weight,
)
from rechub_dist.data.parquet.kinds import is_list
from rechub_dist.data.parquet.row_group import RowGroup
from rechub_dist.data.spec import BatchSpec
from rechub_dist.errors import UserError
from rechub_dist.features import CrossFeature, SequenceFeature, SparseFeature, StoredFeature, TimeGapFeature

Ints = NDArray[Any]  # int32 or int64
Floats = NDArray[np.float32]
Rows = NDArray[Any] | list[NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Ragged:
    """Any number of ids per row: those of row i are `values[offsets[i] : offsets[i + 1]]`, `lengths[i]` of them.

    `weights` has one weight per value where the feature is weighted.
    """

    values: Ints
    offsets: Ints
    lengths: Ints
    weights: Floats | None = None


@dataclass(frozen=True, slots=True)
class Window:
    """One piece of a row group, ready to be sliced.

    Attributes:
        rows: R.
        flat: the features with exactly one id in every row.
        ids: [len(flat), R]. Permuted they are one int32 array (int64 where a table needs it); in the stored order a
            list of Arrow's own columns, as copying what is read once would be a waste.
        ragged: the other id features.
        floats: [D + T + W, R], likewise, float32: dense values, labels, and the weight if there is one.
        keys: by column, R values to group by.
        memory: the flat buffers that permuted `ids` and `floats` are views of.
    """

    rows: int
    flat: tuple[str, ...]
    ids: Rows
    ragged: dict[str, Ragged]
    floats: Rows
    memory: tuple[Ints, Floats] | None
    keys: dict[str, pa.Array] = field(default_factory=dict)


def open_window(
    table: pa.Table | RowGroup,
    spec: BatchSpec,
    permutation: Ints | None,
    where: str,
    reuse: Window | None = None,
    bounds: Mapping[str, tuple[int, int]] = {},
) -> Window:
    """The window of the rows of `table`: checked, converted and permuted.

    Args:
        table: R rows, with a schema that `check_schema` has accepted for `spec`.
        spec: what to convert.
        permutation: int64 [R], the stored rows in their new order; None keeps the stored order.
        where: the file's name, for errors.
        reuse: a window of the same spec that is no longer needed, whose memory is overwritten. (Fresh memory costs page
            faults, about a fifth of the time of opening a window.)
        bounds: the least and the greatest value by column, where known: ids within them need no check of their own.

    Raises:
        UserError: a value is bad, or aligned features differ in length; names `where`, the column and the fix.
    """
    rows = table.num_rows
    dtype = _id_type(spec)
    features = spec.in_key_order
    flat: list[str] = []
    ragged: dict[str, Ragged] = {}
    scalars = len(spec.crosses) + sum(not is_list(table.schema.field(feature.source).type) for feature in features)
    memory = None
    block: Rows = [np.empty(0)] * scalars
    floats: Rows = [np.empty(0)] * spec.float_rows
    if permutation is not None:
        id_memory, block = _room(reuse and reuse.memory and reuse.memory[0], (scalars, rows), dtype)
        float_memory, floats = _room(reuse and reuse.memory and reuse.memory[1], (len(floats), rows), np.float32)
        memory = id_memory, float_memory
    for feature in features:
        ids, weights, lengths = _stored(table, feature, where, bounds.get(feature.source))
        if lengths is None:
            _place(ids, permutation, block, len(flat))
            flat.append(feature.name)
        else:
            narrow = ids if permutation is None else ids.astype(dtype, copy=False)  # pays off where it is permuted
            ragged[feature.name] = _gather(narrow, weights, lengths, permutation, feature)
    for gap in spec.time_gaps:
        times = one_array(table, gap.times, lists=True)
        ids, lengths = read_time_gaps(times, one_array(table, gap.now), gap, where)
        ragged[gap.name] = _gather(ids.astype(dtype, copy=False), None, lengths, permutation, gap)
    for crossed in spec.crosses:
        _cross(crossed, flat, block, ragged)

    for group in spec.aligned:
        _check_aligned([name for name in group if name in ragged], ragged, spec, where)
    row = count()
    for dense in spec.dense:
        for values in read_dense(one_array(table, dense.source, lists=dense.dim > 1), dense, where).T:
            _place(values, permutation, floats, next(row))
    for label in spec.labels:
        _place(read_label(one_array(table, label.source), label, where), permutation, floats, next(row))
    if spec.weight:
        _place(read_weight(one_array(table, spec.weight), where, spec.weight), permutation, floats, next(row))
    keys = {key: read_key(one_array(table, key), where, key) for key in spec.keys}
    if permutation is not None:
        keys = {key: values.take(pa.array(permutation)) for key, values in keys.items()}
    return Window(rows, tuple(flat), block[: len(flat)], ragged, floats, memory, keys)


def _stored(
    table: pa.Table | RowGroup, feature: StoredFeature, where: str, bounds: tuple[int, int] | None
) -> tuple[Ints, Floats | None, Ints | None]:
    """A column's ids, their weights, and their number in each row; None if that is 1 throughout, without weights."""
    array = one_array(table, feature.source, lists=isinstance(feature, SequenceFeature))
    weights: Floats | None = None
    if isinstance(feature, SparseFeature) and feature.weights:
        own = one_array(table, feature.weights, lists=is_list(array.type))
        weights = read_id_weights(own, array, feature, where)
    if is_list(array.type):
        lengths = _list_lengths(array)
        ids, keep = read_ids(_elements(array), feature, where, bounds)
    else:
        ids, keep = read_ids(array, feature, where, bounds)
        if keep is None and weights is None:
            return ids, None, None
        lengths = np.ones(len(array), np.int64)
    if keep is not None:
        ids, weights = ids[keep], None if weights is None else weights[keep]
        kept = np.concatenate([np.zeros(1, np.int64), np.cumsum(keep)])
        lengths = np.diff(kept[_offsets(lengths)])
    return ids, weights, lengths


def _elements(array: pa.Array) -> pa.Array:
    """All ids of a list column, concatenated; without a copy if no list is null."""
    if array.null_count or pa.types.is_fixed_size_list(array.type):
        return array.flatten()
    return array.values[array.offsets[0].as_py() : array.offsets[-1].as_py()]


def _list_lengths(array: pa.Array) -> Ints:
    """The lengths of lists, int32 if Arrow's offsets are, else int64; null lists count as empty."""
    if array.null_count or pa.types.is_fixed_size_list(array.type):
        lengths: Ints = pc.fill_null(pc.list_value_length(array), 0).to_numpy()
        return lengths.astype(np.int64)
    return np.diff(array.offsets.to_numpy())


def _cross(feature: CrossFeature, flat: list[str], block: Rows, ragged: dict[str, Ragged]) -> None:
    """Add a cross to the window; its inputs are already in it, permuted."""
    inputs = [
        (block[flat.index(f.name)], None) if f.name in flat else (ragged[f.name].values, ragged[f.name].lengths)
        for f in feature.inputs
    ]
    ids, lengths = cross(feature, inputs)
    if lengths is None:
        block[len(flat)] = ids
        flat.append(feature.name)
    else:
        ragged[feature.name] = Ragged(ids, _offsets(lengths), lengths)


def _check_aligned(names: list[str], ragged: dict[str, Ragged], spec: BatchSpec, where: str) -> None:
    """Raise UserError if aligned features have different lengths in a row."""
    sources = {feature.name: feature.source for feature in spec.stored} | {
        gap.name: gap.times for gap in spec.time_gaps
    }
    for name in names[1:]:
        first, other = ragged[names[0]].lengths, ragged[name].lengths
        if not np.array_equal(first, other):
            row = int(np.flatnonzero(first != other)[0])
            raise UserError(
                f"{where}: columns {sources[names[0]]!r} and {sources[name]!r} have {first[row]} and {other[row]} ids "
                f"in one row; behaviours of a row must have equal lengths (with the same max_length, keep and no drop)"
            )


def _id_type(spec: BatchSpec) -> np.dtype[Any]:
    return np.dtype(np.int32 if all(f.table.rows <= 2**31 for f in spec.features) else np.int64)


def _offsets(lengths: Any) -> Ints:
    """Running sums of lengths with a leading 0, [n + 1], of the lengths' type, which is wide enough for a column."""
    if "fbgemm_gpu" in sys.modules:  # where there is training; several times as fast
        return complete_cumsum(lengths)
    offsets = np.zeros(len(lengths) + 1, lengths.dtype)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def _room(memory: Any, shape: tuple[int, int], dtype: Any) -> tuple[Any, Any]:
    """A flat buffer, `memory` if it is large enough, else a new one; and its beginning as an array of `shape`."""
    size = shape[0] * shape[1]
    if memory is None or len(memory) < size:
        memory = np.empty(size, dtype)
    return memory, memory[:size].reshape(shape)


def _place(values: Any, permutation: Ints | None, rows: Rows, row: int) -> None:
    """Write the values, permuted, into row `row` of `rows`."""
    if permutation is None:
        rows[row] = values
    else:
        assert isinstance(rows, np.ndarray)
        # the permutation is valid by construction; mode="clip" skips the check, and the narrow type is fastest
        np.take(values.astype(rows.dtype, copy=False), permutation, out=rows[row], mode="clip")


def _gather(
    ids: Ints, weights: Floats | None, lengths: Ints, permutation: Ints | None, feature: StoredFeature | TimeGapFeature
) -> Ragged:
    """The rows cut to the feature's `max_length`, and permuted."""
    if isinstance(feature, SequenceFeature | TimeGapFeature) and lengths.max(initial=0) > feature.max_length:
        surplus = np.maximum(lengths - feature.max_length, 0)
        ends = np.cumsum(lengths)
        starts = ends - (lengths if feature.keep == "last" else surplus)
        index = np.repeat(starts - (np.cumsum(surplus) - surplus), surplus)
        kept = np.ones(len(ids), np.bool_)
        kept[index + np.arange(len(index))] = False
        ids, weights = ids[kept], None if weights is None else weights[kept]
        lengths = lengths - surplus
    if permutation is not None and len(ids):
        lengths, ids, weights = permuted_rows(permutation, lengths, ids, weights)
    return Ragged(ids, _offsets(lengths), lengths, weights)
