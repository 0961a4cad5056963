"""Check that a checkpoint is complete: each element of each tensor once, and all tensors of each table."""

from __future__ import annotations

import numpy as np

from rechub_dist.checkpoint.manifest import CheckpointManifest, DamagedError, SavedTensor
from rechub_dist.checkpoint.tensors import DTYPES, TABLE_STATES, matrix_shape


def check_coverage(manifest: CheckpointManifest, path: str) -> None:
    """Check that the pieces of each tensor cover it exactly once, and that each table has all its tensors.

    Uses the manifest only; `load.verify` checks the files' content.

    Raises:
        DamagedError: names the tensor, and what is missing or duplicated.
    """
    for name, saved in manifest.tensors.items():
        _check_places(name, saved, manifest, path)
        _check_pieces(name, saved, path)
    for table, placed in manifest.run["tables"].items():
        for state in ("weight", *TABLE_STATES.get(placed["optimizer"], ())):
            name = f"tables/{table}/{state}"
            if name not in manifest.tensors:
                raise DamagedError(f"{path}: the checkpoint lacks {name}")
            rows = manifest.tensors[name].shape[:1]
            if state != "step" and rows != (placed["rows"],):
                raise DamagedError(
                    f"{path}: {name} has {rows[0] if rows else 'no'} rows; its table has {placed['rows']}"
                )


def _check_places(name: str, saved: SavedTensor, manifest: CheckpointManifest, path: str) -> None:
    """Each piece has its bytes in one of the checkpoint's own files."""
    for piece in saved.pieces:
        record = manifest.files.get(piece.file)
        if record is None:
            raise DamagedError(f"{path}: {name} has a piece in {piece.file}, which is none of the checkpoint's files")
        end = piece.offset + piece.rows * piece.columns * DTYPES[saved.dtype].itemsize
        if end > record.size:
            raise DamagedError(f"{path}: {name} has a piece up to byte {end} of {piece.file}, which has {record.size}")


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
    # Strip by strip of columns between two edges: one after the other its pieces begin where no other has ended.
    for edge in np.unique(left):
        here = np.flatnonzero((left <= edge) & (edge < right))
        here = here[np.argsort(top[here], kind="stable")]
        twice = np.flatnonzero(bottom[here[:-1]] > top[here[1:]])
        if len(twice):
            first = here[twice[0]]
            raise DamagedError(f"{path}: rows {top[first]} to {bottom[first] - 1} of {name} are duplicated")
