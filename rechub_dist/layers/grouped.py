"""Several networks of one shape side by side (experts, task towers, gates), as batched matrix products."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rechub_dist.layers.activation import activation as make_activation
from rechub_dist.layers.mlp import dropouts
from rechub_dist.layers.norm import batch_norm as normalize


class GroupedLinear(nn.Module):
    """G linear layers, initialised like `nn.Linear`.

    Shapes: [N, in_dim], the same input for all, or [N, G, in_dim] -> [N, G, out_dim].
    """

    def __init__(self, groups: int, in_dim: int, out_dim: int, *, bias: bool = True) -> None:
        super().__init__()
        bound = 1 / math.sqrt(in_dim)
        self.weight = nn.Parameter(torch.empty(groups, in_dim, out_dim).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(groups, out_dim).uniform_(-bound, bound)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        y = torch.einsum("ni,gio->ngo" if x.dim() == 2 else "ngi,gio->ngo", x, self.weight)
        return y if self.bias is None else y + self.bias


def side_by_side(values: Tensor, widths: Sequence[int]) -> Tensor:
    """The first widths[g] values of each group g: [N, G, max(widths)] -> [N, sum(widths)]."""
    if values.shape[2] == 1:
        return values.squeeze(2)
    return torch.cat([values[:, group, :width] for group, width in enumerate(widths)], dim=1)


class GroupedMLP(nn.Module):
    """G networks like `layers.mlp.MLP`, each with weights of its own.

    Args:
        groups: G, at least 1.
        in_dim: width of the input.
        hidden_units: widths of each network's hidden layers; may be empty.
        dropout_rates: one rate a hidden layer; a single float stands for all.
        activation: a name that `layers.activation` knows; its statistics and parameters are each network's own.
        batch_norm: normalise before each activation, by batch statistics.
        out_dim: width of the last, linear layer; None leaves it out.

    Shapes: [N, in_dim], the same input for all, or [N, G, in_dim] -> [N, G, self.out_dim]. Without any layer the input
    must be [N, G, in_dim].
    """

    def __init__(
        self,
        groups: int,
        in_dim: int,
        hidden_units: list[int],
        dropout_rates: float | list[float] = 0.0,
        *,
        activation: str = "relu",
        batch_norm: bool = False,
        out_dim: int | None = None,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = in_dim
        for units, rate in zip(hidden_units, dropouts(dropout_rates, hidden_units), strict=True):
            # Before batch norm a bias would have no effect, and an optimizer would drive it by rounding errors.
            layers.append(GroupedLinear(groups, width, units, bias=not batch_norm))
            if batch_norm:
                layers.append(nn.BatchNorm1d(groups * units))
            layers.append(make_activation(activation, groups * units))
            if rate > 0:
                layers.append(nn.Dropout(rate))
            width = units
        if out_dim is not None:
            layers.append(GroupedLinear(groups, width, out_dim))
            width = out_dim
        self.layers = nn.ModuleList(layers)
        self.groups = groups
        self.out_dim = width

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if isinstance(layer, GroupedLinear) or not any(True for _ in layer.parameters()):
                # What has no parameters works element by element. It takes x as it lies, group by group in memory,
                # where units side by side would be a copy.
                x = layer(x)
            else:  # units last, as activations and norms want them
                x = normalize(layer, x.flatten(1)).unflatten(1, (self.groups, -1))
        return x
