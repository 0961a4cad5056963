"""All metrics by the names that a run file may give them, and what it asks for made of these."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from rechub_dist.config import MetricConfig
from rechub_dist.config.evaluation import DEFAULT
from rechub_dist.errors import UserError, nearest, one_line
from rechub_dist.metrics.collected import AUC, MAE, MSE, Calibration, LogLoss, NormalizedEntropy
from rechub_dist.metrics.direction import Direction
from rechub_dist.metrics.grouped import GroupedAUC
from rechub_dist.metrics.metric import Metric, Scored
from rechub_dist.metrics.multiclass import Accuracy, ClassLogLoss, ClassNormalizedEntropy, MacroAUC
from rechub_dist.metrics.recommended import (
    MAP,
    MRR,
    NDCG,
    Coverage,
    HitRate,
    Popularity,
    RankingMetric,
    RankingRecall,
)
from rechub_dist.metrics.sums import F1, RMSE, CalibrationError, Precision, Recall
from rechub_dist.typed import typed

LabelType = Literal["classification", "regression", "multiclass"]
# Of probabilities, of these and of values, and of the probabilities of several classes.
PROBABILITIES: dict[str, type[Metric[Scored]]] = {
    "auc": AUC,
    "log_loss": LogLoss,
    "normalized_entropy": NormalizedEntropy,
    "calibration": Calibration,
    "calibration_error": CalibrationError,
    "grouped_auc": GroupedAUC,
    "precision": Precision,
    "recall": Recall,
    "f1": F1,
}
VALUES: dict[str, type[Metric[Scored]]] = {"mse": MSE, "rmse": RMSE, "mae": MAE}
MULTICLASS: dict[str, type[Metric[Scored]]] = {
    "log_loss": ClassLogLoss,
    "normalized_entropy": ClassNormalizedEntropy,
    "accuracy": Accuracy,
    "macro_auc": MacroAUC,
}
RANKINGS: dict[str, type[RankingMetric]] = {
    "hit_rate": HitRate,
    "recall": RankingRecall,
    "ndcg": NDCG,
    "mrr": MRR,
    "map": MAP,
    "coverage": Coverage,
    "popularity": Popularity,
}
# What is reported unless the run file says otherwise, the first being what tells the best step.
DEFAULTS: dict[LabelType, tuple[str, ...]] = {
    "classification": ("auc", "log_loss", "normalized_entropy", "calibration"),
    "regression": ("mse", "mae"),
    "multiclass": ("log_loss", "normalized_entropy", "accuracy"),
}
RANKING_DEFAULTS = ("hit_rate", "recall", "ndcg", "mrr")
_WHERE = "evaluation.metrics"
_MISSING = object()


class KnownMetrics:
    """What the names under `evaluation.metrics` stand for: ours, and classes of a user's own.

    Args:
        own: by the name that a run file gives, `package.module:Class`. One with an attribute `depth` is of rankings,
            any other of labels of type classification and regression.
    """

    def __init__(self, own: Mapping[str, type[Metric[Any]]] | None = None) -> None:
        own = own or {}
        self._rankings = RANKINGS | {name: cls for name, cls in own.items() if hasattr(cls, "depth")}
        self._values = VALUES | {name: cls for name, cls in own.items() if not hasattr(cls, "depth")}
        self._probabilities = PROBABILITIES

    def of_label(
        self, wanted: Sequence[MetricConfig], kind: LabelType, classes: int | None = None
    ) -> dict[str, Metric[Scored]]:
        """New metrics of one label of type `kind`, by the names that they are reported by, in order.

        Those of `wanted` that cannot measure it are left out.

        Args:
            wanted: as the run file has them.
            kind: of the label.
            classes: their number, of a label of type multiclass.

        Raises:
            UserError: parameters that a metric does not take, or two metrics of one name.
        """
        known, more = self._of_type(kind), {} if classes is None else {"classes": classes}
        found = _Made()
        for item in _spelt_out(wanted, DEFAULTS[kind]):
            if item.name in known:
                if more.keys() & item.parameters.keys():
                    raise UserError(f"{_WHERE}: {item.name}: its classes are those of the label; leave them out")
                found.add(item.reported, item, known[item.name], **more)
        return found.metrics

    def _of_type(self, kind: LabelType) -> dict[str, type[Metric[Scored]]]:
        """What measures labels of a type."""
        if kind == "multiclass":
            return MULTICLASS
        return self._values if kind == "regression" else self._probabilities | self._values

    def of_rankings(self, wanted: Sequence[MetricConfig], ks: Sequence[int]) -> dict[str, RankingMetric]:
        """New metrics of a ranking, by the names that they are reported by, each at every k unless it has its own.

        Raises:
            UserError: as `of_label`.
        """
        found = _Made()
        items = [item for item in _spelt_out(wanted, RANKING_DEFAULTS) if item.name in self._rankings]
        for k in ks:
            for item in items:
                if item.parameters.get("k") is None:
                    found.add(f"{item.reported}@{k}", item, self._rankings[item.name], k=k)
        for item in items:
            if (own := item.parameters.get("k")) is not None:
                found.add(f"{item.reported}@{own}", item, self._rankings[item.name])
        return found.metrics

    def is_ranking(self, item: MetricConfig) -> bool:
        """Whether a name that stands for metrics of labels and of rankings means the latter: without a threshold."""
        return item.name in self._rankings and "threshold" not in item.parameters

    def check(self, wanted: Sequence[MetricConfig], kinds: Iterable[LabelType], *, rankings: bool) -> None:
        """Refuse names of no metric, and metrics that can measure nothing that there is.

        Raises:
            UserError: naming the metric.
        """
        kinds = set(kinds)
        valid = set(self._rankings) if rankings else set()
        valid |= {name for kind in kinds for name in self._of_type(kind)}
        every = self._rankings.keys() | self._values.keys() | self._probabilities.keys() | MULTICLASS.keys()
        for item in wanted:
            if item.is_default or item.name in valid:
                continue
            if item.name not in every:
                raise UserError(f"{_WHERE}: no metric {item.name!r}: {nearest(item.name, {*valid, DEFAULT})}")
            what = self._measured_by(item.name)
            if not kinds and item.name in self._values:
                what = "labels"
            raise UserError(f"{_WHERE}: {item.name} is a metric of {what}, and this run has none; leave it out")

    def _measured_by(self, name: str) -> str:
        """What a metric is of, in words."""
        if name in self._rankings:
            return "rankings, which recall models have"
        if name in self._values:
            return "labels of type classification or regression"
        return f"labels of type {'classification' if name in self._probabilities else 'multiclass'}"


class _Made:
    """Metrics by the names that they are reported by."""

    def __init__(self) -> None:
        self.metrics: dict[str, Any] = {}
        self._items: dict[str, MetricConfig] = {}

    def add(self, reported: str, item: MetricConfig, cls: type[Metric[Any]], **more: Any) -> None:
        """Make one, unless the same is there already."""
        if reported in self._items:
            if self._items[reported].parameters == item.parameters and self._items[reported].name == item.name:
                return
            raise UserError(f"{_WHERE}: two metrics are reported as {reported!r}; give one another name by `as`")
        self._items[reported] = item
        self.metrics[reported] = _build(cls, item, more)


def _spelt_out(wanted: Sequence[MetricConfig], defaults: Sequence[str]) -> list[MetricConfig]:
    """The metrics, with `default` replaced by what it stands for."""
    return [
        MetricConfig(name=name) if item.is_default else item
        for item in wanted
        for name in (defaults if item.is_default else (item.name,))
    ]


def _build(cls: type[Metric[Any]], item: MetricConfig, more: dict[str, Any]) -> Metric[Any]:
    """A metric from its constructor's parameters, checked by their annotations."""
    parameters = inspect.signature(cls).parameters
    hints = typing.get_type_hints(cls.__init__, include_extras=True)
    given = {**item.parameters, **more}
    for name, value in list(given.items()):
        if name not in parameters:
            raise UserError(f"{_WHERE}: {item.name}: unknown key {name!r}: {nearest(name, [*parameters, 'as'])}")
        given[name] = typed(f"{_WHERE}: {item.name}.{name}", hints.get(name, Any), value)
    for name, parameter in parameters.items():
        if name not in given and parameter.default is inspect.Parameter.empty:
            raise UserError(f"{_WHERE}: {item.name} needs {name}: write {{name: {item.name}, {name}: ...}}")
    try:
        metric = cls(**given)
    except (ValueError, TypeError) as error:
        raise UserError(f"{_WHERE}: {item.name}: {one_line(error)}") from error
    for attribute, valid in (("direction", typing.get_args(Direction)), ("group", None)):
        value = getattr(metric, attribute, _MISSING)
        if value is _MISSING or (valid is not None and value not in valid):
            what = " or ".join(map(repr, valid)) if valid else "the column that it groups rows by, or None"
            raise UserError(f"{_WHERE}: {item.name}: every metric has an attribute {attribute!r}: {what}")
    return metric
