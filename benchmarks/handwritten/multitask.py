"""The multi-task models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from handwritten.common import EXPERTS, FLAT, HIDDEN, LEVELS, TASKS, TOWER, Written, copy, copy_groups, flat, mix, mlp
from rechub_dist.embedded import Embedded


class SharedBottom(Written):
    def __init__(self) -> None:
        super().__init__()
        self.bottom = mlp(FLAT, HIDDEN)
        self.towers = nn.ModuleList(mlp(HIDDEN[-1], TOWER, 1) for _ in range(TASKS))

    def take(self, ours: Any) -> None:
        copy(self.bottom, ours.bottom)
        copy_groups(self.towers, ours.towers)

    def forward(self, batch: Embedded) -> tuple[Tensor, ...]:
        shared = self.bottom(flat(batch))
        return (torch.cat([tower(shared) for tower in self.towers], 1),)


class ESMM(Written):
    def __init__(self) -> None:
        super().__init__()
        self.networks = nn.ModuleList(mlp(FLAT, [*HIDDEN, *TOWER], 1) for _ in range(TASKS))

    def take(self, ours: Any) -> None:
        copy_groups(self.networks, ours.networks)

    def forward(self, batch: Embedded) -> tuple[Tensor, ...]:
        x = flat(batch)
        return (torch.cat([network(x) for network in self.networks], 1),)


class MMoE(Written):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(mlp(FLAT, HIDDEN) for _ in range(EXPERTS))
        self.gates = nn.ModuleList(nn.Linear(FLAT, EXPERTS, bias=False) for _ in range(TASKS))
        self.towers = nn.ModuleList(mlp(HIDDEN[-1], TOWER, 1) for _ in range(TASKS))

    def take(self, ours: Any) -> None:
        copy_groups(self.experts, ours.experts)
        copy_groups(self.gates, ours.gates)
        copy_groups(self.towers, ours.towers)

    def forward(self, batch: Embedded) -> tuple[Tensor, ...]:
        x = flat(batch)
        experts = [expert(x) for expert in self.experts]
        towers = zip(self.gates, self.towers, strict=True)
        return (torch.cat([tower(mix(gate(x), experts)) for gate, tower in towers], 1),)


class PLE(Written):
    def __init__(self) -> None:
        super().__init__()
        self.levels = nn.ModuleList(
            Level(FLAT if level == 0 else HIDDEN[-1], last=level == LEVELS - 1) for level in range(LEVELS)
        )
        self.towers = nn.ModuleList(mlp(HIDDEN[-1], TOWER, 1) for _ in range(TASKS))

    def take(self, ours: Any) -> None:
        for level, of_ours in zip(self.levels, ours.levels, strict=True):
            assert isinstance(level, Level)
            level.take(of_ours)
        copy_groups(self.towers, ours.towers)

    def forward(self, batch: Embedded) -> tuple[Tensor, ...]:
        x = flat(batch)
        states, shared = [x] * TASKS, x
        for level in self.levels:
            states, shared = level(states, shared)
        return (torch.cat([tower(state) for tower, state in zip(self.towers, states, strict=True)], 1),)


class Level(nn.Module):
    def __init__(self, width: int, last: bool) -> None:
        super().__init__()
        each = EXPERTS // 2
        self.experts = nn.ModuleList(mlp(width, HIDDEN) for _ in range((TASKS + 1) * each))
        self.gates = nn.ModuleList(nn.Linear(width, 2 * each, bias=False) for _ in range(TASKS))
        self.shared_gate = None if last else nn.Linear(width, (TASKS + 1) * each, bias=False)

    def take(self, ours: Any) -> None:
        copy_groups(self.experts, ours.experts)
        copy_groups(self.gates, ours.gates)
        if self.shared_gate is not None:
            copy(self.shared_gate, ours.shared_gate)

    def forward(self, states: list[Tensor], state: Tensor) -> tuple[list[Tensor], Tensor]:
        inputs = [s for s in [*states, state] for _ in range(EXPERTS // 2)]  # each task's, and then the shared ones
        experts = [expert(s) for expert, s in zip(self.experts, inputs, strict=True)]
        *own, shared = (experts[i : i + EXPERTS // 2] for i in range(0, len(experts), EXPERTS // 2))
        new = [mix(gate(s), mine + shared) for gate, s, mine in zip(self.gates, states, own, strict=True)]
        return new, state if self.shared_gate is None else mix(self.shared_gate(state), experts)
