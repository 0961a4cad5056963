"""What the hand-written models share: the sizes of the comparison, towers and inputs, and how weights are copied."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from rechub_dist.embedded import Embedded

WIDTH, HIDDEN = 16, [256, 128]
IDS = [f"sparse_{i}" for i in range(26)]
DENSE = [f"dense_{i}" for i in range(13)]
FLAT = WIDTH * len(IDS) + len(DENSE)
PAIRS = list(itertools.combinations(range(len(IDS)), 2))
CROSSES, RANK, CROSS_EXPERTS = 3, 64, 4  # of DCN and DCNv2
ATTENTION, REDUCTION = 16, 3  # AFM's attention units, and FiBiNET's reduction ratio
TASKS, EXPERTS, TOWER = 3, 4, [64]  # multi-task models; PLE has EXPERTS experts a gate, half of them shared
LEVELS = 2
# Models with a history: the candidate and its history in two attributes, and some fields more.
OTHERS = IDS[:6]
TARGET, HISTORY, LENGTH = ["item", "category"], ["items", "categories"], 50
ITEM = WIDTH * len(TARGET)
UNITS, INTEREST, HEADS = [64, 32], 32, 2  # DIN's activation unit, DIEN's states and the heads of BST and SASRec
STATE, BLOCKS = 64, 2  # SASRec
VECTOR, TEMPERATURE = 64, 0.05  # DSSM


class Written(nn.Module):
    """A hand-written model: its logits, and beside them DIEN's auxiliary loss."""

    def take(self, ours: Any) -> None:
        """Copy the weights of our model."""
        raise NotImplementedError

    def forward(self, batch: Embedded) -> tuple[Tensor, ...]:
        raise NotImplementedError


class Dice(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width, eps=1e-8, affine=False)
        self.alpha = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        p = torch.sigmoid(self.norm(x))
        return p * x + (1 - p) * self.alpha * x


def mlp(
    width: int, units: list[int], out: int | None = None, activation: Callable[[int], nn.Module] = lambda _: nn.ReLU()
) -> nn.Sequential:
    pairs = itertools.pairwise([width, *units])
    layers = [layer for before, after in pairs for layer in (nn.Linear(before, after), activation(after))]
    return nn.Sequential(*layers) if out is None else nn.Sequential(*layers, nn.Linear(units[-1], out))


def mix(scores: Tensor, experts: list[Tensor]) -> Tensor:
    """The experts' sum by the softmax of their scores."""
    return torch.einsum("be,bed->bd", torch.softmax(scores, 1), torch.stack(experts, 1))


def concat(batch: Embedded, names: list[str]) -> Tensor:
    return torch.cat([batch.vectors[name] for name in names], 1)


def stack(batch: Embedded) -> Tensor:
    return torch.stack([batch.vectors[name] for name in IDS], 1)


def dense(batch: Embedded) -> Tensor:
    return torch.cat([*batch.dense.values()], 1)


def flat(batch: Embedded) -> Tensor:
    return torch.cat([*(batch.vectors[name] for name in IDS), *batch.dense.values()], 1)


def first_order(batch: Embedded) -> Tensor:
    return torch.cat([batch.vectors[f"{name}.linear"] for name in IDS], 1).sum(1, keepdim=True)


def history(batch: Embedded, names: list[str]) -> tuple[Tensor, Tensor, Tensor]:
    """The vectors of one position side by side, which positions are real, and how many."""
    values, lengths = torch.cat([batch.sequences[name].values for name in names], 2), batch.sequences[names[0]].lengths
    return values, torch.arange(values.shape[1]) < lengths[:, None], lengths


def copy(target: nn.Module | Iterable[Tensor], source: nn.Module | Iterable[Tensor], group: int | None = None) -> None:
    """Parameters in their order; of grouped ones those of one group, whose matrices lie the other way round."""
    to, given = (list(x.parameters() if isinstance(x, nn.Module) else x) for x in (target, source))
    for parameter, value in zip(to, given, strict=True):
        of_group = value if group is None else value[group].t()  # t() leaves a bias as it is
        assert parameter.shape == of_group.shape
        parameter.data.copy_(of_group.detach())


def copy_groups(targets: Iterable[nn.Module], source: nn.Module) -> None:
    for group, target in enumerate(targets):
        copy(target, source, group)
