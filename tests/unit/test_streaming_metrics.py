"""Metrics that are fed batch by batch, against scikit-learn and plain NumPy."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn import metrics as sk

from rechub_dist.config import MetricConfig
from rechub_dist.config.evaluation import DEFAULT
from rechub_dist.distributed.runtime import Runtime, runtime
from rechub_dist.metrics.binary import binary_metrics, regression_metrics
from rechub_dist.metrics.catalogue import MULTICLASS, PROBABILITIES, RANKINGS, VALUES, KnownMetrics
from rechub_dist.metrics.grouped import group_aucs
from rechub_dist.metrics.metric import Ranked, Scored
from rechub_dist.metrics.ranking import best_of_parts, ranking_metrics

N = 700


@pytest.fixture(scope="module")
def one() -> Iterator[Runtime]:
    """One rank."""
    with runtime("cpu", 60) as rt:
        yield rt


def scored(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    p = rng.random(N).round(3).astype(np.float32)
    return p, (rng.random(N) < p).astype(np.float32), rng.random(N).astype(np.float32)


def measured(one: Runtime, kind: Any, *wanted: dict[str, Any]) -> dict[str, float]:
    """The values of metrics that get the rows in batches, of which one is empty."""
    metrics = KnownMetrics().of_label([MetricConfig(**item) for item in wanted], kind)
    for rows in zip(*(np.split(column, [0, 100, 650]) for column in scored()), strict=True):
        for metric in metrics.values():
            metric.update(Scored(*rows))
    for metric in metrics.values():
        metric.merge(one)
    return {name: metric.compute() for name, metric in metrics.items()}


def test_the_default_ones_are_those_of_all_rows_to_the_last_bit(one: Runtime) -> None:
    assert measured(one, "classification", {"name": DEFAULT}) == binary_metrics(*scored())
    assert measured(one, "regression", {"name": DEFAULT}) == regression_metrics(*scored())


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.5, 0.9])
def test_decisions_against_sklearn(one: Runtime, threshold: float) -> None:
    names = ("precision", "recall", "f1")
    found = measured(one, "classification", *({"name": name, "threshold": threshold} for name in names))
    p, y, w = scored()
    for name, of in zip(names, (sk.precision_score, sk.recall_score, sk.f1_score), strict=True):
        assert found[name] == pytest.approx(of(y, p.astype(np.float64) >= threshold, sample_weight=w), rel=1e-6)


def test_nothing_is_predicted_positive(one: Runtime) -> None:
    precision, recall = (
        KnownMetrics()
        .of_label([MetricConfig(name=name) for name in ("precision", "recall")], "classification")
        .values()
    )
    for metric in (precision, recall):
        metric.update(Scored(np.array([0.1, 0.4]), np.array([1.0, 0.0]), np.ones(2)))
        metric.merge(one)
    assert math.isnan(precision.compute())
    assert recall.compute() == 0


def test_errors_against_sklearn(one: Runtime) -> None:
    p, y, w = scored()
    for kind in ("classification", "regression"):
        found = measured(one, kind, {"name": "rmse"}, {"name": "mae"}, {"name": "mse"})
        assert found["rmse"] == pytest.approx(sk.root_mean_squared_error(y, p, sample_weight=w), rel=1e-6)
        assert found["mae"] == pytest.approx(sk.mean_absolute_error(y, p, sample_weight=w), rel=1e-6)
        assert found["rmse"] ** 2 == pytest.approx(found["mse"], rel=1e-12)


@pytest.mark.parametrize("buckets", [1, 10, 37])
def test_calibration_error_bucket_by_bucket(one: Runtime, buckets: int) -> None:
    found = measured(one, "classification", {"name": "calibration_error", "buckets": buckets})["calibration_error"]
    p, y, w = (column.astype(np.float64) for column in scored())
    place = np.minimum((p * buckets).astype(int), buckets - 1)
    wanted = 0.0
    for bucket in range(buckets):
        mine = place == bucket
        if mine.any():
            distance = abs(np.average(p[mine], weights=w[mine]) - np.average(y[mine], weights=w[mine]))
            wanted += distance * w[mine].sum() / w.sum()
    assert found == pytest.approx(wanted, rel=1e-9)


def test_a_prediction_that_is_no_number_makes_all_so(one: Runtime) -> None:
    wanted = [MetricConfig(name=name) for name in ("precision", "recall", "f1", "calibration_error", "rmse", "auc")]
    for metric in KnownMetrics().of_label(wanted, "classification").values():
        metric.update(Scored(np.array([0.9, np.nan]), np.array([1.0, 0.0]), np.ones(2)))
        metric.merge(one)
        assert math.isnan(metric.compute())


def test_nothing_to_measure_is_nan(one: Runtime) -> None:
    wanted = [MetricConfig(name=name) for name in (DEFAULT, "f1", "calibration_error", "rmse")]
    for metric in KnownMetrics().of_label(wanted, "classification").values():
        metric.merge(one)
        assert math.isnan(metric.compute())
    for ranking in (
        KnownMetrics().of_rankings([MetricConfig(name=DEFAULT), MetricConfig(name="coverage")], (5,)).values()
    ):
        ranking.merge(one)
        assert math.isnan(ranking.compute())


@pytest.mark.parametrize("whole", [True, False])
def test_small_groups_among_many_rows_keep_their_digits(whole: bool) -> None:
    """A running sum over all rows would lose them where weights are fractions."""
    rng = np.random.default_rng(0)
    codes = np.sort(np.r_[np.zeros(20_000, np.int64), 1 + rng.integers(0, 200, 2000)])
    codes = np.unique(codes, return_inverse=True)[1]
    p, y = rng.random(len(codes)).round(2), rng.integers(0, 2, len(codes)).astype(np.float64)
    w = np.ones(len(codes)) if whole else np.where(codes == 0, 1e12, 1) * rng.random(len(codes))
    order = rng.permutation(len(codes))
    found = group_aucs(codes[order], p[order], y[order], w[order])
    for group in range(codes.max() + 1):
        mine = codes == group
        if 0 < y[mine].mean() < 1:
            assert found[group] == pytest.approx(sk.roc_auc_score(y[mine], p[mine], sample_weight=w[mine]), abs=1e-12)
        else:
            assert math.isnan(found[group])


def test_rankings_to_the_last_bit_and_what_they_recommend(one: Runtime) -> None:
    rng = torch.Generator().manual_seed(0)
    items, rows = 40, 90
    scores = torch.rand(rows, items, generator=rng) + torch.linspace(0, 1, items)
    top = scores.topk(8, dim=1).indices
    top[3, 5:] = -1  # a small catalogue
    targets = torch.randint(0, items, (rows,), generator=rng)
    places = (scores > scores.gather(1, targets[:, None])).sum(1).float()
    places[5] = math.nan
    wanted = [MetricConfig(name=name) for name in (DEFAULT, "map", "coverage", "popularity")]
    metrics = KnownMetrics().of_rankings(wanted, (2, 8))
    for part in (slice(0, 50), slice(50, 50), slice(50, 90)):
        for metric in metrics.values():
            metric.update(Ranked(places[part], targets[part], top[part], items))
    for metric in metrics.values():
        metric.merge(one)
    found = {name: metric.compute() for name, metric in metrics.items()}
    old = ranking_metrics(places, (2, 8))
    assert {name: found[name] for name in old} == old
    for k in (2, 8):
        shown = [int(i) for i in top[:, :k].flatten() if i >= 0]
        assert found[f"map@{k}"] == found[f"mrr@{k}"]
        assert found[f"coverage@{k}"] == pytest.approx(len(set(shown)) / items)
        assert found[f"popularity@{k}"] == pytest.approx(np.mean([float((targets == i).float().mean()) for i in shown]))
    assert {name: metric.depth for name, metric in metrics.items() if metric.depth} == {
        "coverage@2": 2, "popularity@2": 2, "coverage@8": 8, "popularity@8": 8,
    }  # fmt: skip


def test_the_best_of_parts() -> None:
    scores = torch.rand(3 * 4, 5, generator=torch.Generator().manual_seed(0))
    ids = torch.arange(60).view(12, 5)
    best, values = best_of_parts(ids, scores, 3, 4)
    for row in range(4):
        both = sorted(zip(scores[row::4].flatten().tolist(), ids[row::4].flatten().tolist(), strict=True), reverse=True)
        assert values[row].tolist() == [score for score, _ in both[:4]]
        assert best[row].tolist() == [item for _, item in both[:4]]


def test_all_are_documented() -> None:
    lines = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8").splitlines()
    rows = [line.split(" | ")[0].strip("| `") for line in lines if line.startswith("| `")]
    assert sorted(rows) == sorted([*PROBABILITIES, *VALUES, *MULTICLASS, *RANKINGS])
