"""DeepFM: a factorization machine and a deep network over the same embeddings."""

from __future__ import annotations

import torch

from rechub_dist.embedded import Embedded, Lookup, Output
from rechub_dist.features import DenseFeature, Feature
from rechub_dist.layers.fm import pair_sum
from rechub_dist.layers.inputs import Fields
from rechub_dist.layers.linear import FirstOrder
from rechub_dist.layers.mlp import MLP
from rechub_dist.models.base import Model


class DeepFM(Model):
    """logit = <w, x> + sum over pairs of <v_i, v_j> + MLP([v_1 .. v_F, dense values])  (sections 2.1 and 2.2).

    The first-order term has one scalar per id (`<feature>.linear`) and per dense value; the pairs are those
    of the id features, since dense values have no embedding; the MLP's last bias is the global bias.

    Args:
        features: sparse, sequence (pooled by their mean) and dense features, at least one with ids.
        hidden_units: widths of the deep network.
        dropout_rates: one rate per hidden layer, or one for all.
        embedding_dim: width of all embeddings.
        activation: the deep network's activation.
        batch_norm: batch normalisation in the deep network.
    """

    table_width = "embedding_dim"
    paper = "Guo et al. 2017, DeepFM: A Factorization-Machine based Neural Network for CTR Prediction"

    def __init__(
        self,
        features: list[Feature],
        hidden_units: list[int],
        dropout_rates: float | list[float],
        embedding_dim: int,
        *,
        activation: str = "relu",
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        self.fields = Fields.of(features, embedding_dim)
        if not self.fields.lookups:
            raise ValueError("DeepFM needs embeddings: give it at least one sparse or sequence feature")
        self.first_order = FirstOrder(features)
        self.mlp = MLP(
            self.fields.width, hidden_units, dropout_rates, activation=activation, batch_norm=batch_norm, out_dim=1
        )

    def lookups(self) -> tuple[Lookup, ...]:
        return (*self.fields.lookups, *self.first_order.lookups)

    def dense_features(self) -> tuple[DenseFeature, ...]:
        return self.fields.dense

    def forward(self, embedded: Embedded) -> Output:
        """Logits [B, 1]."""
        vectors = embedded.concat(self.fields.names, [])  # [B, F * D]
        second = pair_sum(vectors.unflatten(1, (len(self.fields.names), -1)))[:, None]
        dense = [embedded.dense[name] for name in self.fields.dense_names]
        deep = self.mlp(torch.cat([vectors, *dense], dim=1))
        return Output(logits=self.first_order(embedded) + second + deep)
