"""FiBiNET: bilinear products of all pairs of fields, raw and weighted by field importance, as input of an MLP."""

from __future__ import annotations

from typing import Literal

import torch

from rechub_dist.embedded import Embedded, Lookup, Output
from rechub_dist.features import DenseFeature, Feature
from rechub_dist.layers.bilinear import SENET, Bilinear
from rechub_dist.layers.inputs import Fields
from rechub_dist.layers.linear import FirstOrder
from rechub_dist.layers.mlp import MLP
from rechub_dist.models.base import Model


class FiBiNET(Model):
    """logit = <w, x> + MLP([p, q, dense values])  (section 3).

    p holds (v_i W) * v_j for all pairs i < j of the id features' vectors, q the same, with matrices of its own, for the
    re-weighted vectors A_i v_i. A = ReLU(W_2 ReLU(W_1 z)) with z_i the mean of v_i; `layers.bilinear.SENET` documents
    how W_2 is initialised. The MLP's last bias is the global bias.

    The paper has only ids. Here dense values, which have no embedding, enter the first-order term and the MLP.

    Args:
        features: sparse, sequence (pooled by their mean) and dense features, at least two with ids. Every table's
            width is its own `dim`; all must be equal.
        bilinear_type: "field_all", one matrix W for all pairs; "field_each", one for each left field;
            "field_interaction", one for each pair.
        hidden_units: widths of the MLP; empty makes it linear in [p, q, dense values].
        reduction_ratio: the F fields' importance is computed through max(1, F // reduction_ratio) hidden units.
        dropout_rates: of the MLP, one rate per hidden layer, or one for all.
        activation: the MLP's activation.
        batch_norm: batch normalisation in the MLP.
    """

    paper = (
        "Huang et al. 2019, FiBiNET: Combining Feature Importance and Bilinear feature Interaction for Click-Through "
        "Rate Prediction"
    )

    def __init__(
        self,
        features: list[Feature],
        bilinear_type: Literal["field_all", "field_each", "field_interaction"],
        hidden_units: list[int],
        reduction_ratio: int,
        *,
        dropout_rates: float | list[float] = 0.0,
        activation: str = "relu",
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        self.fields = Fields.of(features)
        width = _common_width(self.fields)
        count = len(self.fields.lookups)
        self.first_order = FirstOrder(features)
        self.senet = SENET(count, reduction_ratio)
        self.raw = Bilinear(bilinear_type, count, width)
        self.weighted = Bilinear(bilinear_type, count, width)
        self.mlp = MLP(
            count * (count - 1) * width + self.fields.dense_width,  # two vectors a pair
            hidden_units,
            dropout_rates,
            activation=activation,
            batch_norm=batch_norm,
            out_dim=1,
        )

    def lookups(self) -> tuple[Lookup, ...]:
        return (*self.fields.lookups, *self.first_order.lookups)

    def dense_features(self) -> tuple[DenseFeature, ...]:
        return self.fields.dense

    def forward(self, embedded: Embedded) -> Output:
        """Logits [B, 1]."""
        fields = embedded.stack(self.fields.names)  # [B, F, D]
        p = self.raw(fields)  # [B, P, D]
        q = self.weighted(self.senet(fields)[..., None] * fields)
        dense = [embedded.dense[name] for name in self.fields.dense_names]
        deep = self.mlp(torch.cat([p.flatten(1), q.flatten(1), *dense], dim=1))
        return Output(logits=self.first_order(embedded) + deep)


def _common_width(fields: Fields) -> int:
    """The common width of all vectors.

    Raises:
        ValueError: fewer than two features with ids, or a table of another width than the first.
    """
    if len(fields.lookups) < 2:
        raise ValueError(
            f"features has {len(fields.lookups)} with ids, {fields.names}: FiBiNET needs pairs, so give it at least "
            f"two sparse or sequence features"
        )
    first = fields.lookups[0]
    for lookup in fields.lookups:
        if lookup.dim != first.dim:
            raise ValueError(
                f"table {lookup.table.name!r} has dim {lookup.dim}, but table {first.table.name!r} has {first.dim}: "
                f"FiBiNET multiplies fields element by element, so give all tables one dim"
            )
    return first.dim
