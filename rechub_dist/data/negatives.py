"""Negative ids, drawn anew for each row of each epoch from counters instead of a random stream.

A draw is a function of (seed, epoch, the feature's name, the row's position in the epoch, the index within the row)
and of the ids that the row excludes. So it does not matter which rank draws, how rows are split into batches, or
whether the run has been resumed. All arithmetic is on uint64, which wraps, and is the same on every platform.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rechub_dist.data.columns.hashing import Ids, Words, mix64, name_salt
from rechub_dist.features import NegativeFeature


class Draw(NamedTuple):
    """What the draws of a batch depend on.

    Attributes:
        position: the position in the epoch of the batch's first row.
        first, total: the index of that row in the global batch, and how many rows that has.
        places: the rows' places after the first position, int64 [n], where rows are left out; None: 0 .. n - 1.
    """

    seed: int
    epoch: int
    position: int
    first: int = 0
    total: int = 0
    places: Ids | None = None


def row_keys(draw: Draw, name: str, n: int) -> Words:
    """The key of each of n rows' draws for the feature `name`: uint64 [n]."""
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
    """A feature's ids and their number in each row, from the ids that rows have in `like` and hold in `exclude`."""
    keys = row_keys(draw, feature.name, len(like))
    if feature.uniform:
        return draw_negatives(feature, like, exclude, keys), like * feature.count
    assert cumulative is not None
    return draw_weighted(cumulative, like * feature.count, keys), like * feature.count


def draw_weighted(cumulative: NDArray[np.float64], counts: Ids, keys: Words) -> Ids:
    """Draw `counts` [n] ids for rows with the keys [n], each with a chance in proportion to its weight.

    Args:
        cumulative: the running sum of the ids' weights, float64 [ids]; the last is above 0.
    """
    _, words = _words(counts, keys)
    share = (words >> np.uint64(11)).astype(np.float64) * 2.0**-53  # uniform in [0, 1)
    return np.searchsorted(cumulative, share * cumulative[-1], side="right")


def _words(counts: Ids, keys: Words) -> tuple[Ids, Words]:
    """For each draw its row, and 64 random bits."""
    row = np.repeat(np.arange(len(counts)), counts)
    index = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
    return row, mix64(keys[row] + index.view(np.uint64))


def catalogue_share(rows: int, draw: Draw, n: int) -> tuple[Ids, Ids]:
    """The ids of 0 .. rows - 1 that n rows of a global batch hold, dealt evenly, and their number in each row."""
    ends = (draw.first + np.arange(n + 1)) * rows // max(1, draw.total)
    return np.arange(ends[0], ends[-1]), np.diff(ends)


def draw_negatives(
    feature: NegativeFeature, like: Ids, exclude: Sequence[tuple[NDArray[Any], NDArray[Any]]], keys: Words
) -> Ids:
    """Draw `feature.count` ids for each id of the feature `like`, uniform over the ids that the row does not exclude.

    For a row that excludes all ids of the table, as a user does who has seen the whole catalogue, they are uniform over
    all of them.

    Args:
        feature: what to draw.
        like: int64 [n], how many ids each row has in the feature `like`.
        exclude: (ids [m], lengths [n]), integers, of each excluded feature, row after row.
        keys: uint64 [n], of the rows (`row_keys`).

    Returns:
        int64 [feature.count * sum(like)], row after row.
    """
    n, rows = len(like), feature.table.rows
    row, words = _words(like * feature.count, keys)

    # Each excluded id once, as row * rows + id, in order: a row's excluded ids e_0 < e_1 < ... stand together.
    # An id beyond the table cannot be drawn anyway, and would stand in the next row's range.
    held = [(np.repeat(np.arange(n), lengths) * rows + ids)[ids < rows] for ids, lengths in exclude]
    taken = np.unique(np.concatenate(held)) if held else np.zeros(0, np.int64)
    ends = np.searchsorted(taken, np.arange(n + 1) * rows)
    left = rows - np.diff(ends)
    if (full := left == 0).any():  # those rows exclude nothing
        taken = taken[~full[taken // rows]]
        ends = np.searchsorted(taken, np.arange(n + 1) * rows)
        left[full] = rows
    # The k-th id that is left is k plus the number of excluded ids before it, those with e_j - j <= k. As e_j - j
    # never falls with j, one search over all rows finds it: exact, with no draw rejected.
    k = (words % left[row].astype(np.uint64)).view(np.int64)
    if not len(taken):
        return k
    owner = taken // rows
    shifted = taken - (np.arange(len(taken)) - ends[owner])
    return k + np.searchsorted(shifted, row * rows + k, side="right") - ends[row]
