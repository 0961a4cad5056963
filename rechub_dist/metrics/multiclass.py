"""Metrics of labels of several classes, from the probabilities of each class."""

from __future__ import annotations

import math
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from rechub_dist.metrics.binary import Array, auc, float_step, ratio
from rechub_dist.metrics.collected import AllRows, OfAllRows
from rechub_dist.metrics.direction import Direction
from rechub_dist.metrics.metric import Scored
from rechub_dist.metrics.sums import OfSums


class _OfClasses(OfSums):
    """A metric that is a function of sums over rows with the probabilities of C classes."""

    def update(self, rows: Scored) -> None:
        """Add rows."""
        p, y, w = checked_classes(rows.predictions, rows.targets, rows.weights)
        self._sums += self._of_classes(p, y, w, float_step(rows.predictions))

    def _of_classes(self, p: Array, y: NDArray[np.int64], w: Array, step: float) -> Array:
        """The sums of rows: probabilities [N, C], NaN all where one is, classes [N], weights [N]."""
        raise NotImplementedError


class Accuracy(_OfClasses):
    """The share of rows whose class is among the `k` most probable; of equally probable ones the first come first."""

    direction: Direction = "max"

    def __init__(self, classes: int, k: Annotated[int, Field(ge=1)] = 1) -> None:  # noqa: ARG002
        super().__init__(2)
        self._k = k

    def _of_classes(self, p: Array, y: NDArray[np.int64], w: Array, step: float) -> Array:  # noqa: ARG002
        own = p[np.arange(len(y)), y][:, None]
        before = (p > own) | ((p == own) & (np.arange(p.shape[1]) < y[:, None]))
        hit = np.where(np.isnan(own[:, 0]), math.nan, before.sum(axis=1) < self._k)
        return np.array([w @ hit, w.sum()])

    def compute(self) -> float:
        """The value."""
        return ratio(self._sums[0], self._sums[1])


class ClassLogLoss(_OfClasses):
    """Mean cross-entropy in nats: minus the logarithm of the probability of a row's own class."""

    direction: Direction = "min"

    def __init__(self, classes: int) -> None:  # noqa: ARG002
        super().__init__(2)

    def _of_classes(self, p: Array, y: NDArray[np.int64], w: Array, step: float) -> Array:
        return np.array([w @ _losses(p, y, step), w.sum()])

    def compute(self) -> float:
        """The value."""
        return ratio(self._sums[0], self._sums[1])


class ClassNormalizedEntropy(_OfClasses):
    """Log loss over that of always predicting each class's share of the rows; NaN where all rows are of one class."""

    direction: Direction = "min"

    def __init__(self, classes: int) -> None:
        super().__init__(1 + classes)

    def _of_classes(self, p: Array, y: NDArray[np.int64], w: Array, step: float) -> Array:
        return np.append(w @ _losses(p, y, step), np.bincount(y, w, minlength=p.shape[1]))

    def compute(self) -> float:
        """The value."""
        loss, rows = self._sums[0], self._sums[1:]
        shares = rows[rows > 0] / max(rows.sum(), np.finfo(np.float64).tiny)
        entropy = -float(shares @ np.log(shares)) if len(shares) > 1 else 0.0
        return ratio(loss, entropy * rows.sum())


class MacroAUC(OfAllRows):
    """The mean over classes of the AUC of each against all others; classes of no row, or of all, are left out."""

    direction: Direction = "max"

    def __init__(self, classes: int) -> None:
        super().__init__()
        self._rows = AllRows(classes)

    def compute(self) -> float:
        """The value."""
        whole = self._rows.whole
        p, y, w = checked_classes(whole[:-2].T, whole[-2], whole[-1])
        if np.isnan(p).any():
            return math.nan
        found = [auc(p[:, c], (y == c).astype(np.float64), w) for c in range(p.shape[1])]
        there = [value for value in found if not math.isnan(value)]
        return float(np.mean(there)) if there else math.nan


def checked_classes(
    predictions: NDArray[np.floating], labels: NDArray[np.generic], weights: NDArray[np.generic]
) -> tuple[Array, NDArray[np.int64], Array]:
    """Probabilities [N, C] and weights as float64, and classes as int64; a row with a NaN is NaN throughout.

    Raises:
        ValueError: for shapes that do not fit, or a label that is none of the classes.
    """
    p, given, w = (np.asarray(values, np.float64) for values in (predictions, labels, weights))
    if p.ndim != 2 or given.shape != (len(p),) or w.shape != given.shape:
        shapes = f"predictions {p.shape}, labels {given.shape} and weights {w.shape}"
        raise ValueError(f"{shapes} must be [N, C], [N] and [N]")
    y = given.astype(np.int64)
    wrong = np.flatnonzero((y != given) | (y < 0) | (y >= p.shape[1]))
    if len(wrong):
        raise ValueError(f"a label is {given[wrong[0]]}: labels must be integers from 0 to {p.shape[1] - 1}")
    return np.where(np.isnan(p).any(axis=1, keepdims=True), math.nan, p), y, w


def _losses(p: Array, y: NDArray[np.int64], step: float) -> Array:
    """Minus the logarithm of the probability of each row's class, kept `step` off 0."""
    found: Array = -np.log(np.clip(p[np.arange(len(y)), y], step, 1))
    return found
