"""MMoE: experts shared by all tasks, mixed by a gate per task."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import nn

from rechub_dist.embedded import Embedded, Lookup, Output
from rechub_dist.features import DenseFeature, Feature, Outputs
from rechub_dist.layers.activation import activation as make_activation
from rechub_dist.layers.arguments import MAX_LAYERS, check_choice, check_layers, check_outputs
from rechub_dist.layers.grouped import GroupedLinear, GroupedMLP, side_by_side
from rechub_dist.layers.inputs import Fields
from rechub_dist.models.base import Model, check_tasks

# Batch statistics, which "dice" has, have no place in a gate.
GateActivation = Literal["softmax", "gelu", "leaky_relu", "prelu", "relu", "sigmoid", "silu", "tanh"]


class MMoE(Model):
    """logit_k = h_k(sum_i g_k(x)_i f_i(x)), g_k(x) = softmax(W_k x)  (section 4.2).

    The gates are linear, without bias, as in the paper. Gate activations other than softmax weight each expert
    independently; the weights need not sum to 1.

    Args:
        features: sparse, sequence (pooled by their mean) and dense features. Every table's width is its own `dim`.
        expert_units: widths of each expert f_i, at least one.
        num_experts: number of experts; a softmax gate needs at least 2.
        num_tasks: number of tasks.
        expert_activation: the experts' activation.
        gate_activation: "softmax" over the experts, or an elementwise one ("sigmoid", "relu", ...).
        task_types: "classification", "regression" or "multiclass" for each task, in the run's label order; None leaves
            them to the labels. A tower gives a logit, a value or a logit for each class accordingly; all are linear.
        tower_units: hidden widths of each task's tower h_k; None or empty makes it linear.
        dropout_rates: of each expert, one rate per layer, or one for all.
        tower_dropout_rates: the same for each tower.
        tower_activation: the towers' activation.
        batch_norm: batch normalisation in experts and towers.
        outputs: logits of each task, C for a label of C classes, else 1; None for one each.
    """

    paper = "Ma et al. 2018, Modeling Task Relationships in Multi-task Learning with Multi-gate Mixture-of-Experts"

    def __init__(
        self,
        features: list[Feature],
        expert_units: list[int],
        num_experts: int,
        num_tasks: int,
        expert_activation: str = "relu",
        gate_activation: GateActivation = "softmax",
        *,
        task_types: list[str] | None = None,
        tower_units: list[int] | None = None,
        dropout_rates: float | list[float] = 0.0,
        tower_dropout_rates: float | list[float] = 0.0,
        tower_activation: str = "relu",
        batch_norm: bool = False,
        outputs: Outputs = None,
    ) -> None:
        super().__init__()
        check_choice("gate_activation", gate_activation, get_args(GateActivation))
        if not expert_units:
            raise ValueError("expert_units is empty: give each expert at least one layer")
        check_layers("num_experts", num_experts)
        softmax = gate_activation == "softmax"
        if softmax and num_experts == 1:
            raise ValueError("num_experts is 1, of which a softmax gate is always 1: give at least 2 experts")
        every = ["classification"] * max(0, min(num_tasks, MAX_LAYERS))
        check_tasks(num_tasks, every if task_types is None else task_types)
        self.label_outputs = check_outputs(outputs, num_tasks)
        self.num_tasks = num_tasks
        self.task_types = None if task_types is None else tuple(task_types)
        self.fields = Fields.of(features)
        self.experts = GroupedMLP(
            num_experts,
            self.fields.width,
            expert_units,
            dropout_rates,
            activation=expert_activation,
            batch_norm=batch_norm,
        )
        self.gates = GroupedLinear(num_tasks, self.fields.width, num_experts, bias=False)
        self.gate_activation = None if softmax else make_activation(gate_activation, num_tasks * num_experts)
        self.towers = GroupedMLP(
            num_tasks,
            self.experts.out_dim,
            tower_units or [],
            tower_dropout_rates,
            activation=tower_activation,
            batch_norm=batch_norm,
            out_dim=max(self.label_outputs),
        )

    def lookups(self) -> tuple[Lookup, ...]:
        return self.fields.lookups

    def dense_features(self) -> tuple[DenseFeature, ...]:
        return self.fields.dense

    def shared_parameters(self) -> tuple[nn.Parameter, ...]:
        return tuple(self.experts.parameters())

    def forward(self, embedded: Embedded) -> Output:
        """Logits [B, sum of outputs]."""
        x = self.fields.concat(embedded)
        experts = self.experts(x)  # [B, E, D]
        gates = self.gates(x)  # [B, T, E]
        if self.gate_activation is None:
            gates = gates.softmax(dim=2)
        else:
            gates = self.gate_activation(gates.flatten(1)).view_as(gates)
        mixed = torch.bmm(gates, experts)  # [B, T, D]
        return Output(logits=side_by_side(self.towers(mixed), self.label_outputs))
