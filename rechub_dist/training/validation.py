"""The evaluations of a run as it is trained: on the valid split, which tells the best step, and on the test split."""

from __future__ import annotations

import math
import time
from dataclasses import replace

import torch
from torchrec.distributed.model_parallel import DistributedModelParallel

from rechub_dist.assembly.parts import Parts
from rechub_dist.checkpoint import Position
from rechub_dist.data.passes import Passes
from rechub_dist.data.reader import ParquetReader
from rechub_dist.distributed.process import Stop
from rechub_dist.distributed.runtime import Runtime
from rechub_dist.distributed.watchdog import Watchdog
from rechub_dist.embedding.layout import REPLICATED
from rechub_dist.embedding.optim import Optimizers
from rechub_dist.embedding.sharding import table_shards
from rechub_dist.evaluation.evaluate import calibrate, evaluate
from rechub_dist.evaluation.measured import Evaluation
from rechub_dist.metrics.direction import Direction, goodness
from rechub_dist.reporting.reporter import Reporter, short


class Validation:
    """Evaluates the weights as they are, and reports what it finds. All methods are collective.

    Attributes:
        best_metric: the metric that tells the best step.
    """

    def __init__(
        self,
        parts: Parts,
        module: DistributedModelParallel,
        optimizers: Optimizers,
        passes: Passes,
        reader: ParquetReader | None,
        rt: Runtime,
        report: Reporter,
        watchdog: Watchdog,
        stop: Stop,
        best_by: tuple[str, Direction],
    ) -> None:
        self._parts = parts
        self._module = module
        self._optimizers = optimizers
        self._passes = passes
        self._reader = reader
        self._rt = rt
        self._report = report
        self._watchdog = watchdog
        self._stop = stop
        self.best_metric, self._direction = best_by

    def validate(self, position: Position) -> Position:
        """Evaluate on the valid split, which there is; returns the position with what is known of the best step then.

        Raises:
            Stopped: on all ranks, if one was asked to stop.
        """
        assert self._reader is not None
        found = self.evaluate(self._reader, "valid", position.step)
        best = goodness(position.best_metrics.get(self.best_metric, math.nan), self._direction)
        if math.isnan(best) or goodness(found.metrics[self.best_metric], self._direction) > best:
            return replace(
                position,
                best_step=position.step,
                best_metrics=found.metrics,
                best_mode=self._direction,
                evaluations_since_best=0,
            )
        return replace(position, evaluations_since_best=position.evaluations_since_best + 1)

    def calibrate(self) -> None:
        """Fit the calibration of probabilities on the valid split with the weights as they are, where one is asked for.

        Raises:
            Stopped: as `evaluate`.
        """

        def advance(_done: int) -> None:  # a pass over valid is no stall
            self._watchdog.mark("calibrating", slow=True)

        calibrate(self._parts, self._rt, self._reader, advance, self._stop.asked)

    def evaluate(self, reader: ParquetReader, split: str, step: int) -> Evaluation:
        """Evaluate the weights, which are those of `step`, with the averages of the dense ones if there are any.

        Raises:
            Stopped: on all ranks, if one was asked to stop.
        """
        began = time.monotonic()
        self._report.start(f"evaluating {split}", reader.steps)
        self._watchdog.mark(f"evaluating {split}", slow=True)

        def advance(done: int) -> None:
            self._watchdog.mark(f"evaluating {split}", slow=True)
            self._report.advance(done)

        with self._optimizers.averaged():
            found = evaluate(self._parts, reader, self._rt, advance, self._stop.asked)
        seconds = max(1e-9, time.monotonic() - began)
        values = {**found.metrics, "samples_per_second": found.rows / seconds}
        if found.skipped:
            values["rows_skipped"] = found.skipped
            self._report.skipped(split, step, found.skips)
        epoch = self._passes.current(step - 1).number if step else 0
        self._report.record(split, step, epoch, values)
        if self._parts.config.train.histograms:
            for label, predictions in found.predictions.items():
                self._report.histogram(f"{split}/predictions/{label}", predictions, step)
            self._table_histograms(step)
        self._report.say(f"step {step} {split}: {short(found.metrics)}")
        return found

    def _table_histograms(self, step: int) -> None:
        """Norms of the main rank's rows of each table: dead tables and exploding ones show at a glance."""
        if not self._rt.is_main:
            return
        layout = self._parts.layout
        pieces = {name: [s.tensor for s in shards] for name, shards in table_shards(self._module, layout).items()}
        for placed in layout.tables_in(REPLICATED):
            local = self._parts.train_module.stage.replicated
            assert local is not None
            pieces[placed.table.name] = [local.local.weight(placed.table.name).detach()]
        for name, tensors in pieces.items():
            norms = [tensor[:100_000].float().norm(dim=1).cpu() for tensor in tensors]
            if norms:
                self._report.histogram(f"row_norms/{name}", torch.cat(norms).numpy(), step)
