"""Exact search in blocks, held against a sort of all scores, row by row."""

from __future__ import annotations

import numpy as np
import pytest

from rechub_dist.inference.bundle import search
from rechub_dist.inference.bundle.search import Pairs, exact


def by_hand(
    users: np.ndarray, live: np.ndarray, items: np.ndarray, k: int, hidden: list[set[int]], among: list[int]
) -> list[list[float]]:
    """The scores of the best items of each user."""
    found = []
    for row in range(len(users)):
        vectors = users[row][live[row]].astype(np.float64)
        scores = [
            float((vectors @ items[item].astype(np.float64)).max())
            for item in among
            if item not in hidden[row] and len(vectors)
        ]
        found.append(sorted((score for score in scores if not np.isnan(score)), reverse=True)[:k])
    return found


@pytest.mark.parametrize("seed", range(20))
def test_the_best_by_hand(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(seed)
    monkeypatch.setattr(search, "_ITEMS", int(rng.integers(1, 40)))
    monkeypatch.setattr(search, "_SCORES", int(rng.integers(1, 400)))
    count, width, total, k = (int(rng.integers(1, high)) for high in (20, 4, 120, 15))
    whole = rng.integers(0, 2) == 1  # then many scores are equal
    users, items = (
        (rng.integers(-2, 3, shape) if whole else rng.standard_normal(shape)).astype(np.float32)
        for shape in ((count, width, 5), (total, 5))
    )
    items[rng.random(total) < 0.05] = np.nan
    live = rng.random((count, width)) < 0.8
    seen = [set(rng.integers(0, total, rng.integers(0, 9)).tolist()) for _ in range(count)]
    lists = [[*sorted(s), -1] for s in seen]  # -1: what is no item of the catalogue
    offsets = np.cumsum([0, *map(len, lists)])
    hidden = Pairs.of(np.array([item for each in lists for item in each]), offsets)
    among = None if seed % 2 else np.flatnonzero(rng.random(total) < 0.5)
    ids, scores = exact(users, live, items, k, hidden, among)
    wanted = by_hand(users, live, items, k, seen, list(range(total)) if among is None else among.tolist())
    for row in range(count):
        there = ids[row] >= 0
        assert list(there) == [True] * len(wanted[row]) + [False] * (k - len(wanted[row]))
        np.testing.assert_allclose(scores[row][there], wanted[row], rtol=1e-4, atol=1e-5)
        assert np.isneginf(scores[row][~there]).all()
        chosen = ids[row][there]
        assert len(set(chosen.tolist())) == len(chosen)
        assert not set(chosen.tolist()) & seen[row]
        assert among is None or set(chosen.tolist()) <= set(among.tolist())
        own = (users[row][live[row]] @ items[chosen].T).max(axis=0) if live[row].any() else np.empty(0)
        np.testing.assert_allclose(scores[row][there], own, rtol=1e-4, atol=1e-5)


def test_nothing_passes() -> None:
    ids, scores = exact(
        np.ones((2, 1, 3), np.float32), np.ones((2, 1), np.bool_), np.ones((4, 3), np.float32), 2, None,
        np.empty(0, np.int64),
    )  # fmt: skip
    assert (ids == -1).all()
    assert np.isneginf(scores).all()
