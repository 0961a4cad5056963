"""Holds a recall bundle against its run: vectors of users and items, and the items that these find."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rechub_dist.assembly.readers import items_spec, prediction_spec
from rechub_dist.data.given import windows
from rechub_dist.data.rows import RowEncoder
from rechub_dist.evaluation.ranking import batch_of_items, item_batches, seen_items
from rechub_dist.inference.bundle.bundle import BATCH, Bundle
from rechub_dist.inference.bundle.search import NONE, Best, Flags, Floats, Ints, Pairs, products
from rechub_dist.inference.comparison import Comparison, largest
from rechub_dist.inference.from_checkpoint import batches_of, hold
from rechub_dist.inference.predict import known_items, user_vectors
from rechub_dist.inference.run import Run
from rechub_dist.objectives import Ranking

USERS: Final = 500  # whose best items are compared: each is held against every item, twice
K: Final = 10
Items = Iterable[tuple[Ints, Floats]]  # ids [n], vectors [n, D]


def compare_items(run: Run, bundle: Bundle, table: pa.Table, values: pa.Table) -> Comparison:
    """Compare on rows as files hold them, and their values. No more than a block of items is in memory at a time."""
    ranking = run.parts.train_module.objective.ranking
    assert ranking is not None
    wanted, got = _users_of_run(run, ranking, table), _users_of_bundle(bundle, values)
    differences = {"user vectors": _apart(wanted[0][wanted[1]], got[0][got[1]])}
    targets = None
    if set(bundle.columns_of("item")) <= set(values.column_names):
        targets, vectors = _items_of_rows(run, ranking, table)
        found = np.stack(bundle.vectors("item", values)["vector"].to_numpy(zero_copy_only=False))
        differences["item vectors"] = _apart(vectors, found)
    few = [(users[:USERS], live[:USERS], seen.between(0, USERS)) for users, live, seen in (wanted, got)]
    one, other = best_items(*few[0], _of_run(run, ranking)), best_items(*few[1], _of_bundle(bundle))
    metrics = {f"overlap@{K}": (1.0, _overlap(one, other))}
    if targets is not None:
        goal = targets[:USERS, None]
        metrics[f"hit_rate@{K}"] = (float((one == goal).any(axis=1).mean()), float((other == goal).any(axis=1).mean()))
    return Comparison(table.num_rows, differences, metrics, dict.fromkeys(metrics, "max"))


def best_items(users: Floats, live: Flags, seen: Pairs, items: Items) -> Ints:
    """The ids, int64 [B, 10], of the best items of users [B, Q, D] but for those that they have seen; -1 for none."""
    more = int(np.bincount(seen.users, minlength=1).max(initial=0))
    best, ids, first = Best(len(users), K + more), [np.empty(0, np.int64)], 0
    for own, vectors in items:
        best.add(products(users, live, vectors), first)
        ids.append(own)
        first += len(own)
    found = np.append(np.concatenate(ids), NONE)[best.items]  # NONE is the last place
    total = int(max(found.max(initial=0), seen.items.max(initial=0))) + 1
    rows = np.arange(len(users))[:, None]
    hidden = np.isin(rows * total + found, seen.users * total + seen.items)
    order = np.argsort(hidden | (found == NONE), axis=1, kind="stable")[:, :K]
    return np.where(np.take_along_axis(hidden, order, axis=1), NONE, np.take_along_axis(found, order, axis=1))


def _users_of_run(run: Run, ranking: Ranking, table: pa.Table) -> tuple[Floats, Flags, Pairs]:
    """Vectors [B, Q, D], which are live, and the items to leave out."""
    found, seen = [], [Pairs(np.empty(0, np.int64), np.empty(0, np.int64))]
    first = 0
    for batch in batches_of(run, table, prediction_spec(run.parts)):
        found.append([part.float().cpu().numpy() for part in user_vectors(run.parts, batch)])
        history = seen_items(ranking, batch) if run.config.evaluation.exclude_seen else None
        if history is not None:
            lengths = history.lengths.cpu().numpy()
            rows = np.repeat(np.arange(first, first + len(lengths)), lengths)
            seen.append(Pairs(rows, history.values.cpu().numpy()))
        first += batch.rows
    vectors, live = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return vectors, live.astype(np.bool_), _joined(seen)


def _users_of_bundle(bundle: Bundle, values: pa.Table) -> tuple[Floats, Flags, Pairs]:
    found, seen = [], [Pairs(np.empty(0, np.int64), np.empty(0, np.int64))]
    first = 0
    for window in windows(values, bundle.user_spec(), BATCH):
        found.append(bundle.user_vectors(window))
        if (own := bundle.seen(window)) is not None:
            seen.append(Pairs(own.users + first, own.items))
        first += window.rows
    vectors, live = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return vectors, live, _joined(seen)


def _joined(pairs: list[Pairs]) -> Pairs:
    return Pairs(np.concatenate([one.users for one in pairs]), np.concatenate([one.items for one in pairs]))


def _items_of_rows(run: Run, ranking: Ranking, table: pa.Table) -> tuple[Ints, Floats]:
    """The id of each row's item, and its vector by the run."""
    ids, vectors = [], []
    for rows in RowEncoder(items_spec(ranking, run.parts.spec)).batches(table, BATCH):
        batch = batch_of_items(rows, run.parts, ranking)
        own, found = _embedded(run, ranking, batch)
        ids.append(own)
        vectors.append(found)
    return np.concatenate(ids), np.concatenate(vectors)


def _of_run(run: Run, ranking: Ranking) -> Iterator[tuple[Ints, Floats]]:
    known = None if (ids := known_items(ranking)) is None else ids.numpy()
    for batch in item_batches(run.parts, ranking, run.runtime):
        own, vectors = _embedded(run, ranking, batch)
        if known is not None:
            there = known[np.minimum(np.searchsorted(known, own), len(known) - 1)] == own
            own, vectors = own[there], vectors[there]
        yield own, vectors


def _of_bundle(bundle: Bundle) -> Iterator[tuple[Ints, Floats]]:
    first = 0
    for vectors in bundle.catalogue.blocks():
        yield bundle.catalogue.ids[first : first + len(vectors)], vectors
        first += len(vectors)


def _embedded(run: Run, ranking: Ranking, batch: Any) -> tuple[Ints, Floats]:
    """The ids and vectors of a batch of items."""
    batch = batch.to(run.runtime.device)
    hold(run.parts, [batch])
    vectors = ranking.vectors(run.parts.train_module.stage(batch)).float().cpu().numpy()
    return batch.feature(ranking.item.feature.name).values().cpu().numpy(), vectors


def _overlap(one: Ints, other: Ints) -> float:
    """The share of each row's items that the other has, too: their mean over the rows that have any."""
    shared = ((one[:, :, None] == other[:, None, :]) & (one >= 0)[:, :, None]).any(axis=2).sum(axis=1)
    there = (one >= 0).sum(axis=1)
    return float((shared[there > 0] / there[there > 0]).mean()) if there.any() else 1.0


def _apart(one: NDArray[Any], other: NDArray[Any]) -> float:
    return largest(one, other) / max(float(np.abs(one).max(initial=0)), 1e-30)
