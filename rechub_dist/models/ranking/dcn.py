"""DCN: explicit crosses of bounded degree beside a deep network."""

from __future__ import annotations

import torch
from torch import nn

from rechub_dist.embedded import Embedded, Lookup, Output
from rechub_dist.features import DenseFeature, Feature, Outputs
from rechub_dist.layers.arguments import check_layers, check_outputs
from rechub_dist.layers.cross import CrossNetwork, VectorCross
from rechub_dist.layers.inputs import Fields
from rechub_dist.layers.mlp import MLP
from rechub_dist.models.base import Model


class DCN(Model):
    """logit = w^T [x_L, MLP(x_0)] + c, with x_{l+1} = x_0 (x_l^T w_l) + b_l + x_l  (sections 2.2 to 2.4).

    x_0 is the concatenation of the fields' vectors and the dense values (section 2.1).

    Args:
        features: sparse, sequence (pooled by their mean) and dense features. Every table's width is its own `dim`.
        cross_num: L, the number of cross layers.
        hidden_units: widths of the deep network; if empty, the logit is that of the cross network.
        dropout_rates: of the deep network, one rate per hidden layer, or one for all.
        activation: the deep network's activation.
        batch_norm: batch normalisation in the deep network (as in the paper, section 4.2).
        outputs: the number of logits in a list, [C] for a label of C classes; None for one.
    """

    paper = "Wang et al. 2017, Deep & Cross Network for Ad Click Predictions"

    def __init__(
        self,
        features: list[Feature],
        cross_num: int,
        hidden_units: list[int],
        *,
        dropout_rates: float | list[float] = 0.0,
        activation: str = "relu",
        batch_norm: bool = False,
        outputs: Outputs = None,
    ) -> None:
        super().__init__()
        self.label_outputs = check_outputs(outputs, 1)
        check_layers("cross_num", cross_num)
        self.fields = Fields.of(features)
        width = self.fields.width
        self.cross = CrossNetwork(VectorCross(width) for _ in range(cross_num))
        mlp = MLP(width, hidden_units, dropout_rates, activation=activation, batch_norm=batch_norm)
        self.mlp = mlp if hidden_units else None
        self.output = nn.Linear(width + mlp.out_dim if hidden_units else width, self.label_outputs[0])

    def lookups(self) -> tuple[Lookup, ...]:
        return self.fields.lookups

    def dense_features(self) -> tuple[DenseFeature, ...]:
        return self.fields.dense

    def forward(self, embedded: Embedded) -> Output:
        """Logits [B, 1], or [B, C]."""
        x0 = self.fields.concat(embedded)
        crossed = self.cross(x0)
        if self.mlp is None:
            return Output(logits=self.output(crossed))
        return Output(logits=self.output(torch.cat([crossed, self.mlp(x0)], dim=1)))
