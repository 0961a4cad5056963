"""Rows in memory -> batches, by the same code as a data set's row groups."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rechub_dist.batch import Batch
from rechub_dist.data.collate import assemble
from rechub_dist.data.given import windows
from rechub_dist.data.negatives import Draw
from rechub_dist.data.spec import BatchSpec


class RowEncoder:
    """Encodes rows as `spec` says: with its vocabularies, hashes, crosses and transforms, and its derived columns.

    The result is the same, value by value, as that of the reader for the same columns in a file.
    """

    def __init__(self, spec: BatchSpec) -> None:
        self.spec = spec

    def batches(self, rows: Any, size: int) -> Iterator[Batch]:
        """The rows in their order, `size` per batch; one empty batch if there are none.

        Args:
            rows: see `given.table_of`; columns that the spec does not read are ignored.
            size: at least 1.

        Raises:
            UserError: a column is missing or has a wrong type, or a value is invalid.
        """
        first = 0
        for window in windows(rows, self.spec, size):
            n = window.rows
            yield assemble(self.spec, [(window, 0, n)], n, Draw(0, 0, first, 0, n))
            first += n
