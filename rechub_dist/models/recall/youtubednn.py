"""YoutubeDNN: the mean of watched items and the user's other features, mapped by an MLP to the item space."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from rechub_dist.embedded import Embedded, Lookup, Output
from rechub_dist.features import DenseFeature, Feature, SequenceFeature, TimeGapFeature
from rechub_dist.layers.arguments import check_positive
from rechub_dist.layers.inputs import Fields, check_sides
from rechub_dist.layers.towers import Tower
from rechub_dist.models.base import RecallModel


class YoutubeDNN(RecallModel):
    """score = <u, v>, u = MLP([mean of the last max_seq_len watched, other features])  (section 3).

    v is the item's embedding. The paper trains u with a sampled softmax over all items. There u is the output of the
    last ReLU layer, here of a linear layer on top, so that its signs are free. The paper's items have different vectors
    in the softmax and in the history; here they are the same if both features read one table.

    Args:
        user_features: features of the user and the context: sparse, sequence (pooled by their mean) and dense features,
            at least one sequence. No name may be in both lists.
        item_features: features of the item, its id first, a sparse feature with one id per row. With only the id, v is
            its embedding, as in the paper; with more features, a linear map without bias of their concatenated vectors.
        hidden_units: hidden widths of the MLP.
        embedding_dim: width of u and v, and of every table that has no width of its own. If the id is the only
            item feature, its table must have this width.
        max_seq_len: the most items in a mean, the newest ones; likewise for a list of time gaps. A feature is cut to
            it, never lengthened: one with a smaller `max_length` keeps that, so raise both to have longer histories.
        dropout_rates: of the MLP, one rate per hidden layer, or one for all.
        activation: of the hidden layers.
        batch_norm: batch normalisation in the hidden layers.
    """

    table_width = "embedding_dim"
    paper = "Covington, Adams & Sargin 2016, Deep Neural Networks for YouTube Recommendations"
    loss = "softmax"
    negatives = "in_batch"

    def __init__(
        self,
        user_features: list[Feature],
        item_features: list[Feature],
        hidden_units: list[int],
        embedding_dim: int,
        max_seq_len: int,
        *,
        dropout_rates: float | list[float] = 0.0,
        activation: str = "relu",
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        check_positive("embedding_dim", embedding_dim)
        check_positive("max_seq_len", max_seq_len)
        check_sides(user_features, item_features)
        if not any(isinstance(feature, SequenceFeature) for feature in user_features):
            raise ValueError("user_features has no history: give at least one SequenceFeature")
        self.user_tower = Tower(
            [_newest(feature, max_seq_len) for feature in user_features],
            hidden_units,
            dropout_rates,
            embedding_dim,
            activation=activation,
            batch_norm=batch_norm,
            width=embedding_dim,
        )
        several = len(item_features) > 1
        self.item_fields = Fields.of(item_features, embedding_dim, keep_dim=several)
        self.item_map = nn.Linear(self.item_fields.width, embedding_dim, bias=False) if several else nn.Identity()

    def lookups(self) -> tuple[Lookup, ...]:
        return (*self.user_tower.fields.lookups, *self.item_fields.lookups)

    def item_lookups(self) -> tuple[Lookup, ...]:
        return self.item_fields.lookups

    def dense_features(self) -> tuple[DenseFeature, ...]:
        return (*self.user_tower.fields.dense, *self.item_fields.dense)

    def item_dense_features(self) -> tuple[DenseFeature, ...]:
        return self.item_fields.dense

    def forward(self, embedded: Embedded) -> Output:
        """`user` and `item`, both [B, 1, embedding_dim]."""
        user, mask = self.user(embedded)
        return Output(user=user, user_mask=mask, item=self.item(embedded)[:, None])

    def user(self, embedded: Embedded) -> tuple[Tensor, Tensor]:
        """The user's vector u, [B, 1, embedding_dim]."""
        user = self.user_tower(embedded)[:, None]
        return user, torch.ones_like(user[..., 0], dtype=torch.bool)

    def item(self, embedded: Embedded) -> Tensor:
        """The item's vector v, [B, embedding_dim]."""
        vectors: Tensor = self.item_map(self.item_fields.concat(embedded))
        return vectors


def _newest(feature: Feature, count: int) -> Feature:
    """The feature, truncated to its newest `count` values if it is a sequence."""
    if isinstance(feature, SequenceFeature | TimeGapFeature) and feature.max_length > count:
        return replace(feature, max_length=count, keep="last")
    return feature
