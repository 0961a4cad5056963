"""What a model asks for, what it is given and what it returns. Torch only: a notebook needs no more than this.

A model says which tables it reads through `lookups()`; the embedding stage (sharded over ranks, or `LocalTables` in
one process) reads them and hands the model an `Embedded`; the model answers with an `Output`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from rechub_dist.features import CatalogueFeature, IdFeature, NegativeFeature, Pooling, Table

LookupFeature = IdFeature | NegativeFeature | CatalogueFeature


@dataclass(frozen=True)
class Lookup:
    """Read the ids of `feature` from `table`.

    `pooling="sum" | "mean"` gives one vector a row, [B, D]; `None` gives a `Sequence`. `table` carries the width that
    the model relies on. `name` is the key in `Embedded`; by convention the feature's name, or `<feature>.linear` for
    first-order weights.
    """

    name: str
    feature: LookupFeature
    table: Table
    pooling: Pooling | None

    @property
    def dim(self) -> int:
        """The vector's width."""
        if self.table.dim is None:
            raise ValueError(f"table {self.table.name!r} has no width: give it a dim, or the run an embedding.dim")
        return self.table.dim


class Jagged(NamedTuple):
    """Ids of a feature for B rows: `values` int64 [sum of lengths], row after row, and `lengths` int [B].

    `weights` float [sum of lengths] belong to a feature with weights, one an id. `longest` is the largest length, if
    it is known without a look at the tensor, which may lie on a GPU that is busy.
    """

    values: Tensor
    lengths: Tensor
    weights: Tensor | None = None
    longest: int | None = None

    @staticmethod
    def single(ids: Tensor) -> Jagged:
        """One id a row: ids int [B]."""
        return Jagged(ids.long(), torch.ones_like(ids, dtype=torch.int32))

    @staticmethod
    def padded(ids: Tensor, lengths: Tensor) -> Jagged:
        """From right-padded ids int [B, L]; what lies beyond a row's length is left out."""
        mask = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
        return Jagged(ids[mask].long(), lengths.to(torch.int32))


class Sequence(NamedTuple):
    """Right-padded vectors [B, L, D] with the rows' lengths int64 [B], 0 <= lengths <= L and L >= 1.

    L is the longest length in this batch, not a constant. Values beyond a row's length are zero, but no model may
    rely on it: use `mask`. `total` is the sum of the lengths, if it is known without a look at them.
    """

    values: Tensor
    lengths: Tensor
    total: int | None = None

    @property
    def mask(self) -> Tensor:
        """Bool [B, L]: True at real positions."""
        return torch.arange(self.values.shape[1], device=self.values.device) < self.lengths[:, None]


@dataclass
class Embedded:
    """A batch as a model sees it: vectors by lookup name, and dense features by feature name."""

    vectors: dict[str, Tensor] = field(default_factory=dict)  # pooled lookups: float [B, D]
    sequences: dict[str, Sequence] = field(default_factory=dict)  # unpooled lookups
    dense: dict[str, Tensor] = field(default_factory=dict)  # dense features: float32 [B, dim]

    def stack(self, names: list[str]) -> Tensor:
        """The pooled vectors `names`, all of one width: [B, len(names), D]."""
        return torch.stack([self.vectors[name] for name in names], dim=1)

    def concat(self, vectors: list[str], dense: list[str]) -> Tensor:
        """Pooled vectors and dense features side by side: [B, sum of widths]."""
        return torch.cat([*(self.vectors[n] for n in vectors), *(self.dense[n] for n in dense)], dim=1)


@dataclass
class Output:
    """What a model returns: a ranking model `logits`, a recall model `user` and `item`, with `logits` of further tasks.

    Attributes:
        logits: [B, T], one column a label, in the run's label order.
        user: [B, Q, D], the user's vectors (one a position, or one an interest).
        user_mask: bool [B, Q], True where `user` is real.
        item: [B, N, D]; for models that train on every position N = Q and item[:, t] is the item that follows
            position t.
        aux: further losses by name, one value a row, [B]; they enter the loss as the rows' main losses do.
    """

    logits: Tensor | None = None
    user: Tensor | None = None
    user_mask: Tensor | None = None
    item: Tensor | None = None
    aux: dict[str, Tensor] = field(default_factory=dict)


def rows_of(lengths: Tensor, total: int) -> Tensor:
    """For each value of a jagged feature the row that it belongs to: int64 [total]."""
    return torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths, output_size=total)


def to_padded(values: Tensor, lengths: Tensor, longest: int | None = None) -> Sequence:
    """Jagged vectors [sum of lengths, D] as a right-padded `Sequence` [B, max length (at least 1), D].

    Where the largest length is not given it is looked up, for which the host waits for a GPU.
    """
    if longest is None:
        longest = int(lengths.max()) if len(lengths) else 0
    longest = max(1, longest)
    row = rows_of(lengths, len(values))
    lengths = lengths.long()
    start = lengths.cumsum(0) - lengths
    position = torch.arange(len(values), device=values.device) - start[row]
    padded = values.new_zeros(len(lengths) * longest, values.shape[1]).index_copy(0, row * longest + position, values)
    return Sequence(padded.view(len(lengths), longest, values.shape[1]), lengths, len(values))
