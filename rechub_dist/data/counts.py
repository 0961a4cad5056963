"""Counts how often each item is a positive, in one pass over one or two columns of the train split."""

from __future__ import annotations

import torch
from torch import Tensor

from rechub_dist.data.parquet.manifest import Manifest
from rechub_dist.data.reader import ParquetReader
from rechub_dist.data.spec import BatchSpec
from rechub_dist.derived import Derived
from rechub_dist.features import SequenceFeature, SparseFeature

_ROWS_AT_ONCE = 65_536


def count_positives(
    manifest: Manifest,
    item: SparseFeature,
    history: SequenceFeature | None,
    rank: int = 0,
    world_size: int = 1,
    derived: tuple[Derived, ...] = (),
) -> Tensor:
    """How often each id of the item's table is a positive in this rank's share of the rows, int64 [rows of the table].

    A row's positive is its item. With `history`, for models that learn at every position, so are all ids of the history
    but the first, and a row with an empty history has none. Not collective; the ranks' counts are to be summed. Columns
    may be among those `derived`.

    Raises:
        UserError: the data cannot be read, or is unsuitable.
    """
    features = (item,) if history is None else (item, history)
    collections = {"all": tuple(feature.name for feature in features)}
    spec = BatchSpec(features=features, collections=collections, derived=derived)
    reader = ParquetReader(
        manifest,
        spec,
        batch_size=_ROWS_AT_ONCE * world_size,
        rank=rank,
        world_size=world_size,
        shuffle=False,
        streams=world_size,
    )
    counts = torch.zeros(item.table.rows, dtype=torch.int64)
    for batch in reader.batches(0):
        items = batch.feature(item.name).values()
        if history is not None:
            jagged = batch.feature(history.name)
            lengths = jagged.lengths()[: batch.rows]
            follows = torch.ones(int(lengths.sum()), dtype=torch.bool)
            follows[(lengths.cumsum(0) - lengths)[lengths > 0]] = False
            counts += torch.bincount(jagged.values()[follows], minlength=len(counts))
            items = items[lengths > 0]
        counts += torch.bincount(items, minlength=len(counts))
    return counts
