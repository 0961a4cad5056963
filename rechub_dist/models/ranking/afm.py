"""AFM: a factorization machine whose pairs are weighted by an attention network."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rechub_dist.embedded import Embedded, Lookup, Output
from rechub_dist.features import DenseFeature, Feature
from rechub_dist.layers.arguments import check_positive, check_rate
from rechub_dist.layers.inputs import Fields
from rechub_dist.layers.linear import FirstOrder
from rechub_dist.layers.mlp import MLP
from rechub_dist.layers.pairs import pairs
from rechub_dist.models.base import Model


class AFM(Model):
    """logit = w_0 + <w, x> + p^T sum over pairs of a_ij (v_i * v_j)  (section 3.2), where over all pairs
    a_ij = softmax(h^T ReLU(W (v_i * v_j) + b)).

    The pairs are those of the id features; dense values, which have no embedding, are only in the first-order term. The
    dropout is applied to the products v_i * v_j (section 3.3), before they enter the attention network and the sum.

    The paper's pairs are those of the features that a row has. Here a feature without ids (an empty history) is a zero
    vector: its pairs add nothing to the sum, but keep their share of the attention.

    Args:
        features: sparse, sequence (pooled by their mean) and dense features, at least two with ids.
        attention_units: widths of the attention network's hidden layers. The paper has one; further ones are ReLU
            layers with weights and biases of their own, and h follows the last.
        embedding_dim: width of all embeddings.
        dropout_rate: dropout of the products.
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
    ) -> None:
        super().__init__()
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
        products = self.dropout(left * right)  # [B, P, D]
        if self.attention is None:
            pooled = products.sum(dim=1)
        else:
            pooled = torch.einsum("bp,bpd->bd", self.attention(products), products)
        return Output(logits=self.bias + self.first_order(embedded) + self.projection(pooled))


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
