"""Metrics that need all rows at once: the AUC, which compares them, and those that are added up in the rows' order."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from rechub_dist.distributed.runtime import Runtime
from rechub_dist.metrics import binary
from rechub_dist.metrics.direction import Direction
from rechub_dist.metrics.metric import Scored


class AllRows:
    """Predictions, targets and weights of one label, of this rank's rows, then of all ranks'.

    Several metrics may share one: rows that the last `update` brought already are not taken twice.

    Args:
        predictions: how many a row has.
    """

    def __init__(self, predictions: int = 1) -> None:
        self._none = np.empty((predictions + 2, 0), np.float32)
        self._parts: list[Scored] = []
        self._whole: NDArray[np.floating] | None = None

    def update(self, rows: Scored) -> None:
        """Take rows, unless another metric has just done so. They are kept, not copied."""
        if not self._parts or self._parts[-1] is not rows:
            self._parts.append(rows)

    def merge(self, ranks: Runtime) -> None:
        """Bring the rows of all ranks to each, in rank order; nothing if that is done. Collective."""
        if self._whole is None:
            parts = [np.vstack([rows.predictions.T, rows.targets, rows.weights]) for rows in self._parts]
            self._parts = []
            own = np.concatenate([self._none, *parts], axis=1)
            del parts
            self._whole = ranks.gather(torch.from_numpy(np.ascontiguousarray(own.T))).numpy().T

    @property
    def whole(self) -> NDArray[np.floating]:
        """Predictions, targets and weights of all rows, [3, N], of C classes [C + 2, N]; after `merge`."""
        assert self._whole is not None, "merge comes first"
        return self._whole


class OfAllRows:
    """A metric that is a function of all rows."""

    direction: Direction = "min"
    group: str | None = None
    _binary: ClassVar[bool] = False

    def __init__(self) -> None:
        self._rows = AllRows()

    def share(self, rows: AllRows) -> None:
        """Use the rows that other metrics of the same label collect as well; before the first `update`."""
        self._rows = rows

    def update(self, rows: Scored) -> None:
        """Take rows."""
        self._rows.update(rows)

    def merge(self, ranks: Runtime) -> None:
        """Bring the rows of all ranks to each."""
        self._rows.merge(ranks)

    def compute(self) -> float:
        """The value."""
        whole = self._rows.whole
        p, y, w = binary.checked_rows(*whole, binary=self._binary)
        return self._of(p, y, w, binary.float_step(whole))

    def _of(self, p: binary.Array, y: binary.Array, w: binary.Array, step: float) -> float:
        raise NotImplementedError


class AUC(OfAllRows):
    """The chance that a positive is scored above a negative, a tie counting half. Exact."""

    direction: Direction = "max"
    _binary = True

    def _of(self, p: binary.Array, y: binary.Array, w: binary.Array, step: float) -> float:  # noqa: ARG002
        return binary.auc(p, y, w)


class LogLoss(OfAllRows):
    """Mean cross entropy in nats."""

    _binary = True

    def _of(self, p: binary.Array, y: binary.Array, w: binary.Array, step: float) -> float:
        return binary.log_loss(p, y, w, step)


class NormalizedEntropy(OfAllRows):
    """Log loss over that of always predicting the mean label; below 1 something has been learnt."""

    _binary = True

    def _of(self, p: binary.Array, y: binary.Array, w: binary.Array, step: float) -> float:
        return binary.normalized_entropy(p, y, w, step)


class Calibration(OfAllRows):
    """Sum of predictions over sum of labels."""

    direction: Direction = "nearest_to_one"
    _binary = True

    def _of(self, p: binary.Array, y: binary.Array, w: binary.Array, step: float) -> float:  # noqa: ARG002
        return binary.calibration(p, y, w)


class MSE(OfAllRows):
    """Mean squared error."""

    def _of(self, p: binary.Array, y: binary.Array, w: binary.Array, step: float) -> float:  # noqa: ARG002
        return binary.squared_error(p, y, w)


class MAE(OfAllRows):
    """Mean absolute error."""

    def _of(self, p: binary.Array, y: binary.Array, w: binary.Array, step: float) -> float:  # noqa: ARG002
        return binary.absolute_error(p, y, w)
