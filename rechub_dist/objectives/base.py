"""What every objective is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from rechub_dist.batch import Batch
from rechub_dist.config import EvaluationConfig, MetricConfig
from rechub_dist.embedded import Embedded, Lookup, Output
from rechub_dist.errors import UserError, nearest
from rechub_dist.features import Label
from rechub_dist.metrics.catalogue import LabelType, check_wanted, label_metrics
from rechub_dist.metrics.direction import Direction
from rechub_dist.metrics.metric import Metric, Scored

MEAN_AUC = "mean/auc"


class Objective(nn.Module):
    """Loss from a model's output.

    Losses are normalised over the global batch: `weight_sums` gives this rank's share of each term's normaliser; the
    trainer adds them up over ranks into `Batch.weight_sums` before the forward pass.
    """

    terms: ClassVar[int] = 1  # K, the number of normalisers

    def lookups(self) -> tuple[Lookup, ...]:
        """What the objective looks up besides the model: negatives, for one."""
        return ()

    def metrics(self, evaluation: EvaluationConfig) -> dict[str, Direction]:
        """The metrics that an evaluation reports, by name in its order, each with what makes a value the better one.

        Raises:
            UserError: metrics that there are not, or that this objective's predictions cannot be measured by.
        """
        raise NotImplementedError

    def group_keys(self, evaluation: EvaluationConfig) -> tuple[str, ...]:  # noqa: ARG002
        """The columns of the data that these metrics group rows by; raises as `metrics`."""
        return ()

    def weight_sums(self, batch: Batch) -> Tensor:
        """This rank's part of the normalisers, float64 [K], known before the forward pass."""
        raise NotImplementedError

    def prepare(self, batch: Batch) -> None:
        """Note in a batch in host memory what `forward` would otherwise have to ask a GPU for, and to wait for."""

    def forward(self, output: Output, embedded: Embedded, batch: Batch) -> Tensor:
        """This rank's part of the global loss, a scalar: the loss is its sum over ranks."""
        raise NotImplementedError


class Scores(NamedTuple):
    """What an evaluation measures of B rows under one name: float [B] each; a row with weight 0 does not count."""

    predictions: Tensor
    targets: Tensor
    weights: Tensor


class TaskObjective(Objective):
    """An objective over labels: a sum over terms of weight * mean loss, over the rows' weights of the global batch.

    Attributes:
        scored: name and type of all that `scores` returns.

    Raises:
        UserError: no label, or a task weight for a label that is not trained.
    """

    scored: dict[str, LabelType]

    def __init__(self, labels: tuple[Label, ...], task_weights: dict[str, float]) -> None:
        super().__init__()
        if not labels:
            raise UserError("data.labels: at least one label is needed to train on")
        names = [label.name for label in labels]
        for name in task_weights:
            if name not in names:
                raise UserError(f"objective.task_weights: no label {name!r}: {nearest(name, names)}")
        self.labels = labels
        self.task_weights = tuple(task_weights.get(name, 1.0) for name in names)
        self.scored = {label.name: label.type for label in labels}

    def metrics(self, evaluation: EvaluationConfig) -> dict[str, Direction]:
        """Those of `measures`."""
        check_wanted(evaluation.wanted, self.scored.values(), rankings=False)
        return self.task_metrics(evaluation.wanted)

    def group_keys(self, evaluation: EvaluationConfig) -> tuple[str, ...]:
        """The columns that some of `measures` group by."""
        self.metrics(evaluation)
        return self.task_keys(evaluation.wanted)

    def measures(self, wanted: Sequence[MetricConfig]) -> dict[str, dict[str, Metric[Scored]]]:
        """New metrics of each name of `scored` that can be measured by them, by the names of the metrics."""
        return {name: label_metrics(wanted, kind) for name, kind in self.scored.items()}

    def task_metrics(self, wanted: Sequence[MetricConfig]) -> dict[str, Direction]:
        """Those of each name of `scored`, with several the name before a slash; then the labels' mean AUC."""
        measures = self.measures(wanted)
        found = {
            self.metric(scored, name): metric.direction
            for scored, metrics in measures.items()
            for name, metric in metrics.items()
        }
        if len(self.scored) > 1 and all("auc" in measures[label.name] for label in self.labels):
            found[MEAN_AUC] = "max"
        return found

    def task_keys(self, wanted: Sequence[MetricConfig]) -> tuple[str, ...]:
        """The columns that metrics of labels group by, each once."""
        keys = (metric.group for metrics in self.measures(wanted).values() for metric in metrics.values())
        return tuple(dict.fromkeys(key for key in keys if key is not None))

    def metric(self, scored: str, metric: str) -> str:
        """The name that a metric of `scored` is reported by."""
        return f"{scored}/{metric}" if len(self.scored) > 1 else metric

    def losses(self, output: Output, labels: Tensor) -> Tensor:
        """The weighted sum of each row's losses, [B], from labels [B, T]."""
        raise NotImplementedError

    def scores(self, output: Output, batch: Batch) -> dict[str, Scores]:
        """Predictions (probabilities, or values for regression) beside what they are to be, by name."""
        raise NotImplementedError

    def weight_sums(self, batch: Batch) -> Tensor:
        """The sum of row weights, float64 [1]."""
        return row_weights(batch).sum(dtype=torch.float64)[None]

    def forward(self, output: Output, embedded: Embedded, batch: Batch) -> Tensor:  # noqa: ARG002
        """This rank's part of the loss."""
        assert batch.weight_sums is not None
        loss = (self.losses(output, batch.labels) * row_weights(batch)).sum()
        return loss / batch.weight_sums[0].clamp(min=torch.finfo(torch.float32).tiny).to(loss.dtype)


def row_weights(batch: Batch) -> Tensor:
    """The rows' weights, float32 [B]; 1 where the data has none."""
    return batch.labels.new_ones(batch.rows) if batch.weights is None else batch.weights
