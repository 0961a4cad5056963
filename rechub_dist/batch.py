"""What the reader yields: one rank's share of a global batch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from rechub_dist.skips import Skipped


def _cut(ids: JaggedTensor, bounds: Sequence[int]) -> list[tuple[Tensor, slice]]:
    """The lengths of each part between two bounds, and where its ids are."""
    ends = torch.cat([ids.lengths().new_zeros(1), ids.lengths().cumsum(0)]).tolist()
    return [
        (ids.lengths()[start:end], slice(int(ends[start]), int(ends[end]))) for start, end in itertools.pairwise(bounds)
    ]


@dataclass
class Batch(Pipelineable):
    """One rank's rows of a global batch.

    Attributes:
        rows: B, the number of real rows. The jagged collections hold `stride` >= rows rows, equal on all ranks; the
            padding rows at the end are empty.
        dense: float32 [rows, sum of dims], the dense features concatenated in the requested order.
        jagged: ids by collection name; every collection has the same stride.
        labels: float32 [rows, T].
        weights: float32 [rows], or None where every row weighs 1.
        id_weights: by name of the weighted feature, float32, one weight per id.
        longest: by feature, the largest number of ids in a row where the host knows it: asking a GPU means a sync.
        weight_sums: float64 [K], the objective's normalisers over all ranks; None until the trainer has set them.
        candidates: how many distinct items each rank contributes as candidates for all, where the objective has counted
            them in host memory (`Objective.prepare`); this rank's alone until the trainer has gathered the others.
        keys: by column that a metric or loss groups by, the rows' values as an Arrow array, int64 or large_string
            [rows]; always in host memory.
        skipped: rows of this rank's share that are missing because their files are bad.
        notices: what this batch is the first on this rank to skip.
    """

    rows: int
    dense: Tensor
    jagged: dict[str, KeyedJaggedTensor]
    labels: Tensor
    weights: Tensor | None = None
    id_weights: dict[str, Tensor] = field(default_factory=dict)
    longest: dict[str, int] = field(default_factory=dict)
    weight_sums: Tensor | None = None
    candidates: tuple[int, ...] | None = None
    keys: dict[str, Any] = field(default_factory=dict)
    skipped: int = 0
    notices: tuple[Skipped, ...] = ()

    def feature(self, name: str) -> JaggedTensor:
        """The ids of one feature, padding rows included. Raises KeyError for an unknown feature."""
        for collection in self.jagged.values():
            if name in collection.keys():  # noqa: SIM118 - no mapping
                return collection[name]
        raise KeyError(name)

    def split(self, parts: int, collection: str) -> list[Batch]:
        """The batch in consecutive parts of about equal size, empty ones where it has fewer rows; no padding rows.

        `weight_sums` stay those of the whole, so that the parts' losses add up to the whole's. What only metrics and
        shared candidates need (`keys`, `candidates`) is left out.

        Args:
            parts: how many.
            collection: the only one that the batch has.
        """
        assert self.jagged.keys() <= {collection}
        bounds = [self.rows * part // parts for part in range(parts + 1)]
        cut = {name: _cut(self.feature(name), bounds) for jagged in self.jagged.values() for name in jagged.keys()}  # noqa: SIM118
        found = []
        for part, (start, end) in enumerate(itertools.pairwise(bounds)):
            ids = {name: parts_of[part] for name, parts_of in cut.items()}
            jagged = KeyedJaggedTensor(
                list(ids),
                torch.cat([self.feature(name).values()[place] for name, (_, place) in ids.items()]),
                lengths=torch.cat([lengths for lengths, _ in ids.values()]),
                stride=end - start,
            )
            found.append(
                replace(
                    self,
                    rows=end - start,
                    dense=self.dense[start:end],
                    jagged=dict.fromkeys(self.jagged, jagged),
                    labels=self.labels[start:end],
                    weights=None if self.weights is None else self.weights[start:end],
                    id_weights={name: values[ids[name][1]] for name, values in self.id_weights.items()},
                    candidates=None,
                    keys={},
                )
            )
        return found

    def to(self, device: torch.device, non_blocking: bool = False) -> Batch:
        """The same batch on `device`; `keys` stay in host memory."""
        return self._map(lambda x: x.to(device=device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory."""
        return self._map(lambda x: x.pin_memory())

    def record_stream(self, stream: torch.Stream) -> None:
        """Keep the tensors' memory from being reused before `stream` is done with it."""
        tensors = (self.dense, self.labels, self.weights, self.weight_sums, *self.id_weights.values())
        for value in (*tensors, *self.jagged.values()):
            if value is not None:
                value.record_stream(stream)

    def _map(self, f: Callable[[Any], Any]) -> Batch:
        return replace(
            self,
            dense=f(self.dense),
            jagged={name: f(value) for name, value in self.jagged.items()},
            labels=f(self.labels),
            weights=None if self.weights is None else f(self.weights),
            id_weights={name: f(value) for name, value in self.id_weights.items()},
            weight_sums=None if self.weight_sums is None else f(self.weight_sums),
        )
