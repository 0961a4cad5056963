"""Metrics of predicted probabilities and values. Exact: AUC is no histogram's estimate."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


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
    p, y, w = checked_rows(predictions, labels, weights, binary=True)
    step = float_step(predictions)
    return {
        "auc": auc(p, y, w),
        "log_loss": log_loss(p, y, w, step),
        "normalized_entropy": normalized_entropy(p, y, w, step),
        "calibration": calibration(p, y, w),
    }


def regression_metrics(
    predictions: NDArray[np.floating], labels: NDArray[np.generic], weights: NDArray[np.generic] | None = None
) -> dict[str, float]:
    """Weighted mean squared and absolute error, `mse` and `mae`, of predictions [N]; NaN without rows."""
    p, y, w = checked_rows(predictions, labels, weights)
    return {"mse": squared_error(p, y, w), "mae": absolute_error(p, y, w)}


def log_loss(p: Array, y: Array, w: Array, step: float) -> float:
    """Mean cross entropy in nats, with probabilities kept `step` off 0 and 1."""
    clipped = np.clip(p, step, 1 - step)
    return ratio(-float(w @ (y * np.log(clipped) + (1 - y) * np.log1p(-clipped))), float(w.sum()))


def normalized_entropy(p: Array, y: Array, w: Array, step: float) -> float:
    """`log_loss` over that of always predicting the mean label; NaN where all labels are alike."""
    base_rate = ratio(float(w @ y), float(w.sum()))
    one_class = not 0 < base_rate < 1
    entropy = 0.0 if one_class else -base_rate * math.log(base_rate) - (1 - base_rate) * math.log1p(-base_rate)
    return ratio(log_loss(p, y, w, step), entropy)


def calibration(p: Array, y: Array, w: Array) -> float:
    """The sum of predictions over that of labels."""
    return ratio(float(w @ p), float(w @ y))


def squared_error(p: Array, y: Array, w: Array) -> float:
    """The mean squared error."""
    return ratio(float(w @ np.square(p - y)), float(w.sum()))


def absolute_error(p: Array, y: Array, w: Array) -> float:
    """The mean absolute error."""
    return ratio(float(w @ np.abs(p - y)), float(w.sum()))


def float_step(predictions: NDArray[np.floating]) -> float:
    """The relative distance of two floats of the predictions' type, which bounds how near 0 and 1 they can come."""
    step = float(np.finfo(predictions.dtype).eps) if np.issubdtype(predictions.dtype, np.floating) else 0.0
    return max(step, float(np.finfo(np.float64).eps))


def auc(p: Array, y: Array, w: Array) -> float:
    """The chance that a positive is scored above a negative.

    Over groups of equal predictions, lowest first: positives times the negatives below, ties at half.
    """
    if np.isnan(p).any():
        return math.nan
    _, group = np.unique(p, return_inverse=True)
    positives = np.bincount(group, w * y)
    negatives = np.bincount(group, w * (1 - y))
    below = np.cumsum(negatives) - negatives
    return ratio(float(positives @ (below + 0.5 * negatives)), float(positives.sum()) * float(negatives.sum()))


def checked_rows(
    predictions: NDArray[np.floating],
    labels: NDArray[np.generic],
    weights: NDArray[np.generic] | None,
    *,
    binary: bool = False,
) -> tuple[Array, Array, Array]:
    """Predictions, labels and weights (1 each where there are none) as float64 [N].

    Raises:
        ValueError: for shapes that differ, a negative weight, or, where they are `binary`, a label other than 0 and 1.
    """
    p, y = np.asarray(predictions, np.float64), np.asarray(labels, np.float64)
    w = np.ones_like(p) if weights is None else np.asarray(weights, np.float64)
    if p.ndim != 1 or p.shape != y.shape or p.shape != w.shape:
        raise ValueError(f"predictions {p.shape}, labels {y.shape} and weights {w.shape} must have one shape [N]")
    if not (w >= 0).all():
        raise ValueError(f"a weight is {w[~(w >= 0)][0]}: weights must not be negative")
    if binary and (wrong := y[(y != 0) & (y != 1)]).size:
        raise ValueError(f"a label is {wrong[0]}: labels must be 0 or 1")
    return p, y, w


def ratio(numerator: float, denominator: float) -> float:
    """The quotient; NaN where the denominator is 0."""
    return float(numerator / denominator) if denominator else math.nan
