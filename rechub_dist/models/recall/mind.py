"""MIND: several interest vectors per user, extracted from the history by dynamic routing."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rechub_dist.embedded import Embedded, Lookup, Output
from rechub_dist.features import DenseFeature, Feature, LookupFeature, RowsOf, SequenceFeature, SparseFeature
from rechub_dist.layers.arguments import check_choice, check_positive
from rechub_dist.layers.capsule import DynamicRouting
from rechub_dist.layers.inputs import Fields, check_distinct, history_and_item
from rechub_dist.layers.mlp import MLP
from rechub_dist.models.base import RecallModel

Readout = Literal["attention", "best", "max"]


class MIND(RecallModel):
    """v_j = MLP([u_j, user features]), u_1 .. u_K' the capsules that the history is routed to  (section 3).

    An item's score is its largest <v_j, e_item>. A history of n items has K' = max(1, min(K, floor(log2 n)))
    interests; see `layers.capsule.DynamicRouting` for the routing, and for its initial logits.

    Training scores items in the same way. The paper's label-aware attention (`readout="attention"`) weights the
    interests by the label instead: user = sum_j w_j v_j, w = softmax over the valid j of pow(<v_j, e_label>, p). A
    negative is then scored by the label's interests, but in serving by its own best one, which nothing has trained to
    be comparable: on MovieLens-1M it ranks far worse. The paper does not define powers of negative numbers; here pow
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
        attention_power: p of the attention, at least 1: 1 is plain; larger values approach only the best interest.
        readout: what scores items in training: "max", each item's own best interest, as in serving; "attention", the
            paper's; "best", the label's best interest alone, the limit of a large p, as in ComiRec.
        squash_power: (|z|^2 / (1 + |z|^2))^squash_power is a capsule's length; the paper's is 1.
        routing_scale: routing logits are cosines times this (EasyRec: 20); None: the paper's sums of inner products.
        start_std: standard deviation of the initial routing logits.
        bilinear_std: standard deviation of the initial bilinear map (the paper's: 1); None: that of a linear layer.
        last_gradient: gradients flow through the last routing iteration alone, not through all.
        zero_biases: the biases of the MLP start at 0, so that at first an interest is what its capsule makes of it.
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
        readout: Readout = "max",
        squash_power: float = 1.0,
        routing_scale: float | None = None,
        start_std: float = 1.0,
        bilinear_std: float | None = None,
        last_gradient: bool = False,
        zero_biases: bool = False,
    ) -> None:
        super().__init__()
        check_positive("hidden_size", hidden_size)
        check_positive("embedding_dim", embedding_dim)
        if not attention_power >= 1:  # below 1 the gradient at an inner product of 0 is infinite
            raise ValueError(f"attention_power is {attention_power}: it must be at least 1")
        check_choice("readout", readout, get_args(Readout))
        self.history_lookup, self.item_lookup = history_and_item(history, item, item_num, max_length, embedding_dim)
        features = user_features or []
        check_distinct(features)
        self.features = tuple(features)
        for feature in features:
            if feature.name in (self.history_lookup.name, self.item_lookup.name):
                raise ValueError(f"user_features has {feature.name!r}, which is the history or the item: leave it out")
        self.fields = Fields.of(features, embedding_dim, keep_dim=True) if features else Fields((), ())
        length = max_length if isinstance(history, str) else history.max_length
        self.routing = DynamicRouting(
            embedding_dim,
            num_interests,
            routing_iterations,
            length,
            squash_power=squash_power,
            scale=routing_scale,
            start_std=start_std,
            bilinear_std=bilinear_std,
            last_gradient=last_gradient,
        )
        self.mlp = MLP(embedding_dim + self.fields.width, [hidden_size], out_dim=embedding_dim)
        if zero_biases:
            for layer in self.mlp.layers:
                if isinstance(layer, nn.Linear):
                    nn.init.zeros_(layer.bias)
        self.attention_power = attention_power
        self.readout = readout

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
        """`user`, the interests weighted by the label, and `item`, both [B, 1, D].

        With the readout "max" `user` has all interests side by side, [B, 1, num_interests D], the first one in place of
        those that are not valid, so that it does not change the largest score.
        """
        interests, live = self.user(embedded)
        label = self.item(embedded)
        if self.readout == "max":
            user = torch.where(live[..., None], interests, interests[:, :1]).flatten(1)[:, None]
        else:
            user = self.label_weights(interests, live, label)[:, None] @ interests
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

    def score(self, user: Tensor, items: Tensor) -> Tensor:
        """Inner products; with the readout "max" the largest of an item's with all interests."""
        if self.readout != "max":
            return super().score(user, items)
        return (user.unflatten(1, (-1, items.shape[1])) @ items.T).amax(dim=1)

    def score_own(self, user: Tensor, items: Tensor) -> Tensor:
        """The same for items of a user's own."""
        if self.readout != "max":
            return super().score_own(user, items)
        interests = user.unflatten(1, (-1, items.shape[-1]))  # [M, num_interests, D]
        several = items if items.dim() == 3 else items[:, None]
        scores = (interests @ several.transpose(1, 2)).amax(dim=1)  # [M, K]
        return scores if items.dim() == 3 else scores[:, 0]

    def label_weights(self, interests: Tensor, live: Tensor, label: Tensor) -> Tensor:
        """Label-aware attention: the weight of each interest, [B, K], for the label's embedding [B, D]."""
        scores = torch.einsum("bkd,bd->bk", interests, label)
        if self.readout == "best":
            best = scores.masked_fill(~live, -torch.inf).argmax(dim=1)
            return F.one_hot(best, scores.shape[1]).to(scores.dtype)
        if self.attention_power != 1:  # at 1 the sign and the absolute value would lose the gradient at 0
            scores = scores.sign() * scores.abs().pow(self.attention_power)
        return scores.masked_fill(~live, torch.finfo(scores.dtype).min).softmax(dim=1)
