"""Check that a checkpoint is complete: each element of each tensor once, and all tensors of each table."""

from __future__ import annotations

from typing import Any

import numpy as np

from rechub_dist.checkpoint.manifest import CheckpointManifest, DamagedError, SavedTensor
from rechub_dist.checkpoint.tensors import TABLE_STATES, matrix_shape


def check_coverage(manifest: CheckpointManifest, path: str) -> None:
    """Check that the pieces of each tensor cover it exactly once, and that each table has all its tensors.

    Uses the manifest only; `load.verify` checks the files' content.

    Raises:
        DamagedError: names the tensor, and what is missing or duplicated.
    """
    for name, saved in manifest.tensors.items():
        _check_pieces(name, saved, path)
    tables: dict[str, dict[str, Any]] = manifest.run["tables"]
    for table, placed in tables.items():
        for state in ("weight", *TABLE_STATES[placed["optimizer"]]):
            name = f"tables/{table}/{state}"
            if name not in manifest.tensors:
                raise DamagedError(f"{path}: the checkpoint lacks {name}")
            rows = manifest.tensors[name].shape[:1]
            if state != "step" and rows != (placed["rows"],):
                raise DamagedError(f"{path}: {name} has {rows[0]} rows; its table has {placed['rows']}")


def _check_pieces(name: str, saved: SavedTensor, path: str) -> None:
    rows, columns = matrix_shape(saved.shape)
    if not rows * columns:
        return
    pieces = np.array([(p.row, p.row + p.rows, p.column, p.column + p.columns) for p in saved.pieces], np.int64)
    pieces = pieces.reshape(-1, 4)
    top, bottom, left, right = pieces.T
    if ((top < 0) | (bottom > rows) | (left < 0) | (right > columns)).any():
        raise DamagedError(f"{path}: a piece of {name} is outside its {rows} x {columns} elements")
    # If the number of elements is right, either none is missing and none duplicated, or both occur.
    missing = rows * columns - int(((bottom - top) * (right - left)).sum())
    if missing > 0:
        raise DamagedError(f"{path}: the checkpoint lacks {missing} elements of {name}")
    order = np.lexsort((top, left))
    for index, here in enumerate(order):
        later = order[index + 1 :]
        overlap = (top[later] < bottom[here]) & (top[here] < bottom[later])
        overlap &= (left[later] < right[here]) & (left[here] < right[later])
        if overlap.any():
            raise DamagedError(f"{path}: rows {top[here]} to {bottom[here] - 1} of {name} are duplicated")
