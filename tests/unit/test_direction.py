"""Which of two values of a metric is the better one."""

from __future__ import annotations

import math

import pytest

from rechub_dist.config import MetricConfig
from rechub_dist.config.evaluation import DEFAULT
from rechub_dist.errors import UserError
from rechub_dist.metrics.catalogue import KnownMetrics
from rechub_dist.metrics.direction import Direction, goodness, watched_metric

WANTED = [MetricConfig(name=name) for name in (DEFAULT, "rmse", "calibration_error", "coverage", "popularity")]
REPORTED: dict[str, Direction] = {
    name: metric.direction
    for metrics in (
        KnownMetrics().of_label(WANTED, "classification"),
        KnownMetrics().of_label(WANTED, "regression"),
        KnownMetrics().of_rankings(WANTED, (5, 10)),
    )
    for name, metric in metrics.items()
}


@pytest.mark.parametrize(
    ("metric", "better", "worse"),
    [
        ("auc", 0.8, 0.7),
        ("log_loss", 0.3, 0.4),
        ("normalized_entropy", 0.8, 1.1),
        ("calibration", 0.9, 1.2),
        ("calibration", 1.1, 0.8),
        ("mse", 0.0, 1.0),
        ("mae", 0.5, 2.0),
        ("hit_rate@5", 0.2, 0.1),
        ("recall@10", 0.2, 0.1),
        ("ndcg@10", 0.2, 0.1),
        ("mrr@5", 0.2, 0.1),
        ("rmse", 0.5, 2.0),
        ("calibration_error", 0.0, 0.1),
        ("coverage@5", 0.2, 0.1),
        ("popularity@10", 0.1, 0.2),
    ],
)
def test_directions(metric: str, better: float, worse: float) -> None:
    assert goodness(better, REPORTED[metric]) > goodness(worse, REPORTED[metric])
    assert math.isnan(goodness(math.nan, REPORTED[metric]))


def test_the_metric_that_a_run_is_watched_by() -> None:
    reported: dict[str, Direction] = {"mse": "min", "mae": "min"}
    assert watched_metric(None, None, reported) == ("mse", "min")
    assert watched_metric("mae", "max", reported) == ("mae", "max")
    with pytest.raises(UserError, match=r"train.best_metric: no metric 'msee': did you mean 'mse'\?"):
        watched_metric("msee", None, reported)
