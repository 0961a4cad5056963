"""The pieces of the papers' formulas, written out in loops on float64 vectors; none of the project's layers is used."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from rechub_dist.embedded import Embedded
from rechub_dist.models import Model


def affine(layer: nn.Module, x: Tensor) -> Tensor:
    """W x + b for one vector, unit by unit."""
    rows = [sum(layer.weight[o, i] * x[i] for i in range(len(x))) for o in range(len(layer.weight))]
    y = torch.stack(rows)
    return y if layer.bias is None else y + layer.bias


def relu_mlp(layers: nn.ModuleList, x: Tensor) -> Tensor:
    """Linear and ReLU for one vector, in turn, with a last linear layer or without."""
    for layer in layers:
        x = affine(layer, x) if isinstance(layer, nn.Linear) else x * (x > 0)
    return x


def layer_norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * gain + bias for one vector."""
    mean = sum(x) / len(x)
    variance = sum((value - mean) ** 2 for value in x) / len(x)
    return (x - mean) / torch.sqrt(variance + norm.eps) * norm.weight + norm.bias


def softmax(scores: list[Tensor]) -> list[Tensor]:
    powers = [score.exp() for score in scores]
    return [power / sum(powers) for power in powers]


def dice(rows: list[Tensor], alpha: Tensor) -> list[Tensor]:
    """p(s) s + (1 - p(s)) alpha s with the rows' own mean and variance, for every unit apart."""
    out = [[None] * len(alpha) for _ in rows]
    for unit in range(len(alpha)):
        values = [row[unit] for row in rows]
        mean = sum(values) / len(values)
        variance = sum((value - mean) ** 2 for value in values) / len(values)
        for r, s in enumerate(values):
            p = 1 / (1 + torch.exp(-(s - mean) / torch.sqrt(variance + 1e-8)))
            out[r][unit] = p * s + (1 - p) * alpha[unit] * s
    return [torch.stack(row) for row in out]


def dice_mlp(layers: nn.ModuleList, rows: list[Tensor]) -> list[Tensor]:
    """Linear and Dice for a batch of vectors, in turn, and a last linear layer."""
    for layer in layers:
        rows = [affine(layer, row) for row in rows] if isinstance(layer, nn.Linear) else dice(rows, layer.alpha)
    return rows


def assert_same(model: Model, embedded: Embedded, leaves: dict[str, Tensor], formula: Callable[[], Tensor]) -> None:
    """The model's logits [B, T] are the formula's, and so are the gradients of all parameters and of `leaves`."""
    weights: Tensor | None = None
    results = []
    for compute in (lambda: model(embedded).logits, formula):
        values = compute()
        if weights is None:
            weights = torch.linspace(-1, 1.3, values.numel(), dtype=torch.float64).reshape(values.shape)
        targets = dict(model.named_parameters()) | leaves
        gradients = torch.autograd.grad((values * weights).sum(), list(targets.values()))
        results.append((values, dict(zip(targets, gradients, strict=True))))
    (actual, actual_gradients), (expected, expected_gradients) = results
    torch.testing.assert_close(actual, expected)
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(
            actual_gradients[name], gradient, atol=1e-9, rtol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert math.isfinite(float(expected.detach().sum()))
