"""EDCN: a cross and a deep tower that exchange information after every layer."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from rechub_dist.embedded import Embedded, Lookup, Output
from rechub_dist.features import DenseFeature, Feature, Outputs
from rechub_dist.layers.arguments import check_choice, check_layers, check_outputs
from rechub_dist.layers.cross import VectorCross
from rechub_dist.layers.inputs import Fields
from rechub_dist.layers.mlp import MLP, dropouts
from rechub_dist.layers.norm import batch_norm as normalize
from rechub_dist.models.base import Model

BridgeType = Literal["hadamard_product", "pointwise_addition", "concatenation", "attention_pooling"]


class EDCN(Model):
    """logit = w^T [cross_L, deep_L, b_L] + c, after L layers of a cross and a deep tower  (section 3).

    b_0 = x_0 is the concatenation of the fields, of total width d; a dense feature is a field too. Layer l is

        c_l = g^c_l * b_l,  h_l = g^d_l * b_l                      regulation: each tower has gates of its own
        cross_{l+1} = c_0 (c_l^T w_l) + a_l + c_l                  DCN's cross layer
        deep_{l+1}  = activation(W_l h_l + e_l)
        b_{l+1} = bridge(cross_{l+1}, deep_{l+1})                  by default their Hadamard product

    The gates are learned, one set per tower and layer, and do not depend on the row: n softmax(logits / temperature)
    over the n gates of a set, which sum to n and start near 1 with small random differences. The factor n is ours:
    without it, inputs would be scaled by 1 / n layer after layer, and with the usual number of fields almost no
    gradient would reach the embeddings. FGU and BGU are Torch-RecHub's names, not the paper's; our interpretation is

    - "FGU", field-wise gate unit (the paper's regulation): one gate per field;
    - "BGU", bit-wise gate unit: one gate per dimension.

    The bridges are the paper's four (section 3.2), of x = cross_{l+1} and y = deep_{l+1}:

    - "hadamard_product": x * y;
    - "pointwise_addition": x + y;
    - "concatenation": ReLU(W [x, y] + e);
    - "attention_pooling": a_x x + a_y y, [a_x, a_y] = softmax of q^T ReLU(W x + e) and q^T ReLU(W y + e).

    With `gate_batch_norm` c_l and h_l are batch-normalised after their gates, each by statistics and parameters of its
    own, an option of the authors' code. The products of the next layers then have inputs of one size at any depth.

    The paper's towers have the width d throughout. Here a hidden layer with another number of units is followed by a
    linear map back to d, so that the requested sizes are kept.

    Args:
        features: sparse, sequence (pooled by their mean) and dense features, at least two. Every table's width is its
            own `dim`.
        cross_num: L, the number of layers of each tower.
        hidden_units: units of the deep tower's layers, `cross_num` of them.
        gate_type: "FGU" or "BGU".
        temperature: of the gates' softmax; a lower one makes the gates differ more.
        activation: the deep tower's activation.
        dropout_rates: of the deep tower, one rate per layer, or one for all.
        batch_norm: batch normalisation in the deep tower, before the activation.
        bridge_type: "hadamard_product", "pointwise_addition", "concatenation" or "attention_pooling".
        gate_batch_norm: batch normalisation after the gates.
        outputs: the number of logits in a list, [C] for a label of C classes; None for one.
    """

    paper = (
        "Chen et al. 2021, Enhancing Explicit and Implicit Feature Interactions via Information Sharing for Parallel "
        "Deep CTR Models"
    )

    def __init__(
        self,
        features: list[Feature],
        cross_num: int,
        hidden_units: list[int],
        gate_type: Literal["FGU", "BGU"],
        *,
        temperature: float = 1.0,
        activation: str = "relu",
        dropout_rates: float | list[float] = 0.0,
        batch_norm: bool = False,
        bridge_type: BridgeType = "hadamard_product",
        gate_batch_norm: bool = False,
        outputs: Outputs = None,
    ) -> None:
        super().__init__()
        self.label_outputs = check_outputs(outputs, 1)
        check_layers("cross_num", cross_num)
        if len(hidden_units) != cross_num:
            raise ValueError(
                f"cross_num is {cross_num} and hidden_units {list(hidden_units)}: the towers go layer by layer, so "
                f"give {cross_num} hidden widths"
            )
        self.fields = Fields.of(features)
        widths = [lookup.dim for lookup in self.fields.lookups] + [feature.dim for feature in self.fields.dense]
        width = self.fields.width
        self.regulation = Regulation(gate_type, widths, cross_num, temperature)
        self.cross = nn.ModuleList(VectorCross(width) for _ in range(cross_num))
        self.deep = nn.ModuleList(
            MLP(
                width,
                [units],
                rate,
                activation=activation,
                batch_norm=batch_norm,
                out_dim=None if units == width else width,
            )
            for units, rate in zip(hidden_units, dropouts(dropout_rates, hidden_units), strict=True)
        )
        self.bridges = nn.ModuleList(Bridge(bridge_type, width) for _ in range(cross_num))
        count = 2 * cross_num if gate_batch_norm else 0
        self.gate_norms = nn.ModuleList(nn.BatchNorm1d(width) for _ in range(count))  # cross and deep in turn
        self.output = nn.Linear(3 * width, self.label_outputs[0])

    def lookups(self) -> tuple[Lookup, ...]:
        return self.fields.lookups

    def dense_features(self) -> tuple[DenseFeature, ...]:
        return self.fields.dense

    def forward(self, embedded: Embedded) -> Output:
        """Logits [B, 1], or [B, C]."""
        gates = self.regulation()  # [L, 2, d]
        bridge = self.fields.concat(embedded)  # [B, d]
        start = None
        for layer in range(len(self.cross)):
            to_cross, to_deep = (self._regulated(gates[layer, tower] * bridge, layer, tower) for tower in (0, 1))
            start = to_cross if start is None else start
            cross = self.cross[layer](start, to_cross)
            deep = self.deep[layer](to_deep)
            bridge = self.bridges[layer](cross, deep)
        return Output(logits=self.output(torch.cat([cross, deep, bridge], dim=1)))

    def _regulated(self, gated: Tensor, layer: int, tower: int) -> Tensor:
        """c_l or h_l, [B, d]."""
        return normalize(self.gate_norms[2 * layer + tower], gated) if self.gate_norms else gated


class Bridge(nn.Module):
    """What the towers of one layer tell each other: twice [B, d] -> [B, d].

    Args:
        kind: one of `BridgeType`.
        width: d.
    """

    def __init__(self, kind: str, width: int) -> None:
        super().__init__()
        check_choice("bridge_type", kind, get_args(BridgeType))
        self.kind = kind
        if kind == "concatenation":
            self.linear = nn.Linear(2 * width, width)
        elif kind == "attention_pooling":
            self.linear = nn.Linear(width, width)
            self.score = nn.Linear(width, 1, bias=False)

    def forward(self, cross: Tensor, deep: Tensor) -> Tensor:
        if self.kind == "hadamard_product":
            return cross * deep
        if self.kind == "pointwise_addition":
            return cross + deep
        if self.kind == "concatenation":
            joined: Tensor = self.linear(torch.cat([cross, deep], dim=1)).relu()
            return joined
        both = torch.stack([cross, deep], dim=1)  # [B, 2, d]
        weights = self.score(self.linear(both).relu()).softmax(dim=1)  # [B, 2, 1]
        pooled: Tensor = (weights * both).sum(dim=1)
        return pooled


class Regulation(nn.Module):
    """The gates of the two towers, cross and deep, in every layer: [layers, 2, sum of widths].

    Args:
        kind: "FGU", one gate per field, or "BGU", one per dimension.
        widths: the fields' widths.
        layers: the number of layers.
        temperature: of the softmax.
    """

    field_of: Tensor  # for each dimension the field that it belongs to

    def __init__(self, kind: str, widths: list[int], layers: int, temperature: float) -> None:
        super().__init__()
        check_choice("gate_type", kind, ("FGU", "BGU"))
        if len(widths) < 2:
            raise ValueError(
                f"features has {len(widths)}: the gates weigh features against each other, so give at least two"
            )
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature}: it must be above 0")
        self.temperature = temperature
        self.field_wise = kind == "FGU"
        self.logits = nn.Parameter(torch.empty(layers, 2, len(widths) if self.field_wise else sum(widths)))
        nn.init.normal_(self.logits, std=0.1)
        field_of = torch.repeat_interleave(torch.arange(len(widths)), torch.tensor(widths), output_size=sum(widths))
        self.register_buffer("field_of", field_of, persistent=False)

    def forward(self) -> Tensor:
        gates = self.logits.shape[2] * (self.logits / self.temperature).softmax(dim=2)
        return gates.index_select(2, self.field_of) if self.field_wise else gates
