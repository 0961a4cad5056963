"""What an evaluation finds: predictions, fetched from the device many batches at a time, and their metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from rechub_dist.batch import Batch
from rechub_dist.config import MetricConfig
from rechub_dist.distributed.runtime import Runtime
from rechub_dist.embedded import Output
from rechub_dist.errors import UserError
from rechub_dist.metrics.collected import AllRows, OfAllRows
from rechub_dist.metrics.metric import Scored
from rechub_dist.objectives import TaskObjective
from rechub_dist.objectives.base import MEAN_AUC, Scores
from rechub_dist.skips import Skipped

_FETCHED = 16 << 20  # numbers that are fetched from the device at once


@dataclass(frozen=True)
class Evaluation:
    """Metrics by name, and by label the predictions, targets and weights of all rows, [3, N].

    With several labels a metric's name is `click/auc`, and `mean/auc` is the labels' mean. `skipped` rows of bad files
    are in none of them; `skips` says which. Labels of C classes, [C + 2, N], are among those that are `scored` only
    where that is asked for: all rows of many classes take much of a rank's memory.
    """

    metrics: dict[str, float]
    rows: int
    scored: dict[str, np.ndarray]
    skipped: int = 0
    skips: tuple[Skipped, ...] = ()

    @property
    def predictions(self) -> dict[str, np.ndarray]:
        """The predictions by label of one prediction a row, [N]."""
        return {name: rows[0] for name, rows in self.scored.items() if len(rows) == 3}

    @property
    def counts(self) -> dict[str, int]:
        """`rows`, and `rows_skipped` where there are any."""
        return {"rows": self.rows} | ({"rows_skipped": self.skipped} if self.skipped else {})


class Measured:
    """The metrics of all that an objective scores.

    Args:
        every: whether labels of several classes are among what is `scored`.
    """

    def __init__(self, objective: TaskObjective, wanted: Sequence[MetricConfig], *, every: bool = False) -> None:
        self._objective = objective
        self._metrics = objective.measures(wanted)
        self._keys = objective.task_keys(wanted)
        self._means = MEAN_AUC in objective.task_metrics(wanted)
        self._classes = objective.classes
        self._rows = {name: AllRows(self._classes.get(name, 1)) for name in objective.scored}
        self._kept = [name for name in objective.scored if every or name not in self._classes]
        self._count = 0
        for name, metrics in self._metrics.items():
            for metric in metrics.values():
                if isinstance(metric, OfAllRows):
                    metric.share(self._rows[name])
        self._there: list[Tensor] = []
        self._grouped: list[dict[str, pa.Array]] = []
        self._fault: str | None = None

    def fault(self) -> str | None:
        """Why the rows of this rank cannot be measured, if so: for the ranks to stop together."""
        return self._fault

    def add(self, output: Output, batch: Batch) -> None:
        """Take a batch and what the model says of it. Fetching waits for the device, so several are fetched at once."""
        self.add_scores(self._objective.scores(output, batch), batch)

    def add_scores(self, scores: Mapping[str, Scores], batch: Batch) -> None:
        """As `add`, of what something else has predicted of the batch."""
        self._there.append(torch.cat([_table(scores[name]) for name in self._objective.scored], dim=1))
        self._grouped.append(batch.keys)
        if sum(rows.numel() for rows in self._there) >= _FETCHED:
            self._fetch()

    def finish(self, runtime: Runtime) -> Evaluation:
        """The metrics of all ranks' rows. Collective.

        Raises:
            UserError: on all ranks, where some rows cannot be measured.
        """
        self._fetch()
        runtime.raise_together(self._fault)
        values: dict[str, float] = {}
        for name, metrics in self._metrics.items():
            if name in self._kept:
                self._rows[name].merge(runtime)
            for reported, metric in metrics.items():
                metric.merge(runtime)
                values[self._objective.metric(name, reported)] = metric.compute()
        if self._means:
            aucs = [values[self._objective.metric(label.name, "auc")] for label in self._objective.labels]
            values[MEAN_AUC] = float(np.mean(aucs))
        scored = {name: self._rows[name].whole for name in self._kept}
        return Evaluation(values, int(runtime.all_reduce_sum(torch.tensor([self._count]))), scored)

    def _fetch(self) -> None:
        if not self._there or self._fault is not None:
            self._there, self._grouped = [], []
            return
        found = torch.cat(self._there).cpu().numpy()  # [N, sum over names of predictions + 2]
        self._count += len(found)
        keys = {
            key: pa.concat_arrays([part[key] for part in self._grouped if len(part[key])] or [pa.nulls(0)])
            for key in self._keys
        }
        self._there, self._grouped = [], []
        try:
            end = 0
            for name in self._objective.scored:
                first, end = end, end + self._classes.get(name, 1) + 2
                predictions = found[:, first : end - 2] if name in self._classes else found[:, first]
                rows = Scored(predictions, found[:, end - 2], found[:, end - 1], keys)
                if name in self._kept:
                    self._rows[name].update(rows)
                for metric in self._metrics[name].values():
                    metric.update(rows)
        except UserError as error:
            self._fault = str(error)


def _table(scores: Scores) -> Tensor:
    """The rows' predictions, targets and weights, [B, 3], of C classes [B, C + 2]."""
    predictions = scores.predictions if scores.predictions.dim() == 2 else scores.predictions[:, None]
    return torch.cat([predictions, scores.targets[:, None], scores.weights[:, None]], dim=1)
