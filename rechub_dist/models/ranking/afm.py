"""AFM: a factorization machine whose pairs are weighted by an attention network."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from rechub_dist.embedded import Embedded, Lookup, Output
from rechub_dist.features import DenseFeature, Feature
from rechub_dist.layers.arguments import check_choice, check_positive, check_rate
from rechub_dist.layers.inputs import Fields
from rechub_dist.layers.linear import FirstOrder
from rechub_dist.layers.mlp import MLP
from rechub_dist.layers.pairs import pairs
from rechub_dist.models.base import Model

Dropped = Literal["products", "weights", "output"]


class AFM(Model):
    """logit = w_0 + <w, x> + p^T sum over pairs of a_ij (v_i * v_j)  (section 3.2), where over all pairs
    a_ij = softmax(h^T ReLU(W (v_i * v_j) + b)).

    The pairs are those of the id features; dense values, which have no embedding, are only in the first-order term.
    `dropped` says what is dropped in training: the paper's products v_i * v_j, before they enter the attention
    network and the sum (section 3.3), or something of the attention network, as in the authors' code: its weights a_ij,
    after their softmax, or its output, the weighted sum that p multiplies.

    The paper's pairs are those of the features that a row has. Here a feature without ids (an empty history) is a zero
    vector: its pairs add nothing to the sum, but keep their share of the attention.

    Args:
        features: sparse, sequence (pooled by their mean) and dense features, at least two with ids.
        attention_units: widths of the attention network's hidden layers. The paper has one; further ones are ReLU
            layers with weights and biases of their own, and h follows the last.
        embedding_dim: width of all embeddings.
        dropout_rate: of what `dropped` names.
        dropped: "products", "weights" or "output".
    """

    table_width = "embedding_dim"
    paper = (
        "Xiao et al. 2017, Attentional Factorization Machines: Learning the Weight of Feature Interactions via "
        "Attention Networks"
    )

    def __init__(
        self,
        features: list[Feature],
        attention_units: list[int],
        embedding_dim: int,
        dropout_rate: float,
        *,
        dropped: Dropped = "products",
    ) -> None:
        super().__init__()
        check_choice("dropped", dropped, get_args(Dropped))
        self.fields = Fields.of(features, embedding_dim)
        if len(self.fields.lookups) < 2:
            raise ValueError(
                f"features has {len(self.fields.lookups)} with ids, {self.fields.names}: AFM needs pairs, so give it "
                f"at least two sparse or sequence features"
            )
        check_positive("embedding_dim", embedding_dim)
        check_rate("dropout_rate", dropout_rate)
        attention = PairAttention(embedding_dim, attention_units)
        # A single pair has the weight 1 whatever the network says.
        self.attention = attention if len(self.fields.lookups) > 2 else None
        self.first_order = FirstOrder(features)
        self.dropout = nn.Dropout(dropout_rate)
        self.dropped = dropped
        self.projection = nn.Linear(embedding_dim, 1, bias=False)  # p
        self.bias = nn.Parameter(torch.zeros(1))  # w_0

    def lookups(self) -> tuple[Lookup, ...]:
        return (*self.fields.lookups, *self.first_order.lookups)

    def dense_features(self) -> tuple[DenseFeature, ...]:
        return self.fields.dense

    def forward(self, embedded: Embedded) -> Output:
        """Logits [B, 1]."""
        fields = embedded.stack(self.fields.names)  # [B, F, D]
        left, right = pairs(fields, fields)
        products = self._drop("products", left * right)  # [B, P, D]
        weights = torch.ones_like(products[..., 0]) if self.attention is None else self.attention(products)
        pooled = torch.einsum("bp,bpd->bd", self._drop("weights", weights), products)
        pooled = self._drop("output", pooled)
        return Output(logits=self.bias + self.first_order(embedded) + self.projection(pooled))

    def _drop(self, what: str, values: Tensor) -> Tensor:
        dropped: Tensor = self.dropout(values) if what == self.dropped else values
        return dropped


class PairAttention(nn.Module):
    """The weights of a row's pairs, which sum to 1: products [B, P, D] -> [B, P]."""

    def __init__(self, width: int, attention_units: list[int]) -> None:
        super().__init__()
        if not attention_units:
            raise ValueError("attention_units is empty: give at least one width")
        self.mlp = MLP(width, attention_units)
        self.score = nn.Linear(self.mlp.out_dim, 1, bias=False)  # h; a bias would cancel in the softmax

    def forward(self, products: Tensor) -> Tensor:
        scores = self.score(self.mlp(products.flatten(0, 1)))  # [B P, 1]
        return scores.view(products.shape[:2]).softmax(dim=1)
