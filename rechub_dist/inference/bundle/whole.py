"""What a whole graph, one with its tables inside, takes of rows: ids, lists of ids, dense values. NumPy alone."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from rechub_dist.data.columns.window import Window
from rechub_dist.data.spec import BatchSpec
from rechub_dist.errors import UserError
from rechub_dist.inference.bundle.manifest import WholeRecord

Ids = tuple[NDArray[Any], NDArray[Any] | None, NDArray[Any] | None]


def ids_of(window: Window, feature: str) -> Ids:
    """A feature's ids, its offsets [B + 1] (None for one id in each row), and its ids' weights."""
    if feature in window.flat:
        return np.asarray(window.ids[window.flat.index(feature)]), None, None
    ragged = window.ragged[feature]
    return ragged.values, ragged.offsets, ragged.weights


def whole_inputs(record: WholeRecord, spec: BatchSpec, window: Window) -> dict[str, NDArray[Any]]:
    """The inputs by name for the rows of a window of `spec`.

    Raises:
        UserError: a row has no id, or several, of a feature that the graph takes one of.
    """
    found: dict[str, NDArray[Any]] = {}
    for name in record.ids:
        ids, offsets, _ = ids_of(window, name)
        if offsets is not None and (np.diff(offsets) != 1).any():
            raise UserError(f"{record.file} takes one id of feature {name!r} in each row; a row has none, or several")
        found[name] = ids.astype(np.int64)
    ragged = {name: ids_of(window, name) for name in record.lists}
    longest = {name: _longest(ids) for name, ids in ragged.items()}
    shared = record.length or max([1, *(longest[name] for name in record.sequences)])
    for name, (ids, offsets, weights) in ragged.items():
        width = shared if name in record.sequences else longest[name]
        place = np.arange(window.rows + 1) if offsets is None else offsets
        found[name] = _padded(ids.astype(np.int64), place, width)
        found[f"{name}.lengths"] = np.diff(place).astype(np.int64)
        if name in record.weighted:
            ones = np.ones(len(ids), np.float32)
            found[f"{name}.weights"] = _padded(ones if weights is None else weights, place, width)
    row = 0
    for feature in spec.dense:
        values = np.stack([*window.floats[row : row + feature.dim]], axis=1)
        found[feature.name] = values.astype(np.float32, copy=False)
        row += feature.dim
    return {name: found[name] for name in record.inputs}


def _longest(ids: Ids) -> int:
    offsets = ids[1]
    return 1 if offsets is None else max(1, int(np.diff(offsets).max(initial=0)))


def _padded(values: NDArray[Any], offsets: NDArray[Any], width: int) -> NDArray[Any]:
    """Ragged rows right-padded with zeros, [B, width]."""
    lengths = np.diff(offsets)
    row = np.repeat(np.arange(len(lengths)), lengths)
    found = np.zeros((len(lengths), width), values.dtype)
    found[row, np.arange(len(values)) - np.repeat(offsets[:-1], lengths)] = values
    return found
