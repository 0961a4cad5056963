"""Metrics of a model on a split, exact over ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from rechub_dist.assembly.identity import vocabularies_of
from rechub_dist.assembly.parts import Parts, TrainModule, build
from rechub_dist.assembly.readers import evaluation_reader, items_spec, read_manifest
from rechub_dist.assembly.sharded import shard_train_module
from rechub_dist.batch import Batch
from rechub_dist.checkpoint import open_checkpoints
from rechub_dist.checkpoint.state import weights_state
from rechub_dist.config import RunConfig
from rechub_dist.data.columns.hashing import mix64
from rechub_dist.data.negatives import draw_negatives
from rechub_dist.data.reader import ParquetReader
from rechub_dist.data.spec import WEIGHTED, BatchSpec
from rechub_dist.distributed.runtime import Runtime, device_type, runtime
from rechub_dist.embedded import Jagged
from rechub_dist.embedding.stage import split_dense
from rechub_dist.errors import UserError
from rechub_dist.evaluation.measured import Evaluation, Measured
from rechub_dist.features import DenseFeature, NegativeFeature
from rechub_dist.metrics.metric import Ranked
from rechub_dist.metrics.ranking import Catalogue, best_of_parts, target_ranks, top_items
from rechub_dist.metrics.recommended import RankingMetric
from rechub_dist.models import RecallModel
from rechub_dist.objectives import RetrievalObjective, TaskObjective
from rechub_dist.objectives.retrieval import SAMPLED
from rechub_dist.reporting.reporter import Reporter
from rechub_dist.skips import Skipped, Tally

CATALOGUE_CHUNK = 8192  # items embedded at a time, over all ranks


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
        found = evaluate(parts.train_module, parts, reader, rt, report.advance)
        report.skipped(data, step, (*reader.manifest.left_out, *found.skips))
        report.close()
        return step, found


def load_best(config: RunConfig, parts: Parts, rt: Runtime) -> int:
    """Shard the parts and give them the weights of the run's best checkpoint (else its newest); returns its step.

    Called on every rank, when it is known that the data fits.

    Raises:
        UserError: the run has no checkpoint, or was trained with other vocabularies.
    """
    checkpoints = open_checkpoints(config, rt)
    module = shard_train_module(parts, rt, trains=False)
    return checkpoints.load_best(weights_state(module, parts.layout), rt.together(lambda: vocabularies_of(parts)))


def evaluate(
    train_module: TrainModule,
    parts: Parts,
    reader: ParquetReader,
    runtime: Runtime,
    advance: Callable[[int], None] | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Evaluation:
    """Evaluate on every row that `reader` gives; all ranks return the same metrics.

    `advance` is told the number of batches done.

    Raises:
        Stopped: on all ranks, between two batches, when `stop` says so on one.
    """
    training = train_module.training
    train_module.eval()
    try:
        with torch.no_grad():
            tally, skips, objective, wanted = Tally(), list[Skipped](), train_module.objective, parts.config.evaluation
            tasks = None
            if isinstance(objective, TaskObjective):
                tasks = Measured(objective, wanted.wanted)
            elif isinstance(objective, RetrievalObjective) and objective.tasks is not None:
                tasks = Measured(objective.tasks, objective.of_tasks(wanted))
            fault = (lambda: None) if tasks is None else tasks.fault
            batches = on_device(agreed_batches(reader, runtime, advance, stop, tally, skips, fault), runtime)
            if isinstance(objective, RetrievalObjective):
                found = _ranking(train_module, objective, parts, batches, tasks, runtime)
            else:
                assert tasks is not None
                for batch in batches:
                    tasks.add(train_module.model(train_module.stage(batch)), batch)
                found = tasks.finish(runtime)
            return replace(found, skipped=tally.skipped, skips=tuple(skips))
    finally:
        train_module.train(training)


def agreed_batches(
    reader: ParquetReader,
    runtime: Runtime,
    advance: Callable[[int], None] | None,
    stop: Callable[[], bool],
    tally: Tally,
    skips: list[Skipped],
    fault: Callable[[], str | None] = lambda: None,
) -> Iterator[Batch]:
    """The batches, in host memory; a rank that cannot read stops all. In the end, the rows have to add up.

    What `fault` says of the batches so far, where it says anything, stops all ranks as well.
    """
    batches = reader.batches(epoch=0)
    read = skipped = 0
    notices: list[Skipped] = []
    for done in range(1, reader.steps + 2):
        batch, message = None, fault()
        try:
            batch = next(batches, None)
        except UserError as error:
            message = message or str(error)
        runtime.raise_together(message, stop=stop())
        if batch is None:
            tally.add(*runtime.all_reduce_sum(torch.tensor([read, skipped])).tolist())
            skips += tally.note(runtime.gather_list(notices))
            tally.check(reader.rows, whole=True, what=reader.manifest.path)
            return
        read, skipped = read + batch.rows, skipped + batch.skipped
        notices += batch.notices
        yield batch
        if advance is not None:
            advance(done)


def on_device(batches: Iterator[Batch], runtime: Runtime) -> Iterator[Batch]:
    """The batches, on this rank's device; on a GPU the next one is copied while the one before is computed."""
    if runtime.device.type == "cpu":
        yield from batches
        return
    side = torch.cuda.Stream(runtime.device)
    ahead: Batch | None = None
    for batch in batches:
        with torch.cuda.stream(side):
            copied = batch.to(runtime.device, non_blocking=True)
        if ahead is not None:
            yield ahead
        here = torch.cuda.current_stream(runtime.device)
        here.wait_stream(side)
        copied.record_stream(here)
        ahead = copied
    if ahead is not None:
        yield ahead


def _ranking(
    train_module: TrainModule,
    objective: RetrievalObjective,
    parts: Parts,
    batches: Iterator[Batch],
    tasks: Measured | None,
    runtime: Runtime,
) -> Evaluation:
    """Rank each row's item among the whole catalogue, or what the user has not seen of it, by the user's vectors.

    Each rank scores all ranks' users against its own part of the catalogue. Auxiliary tasks are measured as well.
    """
    model, config = train_module.model, parts.config.evaluation
    assert isinstance(model, RecallModel)
    catalogue = catalogue_of(train_module, objective, parts, runtime)
    metrics = objective.rankings(config)
    depth = max((metric.depth for metric in metrics.values()), default=0)
    sampled = {name: metric for name, metric in objective.rankings(config).items() if not metric.depth}
    ranked = 0
    for batch in batches:
        embedded = train_module.stage(batch)
        user, mask = model.user(embedded)
        if tasks is not None:
            tasks.add(model(embedded), batch)
        target = batch.feature(objective.item.feature.name).values()
        seen = seen_items(objective, batch)
        rows = [runtime.gather(rows) for rows in (user, mask, target)]
        hidden = None
        if seen is not None and config.exclude_seen:
            hidden = Jagged(runtime.gather(seen.values), runtime.gather(seen.lengths))
        places = target_ranks(rows[0], rows[1], catalogue, rows[2], hidden, total=runtime.all_reduce_sum)
        top = None
        if depth:
            ids, scores = (runtime.gather(part) for part in top_items(rows[0], rows[1], catalogue, depth, hidden))
            top = best_of_parts(ids, scores, runtime.world_size, depth)[0]
        for metric in metrics.values():
            metric.update(Ranked(places, rows[2], top, len(catalogue.place)))
        if config.sampled_items is not None:
            among = runtime.gather(_drawn(objective, config.sampled_items, target, seen, parts))
            places = target_ranks(rows[0], rows[1], catalogue, rows[2], among=among, total=runtime.all_reduce_sum)
            for metric in sampled.values():
                metric.update(Ranked(places, rows[2], None, len(catalogue.place)))
        ranked += len(places)
    values = {name: _final(metric, runtime) for name, metric in metrics.items()}
    if config.sampled_items is not None:
        values |= {f"{SAMPLED}{name}": _final(metric, runtime) for name, metric in sampled.items()}
    of_tasks = Evaluation({}, 0, {}) if tasks is None else tasks.finish(runtime)
    return Evaluation(values | of_tasks.metrics, ranked, of_tasks.predictions)


def _final(metric: RankingMetric, runtime: Runtime) -> float:
    metric.merge(runtime)
    return metric.compute()


def seen_items(objective: RetrievalObjective, batch: Batch) -> Jagged | None:
    """The items that the model reads as the user's history."""
    if objective.history is None:
        return None
    history = batch.feature(objective.history.name)
    return Jagged(history.values(), history.lengths()[: batch.rows])


def _drawn(objective: RetrievalObjective, count: int, target: Tensor, seen: Jagged | None, parts: Parts) -> Tensor:
    """Items for each row, uniform among those that it does not hold, int64 [B, count]; the same at every evaluation.

    They depend on the seed and the row's items alone, so neither on ranks nor on the order of the rows.
    """
    ids, n = target.cpu().numpy(), len(target)
    keys = mix64(ids.view(np.uint64) ^ mix64(np.array([parts.config.seed], np.uint64)))
    exclude = [(ids, np.ones(n, np.int64))]
    if seen is not None:
        values, lengths = seen.values.cpu().numpy(), seen.lengths.long().cpu().numpy()
        np.add.at(keys, np.repeat(np.arange(n), lengths), mix64(values.view(np.uint64)))
        exclude.append((values, lengths))
    feature = NegativeFeature("sampled", objective.item.table, like=objective.item.feature.name, count=count)
    drawn = draw_negatives(feature, np.ones(n, np.int64), exclude, mix64(keys))
    return torch.from_numpy(drawn).view(n, count).to(target.device)


def catalogue_of(train_module: TrainModule, objective: RetrievalObjective, parts: Parts, runtime: Runtime) -> Catalogue:
    """This rank's part of the items: every rank has about as many."""
    model = train_module.model
    assert isinstance(model, RecallModel)
    rows = objective.item.table.rows
    ids, vectors = [torch.empty(0, dtype=torch.int64)], []
    for batch in _item_batches(objective, parts, runtime):
        ids.append(batch.feature(objective.item.feature.name).values())
        vectors.append(model.item(train_module.stage(batch.to(runtime.device))))
    held = torch.cat(ids)
    _check_catalogue(held, rows, parts, runtime)
    place = torch.full((rows,), -1)
    place[held] = torch.arange(len(held))
    return Catalogue(torch.cat(vectors), place.to(runtime.device))


def _item_batches(objective: RetrievalObjective, parts: Parts, runtime: Runtime) -> Iterator[Batch]:
    """This rank's share of all items: ids alone, or, where items have further features, rows of the data's `items`."""
    if objective.ids_alone:
        item, rows = objective.item.feature.name, objective.item.table.rows
        share = -(-rows // runtime.world_size)
        stride = min(share, max(1, CATALOGUE_CHUNK // runtime.world_size))
        for start in range(0, share, stride):
            first = runtime.rank * share + start
            mine = torch.arange(min(first, rows), min(first + stride, (runtime.rank + 1) * share, rows))
            one = KeyedJaggedTensor([item], mine, lengths=_ones(len(mine), stride), stride=stride)
            dense = torch.zeros(len(mine), sum(feature.dim for feature in parts.spec.dense))
            jagged = _only(parts.spec.collections, one, stride, {})
            weights = with_no_weights(parts.spec, {}, dense)
            yield Batch(len(mine), dense, jagged, torch.empty(len(mine), 0), id_weights=weights)
        return
    spec = items_spec(objective)
    manifest = read_manifest(parts.config, runtime, parts.config.data.items, spec, may_skip=False)
    rank, world = runtime.rank, runtime.world_size
    reader = runtime.together(
        lambda: ParquetReader(
            manifest,
            spec,
            batch_size=CATALOGUE_CHUNK,
            rank=rank,
            world_size=world,
            shuffle=False,
            streams=world,
        )
    )
    for batch in agreed_batches(reader, runtime, None, lambda: False, Tally(), []):
        yield batch_of_items(batch, objective, parts)


def batch_of_items(batch: Batch, objective: RetrievalObjective, parts: Parts) -> Batch:
    """A batch of `items_spec` as the stage wants it: in whole collections, without ids of what is no item's."""
    dense = with_missing(batch.dense, objective.item_dense, parts.spec.dense)
    given = batch.jagged["items"]
    jagged = _only(parts.spec.collections, given, given.stride(), batch.id_weights)
    weights = with_no_weights(parts.spec, batch.id_weights, dense)
    return Batch(batch.rows, dense, jagged, batch.labels, id_weights=weights)


def with_missing(dense: Tensor, there: tuple[DenseFeature, ...], wanted: tuple[DenseFeature, ...]) -> Tensor:
    """The features `there`, which lie side by side in `dense`, in their places among `wanted`, zeros in the others."""
    zeros = {feature.name: dense.new_zeros(len(dense), feature.dim) for feature in wanted}
    return torch.cat([dense.new_zeros(len(dense), 0), *(zeros | split_dense(dense, there)).values()], dim=1)


def with_no_weights(spec: BatchSpec, given: Mapping[str, Tensor], near: Tensor) -> dict[str, Tensor]:
    """The ids' weights by feature, empty for those that are left out of a batch; on the device of `near`."""
    return {feature.name: near.new_zeros(0) for feature in spec.weighted} | dict(given)


def _ones(n: int, stride: int) -> Tensor:
    lengths = torch.zeros(stride, dtype=torch.int32)
    lengths[:n] = 1
    return lengths


def _only(
    collections: Mapping[str, tuple[str, ...]],
    given: KeyedJaggedTensor,
    stride: int,
    id_weights: Mapping[str, Tensor],
) -> dict[str, KeyedJaggedTensor]:
    """Whole collections in which only the features of `given` have ids."""
    features = given.to_dict()
    whole = {}
    for name, keys in collections.items():
        there = [key for key in keys if key in features]
        absent = torch.zeros(stride, dtype=torch.int32)
        lengths = [features[key].lengths() if key in features else absent for key in keys]
        ids = torch.cat([torch.empty(0, dtype=torch.int64), *(features[key].values() for key in there)])
        weights = None
        if name == WEIGHTED:
            each = [id_weights.get(key, torch.ones(len(features[key].values()))) for key in there]
            weights = torch.cat([torch.empty(0), *each])
        whole[name] = KeyedJaggedTensor(list(keys), ids, weights, lengths=torch.cat(lengths), stride=stride)
    return whole


def _check_catalogue(held: Tensor, rows: int, parts: Parts, runtime: Runtime) -> None:
    """Refuse items that are missing, or there twice."""
    counts = runtime.all_reduce_sum(torch.bincount(held, minlength=rows))
    wrong = (counts != 1).nonzero()[:, 0]
    if len(wrong):
        raise UserError(
            f"data.items: {parts.config.data.items} below {parts.config.data.root} holds item {int(wrong[0])} "
            f"{int(counts[wrong[0]])} times; each of the {rows} items must have one row"
        )
