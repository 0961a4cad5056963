"""MIND: several interest vectors per user, extracted from the history by dynamic routing."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from rechub_dist.embedded import Embedded, Lookup, Output
from rechub_dist.features import DenseFeature, Feature, LookupFeature, RowsOf, SequenceFeature, SparseFeature
from rechub_dist.layers.arguments import check_positive
from rechub_dist.layers.capsule import DynamicRouting
from rechub_dist.layers.inputs import Fields, check_distinct, history_and_item
from rechub_dist.layers.mlp import MLP
from rechub_dist.models.base import RecallModel


class MIND(RecallModel):
    """v_j = MLP([u_j, user features]), u_1 .. u_K' the capsules that the history is routed to  (section 3).

    An item's score is its largest <v_j, e_item>. A history of n items has K' = max(1, min(K, floor(log2 n)))
    interests; see `layers.capsule.DynamicRouting` for the routing, and for its initial logits.

    In training the label weights the interests (label-aware attention layer): user = sum_j w_j v_j, w = softmax
    over the valid j of pow(<v_j, e_label>, p). The paper does not define powers of negative numbers; here pow
    keeps the sign, sign(x) |x|^p, so that a worse interest never gets more weight. In the paper, label and behaviours
    have several features, whose vectors are averaged; here only their ids.

    Args:
        item_num: rows of the item table.
        num_interests: K, the maximum number of interests; a history needs 2^K items to have all of them.
        routing_iterations: at least 1; the paper has 3.
        hidden_size: width of the MLP's ReLU layer; a linear one to `embedding_dim` follows.
        embedding_dim: width of the items and of the interests, and of the user features' tables that have no width.
        history: the items in time order; a name makes a feature over the table of `item`.
        item: the item that follows the history; a name makes a feature over the table of `history`. If both are
            names, the table is called "item".
        max_length: the longest history, if `history` is a name.
        user_features: sparse, sequence (pooled by their mean) and dense features of the user.
        attention_power: p, at least 1: 1 is plain attention; larger values approach using only the best interest.
    """

    table_width = "embedding_dim"
    paper = "Li et al. 2019, Multi-Interest Network with Dynamic Routing for Recommendation at Tmall"
    loss = "softmax"
    negatives = "in_batch"

    def __init__(
        self,
        item_num: Annotated[int, RowsOf("history")],
        num_interests: int,
        routing_iterations: int,
        hidden_size: int,
        embedding_dim: int,
        *,
        history: SequenceFeature | str = "history",
        item: SparseFeature | str = "item",
        max_length: int = 50,
        user_features: list[Feature] | None = None,
        attention_power: float = 2.0,
    ) -> None:
        super().__init__()
        check_positive("hidden_size", hidden_size)
        check_positive("embedding_dim", embedding_dim)
        if not attention_power >= 1:  # below 1 the gradient at an inner product of 0 is infinite
            raise ValueError(f"attention_power is {attention_power}: it must be at least 1")
        self.history_lookup, self.item_lookup = history_and_item(history, item, item_num, max_length, embedding_dim)
        features = user_features or []
        check_distinct(features)
        self.features = tuple(features)
        for feature in features:
            if feature.name in (self.history_lookup.name, self.item_lookup.name):
                raise ValueError(f"user_features has {feature.name!r}, which is the history or the item: leave it out")
        self.fields = Fields.of(features, embedding_dim, keep_dim=True) if features else Fields((), ())
        length = max_length if isinstance(history, str) else history.max_length
        self.routing = DynamicRouting(embedding_dim, num_interests, routing_iterations, length)
        self.mlp = MLP(embedding_dim + self.fields.width, [hidden_size], out_dim=embedding_dim)
        self.attention_power = attention_power

    def lookups(self) -> tuple[Lookup, ...]:
        return (self.history_lookup, self.item_lookup, *self.fields.lookups)

    def item_lookups(self) -> tuple[Lookup, ...]:
        return (self.item_lookup,)

    def dense_features(self) -> tuple[DenseFeature, ...]:
        return self.fields.dense

    def history(self) -> LookupFeature:
        """The history; the longest reading of its column, if the user features also read it."""
        own = self.history_lookup.feature
        assert isinstance(own, SequenceFeature)
        others = [feature for feature in self.features if isinstance(feature, SequenceFeature)]
        same = [feature for feature in others if (feature.source, feature.table) == (own.source, own.table)]
        return max(own, *same, key=lambda feature: feature.max_length) if same else own

    def forward(self, embedded: Embedded) -> Output:
        """`user`, the interests weighted by the label, and `item`, both [B, 1, D]."""
        interests, live = self.user(embedded)
        label = self.item(embedded)
        weights = self.label_weights(interests, live, label)
        user = weights[:, None] @ interests
        return Output(user=user, user_mask=torch.ones_like(live[:, :1]), item=label[:, None])

    def user(self, embedded: Embedded) -> tuple[Tensor, Tensor]:
        """The interests v_j, [B, num_interests, D], and which of them are valid, bool [B, num_interests]."""
        history = embedded.sequences[self.history_lookup.name]
        capsules, live = self.routing(history.values, history.lengths)
        if self.fields.width:
            profile = self.fields.concat(embedded)[:, None].expand(-1, capsules.shape[1], -1)
            capsules = torch.cat([capsules, profile], dim=2)
        return self.mlp(capsules.flatten(0, 1)).unflatten(0, live.shape), live

    def item(self, embedded: Embedded) -> Tensor:
        """The item's raw embedding, [B, D]."""
        return embedded.vectors[self.item_lookup.name]

    def label_weights(self, interests: Tensor, live: Tensor, label: Tensor) -> Tensor:
        """Label-aware attention: the weight of each interest, [B, K], for the label's embedding [B, D]."""
        scores = torch.einsum("bkd,bd->bk", interests, label)
        if self.attention_power != 1:  # at 1 the sign and the absolute value would lose the gradient at 0
            scores = scores.sign() * scores.abs().pow(self.attention_power)
        return scores.masked_fill(~live, torch.finfo(scores.dtype).min).softmax(dim=1)
