"""Metrics of a model on a split, exact over ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from rechub_dist.batch import Batch
from rechub_dist.build import Parts, TrainStep
from rechub_dist.data.reader import ParquetReader
from rechub_dist.data.spec import WEIGHTED
from rechub_dist.distributed.runtime import Runtime
from rechub_dist.embedded import Jagged
from rechub_dist.metrics.binary import binary_metrics, regression_metrics
from rechub_dist.metrics.ranking import ranking_metrics, target_ranks
from rechub_dist.models import RecallModel
from rechub_dist.objectives import RetrievalObjective, TaskObjective

CATALOGUE_CHUNK = 8192  # items embedded at a time, over all ranks


@dataclass(frozen=True)
class Evaluation:
    """Metrics by name, and the predictions by label.

    With several labels a metric's name is `click/auc`, and `mean/auc` is the labels' mean.
    """

    metrics: dict[str, float]
    rows: int
    predictions: dict[str, np.ndarray]


def evaluate(
    step: TrainStep, parts: Parts, reader: ParquetReader, runtime: Runtime, advance: Callable[[int], None] | None = None
) -> Evaluation:
    """Evaluate on every row that `reader` gives; all ranks return the same metrics.

    `advance` is told the number of batches done.
    """
    training = step.training
    step.eval()
    try:
        with torch.no_grad():
            batches = _agreed(reader, runtime, advance)
            if isinstance(step.objective, TaskObjective):
                return _tasks(step, step.objective, batches, runtime)
            assert isinstance(step.objective, RetrievalObjective)
            return _ranking(step, step.objective, parts, batches, runtime)
    finally:
        step.train(training)


def _agreed(reader: ParquetReader, runtime: Runtime, advance: Callable[[int], None] | None) -> Iterator[Batch]:
    """The batches, on this rank's device; a rank that cannot read stops all."""
    batches = reader.batches(epoch=0)
    for done in range(1, reader.steps + 2):
        batch = runtime.together(lambda: next(batches, None))
        if batch is None:
            return
        yield batch if runtime.device.type == "cpu" else batch.to(runtime.device)
        if advance is not None:
            advance(done)


def _tasks(step: TrainStep, objective: TaskObjective, batches: Iterator[Batch], runtime: Runtime) -> Evaluation:
    names = objective.scored
    found = [torch.empty(0, len(names), 3)]
    for batch in batches:
        scores = objective.scores(step.model(step.stage(batch)), batch)
        found.append(torch.stack([torch.stack(scores[name], dim=1) for name in names], dim=1).cpu())
    rows = _gather(torch.cat(found), runtime).numpy()
    metrics: dict[str, float] = {}
    for column, (name, kind) in enumerate(names.items()):
        measure = binary_metrics if kind == "classification" else regression_metrics
        prefix = f"{name}/" if len(names) > 1 else ""
        for metric, value in measure(*rows[:, column].T).items():
            metrics[f"{prefix}{metric}"] = value
    if len(names) > 1 and all(label.type == "classification" for label in objective.labels):
        metrics["mean/auc"] = float(np.mean([metrics[f"{label.name}/auc"] for label in objective.labels]))
    return Evaluation(metrics, len(rows), {name: rows[:, column, 0] for column, name in enumerate(names)})


def _ranking(
    step: TrainStep, objective: RetrievalObjective, parts: Parts, batches: Iterator[Batch], runtime: Runtime
) -> Evaluation:
    """Rank each row's item among the whole catalogue by the user's vectors; items seen in the history left out."""
    model = step.model
    assert isinstance(model, RecallModel)
    catalogue = _catalogue(step, objective, parts, runtime)
    ranks = [torch.empty(0)]
    for batch in batches:
        user, mask = model.user(step.stage(batch))
        target = batch.feature(objective.item.feature.name).values()
        history = batch.feature(objective.history.feature.name)
        seen = Jagged(history.values(), history.lengths()[: batch.rows]) if objective.config.exclude_seen else None
        ranks.append(target_ranks(user, mask, catalogue, target, seen).cpu())
    gathered = _gather(torch.cat(ranks)[:, None], runtime)[:, 0]
    return Evaluation(ranking_metrics(gathered, objective.config.top_k), len(gathered), {})


def _catalogue(step: TrainStep, objective: RetrievalObjective, parts: Parts, runtime: Runtime) -> Tensor:
    """The vectors of all items, [N, D], on every rank."""
    model = step.model
    assert isinstance(model, RecallModel)
    item, rows = objective.item.feature.name, objective.item.table.rows
    stride = min(-(-rows // runtime.world_size), max(1, CATALOGUE_CHUNK // runtime.world_size))
    vectors = []
    for start in range(0, rows, stride * runtime.world_size):
        mine = torch.arange(start + runtime.rank * stride, min(rows, start + (runtime.rank + 1) * stride))
        jagged = {
            name: _only(item, mine, features, stride, name == WEIGHTED)
            for name, features in parts.spec.collections.items()
        }
        dense = torch.zeros(len(mine), sum(feature.dim for feature in parts.spec.dense))
        batch = Batch(len(mine), dense, jagged, torch.empty(0, 0))
        found = model.item(step.stage(batch.to(runtime.device)))
        vectors.append(_gather(found, runtime))
    return torch.cat(vectors)


def _only(feature: str, ids: Tensor, features: tuple[str, ...], stride: int, weighted: bool) -> KeyedJaggedTensor:
    """A collection in which only `feature` has ids, one a row."""
    lengths = torch.zeros(len(features), stride, dtype=torch.int32)
    if feature in features:
        lengths[features.index(feature), : len(ids)] = 1
    values = ids if feature in features else ids[:0]
    weights = torch.ones(len(values)) if weighted else None
    return KeyedJaggedTensor(list(features), values, weights, lengths=lengths.view(-1), stride=stride)


def _gather(rows: Tensor, runtime: Runtime) -> Tensor:
    """All ranks' rows, in rank order, on every rank."""
    counts = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(runtime.world_size)]
    group = runtime.control if rows.device.type == "cpu" else runtime.group
    dist.all_gather(counts, torch.tensor([len(rows)], device=rows.device), group=group)
    sizes = [int(count) for count in counts]
    padded = rows.new_zeros(max(sizes), *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
