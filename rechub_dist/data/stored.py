"""Where the rows of a batch are stored, from the order alone: to inspect a batch, and to trace what was trained on."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rechub_dist.data.mix import MixEpoch
from rechub_dist.data.order import EpochOrder, IntArray
from rechub_dist.data.reader import ParquetReader
from rechub_dist.errors import UserError


class Stored(NamedTuple):
    """Rows `rows`, int64, of row group `group` of the file `path`."""

    path: str
    group: int
    rows: IntArray


class StoredRows:
    """One rank's rows of the batches of an epoch, in the batch's order; rows of bad files that are left out too."""

    def __init__(self, reader: ParquetReader, epoch: int) -> None:
        self._reader = reader
        self._epoch = epoch
        self._permutations: dict[int, IntArray | None] = {}

    @cached_property
    def _order(self) -> EpochOrder | MixEpoch:  # made when it is wanted: mostly it is not
        return self._reader.order.epoch(self._epoch)

    def of(self, step: int) -> list[Stored]:
        """Those of `step` of the epoch."""
        slices = self._order.share(step, self._reader.rank, self._reader.world_size).slices
        wanted = {piece.window for piece in slices}
        self._permutations = {  # those of windows that are still open are computed once
            index: self._permutations[index] if index in self._permutations else self._order.permutation(index)
            for index in wanted
        }
        found = []
        for piece in slices:
            window = self._order.window(piece.window)
            file, group = self._reader.manifest.groups[window.group]
            order = self._permutations[piece.window]
            rows = np.arange(piece.start, piece.stop) if order is None else order[piece.start : piece.stop]
            found.append(Stored(file.path, group, window.start + rows))
        return found


class Trace:
    """Appends to a file what a rank's steps are trained on: a JSON line a step, `{"step": n, "stored": [...]}`.

    A run that is taken up again writes new files: `attempt` sorts after those before it.
    """

    def __init__(self, folder: Path, attempt: int, rank: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / f"{attempt:020d}-rank-{rank}.jsonl").open("w", encoding="utf-8")

    def write(self, step: int, stored: list[Stored]) -> None:
        """Write that the 1-based `step` is done. Raises UserError where that cannot be: half a trace is of no use."""
        pieces = [[piece.path, piece.group, piece.rows.tolist()] for piece in stored]
        try:
            self._file.write(json.dumps({"step": step, "stored": pieces}) + "\n")
            self._file.flush()
        except OSError as error:
            raise UserError(
                f"train.trace_rows: {self._file.name} cannot be written: {error.strerror or error}; make room, or "
                "leave the trace out"
            ) from error
