"""What every objective is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from rechub_dist.batch import Batch
from rechub_dist.config import EvaluationConfig, MetricConfig
from rechub_dist.embedded import Embedded, Lookup, Output
from rechub_dist.errors import UserError, nearest
from rechub_dist.features import Label
from rechub_dist.metrics.catalogue import KnownMetrics, LabelType
from rechub_dist.metrics.direction import Direction
from rechub_dist.metrics.metric import Metric, Scored
from rechub_dist.metrics.recommended import RankingMetric

if TYPE_CHECKING:
    from rechub_dist.objectives.negatives import Negatives
    from rechub_dist.objectives.ranking import Ranking

MEAN_AUC = "mean/auc"
COMBINED = "combined"  # the weighted sum of `evaluation.combined`
SAMPLED = "sampled_"  # before the names of metrics among drawn items


class Objective(nn.Module):
    """What a model is trained for: the loss of its output, the predictions in it, and how these are measured.

    Losses are normalised over the global batch: `weight_sums` gives this rank's share of each term's normaliser; the
    trainer adds them up over ranks into `Batch.weight_sums` before the forward pass.

    An objective predicts labels (`tasks`), ranks items (`ranking`), or both. To predict labels derive from
    `TaskObjective`.

    Attributes:
        known_metrics: what the names under `evaluation.metrics` stand for.
        calibrators: of predictions, by name; no part of the state.
    """

    terms: ClassVar[int] = 1  # K, the number of normalisers

    def __init__(self) -> None:
        super().__init__()
        self.known_metrics = KnownMetrics()
        self.calibrators: dict[str, nn.Module] = {}

    def set_metrics(self, known: KnownMetrics) -> None:
        """Have the names of metrics mean what `known` says."""
        self.known_metrics = known
        if self.tasks is not None and self.tasks is not self:
            self.tasks.set_metrics(known)

    def set_calibrators(self, calibrators: dict[str, nn.Module]) -> None:
        """Calibrate predictions by name from now on: modules of probabilities [B], of C classes [B, C]."""
        self.calibrators = calibrators
        if self.tasks is not None and self.tasks is not self:
            self.tasks.set_calibrators(calibrators)

    def calibrated(self, output: Output) -> dict[str, Tensor]:
        """`predictions`, calibrated where that is set."""
        found = self.predictions(output)
        return {name: self.calibrators.get(name, nn.Identity())(values) for name, values in found.items()}

    @property
    def tasks(self) -> TaskObjective | None:
        """The labels that it predicts; None for none."""
        return None

    @property
    def ranking(self) -> Ranking | None:
        """The items that it ranks for users; None for none."""
        return None

    @property
    def negatives(self) -> Negatives | None:
        """What it compares positives with; None for nothing."""
        return None

    @property
    def row_keys(self) -> tuple[str, ...]:
        """The columns whose values it needs of each row to train, as `Batch.keys` has them."""
        return ()

    @property
    def whole_batch(self) -> bool:
        """Whether the loss of a row, or what weighs it, depends on the other rows of the global batch."""
        return self.negatives is not None and self.negatives.shared

    def lookups(self) -> tuple[Lookup, ...]:
        """What the objective looks up besides the model: negatives, for one."""
        return ()

    def learned(self) -> dict[str, Tensor]:
        """What training changes in it, live, by name: a checkpoint holds it beside the model's weights."""
        return dict(self.named_parameters())

    def watched(self) -> dict[str, float]:
        """What to tell of its state beside the loss, by name; the host may wait for a GPU. Not collective."""
        return {}

    def settings(self) -> dict[str, Any]:
        """What its configuration leaves to the model or the labels, as resolved, by the configuration's keys."""
        return {}

    def weight_sums(self, batch: Batch) -> Tensor:
        """This rank's part of the normalisers, float64 [K], known before the forward pass."""
        raise NotImplementedError

    def prepare(self, batch: Batch) -> None:
        """Note in a batch in host memory what `forward` would otherwise have to ask a GPU for, and to wait for."""

    def forward(self, output: Output, embedded: Embedded, batch: Batch) -> Tensor:
        """This rank's part of the global loss, a scalar: the loss is its sum over ranks."""
        raise NotImplementedError

    def predictions(self, output: Output) -> dict[str, Tensor]:
        """What the output says of each row's labels, by the names of `tasks.scored`: float [B], of C classes [B, C]."""
        raise NotImplementedError

    def metrics(self, evaluation: EvaluationConfig) -> dict[str, Direction]:
        """The metrics that an evaluation reports, by name in its order, each with what makes a value the better one.

        First `evaluation.combined` where it is set, then those of the ranking, among drawn items as well where that is
        asked for, then those of the labels.

        Raises:
            UserError: metrics that there are not, or that these predictions cannot be measured by; or as
                `check_calibration`.
        """
        self.check_calibration(evaluation)
        kinds = () if self.tasks is None else self.tasks.scored.values()
        self.known_metrics.check(evaluation.wanted, kinds, rankings=self.ranking is not None)
        rankings = self.rankings(evaluation)
        found = {name: metric.direction for name, metric in rankings.items()}
        if evaluation.sampled_items is not None:
            found |= {f"{SAMPLED}{name}": metric.direction for name, metric in rankings.items() if not metric.depth}
        if self.tasks is not None:
            found |= self.tasks.task_metrics(self.wanted_of_tasks(evaluation))
        for name in evaluation.combined or ():
            if name not in found:
                raise UserError(f"evaluation.combined: no metric {name!r}: {nearest(name, found)}")
        return found if evaluation.combined is None else {COMBINED: "max", **found}

    def check_calibration(self, evaluation: EvaluationConfig) -> None:
        """Refuse a curve for predictions that are not one probability a row.

        Raises:
            UserError: a label has several classes.
        """
        several = [] if self.tasks is None else list(self.tasks.classes)
        if evaluation.calibration == "isotonic" and several:
            raise UserError(
                f"evaluation.calibration: {several[0]} is a label of several classes, and a curve for each would not "
                "leave probabilities that add up to 1; use temperature"
            )

    def group_keys(self, evaluation: EvaluationConfig) -> tuple[str, ...]:
        """The columns of the data that these metrics group rows by; raises as `metrics`."""
        self.metrics(evaluation)
        return () if self.tasks is None else self.tasks.task_keys(self.wanted_of_tasks(evaluation))

    def wanted_of_tasks(self, evaluation: EvaluationConfig) -> list[MetricConfig]:
        """The metrics wanted of labels: where items are ranked, those that could be of either are the ranking's."""
        if self.tasks is None:
            return []
        return [item for item in evaluation.wanted if self.ranking is None or not self.known_metrics.is_ranking(item)]

    def rankings(self, evaluation: EvaluationConfig) -> dict[str, RankingMetric]:
        """New metrics of the ranking, by the names that they are reported by."""
        if self.ranking is None:
            return {}
        tasks = self.wanted_of_tasks(evaluation)
        wanted = [item for item in evaluation.wanted if item.is_default or item not in tasks]
        return self.known_metrics.of_rankings(wanted, evaluation.top_k)


class Scores(NamedTuple):
    """What an evaluation measures of B rows under one name: float [B] each; a row with weight 0 does not count.

    Predictions of a label of C classes are [B, C].
    """

    predictions: Tensor
    targets: Tensor
    weights: Tensor


class TaskObjective(Objective):
    """An objective over labels: a sum over terms of weight * mean loss, over the rows' weights of the global batch.

    One of your own needs `losses` and `predictions`. Its constructor gets the run's labels where a parameter is
    annotated `tuple[Label, ...]`, the model where one is annotated `Model`; what else it takes stands under
    `objective.arguments`.

    Args:
        labels: of the run, in the order of the model's logits; a label of C classes has C of them.
        task_weights: by label; 1 where none is given.

    Attributes:
        scored: name and type of all that `predictions` returns.
        classes: their number, for each label of type multiclass.

    Raises:
        UserError: no label, or a task weight for a label that is not trained.
    """

    scored: dict[str, LabelType]

    def __init__(self, labels: tuple[Label, ...], task_weights: Mapping[str, float]) -> None:
        super().__init__()
        if not labels:
            raise UserError("data.labels: at least one label is needed to train on; name one")
        names = [label.name for label in labels]
        for name in task_weights:
            if name not in names:
                raise UserError(f"objective.task_weights: no label {name!r}: {nearest(name, names)}")
        self.labels = labels
        self.task_weights = tuple(task_weights.get(name, 1.0) for name in names)
        self.scored = {label.name: label.type for label in labels}
        self.classes = {label.name: label.classes for label in labels if label.classes is not None}

    @property
    def tasks(self) -> TaskObjective:
        """Itself."""
        return self

    def losses(self, output: Output, labels: Tensor) -> Tensor:
        """The weighted sum of each row's losses, [B], from labels [B, T]. B may be 0."""
        raise NotImplementedError

    def targets(self, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        """What the predictions are to be, and how much each row counts, by name: float [B] each."""
        weights = row_weights(batch)
        return {label.name: (batch.labels[:, t], weights) for t, label in enumerate(self.labels)}

    def scores(self, output: Output, batch: Batch) -> dict[str, Scores]:
        """Predictions beside what they are to be, by the names of `scored`."""
        predictions, targets = self.calibrated(output), self.targets(batch)
        if predictions.keys() != self.scored.keys():
            raise UserError(f"objective.name: predicts {', '.join(predictions)}, but scores {', '.join(self.scored)}")
        for name, found in predictions.items():
            one_a_row(found, targets[name][0], f"objective.name: its prediction of {name}", self.classes.get(name))
        return {name: Scores(predictions[name], *targets[name]) for name in self.scored}

    def settings(self) -> dict[str, Any]:
        """The weight of each label."""
        return {"task_weights": {label.name: w for label, w in zip(self.labels, self.task_weights, strict=True)}}

    def measures(self, wanted: Sequence[MetricConfig]) -> dict[str, dict[str, Metric[Scored]]]:
        """New metrics of each name of `scored` that can be measured by them, by the names of the metrics."""
        return {
            name: self.known_metrics.of_label(wanted, kind, self.classes.get(name))
            for name, kind in self.scored.items()
        }

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

    def weight_sums(self, batch: Batch) -> Tensor:
        """The sum of row weights, float64 [1]."""
        return row_weights(batch).sum(dtype=torch.float64)[None]

    def forward(self, output: Output, embedded: Embedded, batch: Batch) -> Tensor:  # noqa: ARG002
        """This rank's part of the loss."""
        losses = self.losses(output, batch.labels)
        return self._of_rows(one_a_row(losses, batch.labels[:, 0], "objective.name: its losses"), batch)

    @staticmethod
    def _of_rows(losses: Tensor, batch: Batch) -> Tensor:
        """This rank's part of the weighted mean over the global batch of a loss a row, [B]."""
        assert batch.weight_sums is not None
        loss = (losses * row_weights(batch)).sum()
        return loss / batch.weight_sums[0].clamp(min=torch.finfo(torch.float32).tiny).to(loss.dtype)


def one_a_row(found: Any, rows: Tensor, where: str, classes: int | None = None) -> Tensor:
    """What code of a user's own has returned, if that is one number a row as in `rows`, [B], or one for each class.

    A mean, say, would otherwise be multiplied by the rows' weights.

    Raises:
        UserError: it is something else; `where` names the code.
    """
    shape = rows.shape if classes is None else (len(rows), classes)
    if not isinstance(found, Tensor) or found.shape != shape:
        what = f"a tensor {list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        wanted = "one number a row, [B], not their mean or sum"
        if classes is not None:
            wanted = f"the probabilities of {classes} classes a row, [B, {classes}]"
        raise UserError(f"{where}: returns {what} for {len(rows)} rows; let it return {wanted}")
    return found


def row_weights(batch: Batch) -> Tensor:
    """The rows' weights, float32 [B]; 1 where the data has none."""
    return batch.labels.new_ones(batch.rows) if batch.weights is None else batch.weights
