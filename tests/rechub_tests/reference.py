"""The pieces of the papers' formulas, written out in loops on float64 vectors; none of the project's layers is used."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from rechub_dist.embedded import Embedded, Output
from rechub_dist.models import Model


def affine(layer: nn.Module, x: Tensor) -> Tensor:
    """W x + b for one vector, unit by unit."""
    rows = [sum(layer.weight[o, i] * x[i] for i in range(len(x))) for o in range(len(layer.weight))]
    y = torch.stack(rows)
    return y if layer.bias is None else y + layer.bias


def relu_mlp(layers: nn.ModuleList, x: Tensor, slope: float = 0.0) -> Tensor:
    """Linear and ReLU (leaky with a slope) for one vector, in turn, with a last linear layer or without."""
    for layer in layers:
        x = affine(layer, x) if isinstance(layer, nn.Linear) else x * (x > 0) + slope * x * (x <= 0)
    return x


def group_affine(layer: nn.Module, group: int, x: Tensor) -> Tensor:
    """One group's x W + b for one vector, unit by unit; weights lie as [group, input, output]."""
    weight = layer.weight[group]
    y = torch.stack([sum(weight[i, o] * x[i] for i in range(len(x))) for o in range(weight.shape[1])])
    return y if layer.bias is None else y + layer.bias[group]


def group_relu_mlp(layers: nn.ModuleList, group: int, x: Tensor) -> Tensor:
    """`relu_mlp` of one group."""
    for layer in layers:
        x = x * (x > 0) if isinstance(layer, nn.ReLU) else group_affine(layer, group, x)
    return x


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def gru(layer: nn.GRU, inputs: list[Tensor], number: int = 0) -> list[Tensor]:
    """The states of one layer over one row; nn.GRU's z keeps the state, so that the update gate is 1 - z."""
    H = layer.hidden_size
    w_ih, w_hh, b_ih, b_hh = (
        getattr(layer, f"{n}_l{number}") for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    )
    h = torch.zeros(H, dtype=torch.float64)
    states = []
    for x in inputs:
        a = [w_ih[o].dot(x) + b_ih[o] for o in range(3 * H)]
        b = [w_hh[o].dot(h) + b_hh[o] for o in range(3 * H)]
        r, z = ([sigmoid(a[k + o] + b[k + o]) for o in range(H)] for k in (0, H))
        n = [torch.tanh(a[2 * H + o] + r[o] * b[2 * H + o]) for o in range(H)]
        h = torch.stack([(1 - z[o]) * n[o] + z[o] * h[o] for o in range(H)])
        states.append(h)
    return states


def vector_cross(layer: nn.Module, x0: Tensor, x: Tensor) -> Tensor:
    """x_0 (x^T w) + b + x for one vector, element by element."""
    scale = sum(layer.linear.weight[0, k] * x[k] for k in range(len(x)))
    return torch.stack([x0[k] * scale + layer.bias[k] + x[k] for k in range(len(x))])


def first_order(layer: nn.Module, embedded: Embedded, ids: list[str], dense: list[str], b: int) -> Tensor:
    """Row b's sum of the ids' scalar weights and of the weighted dense values."""
    y = sum((embedded.vectors[f"{name}.linear"][b, 0] for name in ids), torch.zeros((), dtype=torch.float64))
    values = [value for name in dense for value in embedded.dense[name][b]]
    return y + sum(layer.linear.weight[0, i] * value for i, value in enumerate(values)) if values else y


def row_input(embedded: Embedded, ids: list[str], dense: list[str], b: int) -> Tensor:
    """Row b's vectors and then its dense values, side by side."""
    return torch.cat([*(embedded.vectors[name][b] for name in ids), *(embedded.dense[name][b] for name in dense)])


def layer_norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * gain + bias for one vector."""
    mean = sum(x) / len(x)
    variance = sum((value - mean) ** 2 for value in x) / len(x)
    return (x - mean) / torch.sqrt(variance + norm.eps) * norm.weight + norm.bias


def unit(x: Tensor) -> Tensor:
    """x / |x|."""
    return x / torch.sqrt(sum(value**2 for value in x))


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


def assert_same(
    model: Model,
    embedded: Embedded,
    leaves: dict[str, Tensor],
    formula: Callable[[], Tensor],
    read: Callable[[Output], Tensor] = lambda output: output.logits,
) -> None:
    """What `read` takes of the model's output, its logits [B, T], is the formula's.

    So are the gradients of all parameters and of `leaves`.
    """
    weights: Tensor | None = None
    results = []
    for compute in (lambda: read(model(embedded)), formula):
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
