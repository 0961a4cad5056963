"""DSSM: a user tower and an item tower, compared by cosine similarity."""

from __future__ import annotations

import torch
from torch import Tensor

from rechub_dist.embedded import Embedded, Lookup, Output
from rechub_dist.features import DenseFeature, Feature
from rechub_dist.layers.arguments import check_positive
from rechub_dist.layers.inputs import check_sides
from rechub_dist.layers.towers import Tower, unit
from rechub_dist.models.base import RecallModel


class DSSM(RecallModel):
    """score = cos(u, i) / temperature, u and i the outputs of two MLPs  (section 3).

    The paper trains it with a softmax over the clicked document and some unclicked ones; its smoothing factor gamma is
    1 / temperature. Its towers read letter trigram counts of queries and documents, ours read user and item features.
    Its layers are all tanh; ours use `activation`, except the last one, which is linear, so that the direction of the
    vectors is free.

    Args:
        user_features: features of the user and the context: sparse, sequence (pooled by their mean) and dense features.
        item_features: features of the item, its id first, a sparse feature with one id per row. No name may be in both
            lists; features of both may read one table.
        hidden_units: hidden widths of each tower; may be empty.
        dropout_rates: of each tower, one rate per hidden layer, or one for all.
        embedding_dim: width of the towers' outputs.
        temperature: the smaller, the more weight the closest items get.
        activation: of the hidden layers; the paper's is "tanh".
        batch_norm: batch normalisation in the hidden layers.

    Every table's width is its own `dim`; `embedding_dim` sets none.
    """

    paper = "Huang et al. 2013, Learning Deep Structured Semantic Models for Web Search using Clickthrough Data"
    loss = "softmax"
    negatives = "in_batch"

    def __init__(
        self,
        user_features: list[Feature],
        item_features: list[Feature],
        hidden_units: list[int],
        dropout_rates: float | list[float],
        embedding_dim: int,
        *,
        temperature: float = 0.05,
        activation: str = "relu",
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        check_positive("embedding_dim", embedding_dim)
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature}: it must be above 0")
        check_sides(user_features, item_features)
        self.temperature = temperature
        self.user_tower, self.item_tower = (
            Tower(features, hidden_units, dropout_rates, embedding_dim, activation=activation, batch_norm=batch_norm)
            for features in (user_features, item_features)
        )

    def lookups(self) -> tuple[Lookup, ...]:
        return (*self.user_tower.fields.lookups, *self.item_tower.fields.lookups)

    def item_lookups(self) -> tuple[Lookup, ...]:
        return self.item_tower.fields.lookups

    def dense_features(self) -> tuple[DenseFeature, ...]:
        return (*self.user_tower.fields.dense, *self.item_tower.fields.dense)

    def item_dense_features(self) -> tuple[DenseFeature, ...]:
        return self.item_tower.fields.dense

    def forward(self, embedded: Embedded) -> Output:
        """`user` and `item`, both [B, 1, D]; their inner product is the cosine divided by the temperature."""
        user, mask = self.user(embedded)
        return Output(user=user, user_mask=mask, item=self.item(embedded)[:, None])

    def user(self, embedded: Embedded) -> tuple[Tensor, Tensor]:
        """The user's vector, [B, 1, D], of length 1 / temperature."""
        user = unit(self.user_tower(embedded))[:, None] / self.temperature
        return user, torch.ones_like(user[..., 0], dtype=torch.bool)

    def item(self, embedded: Embedded) -> Tensor:
        """The item's vector, [B, D], of length 1."""
        return unit(self.item_tower(embedded))
