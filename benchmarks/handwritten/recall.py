"""The recall models: what they give for a batch are users' and items' vectors."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from handwritten.common import (
    BLOCKS,
    HEADS,
    HIDDEN,
    HISTORY,
    LENGTH,
    OTHERS,
    STATE,
    TARGET,
    TEMPERATURE,
    VECTOR,
    WIDTH,
    Written,
    concat,
    copy,
    mlp,
)
from rechub_dist.embedded import Embedded


class SASRec(Written):
    """The states [B, L, D] after each item, and the vectors of the items that follow."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(LENGTH, STATE) * 0.02)
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.norm = nn.LayerNorm(STATE, eps=1e-8)

    def take(self, ours: Any) -> None:
        copy([self.positions], [ours.positions])
        copy(self.norm, ours.norm)
        for block, of_ours in zip(self.blocks, ours.blocks, strict=True):
            assert isinstance(block, Block)
            attention = of_ours.attention
            copy(block.attention_norm, of_ours.attention_norm)
            joined = torch.cat([attention.query.weight, attention.key.weight, attention.value.weight])
            copy(block.project, [joined])
            copy(block.network_norm, of_ours.network_norm)
            copy(block.network, of_ours.network)

    def forward(self, batch: Embedded) -> tuple[Tensor, ...]:
        items, lengths = batch.sequences[HISTORY[0]][:2]
        places = torch.arange(items.shape[1])
        mask = (places < lengths[:, None])[..., None]
        x = (math.sqrt(STATE) * items + self.positions[: items.shape[1]]) * mask
        for block in self.blocks:
            x = block(x)
        following = F.pad(items[:, 1:], (0, 0, 0, 1))
        at_last = (places == lengths[:, None] - 1)[..., None]
        return self.norm(x) * mask, torch.where(at_last, batch.vectors[TARGET[0]][:, None], following) * mask


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.network_norm = nn.LayerNorm(STATE, eps=1e-8), nn.LayerNorm(STATE, eps=1e-8)
        self.project = nn.Linear(STATE, 3 * STATE, bias=False)
        self.network = nn.Sequential(nn.Linear(STATE, STATE), nn.ReLU(), nn.Linear(STATE, STATE))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(self.attention_norm(x)).unflatten(2, (3 * HEADS, -1)).transpose(1, 2).chunk(3, 1)
        x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        added: Tensor = x + self.network(self.network_norm(x))
        return added


class DSSM(Written):
    """The users' vectors, whose inner product with the items' is the score, and the items': [B, D] each."""

    def __init__(self) -> None:
        super().__init__()
        self.user = mlp(WIDTH * (len(OTHERS) + 1), HIDDEN, VECTOR)
        self.item = mlp(WIDTH, HIDDEN, VECTOR)

    def take(self, ours: Any) -> None:
        copy(self.user, ours.user_tower)
        copy(self.item, ours.item_tower)

    def forward(self, batch: Embedded) -> tuple[Tensor, ...]:
        user = self.user(concat(batch, [*OTHERS, HISTORY[0]]))
        return F.normalize(user, dim=1) / TEMPERATURE, F.normalize(self.item(batch.vectors[TARGET[0]]), dim=1)
