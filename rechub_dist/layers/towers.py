"""Towers: one side's features, the user's or the item's, to one vector."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from rechub_dist.embedded import Embedded
from rechub_dist.features import Feature
from rechub_dist.layers.inputs import Fields
from rechub_dist.layers.mlp import MLP


class Tower(nn.Module):
    """MLP([v_1 .. v_F, dense values]) with a last linear layer.

    Args:
        features: sparse, sequence (pooled by their mean) and dense features.
        hidden_units: widths of the hidden layers; may be empty.
        dropout_rates: one rate a hidden layer, or one for all.
        out_dim: width of the vector.
        activation: of the hidden layers.
        batch_norm: batch normalisation in the hidden layers.
        width: of the tables that have none; None leaves it to the tables.

    Attributes:
        fields: the features' lookups and dense features.
    """

    def __init__(
        self,
        features: Sequence[Feature],
        hidden_units: list[int],
        dropout_rates: float | list[float],
        out_dim: int,
        *,
        activation: str,
        batch_norm: bool,
        width: int | None = None,
    ) -> None:
        super().__init__()
        self.fields = Fields.of(features, width, keep_dim=True)
        self.mlp = MLP(
            self.fields.width,
            hidden_units,
            dropout_rates,
            activation=activation,
            batch_norm=batch_norm,
            out_dim=out_dim,
        )

    def forward(self, embedded: Embedded) -> Tensor:
        """[B, out_dim]."""
        vectors: Tensor = self.mlp(self.fields.concat(embedded))
        return vectors


def unit(vectors: Tensor) -> Tensor:
    """v / |v|, and zeros for zeros: [B, D] -> [B, D]."""
    return F.normalize(vectors, dim=1, eps=1e-8)
