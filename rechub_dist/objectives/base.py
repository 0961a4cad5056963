"""What every objective is."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from rechub_dist.batch import Batch
from rechub_dist.embedded import Embedded, Lookup, Output


class Objective(nn.Module):
    """Loss from a model's output.

    Losses are normalised over the global batch: `weight_sums` gives this rank's share of each term's normaliser; the
    trainer adds them up over ranks into `Batch.weight_sums` before the forward pass.
    """

    terms: ClassVar[int] = 1  # K, the number of normalisers

    def lookups(self) -> tuple[Lookup, ...]:
        """What the objective looks up besides the model: negatives, for one."""
        return ()

    def weight_sums(self, batch: Batch) -> Tensor:
        """This rank's part of the normalisers, float64 [K], known before the forward pass."""
        raise NotImplementedError

    def forward(self, output: Output, embedded: Embedded, batch: Batch) -> Tensor:
        """This rank's part of the global loss, a scalar: the loss is its sum over ranks."""
        raise NotImplementedError
