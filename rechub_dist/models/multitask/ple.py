"""PLE: levels of task-specific and shared experts, which separate what tasks share from what is specific to one."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from rechub_dist.embedded import Embedded, Lookup, Output
from rechub_dist.features import DenseFeature, Feature, Outputs
from rechub_dist.layers.arguments import check_choice, check_layers, check_outputs
from rechub_dist.layers.grouped import GroupedLinear, GroupedMLP, side_by_side
from rechub_dist.layers.inputs import Fields
from rechub_dist.models.base import Model, check_tasks

ExpertsPer = Literal["task", "level"]


class PLE(Model):
    """logit_k = h_k(s_k), s_k the state of task k after the last level  (sections 4.1 and 4.2).

    In every level the experts of task k map its state s_k, the shared experts the shared state s_0; all states are x
    at first. The new state of task k is sum_i g_k(s_k)_i f_i over its own and the shared experts, g_k(s) =
    softmax(W_k s); that of the shared part the same sum over all experts with g_0(s_0). Nothing follows the shared
    state of the last level, which has no gate for it. With one level this is CGC.

    Args:
        features: sparse, sequence (pooled by their mean) and dense features. Every table's width is its own `dim`.
        expert_units: widths of every expert, at least one.
        num_experts: experts of each task in each level, or of all tasks together: `experts_per`.
        num_layers: number of levels.
        num_shared_experts: shared experts in each level.
        task_types: "classification", "regression" or "multiclass" for each task, in the run's label order. A tower
            gives a logit, a value or a logit for each class accordingly; all are linear.
        tower_units: hidden widths of each task's tower h_k; None or empty makes it linear.
        dropout_rates: of each expert, one rate per layer, or one for all.
        tower_dropout_rates: the same for each tower.
        activation: of experts and towers.
        batch_norm: batch normalisation in experts and towers.
        experts_per: what `num_experts` counts in each level: a "task"'s experts, the m_k of the paper (a level then has
            `num_experts` times the tasks, and the shared ones), or those of the "level", of which each task gets an
            equal part; shared ones are not among them.
        outputs: logits of each task, C for a label of C classes, else 1; None for one each.
    """

    paper = (
        "Tang et al. 2020, Progressive Layered Extraction (PLE): A Novel Multi-Task Learning (MTL) Model for "
        "Personalized Recommendations"
    )

    def __init__(
        self,
        features: list[Feature],
        expert_units: list[int],
        num_experts: int,
        num_layers: int,
        num_shared_experts: int,
        task_types: list[str],
        *,
        tower_units: list[int] | None = None,
        dropout_rates: float | list[float] = 0.0,
        tower_dropout_rates: float | list[float] = 0.0,
        activation: str = "relu",
        batch_norm: bool = False,
        experts_per: ExpertsPer = "task",
        outputs: Outputs = None,
    ) -> None:
        super().__init__()
        check_choice("experts_per", experts_per, get_args(ExpertsPer))
        if not expert_units:
            raise ValueError("expert_units is empty: give each expert at least one layer")
        check_layers("num_experts", num_experts)
        check_layers("num_layers", num_layers)
        check_layers("num_shared_experts", num_shared_experts)
        check_tasks(len(task_types), task_types)
        self.label_outputs = check_outputs(outputs, len(task_types))
        self.num_tasks, self.task_types = len(task_types), tuple(task_types)
        if experts_per == "level":
            if num_experts % self.num_tasks:
                raise ValueError(
                    f"num_experts is {num_experts} per level, which {self.num_tasks} tasks cannot share equally: give "
                    f"a multiple of {self.num_tasks}"
                )
            num_experts //= self.num_tasks
        self.fields = Fields.of(features)
        self.levels = nn.ModuleList(
            _Level(
                self.num_tasks,
                num_experts,
                num_shared_experts,
                self.fields.width if level == 0 else expert_units[-1],
                expert_units,
                dropout_rates,
                activation=activation,
                batch_norm=batch_norm,
                last=level == num_layers - 1,
            )
            for level in range(num_layers)
        )
        self.towers = GroupedMLP(
            self.num_tasks,
            expert_units[-1],
            tower_units or [],
            tower_dropout_rates,
            activation=activation,
            batch_norm=batch_norm,
            out_dim=max(self.label_outputs),
        )

    def lookups(self) -> tuple[Lookup, ...]:
        return self.fields.lookups

    def dense_features(self) -> tuple[DenseFeature, ...]:
        return self.fields.dense

    def shared_parameters(self) -> tuple[nn.Parameter, ...]:
        """Of all levels but the last, whose shared experts are in one tensor with each task's own."""
        parts = ("shared_gate", "experts")
        levels = list(self.levels)[:-1]
        return tuple(p for level in levels for part in parts for p in level.get_submodule(part).parameters())

    def forward(self, embedded: Embedded) -> Output:
        """Logits [B, sum of outputs], one per task, or per class of it."""
        states = self.fields.concat(embedded)
        for level in self.levels:
            states = level(states)
        return Output(logits=side_by_side(self.towers(states), self.label_outputs))


class _Level(nn.Module):
    """One level: the experts of each task in turn, then the shared ones, and the gates over them."""

    def __init__(
        self,
        num_tasks: int,
        num_experts: int,
        num_shared_experts: int,
        in_dim: int,
        expert_units: list[int],
        dropout_rates: float | list[float],
        *,
        activation: str,
        batch_norm: bool,
        last: bool,
    ) -> None:
        super().__init__()
        self.num_tasks, self.num_experts, self.num_shared_experts = num_tasks, num_experts, num_shared_experts
        own = num_tasks * num_experts
        self.experts = GroupedMLP(
            own + num_shared_experts, in_dim, expert_units, dropout_rates, activation=activation, batch_norm=batch_norm
        )
        self.gates = GroupedLinear(num_tasks, in_dim, num_experts + num_shared_experts, bias=False)
        self.shared_gate = None if last else nn.Linear(in_dim, own + num_shared_experts, bias=False)

    def forward(self, states: Tensor) -> Tensor:
        """New states [B, T + 1, D], the shared one last; [B, T, D] from the last level.

        The input is the previous states, [B, T + 1, I], or x, [B, I], in place of all of them.
        """
        if states.dim() == 2:
            inputs = of_tasks = of_shared = states
        else:
            of_tasks, of_shared = states[:, :-1], states[:, -1]
            each_task = of_tasks.repeat_interleave(self.num_experts, dim=1)
            inputs = torch.cat([each_task, states[:, -1:].expand(-1, self.num_shared_experts, -1)], dim=1)
        experts = self.experts(inputs)  # [B, T * E + S, D]
        own, shared = experts.split([self.num_tasks * self.num_experts, self.num_shared_experts], dim=1)
        own = own.unflatten(1, (self.num_tasks, self.num_experts))  # [B, T, E, D]
        gates = self.gates(of_tasks).softmax(dim=2)  # [B, T, E + S]
        own_gates, shared_gates = gates.split([self.num_experts, self.num_shared_experts], dim=2)
        mixed = torch.einsum("bte,bted->btd", own_gates, own) + torch.bmm(shared_gates, shared)
        if self.shared_gate is None:
            return mixed
        gate = self.shared_gate(of_shared).softmax(dim=1)  # [B, T * E + S]
        return torch.cat([mixed, torch.einsum("be,bed->bd", gate, experts)[:, None]], dim=1)
