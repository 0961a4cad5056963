"""Activations by name. All take [N, width], units last, so that per-unit parameters and statistics fit."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from rechub_dist.layers.norm import batch_norm


class Dice(nn.Module):
    """Data adaptive activation (DIN, section 5.3): p(s) s + (1 - p(s)) alpha s, p(s) = sigmoid((s - E[s]) / std(s)).

    The mean and variance are those of the batch, one a unit; rows must be real ones, so select valid positions first.
    alpha starts at 0, and eps is the paper's 1e-8. Shapes: [N, width] -> [N, width].
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width, eps=1e-8, affine=False)
        self.alpha = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        p = torch.sigmoid(batch_norm(self.norm, x))
        return x * torch.lerp(self.alpha, torch.ones_like(self.alpha), p)


_ACTIVATIONS: dict[str, Callable[[int], nn.Module]] = {
    "dice": Dice,
    "gelu": lambda _: nn.GELU(),
    "leaky_relu": lambda _: nn.LeakyReLU(),
    "prelu": nn.PReLU,
    "relu": lambda _: nn.ReLU(),
    "sigmoid": lambda _: nn.Sigmoid(),
    "silu": lambda _: nn.SiLU(),
    "tanh": lambda _: nn.Tanh(),
}


def activation(name: str, width: int) -> nn.Module:
    """The activation `name` for [N, width].

    Raises:
        ValueError: for an unknown name; it lists the known ones.
    """
    if name not in _ACTIVATIONS:
        raise ValueError(f"activation {name!r} is unknown: use one of {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name](width)
