"""FiBiNET's two blocks: the fields' importance, and the bilinear products of their pairs."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from rechub_dist.layers.arguments import check_choice, check_positive
from rechub_dist.layers.grouped import GroupedLinear
from rechub_dist.layers.pairs import pairs


class SENET(nn.Module):
    """The weight of each field: ReLU(W_2 ReLU(W_1 z)), z_i the mean of v_i  (FiBiNET, "SENET Layer"), no biases.

    W_2 starts with positive values. With signs at random a field whose row of W_2 is negative would have the weight 0
    for every input, and so no gradient that could change it; with a single hidden unit that is half the fields.

    Args:
        fields: F, the number of fields.
        reduction_ratio: the hidden layer has F // reduction_ratio units, at least 1.

    Shapes: [B, F, D] -> [B, F].
    """

    def __init__(self, fields: int, reduction_ratio: int) -> None:
        super().__init__()
        check_positive("reduction_ratio", reduction_ratio)
        hidden = max(1, fields // reduction_ratio)
        self.squeeze = nn.Linear(fields, hidden, bias=False)
        self.excite = nn.Linear(hidden, fields, bias=False)
        nn.init.uniform_(self.excite.weight, 0, 1 / math.sqrt(hidden))

    def forward(self, fields: Tensor) -> Tensor:
        return self.excite(self.squeeze(fields.mean(dim=2)).relu()).relu()


class Bilinear(nn.Module):
    """(v_i W) * v_j for all pairs i < j of fields  (FiBiNET, "Bilinear-Interaction Layer").

    Args:
        kind: "field_all", one W for all pairs; "field_each", one for each field but the last, which never stands on
            the left; "field_interaction", one for each pair.
        fields: F, at least 2.
        width: D, of every field.

    Shapes: [B, F, D] -> [B, F (F - 1) / 2, D].
    """

    def __init__(self, kind: str, fields: int, width: int) -> None:
        super().__init__()
        check_choice("bilinear_type", kind, ("field_all", "field_each", "field_interaction"))
        self.of_pairs = kind == "field_interaction"
        self.linear: nn.Module
        if kind == "field_all":
            self.linear = nn.Linear(width, width, bias=False)
        else:
            matrices = fields * (fields - 1) // 2 if self.of_pairs else fields - 1
            self.linear = GroupedLinear(matrices, width, width, bias=False)

    def forward(self, fields: Tensor) -> Tensor:
        if not self.of_pairs:
            left, right = pairs(self.linear(fields[:, :-1]), fields)
            return left * right
        # Here what belongs to one matrix lies together, pair by pair. Stacking, unlike a transpose, gives the
        # gradients that layout as well.
        by_field = fields.transpose(0, 1).contiguous()  # [F, B, D]
        left, right = pairs(by_field, by_field, dim=0)  # [P, B, D]
        products = self.linear(left.transpose(0, 1)).transpose(0, 1) * right
        return torch.stack(products.unbind(), dim=1)
