"""Small batches: tables of one file, all of whose rows make a batch."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import torch

from rechub_dist.batch import Batch
from rechub_dist.data.collate import assemble
from rechub_dist.data.columns.window import open_window
from rechub_dist.data.negatives import Draw
from rechub_dist.data.spec import BatchSpec
from rechub_dist.features import Table

ITEM, USER = Table("item", 10), Table("user", 20)
NOWHERE = Draw(0, 0, 0)


def batch_of(table: pa.Table, spec: BatchSpec, permutation: Any = None, stride: int | None = None) -> Batch:
    window = open_window(table, spec, permutation, "a.parquet")
    return assemble(spec, [(window, 0, table.num_rows)], stride or table.num_rows, NOWHERE)


def lists(batch: Batch, name: str) -> list[list[int]]:
    """A feature's ids row by row, the padding included."""
    jagged = batch.feature(name)
    return [part.tolist() for part in torch.split(jagged.values(), jagged.lengths().tolist())]
