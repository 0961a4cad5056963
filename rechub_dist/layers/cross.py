"""Cross layers: each multiplies what it is given by the network's input x_0 once more, and adds it back.

All take x_0 and x_l, [N, width] each, and return x_{l+1}, [N, width].
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from rechub_dist.layers.grouped import GroupedLinear


class VectorCross(nn.Module):
    """x_0 (x_l^T w) + b + x_l  (DCN, equation 3); b starts at 0."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 1, bias=False)
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x0: Tensor, x: Tensor) -> Tensor:
        return x0 * self.linear(x) + self.bias + x


class MatrixCross(nn.Module):
    """x_0 * (W x_l + b) + x_l  (DCN V2, "Cross Network")."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x0: Tensor, x: Tensor) -> Tensor:
        return x0 * self.linear(x) + x


class LowRankCross(nn.Module):
    """x_0 * (U V^T x_l + b) + x_l, U and V of `rank` columns  (DCN V2, "Cost-Effective Mixture of Low-Rank DCN")."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.reduce = nn.Linear(width, rank, bias=False)
        self.expand = nn.Linear(rank, width)

    def forward(self, x0: Tensor, x: Tensor) -> Tensor:
        return x0 * self.expand(self.reduce(x)) + x


class MixtureCross(nn.Module):
    """sum_i G_i(x_l) x_0 * (U_i g(C_i g(V_i^T x_l)) + b) + x_l  (the same section), with g = tanh.

    The gates G are a softmax over the experts, linear in x_l. They sum to 1, so that the shared b needs no gate, and
    the sum over experts is one matrix product: [U_1 .. U_K] times the gated vectors of all experts side by side.
    """

    def __init__(self, width: int, rank: int, experts: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, experts, bias=False)
        self.reduce = GroupedLinear(experts, width, rank, bias=False)
        self.mix = GroupedLinear(experts, rank, rank, bias=False)
        self.expand = nn.Linear(experts * rank, width)

    def forward(self, x0: Tensor, x: Tensor) -> Tensor:
        gates = self.gate(x).softmax(dim=1)  # [N, experts]
        hidden = self.mix(self.reduce(x).tanh()).tanh()  # [N, experts, rank]
        return x0 * self.expand((gates[..., None] * hidden).flatten(1)) + x


class CrossNetwork(nn.Module):
    """x_L from x_0 through `layers`: [N, width] -> [N, width]."""

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x0: Tensor) -> Tensor:
        x = x0
        for layer in self.layers:
            x = layer(x0, x)
        return x
