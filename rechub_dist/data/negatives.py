"""Negative ids, drawn anew for each row of each epoch with a counter-based generator.

A draw is a function of (seed, epoch, the feature's name, the row's position in the epoch, the index within the row)
and of the ids that the row excludes. So it does not depend on the rank, the batch size or restarts. All arithmetic is
on uint64 with wrap-around, the same on every platform.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rechub_dist.data.columns.hashing import Ids, Words, mix64, name_salt
from rechub_dist.features import NegativeFeature


class Draw(NamedTuple):
    """What the draws for a batch depend on.

    Attributes:
        position: the position in the epoch of the batch's first row.
        first, total: the index of that row in the global batch, and the number of rows of the global batch.
        places: if rows are skipped, the rows' positions relative to the first, int64 [n]; None for 0 .. n - 1.
    """

    seed: int
    epoch: int
    position: int
    first: int = 0
    total: int = 0
    places: Ids | None = None


def row_keys(draw: Draw, name: str, n: int) -> Words:
    """The keys of n rows for draws of the feature `name`, uint64 [n]."""
    key = mix64(np.array([draw.seed], np.uint64))
    key = mix64(mix64(key ^ np.uint64(draw.epoch)) ^ name_salt(name))
    places = np.arange(n, dtype=np.uint64) if draw.places is None else draw.places.view(np.uint64)
    return mix64(key ^ (np.uint64(draw.position) + places))


def draw_ids(
    feature: NegativeFeature,
    like: Ids,
    exclude: Sequence[tuple[NDArray[Any], NDArray[Any]]],
    cumulative: NDArray[np.float64] | None,
    draw: Draw,
) -> tuple[Ids, Ids]:
    """The ids of a feature, int64, row by row, and their number in each row, int64 [n].

    Args:
        feature: what to draw.
        like: int64 [n], the number of ids of each row in the feature `like`.
        exclude: as in `draw_negatives`.
        cumulative: as in `draw_weighted`, for a feature that is not uniform; else None.
        draw: what the draws depend on.
    """
    keys = row_keys(draw, feature.name, len(like))
    if feature.uniform:
        return draw_negatives(feature, like, exclude, keys), like * feature.count
    assert cumulative is not None
    return draw_weighted(cumulative, like * feature.count, keys), like * feature.count


def draw_weighted(cumulative: NDArray[np.float64], counts: Ids, keys: Words) -> Ids:
    """Ids drawn in proportion to their weights, `counts`, int64 [n], of them for each row: int64 [sum], row by row.

    Args:
        cumulative: the running sum of the ids' weights, float64 [ids]; the last is above 0.
        counts: the number of ids to draw for each row.
        keys: uint64 [n], of the rows (`row_keys`).
    """
    _, words = _words(counts, keys)
    share = (words >> np.uint64(11)).astype(np.float64) * 2.0**-53  # uniform in [0, 1)
    return np.searchsorted(cumulative, share * cumulative[-1], side="right")


def _words(counts: Ids, keys: Words) -> tuple[Ids, Words]:
    """For each draw its row, int64, and 64 random bits, uint64."""
    row = np.repeat(np.arange(len(counts)), counts)
    index = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
    return row, mix64(keys[row] + index.view(np.uint64))


def catalogue_share(rows: int, draw: Draw, n: int) -> tuple[Ids, Ids]:
    """The part of ids 0 .. rows - 1 that n rows of a global batch get when all are spread evenly; and their lengths."""
    ends = (draw.first + np.arange(n + 1)) * rows // max(1, draw.total)
    return np.arange(ends[0], ends[-1]), np.diff(ends)


def draw_negatives(
    feature: NegativeFeature, like: Ids, exclude: Sequence[tuple[NDArray[Any], NDArray[Any]]], keys: Words
) -> Ids:
    """Draw `feature.count` ids for each id of the feature `like`, uniform over the ids that the row does not exclude.

    A row that excludes all ids of the table, as of a user who has seen the whole catalogue, gets any of them.

    Args:
        feature: what to draw.
        like: int64 [n], the number of ids of each row in the feature `like`.
        exclude: for each excluded feature its ids [m], row by row, and their number in each row [n], integers.
        keys: uint64 [n], of the rows (`row_keys`).

    Returns:
        int64 [feature.count * sum(like)], row by row.
    """
    n, rows = len(like), feature.table.rows
    row, words = _words(like * feature.count, keys)

    # Each excluded id once, as row * rows + id, sorted: a row's excluded ids e_0 < e_1 < ... are adjacent. Ids beyond
    # the table cannot be drawn anyway, and would be in the next row's range.
    held = [(np.repeat(np.arange(n), lengths) * rows + ids)[ids < rows] for ids, lengths in exclude]
    taken = np.unique(np.concatenate(held)) if held else np.zeros(0, np.int64)
    ends = np.searchsorted(taken, np.arange(n + 1) * rows)
    left = rows - np.diff(ends)
    if (full := left == 0).any():  # these rows exclude nothing
        taken = taken[~full[taken // rows]]
        ends = np.searchsorted(taken, np.arange(n + 1) * rows)
        left[full] = rows
    # The k-th id that is left is k plus the number of excluded ids before it, those with e_j - j <= k. As e_j - j never
    # decreases in j, one search over all rows finds it: exact, without rejection.
    k = (words % left[row].astype(np.uint64)).view(np.int64)
    if not len(taken):
        return k
    owner = taken // rows
    shifted = taken - (np.arange(len(taken)) - ends[owner])
    return k + np.searchsorted(shifted, row * rows + k, side="right") - ends[row]
