"""Windows -> batches: concatenates slices of windows, without a loop over rows.

Columns that are adjacent in a window's block are sliced as one view, and concatenated at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from rechub_dist.batch import Batch
from rechub_dist.data.columns.window import Floats, Ints, Rows, Window
from rechub_dist.data.negatives import Draw, catalogue_share, draw_ids
from rechub_dist.data.spec import WEIGHTED, BatchSpec


class Pieces(NamedTuple):
    """One feature's ids for n rows, in pieces, and the number of ids of each row, integers [n]."""

    values: Sequence[Ints]
    lengths: Ints

    def whole(self) -> tuple[Ints, Ints]:
        """The ids in one array, int64, and the number of ids of each row."""
        if len(self.values) == 1 and self.values[0].dtype == np.int64:
            return self.values[0], self.lengths
        return _joined(self.values, np.dtype(np.int64)), self.lengths


def assemble(spec: BatchSpec, parts: Sequence[tuple[Window, int, int]], stride: int, draw: Draw) -> Batch:
    """One rank's batch from rows `start .. stop - 1` of each `(window, start, stop)`, in this order.

    Args:
        spec: the spec that the windows were opened with.
        parts: the slices; empty for a rank without rows.
        stride: rows of the jagged collections, at least the number of real ones; the others are empty.
        draw: what the draws of negatives depend on.

    Returns:
        A batch in host memory, with ids int64 and lengths int32.
    """
    n = sum(stop - start for _, start, stop in parts)
    assert n <= stride
    flat, block = _flat_block(spec, parts)
    place = {name: i for i, name in enumerate(flat)}
    ragged: dict[str, Pieces] = {}
    ones = np.ones(n, np.int64)

    def ids(name: str) -> Pieces:
        """A feature's ids, whether flat or ragged."""
        return Pieces([block[place[name]]], ones) if name in place else ragged[name]

    for feature in (*spec.stored, *spec.time_gaps, *spec.crosses):
        if feature.name not in place:
            ragged[feature.name] = _ragged_slices(feature.name, parts)
    weights = {weighted.name: _weight_slices(weighted.name, parts) for weighted in spec.weighted}
    _draw(spec, ids, ragged, draw, n)

    jagged: dict[str, KeyedJaggedTensor] = {}
    longest: dict[str, int] = {}
    for collection, keys in spec.collections.items():
        first = place.get(keys[0], 0)
        if flat[first : first + len(keys)] == tuple(keys):
            lengths, per_key = _one_each(len(keys), n, stride), [n] * len(keys)
            longest.update(dict.fromkeys(keys, min(n, 1)))
            values = block[first : first + len(keys)].reshape(-1)  # a view: the keys are adjacent in the block
        else:
            lengths = np.zeros((len(keys), stride), np.int32)
            for row, key in zip(lengths, keys, strict=True):
                row[:n] = ids(key).lengths
                longest[key] = int(row.max(initial=0))
            per_key = [sum(map(len, ids(key).values)) for key in keys]
            values = _joined([piece for key in keys for piece in ids(key).values], np.dtype(np.int64))
        jagged[collection] = KeyedJaggedTensor(
            keys=list(keys),
            values=torch.from_numpy(values),
            lengths=torch.from_numpy(lengths.reshape(-1)),
            weights=_key_weights(keys, weights, ids) if collection == WEIGHTED else None,
            stride=stride,
            length_per_key=per_key,  # else TorchRec would sum the lengths itself, on a GPU with a sync
        )

    D = sum(dense.dim for dense in spec.dense)
    T = len(spec.labels)
    floats = _block([(w.floats, a, b) for w, a, b in parts], spec.float_rows, np.dtype(np.float32))
    return Batch(
        rows=n,
        dense=torch.from_numpy(np.ascontiguousarray(floats[:D].T)),
        jagged=jagged,
        labels=torch.from_numpy(np.ascontiguousarray(floats[D : D + T].T)),
        weights=torch.from_numpy(floats[-1]) if spec.weight else None,
        id_weights={name: torch.from_numpy(values) for name, values in weights.items()},
        longest=longest,
        keys={key: _key_slices(key, parts) for key in spec.keys},
    )


@lru_cache(maxsize=16)
def _one_each(keys: int, n: int, stride: int) -> Ints:
    """Lengths of one id in each of the first n rows, int32 [keys, stride]; shared, as nothing writes into a batch."""
    lengths = np.zeros((keys, stride), np.int32)
    lengths[:, :n] = 1
    return lengths


def _draw(spec: BatchSpec, ids: Callable[[str], Pieces], ragged: dict[str, Pieces], draw: Draw, n: int) -> None:
    """Add the features that no column holds, negatives and catalogues, to `ragged`."""
    for name in spec.idle:
        ragged[name] = Pieces((), np.zeros(n, np.int64))
    for negative in spec.negatives:
        if negative.name not in spec.idle:
            held = [ids(name).whole() for name in negative.exclude]
            cumulative = spec.cumulative.get(negative.name)
            drawn, lengths = draw_ids(negative, ids(negative.like).lengths, held, cumulative, draw)
            ragged[negative.name] = Pieces([drawn], lengths)
    for catalogue in spec.catalogues:
        if catalogue.name not in spec.idle:
            share, lengths = catalogue_share(catalogue.table.rows, draw, n)
            ragged[catalogue.name] = Pieces([share], lengths)


def _key_weights(keys: Sequence[str], weights: dict[str, Floats], ids: Callable[[str], Pieces]) -> torch.Tensor:
    """The weights of a collection's ids in key order, float32 [ids]; 1 for features without weights."""
    pieces = [weights[key] if key in weights else np.ones(ids(key).lengths.sum(), np.float32) for key in keys]
    return torch.from_numpy(np.concatenate(pieces))


def _flat_block(spec: BatchSpec, parts: Sequence[tuple[Window, int, int]]) -> tuple[tuple[str, ...], Ints]:
    """The features with exactly one id per row in all slices, and these ids, int64 [features, n]."""
    if not parts:
        flat = tuple(f.name for f in (*spec.in_key_order, *spec.time_gaps, *spec.crosses))
        return flat, np.zeros((len(flat), 0), np.int64)
    flat = parts[0][0].flat
    if all(window.flat == flat for window, _, _ in parts):
        return flat, _block([(w.ids, a, b) for w, a, b in parts], len(flat), np.dtype(np.int64))
    # a feature that lost ids in some window is ragged in this batch
    flat = tuple(name for name in flat if all(name in window.flat for window, _, _ in parts))
    picked = [([w.ids[w.flat.index(name)] for name in flat], a, b) for w, a, b in parts]
    return flat, _block(picked, len(flat), np.dtype(np.int64))


def _block(parts: Sequence[tuple[Rows, int, int]], height: int, dtype: np.dtype[Any]) -> Any:
    """Columns `start .. stop - 1` of each `(rows, start, stop)`, concatenated: [height, n]."""
    joined = np.empty((height, sum(stop - start for _, start, stop in parts)), dtype)
    end = 0
    for rows, start, stop in parts:
        begin, end = end, end + stop - start
        if isinstance(rows, list):
            for target, row in zip(joined, rows, strict=True):
                target[begin:end] = row[start:stop]
        else:
            joined[:, begin:end] = rows[:, start:stop]
    return joined


def _joined(pieces: Sequence[Ints], dtype: np.dtype[Any]) -> Any:
    """The pieces concatenated and cast in one pass: several times as fast as `np.concatenate`."""
    joined = np.empty(sum(map(len, pieces)), dtype)
    end = 0
    for piece in pieces:
        start, end = end, end + len(piece)
        joined[start:end] = piece
    return joined


def _ragged_slices(name: str, parts: Sequence[tuple[Window, int, int]]) -> Pieces:
    """The ids of one feature, in the order of the slices."""
    values: list[Ints] = []
    lengths: list[Ints] = []
    for window, start, stop in parts:
        if (column := window.ragged.get(name)) is not None:
            values.append(column.values[column.offsets[start] : column.offsets[stop]])
            lengths.append(column.lengths[start:stop])
        else:
            values.append(window.ids[window.flat.index(name)][start:stop])
            lengths.append(np.ones(stop - start, np.int64))
    return Pieces(values, np.concatenate(lengths))


def _key_slices(key: str, parts: Sequence[tuple[Window, int, int]]) -> pa.Array:
    """The values of a key, in the order of the slices; of type null where there are no rows."""
    pieces = [window.keys[key].slice(start, stop - start) for window, start, stop in parts]
    return pa.concat_arrays(pieces) if pieces else pa.nulls(0)


def _weight_slices(name: str, parts: Sequence[tuple[Window, int, int]]) -> Floats:
    """The weights of one feature's ids, float32; a weighted feature is never flat."""
    pieces = [np.zeros(0, np.float32)]
    for window, start, stop in parts:
        column = window.ragged[name]
        assert column.weights is not None
        pieces.append(column.weights[column.offsets[start] : column.offsets[stop]])
    return np.concatenate(pieces)
