"""Where the rows of a batch are stored, from the order alone: to inspect a batch, and to trace what was trained on."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rechub_dist.data.order.epoch import EpochOrder, IntArray
from rechub_dist.data.order.mix import MixEpoch
from rechub_dist.data.parquet.files import OpenFiles
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
        self._files = OpenFiles()
        self._open: dict[int, Stored] = {}

    @cached_property
    def _order(self) -> EpochOrder | MixEpoch:  # made when it is wanted: mostly it is not
        return self._reader.order.epoch(self._epoch)

    def of(self, step: int) -> list[Stored]:
        """Those of `step` of the epoch.

        Raises:
            UserError: where rows have to meet conditions, and their file cannot be read.
        """
        slices = self._order.share(step, self._reader.rank, self._reader.world_size).slices
        indices = {piece.window for piece in slices}
        # those of windows that are still open are found once
        self._open = {index: self._open.get(index) or self._window(index) for index in indices}
        return [
            self._open[piece.window]._replace(rows=self._open[piece.window].rows[piece.start : piece.stop])
            for piece in slices
        ]

    def _window(self, index: int) -> Stored:
        """All rows of a window, in its order."""
        window, permutation = self._order.window(index), self._order.permutation(index)
        file, group = self._reader.manifest.groups[window.group]
        rows = np.arange(window.start, window.stop) if permutation is None else window.start + permutation
        if file.where.items:
            table = self._files.read(file.whole(), group, file.where.names)
            rows = file.where.rows(table, file.path)[rows]
        return Stored(file.path, group, rows)


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
