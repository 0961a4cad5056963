"""What the reader yields: one rank's share of a global batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from rechub_dist.skips import Skipped


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
