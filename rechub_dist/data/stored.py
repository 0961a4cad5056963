"""Where the rows of a batch are stored: to inspect a batch, and to trace what was trained on."""

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
    """Locates a rank's rows of each batch of an epoch, in the batch's order; including rows that are skipped."""

    def __init__(self, reader: ParquetReader, epoch: int) -> None:
        self._reader = reader
        self._epoch = epoch
        self._files = OpenFiles()
        self._open: dict[int, Stored] = {}

    @cached_property
    def _order(self) -> EpochOrder | MixEpoch:  # lazy, as it is rarely needed
        return self._reader.order.epoch(self._epoch)

    def of(self, step: int) -> list[Stored]:
        """This rank's rows of the epoch's batch `step`, in pieces.

        Raises:
            IndexError: `step` is outside the epoch.
            UserError: rows are selected by conditions, and their file cannot be read.
        """
        slices = self._order.share(step, self._reader.rank, self._reader.world_size).slices
        indices = {piece.window for piece in slices}
        # windows that several steps share are located once
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
    """Writes which rows a rank's steps are trained on: one JSON line per step, `{"step": n, "stored": [...]}`.

    A resumed run writes a new file; `attempt` numbers them in order.
    """

    def __init__(self, folder: Path, attempt: int, rank: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / f"{attempt:020d}-rank-{rank}.jsonl").open("w", encoding="utf-8")

    def write(self, step: int, stored: list[Stored]) -> None:
        """Record the rows of 1-based `step`. Raises UserError if that fails, as half a trace is useless."""
        pieces = [[piece.path, piece.group, piece.rows.tolist()] for piece in stored]
        try:
            self._file.write(json.dumps({"step": step, "stored": pieces}) + "\n")
            self._file.flush()
        except OSError as error:
            raise UserError(
                f"train.trace_rows: {self._file.name} cannot be written: {error.strerror or error}; free some "
                "space, or turn train.trace_rows off"
            ) from error
