"""The ranking models with a history."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from handwritten.common import (
    HEADS,
    HIDDEN,
    HISTORY,
    INTEREST,
    ITEM,
    LENGTH,
    OTHERS,
    TARGET,
    UNITS,
    WIDTH,
    Dice,
    Written,
    concat,
    copy,
    history,
    mlp,
)
from rechub_dist.embedded import Embedded


class DIN(Written):
    def __init__(self) -> None:
        super().__init__()
        self.unit = mlp(4 * ITEM, UNITS, 1, Dice)
        self.mlp = mlp(WIDTH * len(OTHERS) + 2 * ITEM, HIDDEN, 1, Dice)

    def take(self, ours: Any) -> None:
        copy(self.unit, ours.attention)
        copy(self.mlp, ours.mlp)

    def forward(self, batch: Embedded) -> tuple[Tensor, ...]:
        behaviors, mask, lengths = history(batch, HISTORY)
        target = concat(batch, TARGET)
        e = behaviors[mask]  # Dice takes the statistics of real behaviours, so only these enter the unit
        row = torch.arange(len(lengths)).repeat_interleave(lengths)
        v = target[row]
        weights = self.unit(torch.cat([e, v, e - v, e * v], 1))
        interest = torch.zeros_like(target).index_add(0, row, weights * e)
        return (self.mlp(torch.cat([concat(batch, OTHERS), target, interest], 1)),)


class DIEN(Written):
    def __init__(self) -> None:
        super().__init__()
        self.extractor = nn.GRU(ITEM, INTEREST, batch_first=True)
        self.next = nn.Linear(INTEREST, ITEM, bias=False)
        self.attention = nn.Linear(ITEM, INTEREST, bias=False)
        self.evolution = self.cell()
        self.mlp = mlp(WIDTH * len(OTHERS) + ITEM + INTEREST, HIDDEN, 1, Dice)

    def cell(self) -> nn.Module:
        return AUGRUCell(INTEREST, INTEREST)

    def take(self, ours: Any) -> None:
        copy(self.extractor, ours.extractor)
        copy(self.next, ours.next_behavior)
        copy(self.attention, ours.attention)
        copy(self.evolution, ours.evolution)
        copy(self.mlp, ours.mlp)

    def evolve(self, states: Tensor, weights: Tensor) -> Tensor:
        h = torch.zeros_like(states[:, 0])
        all_states = []
        for t in range(states.shape[1]):
            h = self.evolution(states[:, t], h, weights[:, t, None])
            all_states.append(h)
        return torch.stack(all_states, 1)

    def forward(self, batch: Embedded) -> tuple[Tensor, ...]:
        behaviors, mask, lengths = history(batch, HISTORY)
        negatives, _, _ = history(batch, [f"{name}.negative" for name in HISTORY])
        target = concat(batch, TARGET)
        states, _ = self.extractor(behaviors)

        predicted = self.next(states[:, :-1])
        happened = F.logsigmoid((predicted * behaviors[:, 1:]).sum(2))
        drawn = F.logsigmoid(-(predicted * negatives[:, 1:]).sum(2))
        loss = -((happened + drawn) * mask[:, 1:]).sum(1) / (lengths - 1).clamp(min=1)

        scores = (states * self.attention(target)[:, None]).sum(2)
        weights = torch.softmax(scores.masked_fill(~mask, -1e9), 1)
        evolved = self.evolve(states, weights)
        final = evolved[torch.arange(len(lengths)), (lengths - 1).clamp(min=0)] * (lengths > 0)[:, None]
        return self.mlp(torch.cat([concat(batch, OTHERS), target, final], 1)), loss


class AUGRUCell(nn.Module):
    """A GRU's step whose update gate is scaled by the attention."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.x = nn.Linear(width, 3 * hidden)
        self.h = nn.Linear(hidden, 3 * hidden, bias=False)

    def forward(self, x: Tensor, h: Tensor, a: Tensor) -> Tensor:
        xr, xu, xc = self.x(x).chunk(3, 1)
        hr, hu, hc = self.h(h).chunk(3, 1)
        r, u = torch.sigmoid(xr + hr), torch.sigmoid(xu + hu)
        c = torch.tanh(xc + r * hc)
        return (1 - a * u) * h + a * u * c


class DIENWithAIGRU(DIEN):
    def cell(self) -> nn.Module:
        return nn.GRU(INTEREST, INTEREST, batch_first=True)

    def evolve(self, states: Tensor, weights: Tensor) -> Tensor:
        evolved: Tensor = self.evolution(weights[:, :, None] * states)[0]
        return evolved


class BST(Written):
    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.zeros(LENGTH + 1, WIDTH))
        self.input = nn.Linear(ITEM + WIDTH, WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, bias=False, batch_first=True)
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.network = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.LeakyReLU(), nn.Linear(4 * WIDTH, WIDTH))
        self.mlp = mlp(WIDTH * (len(OTHERS) + LENGTH + 1), HIDDEN, 1, lambda _: nn.LeakyReLU())

    def take(self, ours: Any) -> None:
        [block] = ours.blocks
        attention = block.attention
        copy([self.positions], [ours.positions])
        copy(self.input, ours.input)
        joined = torch.cat([attention.query.weight, attention.key.weight, attention.value.weight])
        copy(self.attention, [joined, attention.output.weight])
        copy(self.norm1, block.attention_norm)
        copy(self.norm2, block.network_norm)
        copy(self.network, block.network)
        copy(self.mlp, ours.mlp)

    def forward(self, batch: Embedded) -> tuple[Tensor, ...]:
        behaviors, _, lengths = history(batch, HISTORY)
        rows = torch.arange(len(lengths))[:, None]
        newest_first = behaviors[rows, (lengths[:, None] - 1 - torch.arange(behaviors.shape[1])).clamp(min=0)]
        items = torch.cat([concat(batch, TARGET)[:, None], newest_first], 1)
        mask = torch.arange(items.shape[1]) <= lengths[:, None]
        positions = self.positions[: items.shape[1]].expand(len(items), -1, -1)
        x = self.input(torch.cat([items, positions], 2))
        attended, _ = self.attention(x, x, x, key_padding_mask=~mask, need_weights=False)
        x = self.norm1(x + attended)
        x = self.norm2(x + self.network(x)) * mask[:, :, None]
        x = F.pad(x, (0, 0, 0, LENGTH + 1 - x.shape[1]))
        return (self.mlp(torch.cat([concat(batch, OTHERS), x.flatten(1)], 1)),)
