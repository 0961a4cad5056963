"""Metrics of a model on a split, exact over ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Final

import numpy as np
import torch
from torch import nn

from rechub_dist.assembly.identity import vocabularies_of
from rechub_dist.assembly.parts import Parts, build
from rechub_dist.assembly.readers import evaluation_reader, optional_reader
from rechub_dist.assembly.sharded import shard_train_module
from rechub_dist.checkpoint import open_checkpoints
from rechub_dist.checkpoint.state import weights_state
from rechub_dist.config import RunConfig
from rechub_dist.data.reader import ParquetReader
from rechub_dist.distributed.runtime import Runtime, device_type, runtime
from rechub_dist.errors import UserError
from rechub_dist.evaluation.batches import agreed_batches, on_device
from rechub_dist.evaluation.measured import Evaluation, Measured
from rechub_dist.evaluation.ranking import rank_items
from rechub_dist.metrics.calibrate import fit
from rechub_dist.objectives.base import COMBINED
from rechub_dist.objectives.calibrated import Calibrator
from rechub_dist.reporting.reporter import Reporter
from rechub_dist.skips import Skipped, Tally

CALIBRATION: Final = "evaluation.calibration"


def evaluate_run(config: RunConfig, data: str) -> tuple[int, Evaluation]:
    """The step and metrics of a run's best checkpoint (else its newest) on `data`; called on every rank.

    Raises:
        UserError: the run has no checkpoint, or `data` does not fit it.
    """
    device = device_type(config.device)
    with runtime(device, config.distributed.timeout_seconds, config.distributed.threads) as rt:
        parts = rt.together(lambda: build(config, device=rt.device.type, world_size=rt.world_size))
        reader = evaluation_reader(config, parts, rt, data)
        step = load_best(config, parts, rt)
        report = Reporter(None, quiet=not rt.is_main)
        report.start(f"evaluating {data}", reader.steps)
        found = evaluate(parts, reader, rt, report.advance)
        report.skipped(data, step, (*reader.manifest.left_out, *found.skips))
        report.close()
        return step, found


def load_best(config: RunConfig, parts: Parts, rt: Runtime) -> int:
    """Shard the parts and give them the weights of the run's best checkpoint (else its newest); returns its step.

    What the configuration says is to be calibrated is. Called on every rank, when it is known that the data fits.

    Raises:
        UserError: the run has no checkpoint, was trained with other vocabularies, or cannot be calibrated.
    """
    checkpoints = open_checkpoints(config, rt)
    module = shard_train_module(parts, rt, trains=False)
    vocabularies = rt.together(lambda: vocabularies_of(parts))
    step = checkpoints.load_best(weights_state(module, parts.layout), vocabularies)
    calibrate(parts, rt)
    return step


def evaluate(
    parts: Parts,
    reader: ParquetReader,
    runtime: Runtime,
    advance: Callable[[int], None] | None = None,
    stop: Callable[[], bool] = lambda: False,
    *,
    every_label: bool = False,
) -> Evaluation:
    """Evaluate on every row that `reader` gives; all ranks return the same metrics. Collective.

    `advance` is told the number of batches done. With `every_label` what is found has the rows of labels of several
    classes, too.

    Raises:
        Stopped: on all ranks, between two batches, when `stop` says so on one.
    """
    train_module = parts.train_module
    objective, wanted, training = train_module.objective, parts.config.evaluation, train_module.training
    train_module.eval()
    try:
        with torch.no_grad():
            tally, skips = Tally(), list[Skipped]()
            tasks = None
            if objective.tasks is not None:
                tasks = Measured(objective.tasks, objective.wanted_of_tasks(wanted), every=every_label)
            fault = (lambda: None) if tasks is None else tasks.fault
            batches = on_device(agreed_batches(reader, runtime, advance, stop, tally, skips, fault), runtime)
            if objective.ranking is not None:
                found = rank_items(parts, objective.ranking, batches, tasks, runtime)
            else:
                assert tasks is not None
                for batch in batches:
                    tasks.add(train_module.model(train_module.stage(batch)), batch)
                found = tasks.finish(runtime)
            if (combined := wanted.combined) is not None:
                value = sum(weight * found.metrics[name] for name, weight in combined.items())
                found = replace(found, metrics={COMBINED: value, **found.metrics})
            return replace(found, skipped=tally.skipped, skips=tuple(skips))
    finally:
        train_module.train(training)


def calibrate(
    parts: Parts,
    runtime: Runtime,
    reader: ParquetReader | None = None,
    advance: Callable[[int], None] | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> None:
    """Have the objective calibrate its probabilities, where the configuration asks for that. Collective.

    The same rows give the same calibration on any number of ranks: each has all predictions.

    Args:
        parts: with the weights to calibrate.
        reader: of the valid split; default: that of the configuration.
        advance, stop: as of `evaluate`.

    Raises:
        Stopped: as `evaluate`.
        UserError: no label is a probability, one has several classes and the method is for one, there is no valid
            split, or that has one class only.
    """
    method = parts.config.evaluation.calibration
    if method is None:
        return
    objective = parts.train_module.objective
    objective.check_calibration(parts.config.evaluation)
    kinds = {} if objective.tasks is None else objective.tasks.scored
    names = [name for name, kind in kinds.items() if kind != "regression"]
    if not names:
        raise UserError(f"{CALIBRATION}: {parts.config.model.name} predicts no probability to calibrate; leave it out")
    reader = reader or optional_reader(parts.config, parts, runtime, "valid")
    if reader is None:
        raise UserError(
            f"{CALIBRATION}: is fitted on the valid split, which {parts.config.data.root} has not; leave it out"
        )
    objective.set_calibrators({})
    found = evaluate(parts, reader, runtime, advance, stop, every_label=True)
    calibrators: dict[str, nn.Module] = {}
    for name in names:
        try:
            *predictions, labels, weights = found.scored[name]
            probabilities = predictions[0] if kinds[name] == "classification" else np.stack(predictions, axis=1)
            calibrators[name] = Calibrator(fit(method, probabilities, labels, weights)).to(runtime.device)
        except ValueError as error:
            raise UserError(f"{CALIBRATION}: {name} cannot be calibrated on {reader.manifest.path}: {error}") from None
    objective.set_calibrators(calibrators)
