"""DCNv2: cross layers with a matrix, whole or as a mixture of low-rank experts, beside or below a deep network."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from rechub_dist.embedded import Embedded, Lookup, Output
from rechub_dist.features import DenseFeature, Feature, Outputs
from rechub_dist.layers.arguments import check_choice, check_layers, check_outputs
from rechub_dist.layers.cross import CrossNetwork, LowRankCross, MatrixCross, MixtureCross, VectorCross
from rechub_dist.layers.inputs import Fields
from rechub_dist.layers.mlp import MLP
from rechub_dist.models.base import Model


class DCNv2(Model):
    """logit = w^T [x_L, MLP(x_0)] + c, or w^T MLP(x_L) + c if stacked; x_0 is the concatenation of the fields' vectors
    and the dense values  (section 3).

    One cross layer ("Cross Network" and "Cost-Effective Mixture of Low-Rank DCN"), `*` elementwise:

    - "matrix": x_{l+1} = x_0 * (W x_l + b) + x_l
    - "matrix" of low rank: x_{l+1} = x_0 * (U V^T x_l + b) + x_l
    - a mixture of low-rank experts: x_{l+1} = sum_i G_i(x_l) x_0 * (U_i g(C_i g(V_i^T x_l)) + b) + x_l
    - "vector", DCN's: x_{l+1} = x_0 (x_l^T w) + b + x_l

    The paper leaves g and the gates open. Here g is tanh, and the gates are a softmax over experts, linear in x_l and
    without bias. As they sum to 1, the experts' common b can be added outside the sum.

    Args:
        features: sparse, sequence (pooled by their mean) and dense features. Every table's width is its own `dim`.
        cross_num: L, the number of cross layers.
        hidden_units: widths of the deep network; if empty, the logit is that of the cross network.
        cross_parameterization: "matrix" or "vector".
        low_rank: columns of U and V, at most the width of x_0; None keeps W whole.
        num_experts: experts per layer; more than one requires `low_rank`.
        structure: "parallel", the deep network beside the cross network, or "stacked", on top of it.
        dropout_rates: of the deep network, one rate per hidden layer, or one for all.
        activation: the deep network's activation.
        batch_norm: batch normalisation in the deep network.
        outputs: the number of logits in a list, [C] for a label of C classes; None for one.
    """

    paper = "Wang et al. 2021, DCN V2: Improved Deep & Cross Network and Practical Lessons for Web-scale LTR Systems"

    def __init__(
        self,
        features: list[Feature],
        cross_num: int,
        hidden_units: list[int],
        cross_parameterization: Literal["matrix", "vector"] = "matrix",
        *,
        low_rank: int | None = None,
        num_experts: int = 1,
        structure: Literal["parallel", "stacked"] = "parallel",
        dropout_rates: float | list[float] = 0.0,
        activation: str = "relu",
        batch_norm: bool = False,
        outputs: Outputs = None,
    ) -> None:
        super().__init__()
        self.label_outputs = check_outputs(outputs, 1)
        check_layers("cross_num", cross_num)
        check_choice("structure", structure, ("parallel", "stacked"))
        self.fields = Fields.of(features)
        width = self.fields.width
        _check_layer(width, cross_parameterization, low_rank, num_experts)
        self.cross = CrossNetwork(
            _layer(width, cross_parameterization, low_rank, num_experts) for _ in range(cross_num)
        )
        # Without hidden layers the MLP is the identity, so that the stacked form is the cross network alone.
        self.parallel = structure == "parallel" and bool(hidden_units)
        self.mlp = MLP(width, hidden_units, dropout_rates, activation=activation, batch_norm=batch_norm)
        self.output = nn.Linear(width + self.mlp.out_dim if self.parallel else self.mlp.out_dim, self.label_outputs[0])

    def lookups(self) -> tuple[Lookup, ...]:
        return self.fields.lookups

    def dense_features(self) -> tuple[DenseFeature, ...]:
        return self.fields.dense

    def forward(self, embedded: Embedded) -> Output:
        """Logits [B, 1], or [B, C]."""
        x0 = self.fields.concat(embedded)
        crossed = self.cross(x0)
        top = torch.cat([crossed, self.mlp(x0)], dim=1) if self.parallel else self.mlp(crossed)
        return Output(logits=self.output(top))


def _layer(width: int, parameterization: str, low_rank: int | None, num_experts: int) -> nn.Module:
    if parameterization == "vector":
        return VectorCross(width)
    if low_rank is None:
        return MatrixCross(width)
    return LowRankCross(width, low_rank) if num_experts == 1 else MixtureCross(width, low_rank, num_experts)


def _check_layer(width: int, parameterization: str, low_rank: int | None, num_experts: int) -> None:
    """Check that the parameters are compatible."""
    check_choice("cross_parameterization", parameterization, ("matrix", "vector"))
    check_layers("num_experts", num_experts)
    if low_rank is None:
        if num_experts > 1:
            raise ValueError(f"num_experts is {num_experts}, and experts are of low rank: give low_rank as well")
        return
    if parameterization != "matrix":
        raise ValueError(
            f"low_rank is {low_rank}, but cross_parameterization is {parameterization!r}: make it 'matrix', or leave "
            f"low_rank out"
        )
    if not 1 <= low_rank <= width:
        raise ValueError(f"low_rank is {low_rank}: it must be at least 1 and at most the input's width, {width}")
