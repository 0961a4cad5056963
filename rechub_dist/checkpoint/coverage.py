"""Whether a checkpoint holds everything: each element of each tensor once, and all that its tables consist of."""

from __future__ import annotations

from typing import Any

import numpy as np

from rechub_dist.checkpoint.manifest import CheckpointManifest, DamagedError, SavedTensor
from rechub_dist.checkpoint.tensors import TABLE_STATES, matrix_shape
from rechub_dist.errors import shown


def check_coverage(manifest: CheckpointManifest, path: str) -> None:
    """Prove that the pieces of each tensor cover its rows and columns exactly once, and that no table lacks any.

    From the manifest alone; that the files have these bytes is `verify`'s to prove.

    Raises:
        DamagedError: names the tensor, and what is missing or there twice.
    """
    for name, saved in manifest.tensors.items():
        _check_pieces(name, saved, path)
    tables: dict[str, dict[str, Any]] = manifest.run["tables"]
    for table, placed in tables.items():
        states = TABLE_STATES.get(placed["optimizer"])
        if states is None:
            raise DamagedError(f"{path}: table {shown(table)} has no optimizer {shown(placed['optimizer'])}")
        for state in ("weight", *states):
            name = f"tables/{table}/{state}"
            if name not in manifest.tensors:
                raise DamagedError(f"{path}: the checkpoint lacks {name}")
            rows = manifest.tensors[name].shape[:1]
            if state != "step" and rows != (placed["rows"],):
                raise DamagedError(f"{path}: {name} has {sum(rows)} rows; its table has {placed['rows']}")


def _check_pieces(name: str, saved: SavedTensor, path: str) -> None:
    rows, columns = matrix_shape(saved.shape)
    if not rows * columns:
        return
    pieces = np.array([(p.row, p.row + p.rows, p.column, p.column + p.columns) for p in saved.pieces], np.int64)
    pieces = pieces.reshape(-1, 4)
    top, bottom, left, right = pieces.T
    if ((top < 0) | (bottom > rows) | (left < 0) | (right > columns)).any():
        raise DamagedError(f"{path}: a piece of {name} lies outside its {rows} x {columns} elements")
    # Of as many elements as there are, either none is missing and none is there twice, or both.
    missing = rows * columns - int(((bottom - top) * (right - left)).sum())
    if missing > 0:
        raise DamagedError(f"{path}: the checkpoint lacks {missing} elements of {name}")
    order = np.lexsort((top, left))
    for index, here in enumerate(order):
        later = order[index + 1 :]
        overlap = (top[later] < bottom[here]) & (top[here] < bottom[later])
        overlap &= (left[later] < right[here]) & (left[here] < right[later])
        if overlap.any():
            raise DamagedError(f"{path}: rows {top[here]} to {bottom[here] - 1} of {name} are there twice")
