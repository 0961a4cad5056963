"""Metrics of predicted probabilities and values. Exact: AUC is no histogram's estimate."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from rechub_dist.metrics.direction import Direction

Array = NDArray[np.float64]
# What is reported, the first being what tells the best step unless the run file says otherwise.
BINARY: dict[str, Direction] = {
    "auc": "max",
    "log_loss": "min",
    "normalized_entropy": "min",
    "calibration": "nearest_to_one",
}
REGRESSION: dict[str, Direction] = {"mse": "min", "mae": "min"}


def binary_metrics(
    predictions: NDArray[np.floating], labels: NDArray[np.generic], weights: NDArray[np.generic] | None = None
) -> dict[str, float]:
    """Metrics of predicted probabilities [N] of labels 0 or 1 [N], each row counting `weights` [N] times.

    - `auc`: the chance that a positive is scored above a negative, a tie counting half.
    - `log_loss`: mean cross entropy in nats, with probabilities kept one float step off 0 and 1.
    - `normalized_entropy`: log_loss over that of always predicting the mean label (He et al. 2014).
    - `calibration`: sum of predictions over sum of labels.

    What the rows cannot tell (one class only, no rows, no weight) is NaN, and so is everything once a prediction is.

    Raises:
        ValueError: for shapes that differ, a label other than 0 and 1, or a negative weight.
    """
    step = float(np.finfo(predictions.dtype).eps) if np.issubdtype(predictions.dtype, np.floating) else 0.0
    p, y, w = _rows(predictions, labels, weights)
    wrong = y[(y != 0) & (y != 1)]
    if wrong.size:
        raise ValueError(f"a label is {wrong[0]}: labels must be 0 or 1")

    step = max(step, float(np.finfo(np.float64).eps))
    clipped = np.clip(p, step, 1 - step)
    log_loss = _ratio(-float(w @ (y * np.log(clipped) + (1 - y) * np.log1p(-clipped))), float(w.sum()))
    base_rate = _ratio(float(w @ y), float(w.sum()))
    one_class = not 0 < base_rate < 1
    entropy = 0.0 if one_class else -base_rate * math.log(base_rate) - (1 - base_rate) * math.log1p(-base_rate)
    return {
        "auc": _auc(p, y, w),
        "log_loss": log_loss,
        "normalized_entropy": _ratio(log_loss, entropy),
        "calibration": _ratio(float(w @ p), float(w @ y)),
    }


def regression_metrics(
    predictions: NDArray[np.floating], labels: NDArray[np.generic], weights: NDArray[np.generic] | None = None
) -> dict[str, float]:
    """Weighted mean squared and absolute error, `mse` and `mae`, of predictions [N]; NaN without rows."""
    p, y, w = _rows(predictions, labels, weights)
    total = float(w.sum())
    return {
        "mse": _ratio(float(w @ np.square(p - y)), total),
        "mae": _ratio(float(w @ np.abs(p - y)), total),
    }


def _auc(p: Array, y: Array, w: Array) -> float:
    """Over groups of equal predictions, lowest first: positives times the negatives below, ties at half."""
    if np.isnan(p).any():
        return math.nan
    _, group = np.unique(p, return_inverse=True)
    positives = np.bincount(group, w * y)
    negatives = np.bincount(group, w * (1 - y))
    below = np.cumsum(negatives) - negatives
    return _ratio(float(positives @ (below + 0.5 * negatives)), float(positives.sum()) * float(negatives.sum()))


def _rows(
    predictions: NDArray[np.floating], labels: NDArray[np.generic], weights: NDArray[np.generic] | None
) -> tuple[Array, Array, Array]:
    """Predictions, labels and weights (1 each where there are none) as float64 [N]."""
    p, y = np.asarray(predictions, np.float64), np.asarray(labels, np.float64)
    w = np.ones_like(p) if weights is None else np.asarray(weights, np.float64)
    if p.ndim != 1 or p.shape != y.shape or p.shape != w.shape:
        raise ValueError(f"predictions {p.shape}, labels {y.shape} and weights {w.shape} must have one shape [N]")
    if not (w >= 0).all():
        raise ValueError(f"a weight is {w[~(w >= 0)][0]}: weights must not be negative")
    return p, y, w


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else math.nan
