"""What a model asks for, what it gets and what it returns. Depends on torch alone, so that notebooks can use it.

A model declares the tables it reads through `lookups()`; the embedding stage (sharded over ranks, or `LocalTables` in
one process) reads them and passes the model an `Embedded`; the model returns an `Output`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from rechub_dist.features import LookupFeature, Pooling, Table


@dataclass(frozen=True)
class Lookup:
    """Read the ids of `feature` from `table`.

    `pooling="sum" | "mean"` gives one vector per row, [B, D]; `None` gives a `Sequence`. `table` has the width that the
    model relies on. `name` is the key in `Embedded`: by convention the feature's name, or `<feature>.linear` for
    first-order weights.
    """

    name: str
    feature: LookupFeature
    table: Table
    pooling: Pooling | None

    @property
    def dim(self) -> int:
        """The width of the vectors. Raises ValueError where the table has none yet."""
        if self.table.dim is None:
            raise ValueError(f"table {self.table.name!r} has no width: give it a dim, or the run an embedding.dim")
        return self.table.dim


class Jagged(NamedTuple):
    """Ids of a feature for B rows: `values` int64 [sum of lengths], row after row, and `lengths` int [B].

    `weights`, float [sum of lengths], one per id, are those of a weighted feature. `longest` is the largest length
    where the host knows it; reading it from a GPU means a sync.
    """

    values: Tensor
    lengths: Tensor
    weights: Tensor | None = None
    longest: int | None = None

    @staticmethod
    def single(ids: Tensor) -> Jagged:
        """From one id per row: ids int [B]."""
        return Jagged(ids.long(), torch.ones_like(ids, dtype=torch.int32))

    @staticmethod
    def padded(ids: Tensor, lengths: Tensor) -> Jagged:
        """From right-padded ids int [B, L] and lengths int [B]; ids beyond a row's length are dropped."""
        mask = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
        return Jagged(ids[mask].long(), lengths.to(torch.int32))


class Sequence(NamedTuple):
    """Right-padded vectors [B, L, D] with the rows' lengths int64 [B], 0 <= lengths <= L and L >= 1.

    L is the longest length in this batch, not a constant. Values beyond a row's length are zero, but models must not
    rely on that: use `mask`. `total` is the sum of the lengths where the host knows it.
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
        """The pooled vectors `names`, all of width D: [B, len(names), D]. Raises KeyError for an unknown name."""
        return torch.stack([self.vectors[name] for name in names], dim=1)

    def concat(self, vectors: list[str], dense: list[str]) -> Tensor:
        """Pooled vectors, then dense features, concatenated: [B, sum of widths]. Raises KeyError as `stack`."""
        return torch.cat([*(self.vectors[n] for n in vectors), *(self.dense[n] for n in dense)], dim=1)


@dataclass
class Output:
    """What a model returns: ranking models `logits`, recall models `user` and `item`, and `logits` of further tasks.

    Attributes:
        logits: float [B, T], one column per label, in the run's label order; a label of C classes has C columns.
        user: float [B, Q, D], the user's vectors (one per position, or one per interest).
        user_mask: bool [B, Q], True where `user` is real.
        item: float [B, N, D]; for models that train on every position, N = Q and item[:, t] is the item that follows
            position t.
        aux: further losses by name, float [B], one value per row; added to the main loss row by row.
    """

    logits: Tensor | None = None
    user: Tensor | None = None
    user_mask: Tensor | None = None
    item: Tensor | None = None
    aux: dict[str, Tensor] = field(default_factory=dict)


def rows_of(lengths: Tensor, total: int) -> Tensor:
    """The row that each value of a jagged feature belongs to, int64 [total]; `total` is the sum of `lengths`."""
    return torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths, output_size=total)


def to_padded(values: Tensor, lengths: Tensor, longest: int | None = None) -> Sequence:
    """Jagged vectors [sum of lengths, D] as a right-padded `Sequence` [B, max length (at least 1), D].

    Where `longest` is not given it is read from `lengths`, which on a GPU means a sync.
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
