"""SharedBottom: one network shared by all tasks, with a tower per task on top."""

from __future__ import annotations

from torch import nn

from rechub_dist.embedded import Embedded, Lookup, Output
from rechub_dist.features import DenseFeature, Feature, Outputs
from rechub_dist.layers.arguments import check_outputs
from rechub_dist.layers.grouped import GroupedMLP, side_by_side
from rechub_dist.layers.inputs import Fields
from rechub_dist.layers.mlp import MLP
from rechub_dist.models.base import Model, check_tasks


class SharedBottom(Model):
    """logit_k = h_k(f(x)), f shared by the tasks (as formulated in Ma et al. 2018, MMoE, section 3.1).

    Args:
        features: sparse, sequence (pooled by their mean) and dense features. Every table's width is its own `dim`.
        hidden_units: widths of the shared network f.
        task_hidden_units: hidden widths of each task's tower h_k; may be empty.
        num_tasks: number of tasks.
        task_types: "classification", "regression" or "multiclass" for each task, in the run's label order. A tower
            gives a logit, a value or a logit for each class accordingly; all are linear.
        dropout_rates: of the shared network, one rate per layer, or one for all.
        task_dropout_rates: the same for each tower.
        activation: of all networks.
        batch_norm: batch normalisation in all networks.
        outputs: logits of each task, C for a label of C classes, else 1; None for one each.
    """

    paper = "Caruana 1997, Multitask Learning"

    def __init__(
        self,
        features: list[Feature],
        hidden_units: list[int],
        task_hidden_units: list[int],
        num_tasks: int,
        task_types: list[str],
        *,
        dropout_rates: float | list[float] = 0.0,
        task_dropout_rates: float | list[float] = 0.0,
        activation: str = "relu",
        batch_norm: bool = False,
        outputs: Outputs = None,
    ) -> None:
        super().__init__()
        check_tasks(num_tasks, task_types)
        self.label_outputs = check_outputs(outputs, num_tasks)
        self.num_tasks, self.task_types = num_tasks, tuple(task_types)
        self.fields = Fields.of(features)
        self.bottom = MLP(self.fields.width, hidden_units, dropout_rates, activation=activation, batch_norm=batch_norm)
        self.towers = GroupedMLP(
            num_tasks,
            self.bottom.out_dim,
            task_hidden_units,
            task_dropout_rates,
            activation=activation,
            batch_norm=batch_norm,
            out_dim=max(self.label_outputs),
        )

    def lookups(self) -> tuple[Lookup, ...]:
        return self.fields.lookups

    def dense_features(self) -> tuple[DenseFeature, ...]:
        return self.fields.dense

    def shared_parameters(self) -> tuple[nn.Parameter, ...]:
        return tuple(self.bottom.parameters())

    def forward(self, embedded: Embedded) -> Output:
        """Logits [B, sum of outputs]."""
        shared = self.bottom(self.fields.concat(embedded))
        return Output(logits=side_by_side(self.towers(shared), self.label_outputs))
