"""Ranking of the whole catalogue for users, each rank with its own part of the items."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from rechub_dist.assembly.parts import Parts
from rechub_dist.assembly.readers import items_spec, read_manifest
from rechub_dist.batch import Batch
from rechub_dist.data.columns.hashing import mix64
from rechub_dist.data.negatives import draw_negatives
from rechub_dist.data.reader import ParquetReader
from rechub_dist.data.spec import WEIGHTED, BatchSpec
from rechub_dist.distributed.runtime import Runtime
from rechub_dist.embedded import Jagged
from rechub_dist.embedding.stage import split_dense
from rechub_dist.errors import UserError
from rechub_dist.evaluation.batches import agreed_batches
from rechub_dist.evaluation.measured import Evaluation, Measured
from rechub_dist.features import DenseFeature, NegativeFeature
from rechub_dist.metrics.metric import Ranked
from rechub_dist.metrics.ranking import Catalogue, best_of_parts, target_ranks, top_items
from rechub_dist.metrics.recommended import RankingMetric
from rechub_dist.objectives import Ranking
from rechub_dist.objectives.base import SAMPLED
from rechub_dist.skips import Tally

CATALOGUE_CHUNK = 8192  # items embedded at a time, over all ranks


def rank_items(
    parts: Parts, ranking: Ranking, batches: Iterator[Batch], tasks: Measured | None, runtime: Runtime
) -> Evaluation:
    """Rank each row's item among the whole catalogue, or what the user has not seen of it, by the user's vectors.

    Each rank scores all ranks' users against its own part of the catalogue. Auxiliary tasks are measured as well.
    """
    step, config = parts.train_module, parts.config.evaluation
    catalogue = catalogue_of(parts, ranking, runtime)
    metrics = step.objective.rankings(config)
    depth = max((metric.depth for metric in metrics.values()), default=0)
    sampled = {name: metric for name, metric in step.objective.rankings(config).items() if not metric.depth}
    ranked = 0
    for batch in batches:
        embedded = step.stage(batch)
        user, mask = ranking.user(embedded)
        if tasks is not None:
            tasks.add(step.model(embedded), batch)
        target = batch.feature(ranking.item.feature.name).values()
        seen = seen_items(ranking, batch)
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
            among = runtime.gather(_drawn(ranking, config.sampled_items, target, seen, parts))
            places = target_ranks(rows[0], rows[1], catalogue, rows[2], among=among, total=runtime.all_reduce_sum)
            for metric in sampled.values():
                metric.update(Ranked(places, rows[2], None, len(catalogue.place)))
        ranked += len(places)
    values = {name: _final(metric, runtime) for name, metric in metrics.items()}
    if config.sampled_items is not None:
        values |= {f"{SAMPLED}{name}": _final(metric, runtime) for name, metric in sampled.items()}
    of_tasks = Evaluation({}, 0, {}) if tasks is None else tasks.finish(runtime)
    return Evaluation(values | of_tasks.metrics, ranked, of_tasks.scored)


def _final(metric: RankingMetric, runtime: Runtime) -> float:
    metric.merge(runtime)
    return metric.compute()


def seen_items(ranking: Ranking, batch: Batch) -> Jagged | None:
    """The items that the model reads as the users' histories; None where it reads none."""
    if ranking.history is None:
        return None
    history = batch.feature(ranking.history.name)
    return Jagged(history.values(), history.lengths()[: batch.rows])


def _drawn(ranking: Ranking, count: int, target: Tensor, seen: Jagged | None, parts: Parts) -> Tensor:
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
    feature = NegativeFeature("sampled", ranking.item.table, like=ranking.item.feature.name, count=count)
    drawn = draw_negatives(feature, np.ones(n, np.int64), exclude, mix64(keys))
    return torch.from_numpy(drawn).view(n, count).to(target.device)


def catalogue_of(parts: Parts, ranking: Ranking, runtime: Runtime) -> Catalogue:
    """This rank's part of the items: every rank has about as many. Collective.

    Raises:
        UserError: on all ranks, where the data's items are not each of the table's ids once.
    """
    rows = ranking.item.table.rows
    ids, vectors = [torch.empty(0, dtype=torch.int64)], []
    for batch in item_batches(parts, ranking, runtime):
        ids.append(batch.feature(ranking.item.feature.name).values())
        vectors.append(ranking.vectors(parts.train_module.stage(batch.to(runtime.device))))
    held = torch.cat(ids)
    _check_catalogue(held, rows, parts, runtime)
    place = torch.full((rows,), -1)
    place[held] = torch.arange(len(held))
    return Catalogue(torch.cat(vectors), place.to(runtime.device))


def item_batches(parts: Parts, ranking: Ranking, runtime: Runtime) -> Iterator[Batch]:
    """This rank's share of all items: ids alone, or, where items have further features, rows of the data's `items`."""
    if ranking.ids_alone:
        item, rows = ranking.item.feature.name, ranking.item.table.rows
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
    spec = items_spec(ranking, parts.spec)
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
        yield batch_of_items(batch, parts, ranking)


def batch_of_items(batch: Batch, parts: Parts, ranking: Ranking) -> Batch:
    """A batch of `items_spec` as the stage wants it: in whole collections, without ids of what is no item's."""
    dense = with_missing(batch.dense, ranking.dense, parts.spec.dense)
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
