"""Metrics that are made of sums over rows: nothing but the sums is kept, in float64."""

from __future__ import annotations

import math
from typing import Annotated

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from rechub_dist.distributed.runtime import Runtime
from rechub_dist.metrics.binary import Array, checked_rows, ratio
from rechub_dist.metrics.direction import Direction
from rechub_dist.metrics.metric import Scored

Threshold = Annotated[float, Field(ge=0, le=1)]


class OfSums:
    """A metric that is a function of sums over rows."""

    direction: Direction = "max"
    group: str | None = None

    def __init__(self, sums: int) -> None:
        self._sums: NDArray[np.float64] = np.zeros(sums)

    def update(self, rows: Scored) -> None:
        """Add rows."""
        self._sums += self._of(*checked_rows(rows.predictions, rows.targets, rows.weights))

    def merge(self, ranks: Runtime) -> None:
        """Add the ranks' sums."""
        self._sums = ranks.all_reduce_sum(torch.from_numpy(self._sums)).numpy()

    def compute(self) -> float:
        """The value."""
        raise NotImplementedError

    def _of(self, p: Array, y: Array, w: Array) -> NDArray[np.float64]:
        """The rows' sums."""
        raise NotImplementedError


class RMSE(OfSums):
    """Square root of the mean squared error, in the label's unit."""

    direction: Direction = "min"

    def __init__(self) -> None:
        super().__init__(2)

    def _of(self, p: Array, y: Array, w: Array) -> NDArray[np.float64]:
        return np.array([w @ np.square(p - y), w.sum()])

    def compute(self) -> float:
        """The value."""
        return math.sqrt(ratio(self._sums[0], self._sums[1]))


class _Decided(OfSums):
    """Of rows that count as predicted positives from a threshold on: true positives, predicted and real positives."""

    def __init__(self, threshold: Threshold = 0.5) -> None:
        super().__init__(3)
        self._threshold = threshold

    def _of(self, p: Array, y: Array, w: Array) -> NDArray[np.float64]:
        predicted = np.where(np.isnan(p), math.nan, p >= self._threshold)
        return np.array([w @ (predicted * y), w @ predicted, w @ y])


class Precision(_Decided):
    """The share of real positives among the rows whose probability is at least `threshold`."""

    def compute(self) -> float:
        """The value."""
        return ratio(self._sums[0], self._sums[1])


class Recall(_Decided):
    """The share of real positives whose probability is at least `threshold`."""

    def compute(self) -> float:
        """The value."""
        return ratio(self._sums[0], self._sums[2])


class F1(_Decided):
    """The harmonic mean of precision and recall at `threshold`."""

    def compute(self) -> float:
        """The value."""
        return ratio(2 * self._sums[0], self._sums[1] + self._sums[2])


class CalibrationError(OfSums):
    """Expected calibration error: by `buckets` of equal width of the probability, the distance of the mean prediction
    to the mean label, averaged by the buckets' rows (Naeini et al. 2015)."""

    direction: Direction = "min"

    def __init__(self, buckets: Annotated[int, Field(ge=1, le=1_000_000)] = 10) -> None:
        super().__init__(3 * buckets)
        self._buckets = buckets

    def _of(self, p: Array, y: Array, w: Array) -> NDArray[np.float64]:
        place = np.clip(np.nan_to_num(p) * self._buckets, 0, self._buckets - 1).astype(np.int64)
        sums = [np.bincount(place, values, minlength=self._buckets) for values in (w * p, w * y, w)]
        return np.concatenate(sums)

    def compute(self) -> float:
        """The value."""
        predicted, real, rows = self._sums.reshape(3, self._buckets)
        return ratio(float(np.abs(predicted - real).sum()), float(rows.sum()))
