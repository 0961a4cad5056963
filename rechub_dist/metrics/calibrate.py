"""Calibration of predicted probabilities, fitted on rows that the model was not trained on. NumPy alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

Method = Literal["temperature", "isotonic"]
Floats = NDArray[np.float64]
EDGE: Final = 1e-7  # probabilities are kept so far off 0 and 1
SMALLEST: Final = float(np.finfo(np.float32).tiny)  # those of one of several classes, which may all be below EDGE
_MOST_POINTS: Final = 1000  # of an isotonic curve: finer than what any number of rows can tell apart


@dataclass(frozen=True)
class Temperature:
    """Divides the log odds by a number (Guo et al. 2017, "On Calibration of Modern Neural Networks", section 4.2).

    Of several classes the logarithms of their probabilities, which are then made to add up to 1 again. The order of the
    rows, and so AUC, stays as it is; of several classes that of each row's classes.
    """

    temperature: float


@dataclass(frozen=True)
class Curve:
    """The rising step function with the least squared error (Zadrozny & Elkan 2002), through the middles of its steps.

    Between these are straight lines, so that different probabilities stay different but for those beyond the first and
    the last (Oron & Flournoy 2017, "Centered Isotonic Regression").

    Attributes:
        scores: the model's probabilities, ascending [K].
        probabilities: the calibrated ones, ascending [K].
    """

    scores: Floats
    probabilities: Floats


def fit(
    method: Method, predictions: NDArray[np.floating], labels: NDArray[np.floating], weights: NDArray[np.floating]
) -> Temperature | Curve:
    """The calibration of probabilities [N] that fits labels 0 or 1 [N] best, each row counting `weights` [N] times.

    For a temperature there may be C classes: probabilities [N, C] and labels 0 .. C - 1.

    Raises:
        ValueError: no row counts, all labels are alike, a prediction is NaN, or the labels do not rise with the
            predictions, so that no temperature helps.
    """
    p, y, w = (np.asarray(values, np.float64) for values in (predictions, labels, weights))
    there = w > 0
    p, y, w = p[there], y[there], w[there]
    if not len(p) or y.min() == y.max():
        raise ValueError("the rows to fit on have labels of one class only")
    if np.isnan(p).any():
        raise ValueError("a prediction is NaN")
    return Temperature(_temperature(p, y.astype(int), w)) if method == "temperature" else _isotonic(p, y, w)


def _temperature(p: Floats, y: NDArray[np.int_], w: Floats) -> float:
    """1 / a, where a minimises the log loss of softmax(a * log p), which is convex in a: Newton's steps, halved."""
    logs = np.log(p.clip(min=SMALLEST) if p.ndim == 2 else np.stack([1 - p, p], axis=1).clip(EDGE, 1 - EDGE))
    logs -= logs[np.arange(len(y)), y][:, None]  # what a row's own class is behind each by
    total = w.sum()
    if w @ logs.mean(axis=1) >= 0:  # the slope at a = 0: the best a is not positive
        raise ValueError("no temperature helps: its labels do not rise with its predictions, so look at its AUC first")

    def loss(scale: float) -> float:
        return float(w @ np.logaddexp.reduce(scale * logs, axis=1) / total)

    scale, step = 1.0, 1.0
    while abs(step) >= 1e-9 * scale:
        z = scale * logs
        q = np.exp(z - np.logaddexp.reduce(z, axis=1, keepdims=True))
        mean = (q * logs).sum(axis=1, keepdims=True)
        curvature = float(w @ (q * (logs - mean) ** 2).sum(axis=1))
        step = float(w @ mean[:, 0]) / max(curvature, 1e-300)
        while abs(step) >= 1e-9 * scale and (scale - step <= 0 or loss(scale - step) > loss(scale)):
            step /= 2
        if abs(step) >= 1e-9 * scale:
            scale -= step
    return 1 / scale


def _isotonic(p: Floats, y: Floats, w: Floats) -> Curve:
    """By pooling adjacent violators among at most `_MOST_POINTS` groups of neighbouring scores."""
    order = np.argsort(p, kind="stable")
    p, y, w = p[order], y[order], w[order]
    place = np.minimum((np.cumsum(w) - w) / w.sum() * _MOST_POINTS, _MOST_POINTS - 1).astype(int)
    _, first = np.unique(p, return_index=True)
    place = np.repeat(place[first], np.diff(np.append(first, len(p))))  # equal scores are one group
    _, group = np.unique(place, return_inverse=True)
    weight = np.bincount(group, w)
    score = np.bincount(group, w * p) / weight
    mean = np.bincount(group, w * y) / weight
    steps: list[list[float]] = []  # of pooled groups: mean, mean score, weight
    for step in zip(mean, score, weight, strict=True):
        steps.append(list(step))
        while len(steps) > 1 and steps[-2][0] >= steps[-1][0]:
            last, before = steps.pop(), steps[-1]
            share = last[2] / (last[2] + before[2])
            before[:] = [*(before[k] + share * (last[k] - before[k]) for k in (0, 1)), before[2] + last[2]]
    found = np.asarray(steps)
    return Curve(found[:, 1], np.clip(found[:, 0], EDGE, 1 - EDGE))
