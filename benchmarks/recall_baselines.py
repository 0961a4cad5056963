"""What a recall model has to beat, without learning: popularity and item-kNN, ranked against all items.

    python benchmarks/recall_baselines.py data/movielens_1m_sequence
    python benchmarks/recall_baselines.py data/diginetica --keep-seen

The folder is a prepared one with the columns `history` and `item`. Both learn from the rows of `train` alone (one row a
user or session: its history and its item), as the models do.

    popularity   score(i) = the number of training events of i

    item-kNN     score(i | h) = sum over the distinct items j of the last `--last` of h, j != i, of sim(i, j)
                 sim(i, j) = |U_i & U_j| / sqrt(|U_i| |U_j|)         the cosine of the items' user sets

where U_i is the set of training rows in which i occurs, and j counts only where i is among its `--neighbours` nearest
items (those that tie with the last of them included).

History is cut to the schema's `max_length` first, and what is left of it is not ranked unless `--keep-seen` (the target
always is), both as in our evaluation; where sessions come back to their items, as in Diginetica, the published figures
keep what was seen. A tie counts half a place for each tied competitor, as in `rechub_dist/metrics/ranking.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow.parquet as pq
import torch
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from scipy import sparse

from rechub_dist.config import read_yaml
from rechub_dist.errors import UserError
from rechub_dist.features import SequenceFeature, SparseFeature
from rechub_dist.metrics.ranking import ranking_metrics
from rechub_dist.schema import parse_schema

SCORES_AT_ONCE = 1 << 22  # elements of the largest temporary
DECIMALS = 9  # equal sums, taken in another order, differ far behind; rounding makes them tie
READ_ROWS = 65_536

Array = NDArray[Any]


@dataclass(frozen=True)
class Rows:
    """Rows with a target each: histories one after another."""

    history: Array  # int [H]
    lengths: Array  # int [B]
    item: Array  # int [B]

    def last(self, count: int) -> Rows:
        """The newest `count` items of each history."""
        ends = np.cumsum(self.lengths)
        from_end = np.repeat(ends, self.lengths) - np.arange(len(self.history))
        return Rows(self.history[from_end <= count], np.minimum(self.lengths, count), self.item)

    def sets(self, items: int, *, with_item: bool = False) -> sparse.csr_matrix:
        """The items of each row, 1 where one occurs [B, items]."""
        owners, ids = np.repeat(np.arange(len(self.item)), self.lengths), self.history
        if with_item:
            owners, ids = np.append(owners, np.arange(len(self.item))), np.append(ids, self.item)
        matrix = sparse.csr_matrix((np.ones(len(ids)), (owners, ids)), shape=(len(self.item), items))
        matrix.data[:] = 1  # twice is once
        return matrix


class Popularity:
    """The same scores for all."""

    def __init__(self, counts: Array) -> None:
        self.counts = counts.astype(np.float64)

    def scores(self, rows: Rows) -> Array:
        """[B, items]."""
        return np.broadcast_to(self.counts, (len(rows.item), len(self.counts)))


class ItemKNN:
    """Cosine of the items' user sets, the `neighbours` nearest of each item; 0 keeps all."""

    def __init__(self, sets: sparse.csr_matrix, neighbours: int, last: int) -> None:
        self.last = last
        norms = np.sqrt(np.asarray(sets.sum(axis=0)).ravel())
        scaled = (sets @ sparse.diags(1 / np.maximum(norms, 1))).tocsr()
        by_item = scaled.T.tocsr()
        chunk = max(1, SCORES_AT_ONCE // sets.shape[1])
        blocks = []
        for start in range(0, sets.shape[1], chunk):
            block = (by_item[start : start + chunk] @ scaled).tocoo()
            keep = block.col != block.row + start  # no item is its own neighbour
            shape = block.shape
            block = sparse.csr_matrix((block.data[keep].round(DECIMALS), (block.row[keep], block.col[keep])), shape)
            blocks.append(_nearest(block, neighbours) if neighbours else block)
        self.similar = sparse.vstack(blocks, format="csr")

    def scores(self, rows: Rows) -> Array:
        """[B, items]."""
        return (rows.last(self.last).sets(self.similar.shape[0]) @ self.similar).toarray().round(DECIMALS)


def _nearest(block: sparse.csr_matrix, count: int) -> sparse.csr_matrix:
    """The `count` largest entries of each row, and those that tie with the last of them."""
    for start, end in zip(block.indptr[:-1], block.indptr[1:], strict=True):
        if end - start > count:
            values = block.data[start:end]
            values[values < np.partition(values, -count)[-count]] = 0
    block.eliminate_zeros()
    return block


def target_ranks(scores: Array, rows: Rows, *, exclude_seen: bool) -> Array:
    """Each target's place among the items, 0 for the best, half a place for a tie [B]."""
    own = scores[np.arange(len(rows.item)), rows.item][:, None]
    competes = np.ones(scores.shape, bool)
    if exclude_seen:
        competes[np.repeat(np.arange(len(rows.item)), rows.lengths), rows.history] = False
    competes[np.arange(len(rows.item)), rows.item] = False
    ahead = ((scores > own) & competes).sum(axis=1)
    return ahead + 0.5 * ((scores == own) & competes).sum(axis=1)


def read(folder: Path, max_length: int | None) -> Iterator[Rows]:
    """The rows of a split, some at a time, the newest `max_length` items of a history."""
    for file in sorted(folder.glob("*.parquet")):
        for batch in pq.ParquetFile(file).iter_batches(READ_ROWS, columns=["history", "item"]):
            lengths = np.diff(batch["history"].offsets.to_numpy())
            rows = Rows(batch["history"].flatten().to_numpy(), lengths, batch["item"].to_numpy())
            yield rows if max_length is None else rows.last(max_length)


def evaluate(model: Popularity | ItemKNN, parts: Iterator[Rows], items: int, *, exclude_seen: bool) -> Array:
    """The ranks of all rows."""
    chunk = max(1, SCORES_AT_ONCE // items)
    ranks = [np.empty(0)]
    for rows in parts:
        ends = np.concatenate(([0], np.cumsum(rows.lengths)))
        for start in range(0, len(rows.item), chunk):
            stop = min(start + chunk, len(rows.item))
            few = Rows(rows.history[ends[start] : ends[stop]], rows.lengths[start:stop], rows.item[start:stop])
            ranks.append(target_ranks(model.scores(few), few, exclude_seen=exclude_seen))
    return np.concatenate(ranks)


def learn(folder: Path, items: int, neighbours: int, last: int) -> dict[str, Popularity | ItemKNN]:
    """Both from the rows of a split; all of their histories count."""
    counts, sets = np.zeros(items, np.int64), []
    for rows in read(folder, None):
        counts += np.bincount(rows.history, minlength=items) + np.bincount(rows.item, minlength=items)
        sets.append(rows.sets(items, with_item=True))
    return {
        "popularity": Popularity(counts),
        f"item-kNN, {neighbours or 'all'} neighbours": ItemKNN(sparse.vstack(sets, format="csr"), neighbours, last),
    }


def main(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A prepared folder.")],
    split: Annotated[str, typer.Option(help="The split to rank.")] = "test",
    exclude_seen: Annotated[
        bool, typer.Option("--exclude-seen/--keep-seen", help="Leave the history's items out of the ranking.")
    ] = True,
    neighbours: Annotated[int, typer.Option(min=0, help="Neighbours of an item; 0 for all.")] = 100,
    last: Annotated[int, typer.Option(min=1, help="Items of a history that count for item-kNN.")] = 20,
    top_k: Annotated[list[int] | None, typer.Option("--k", min=1, help="Places that count; default 5, 10, 20.")] = None,
) -> None:
    """Rank and print."""
    schema = parse_schema(read_yaml(folder / "dataset.yaml"))
    history, item = schema["history"], schema["item"]
    if not isinstance(history, SequenceFeature) or not isinstance(item, SparseFeature):
        raise UserError(f"{folder}: history must be a sequence and item sparse")
    items, ks = item.table.rows, top_k or [5, 10, 20]
    names = [f"{metric}@{k}" for metric in ("hit_rate", "ndcg", "mrr") for k in ks]
    title = f"{folder.name}, {split}, {items:,} items, seen items {'excluded' if exclude_seen else 'kept'}"
    table = Table("", *names, title=title, title_justify="left")
    number = 0
    for name, model in learn(folder / "train", items, neighbours, last).items():
        ranks = evaluate(model, read(folder / split, history.max_length), items, exclude_seen=exclude_seen)
        found, number = ranking_metrics(torch.from_numpy(ranks), ks), len(ranks)
        table.add_row(name, *(f"{found[metric]:.4f}" for metric in names))
    console = Console()
    if not console.is_terminal:
        console.width = 160
    console.print(table)
    console.print(f"{number:,} rows", highlight=False)


if __name__ == "__main__":
    typer.run(main)
