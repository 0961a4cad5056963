"""The ranking models without a history."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from handwritten.common import (
    ATTENTION,
    CROSS_EXPERTS,
    CROSSES,
    DENSE,
    FLAT,
    HIDDEN,
    IDS,
    PAIRS,
    RANK,
    REDUCTION,
    WIDTH,
    Written,
    copy,
    copy_groups,
    dense,
    first_order,
    flat,
    mix,
    mlp,
    stack,
)
from rechub_dist.embedded import Embedded


class WideDeep(Written):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(len(DENSE), 1, bias=False)
        self.mlp = mlp(FLAT, HIDDEN, 1)

    def take(self, ours: Any) -> None:
        copy(self.linear, ours.wide.linear)
        copy(self.mlp, ours.mlp)

    def forward(self, batch: Embedded) -> tuple[Tensor, ...]:
        return (first_order(batch) + self.linear(dense(batch)) + self.mlp(flat(batch)),)


class DeepFM(Written):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(len(DENSE), 1, bias=False)
        self.mlp = mlp(FLAT, HIDDEN, 1)

    def take(self, ours: Any) -> None:
        copy(self.linear, ours.first_order.linear)
        copy(self.mlp, ours.mlp)

    def forward(self, batch: Embedded) -> tuple[Tensor, ...]:
        fields, x = stack(batch), dense(batch)
        second = 0.5 * (fields.sum(1) ** 2 - (fields**2).sum(1)).sum(1, keepdim=True)
        deep = self.mlp(torch.cat([fields.flatten(1), x], 1))
        return (first_order(batch) + self.linear(x) + second + deep,)


class DCN(Written):
    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ModuleList(nn.Linear(FLAT, 1, bias=False) for _ in range(CROSSES))
        self.biases = nn.ParameterList(torch.zeros(FLAT) for _ in range(CROSSES))
        self.mlp = mlp(FLAT, HIDDEN)
        self.output = nn.Linear(FLAT + HIDDEN[-1], 1)

    def take(self, ours: Any) -> None:
        copy(self.weights, [layer.linear.weight for layer in ours.cross.layers])
        copy(self.biases, [layer.bias for layer in ours.cross.layers])
        copy(self.mlp, ours.mlp)
        copy(self.output, ours.output)

    def forward(self, batch: Embedded) -> tuple[Tensor, ...]:
        x = x0 = flat(batch)
        for weight, bias in zip(self.weights, self.biases, strict=True):
            x = x0 * weight(x) + bias + x
        return (self.output(torch.cat([x, self.mlp(x0)], 1)),)


class DCNv2(Written):
    def __init__(self) -> None:
        super().__init__()
        self.cross = nn.ModuleList(self.layer() for _ in range(CROSSES))
        self.mlp = mlp(FLAT, HIDDEN)
        self.output = nn.Linear(FLAT + HIDDEN[-1], 1)

    def layer(self) -> nn.Module:
        return nn.Linear(FLAT, FLAT)

    def take(self, ours: Any) -> None:
        copy(self.cross, ours.cross)
        copy(self.mlp, ours.mlp)
        copy(self.output, ours.output)

    def forward(self, batch: Embedded) -> tuple[Tensor, ...]:
        x = x0 = flat(batch)
        for layer in self.cross:
            x = x0 * layer(x) + x
        return (self.output(torch.cat([x, self.mlp(x0)], 1)),)


class DCNv2Mixture(DCNv2):
    def layer(self) -> nn.Module:
        return Mixture()

    def take(self, ours: Any) -> None:
        for layer, of_ours in zip(self.cross, ours.cross.layers, strict=True):
            assert isinstance(layer, Mixture)
            layer.take(of_ours)
        copy(self.mlp, ours.mlp)
        copy(self.output, ours.output)


class Mixture(nn.Module):
    """sum_i G_i(x) (U_i tanh(C_i tanh(V_i x)) + b), expert by expert."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(FLAT, CROSS_EXPERTS, bias=False)
        self.V = nn.ModuleList(nn.Linear(FLAT, RANK, bias=False) for _ in range(CROSS_EXPERTS))
        self.C = nn.ModuleList(nn.Linear(RANK, RANK, bias=False) for _ in range(CROSS_EXPERTS))
        self.U = nn.ModuleList(nn.Linear(RANK, FLAT, bias=False) for _ in range(CROSS_EXPERTS))
        self.bias = nn.Parameter(torch.zeros(FLAT))

    def take(self, ours: Any) -> None:
        copy(self.gate, ours.gate)
        copy_groups(self.V, ours.reduce)
        copy_groups(self.C, ours.mix)
        for layer, weight in zip(self.U, ours.expand.weight.split(RANK, dim=1), strict=True):
            copy(layer, [weight])
        copy([self.bias], [ours.expand.bias])

    def forward(self, x: Tensor) -> Tensor:
        experts = [
            U(torch.tanh(C(torch.tanh(V(x))))) + self.bias for V, C, U in zip(self.V, self.C, self.U, strict=True)
        ]
        return mix(self.gate(x), experts)


class AFM(Written):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(len(DENSE), 1, bias=False)
        self.attention = nn.Sequential(nn.Linear(WIDTH, ATTENTION), nn.ReLU(), nn.Linear(ATTENTION, 1, bias=False))
        self.projection = nn.Linear(WIDTH, 1)  # its bias is w_0

    def take(self, ours: Any) -> None:
        copy(self.linear, ours.first_order.linear)
        copy(self.attention, ours.attention)
        copy(self.projection, [ours.projection.weight, ours.bias])

    def forward(self, batch: Embedded) -> tuple[Tensor, ...]:
        v = [batch.vectors[name] for name in IDS]
        products = torch.stack([v[i] * v[j] for i, j in PAIRS], 1)
        weights = torch.softmax(self.attention(products), 1)
        return (first_order(batch) + self.linear(dense(batch)) + self.projection((weights * products).sum(1)),)


class FiBiNET(Written):
    kind = "field_interaction"

    def __init__(self) -> None:
        super().__init__()
        fields = len(IDS)
        hidden = fields // REDUCTION
        self.linear = nn.Linear(len(DENSE), 1, bias=False)
        self.senet = nn.Sequential(
            nn.Linear(fields, hidden, bias=False), nn.ReLU(), nn.Linear(hidden, fields, bias=False), nn.ReLU()
        )
        matrices = {"field_all": 1, "field_each": fields - 1, "field_interaction": len(PAIRS)}[self.kind]
        self.raw, self.weighted = (
            nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(matrices)) for _ in range(2)
        )
        self.mlp = mlp(2 * len(PAIRS) * WIDTH + len(DENSE), HIDDEN, 1)

    def take(self, ours: Any) -> None:
        copy(self.linear, ours.first_order.linear)
        copy(self.senet, ours.senet)
        for mine, theirs in ((self.raw, ours.raw), (self.weighted, ours.weighted)):
            for group, layer in enumerate(mine):
                copy(layer, theirs, None if self.kind == "field_all" else group)
        copy(self.mlp, ours.mlp)

    def forward(self, batch: Embedded) -> tuple[Tensor, ...]:
        fields, x = stack(batch), dense(batch)
        weights = self.senet(fields.mean(2))
        p = self.products(self.raw, fields)
        q = self.products(self.weighted, fields * weights[:, :, None])
        return (first_order(batch) + self.linear(x) + self.mlp(torch.cat([p, q, x], 1)),)

    def products(self, layers: nn.ModuleList, fields: Tensor) -> Tensor:
        v = fields.unbind(1)
        if self.kind == "field_interaction":
            return torch.cat([layer(v[i]) * v[j] for layer, (i, j) in zip(layers, PAIRS, strict=True)], 1)
        left = [layers[0 if self.kind == "field_all" else i](v[i]) for i in range(len(IDS) - 1)]
        return torch.cat([left[i] * v[j] for i, j in PAIRS], 1)


class FiBiNETEach(FiBiNET):
    kind = "field_each"


class FiBiNETAll(FiBiNET):
    kind = "field_all"


class EDCN(Written):
    def __init__(self) -> None:
        super().__init__()
        fields = len(IDS) + len(DENSE)
        self.cross_gates, self.deep_gates = (
            nn.ParameterList(torch.zeros(fields) for _ in range(CROSSES)) for _ in range(2)
        )
        self.weights = nn.ModuleList(nn.Linear(FLAT, 1, bias=False) for _ in range(CROSSES))
        self.biases = nn.ParameterList(torch.zeros(FLAT) for _ in range(CROSSES))
        self.deep = nn.ModuleList(nn.Linear(FLAT, FLAT) for _ in range(CROSSES))
        self.output = nn.Linear(3 * FLAT, 1)
        self.widths = torch.tensor([WIDTH] * len(IDS) + [1] * len(DENSE))

    def take(self, ours: Any) -> None:
        copy(self.cross_gates, ours.regulation.logits[:, 0])
        copy(self.deep_gates, ours.regulation.logits[:, 1])
        copy(self.weights, [layer.linear.weight for layer in ours.cross])
        copy(self.biases, [layer.bias for layer in ours.cross])
        copy(self.deep, ours.deep)
        copy(self.output, ours.output)

    def regulate(self, logits: Tensor, x: Tensor) -> Tensor:
        gates = len(logits) * torch.softmax(logits, 0)
        return x * gates.repeat_interleave(self.widths)

    def forward(self, batch: Embedded) -> tuple[Tensor, ...]:
        bridge = flat(batch)
        start = None
        for i in range(CROSSES):
            c, h = self.regulate(self.cross_gates[i], bridge), self.regulate(self.deep_gates[i], bridge)
            start = c if start is None else start
            cross = start * self.weights[i](c) + self.biases[i] + c
            deep = torch.relu(self.deep[i](h))
            bridge = cross * deep
        return (self.output(torch.cat([cross, deep, bridge], 1)),)
