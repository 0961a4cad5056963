"""Exact search: the best items of a catalogue for a batch of users, block by block. NumPy alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]

_SCORES: Final = 1 << 23  # products that are in memory at once
_ITEMS: Final = 1 << 16  # items of a block, at most
NONE: Final = -1  # where there is no item


@dataclass(frozen=True)
class Pairs:
    """Users and items that do not go together: what a user has seen.

    Attributes:
        users: int64 [n], ascending, rows of the batch.
        items: int64 [n], rows of the catalogue; those below 0 are of no item in it.
    """

    users: Ints
    items: Ints

    @classmethod
    def of(cls, items: NDArray[Any], offsets: NDArray[Any]) -> Pairs:
        """Of ragged rows: the items of user i are `items[offsets[i] : offsets[i + 1]]`."""
        return cls(np.repeat(np.arange(len(offsets) - 1), np.diff(offsets)), np.asarray(items).astype(np.int64))

    def between(self, first: int, end: int) -> Pairs:
        """Those of users first .. end - 1, who are counted from 0."""
        low, high = np.searchsorted(self.users, [first, end])
        return Pairs(self.users[low:high] - first, self.items[low:high])

    def of_users(self, users: Ints) -> Pairs:
        """Those of these users, ascending, who are then counted in this order."""
        place = np.searchsorted(users, self.users)
        there = users[np.minimum(place, len(users) - 1)] == self.users
        return Pairs(place[there], self.items[there])

    def hide(self, scores: Floats, first: int) -> None:
        """Set scores [users, n] of the items first .. first + n - 1 to -inf."""
        there = (self.items >= first) & (self.items < first + scores.shape[1])
        scores[self.users[there], self.items[there] - first] = -np.inf


def exact(
    users: Floats, live: Flags, items: Floats, k: int, hidden: Pairs | None = None, among: Ints | None = None
) -> tuple[Ints, Floats]:
    """The best items of each user by the largest product with one of the user's vectors, no item twice.

    Args:
        users: float32 [B, Q, D].
        live: bool [B, Q], which of the vectors count.
        items: float32 [N, D], also memory-mapped: it is read in blocks.
        k: at least 1.
        hidden: what to leave out.
        among: int64, ascending, the only rows of `items` to look at; default all.

    Returns:
        Rows of `items`, int64 [B, k], best first, and their scores, float32 [B, k]; -1 and -inf where a user has fewer
        items, or no live vector. A score that is no number is none. Items of equal scores stand in any order.
    """
    total = len(items) if among is None else len(among)
    found = np.full((len(users), k), NONE, np.int64), np.full((len(users), k), -np.inf, np.float32)
    if not total:
        return found
    if among is not None and hidden is not None:
        place = np.searchsorted(among, hidden.items)
        there = among[np.minimum(place, total - 1)] == hidden.items
        hidden = Pairs(hidden.users, np.where(there, place, NONE))
    block = min(_ITEMS, total)
    step = max(1, _SCORES // (block * max(1, users.shape[1])))
    for row in range(0, len(users), step):
        rows = slice(row, row + step)
        own = None if hidden is None else hidden.between(row, row + step)
        best = Best(len(users[rows]), k)
        for first in range(0, total, block):
            part = slice(first, first + block)
            vectors = np.asarray(items[part] if among is None else items[among[part]], np.float32)
            scores = products(users[rows], live[rows], vectors)
            if own is not None:
                own.hide(scores, first)
            best.add(scores, first)
        found[0][rows], found[1][rows] = best.items, best.scores
    if among is not None:
        np.copyto(found[0], among[found[0]], where=found[0] >= 0)
    return found


def products(users: Floats, live: Flags, vectors: Floats) -> Floats:
    """The largest products of each user's live vectors with n vectors, float32 [B, n]; -inf for none or no number."""
    count, width, dim = users.shape
    scores: Floats = (users.reshape(-1, dim) @ vectors.T).reshape(count, width, len(vectors))
    if not live.all():
        scores[~live] = -np.inf
    best: Floats = scores[:, 0] if width == 1 else scores.max(axis=1)
    np.copyto(best, -np.inf, where=np.isnan(best))
    return best


class Best:
    """The k best so far of each user, best first."""

    def __init__(self, users: int, k: int) -> None:
        self.items = np.full((users, k), NONE, np.int64)
        self.scores = np.full((users, k), -np.inf, np.float32)

    def add(self, scores: Floats, first: int) -> None:
        """Look at the scores [users, n] of items first .. first + n - 1, too."""
        k, width = self.scores.shape[1], scores.shape[1]
        better = scores > self.scores[:, -1:]
        if np.count_nonzero(better) > 4 * better.shape[0] * k and width > k:  # only the block's own k best can be
            better &= scores >= np.partition(scores, width - k, axis=1)[:, width - k, None]
        users, places = np.divmod(np.flatnonzero(better), width)
        self._merge(users, places + first, scores[users, places])

    def _merge(self, users: Ints, items: Ints, scores: Floats) -> None:
        if not len(users):
            return
        k = self.scores.shape[1]
        held_users, held = np.nonzero(self.items >= 0)
        self.items, self.scores = best_of(
            len(self.items),
            k,
            np.concatenate([held_users, users]),
            np.concatenate([self.items[held_users, held], items]),
            np.concatenate([self.scores[held_users, held], scores]),
        )


def best_of(count: int, k: int, users: Ints, items: Ints, scores: Floats) -> tuple[Ints, Floats]:
    """The k best of candidates [n] for each of `count` users, as `exact` returns them; no candidate is there twice."""
    order = np.lexsort((-scores, users))
    users, items, scores = users[order], items[order], scores[order]
    rank = np.arange(len(users)) - np.searchsorted(users, users)
    within = rank < k
    found = np.full((count, k), NONE, np.int64), np.full((count, k), -np.inf, np.float32)
    found[0][users[within], rank[within]] = items[within]
    found[1][users[within], rank[within]] = scores[within]
    return found
