from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from rechub_dist.embedded import Jagged
from rechub_dist.metrics import ranking
from rechub_dist.metrics.binary import binary_metrics, regression_metrics
from rechub_dist.metrics.ranking import Catalogue, ranking_metrics

rows = st.lists(
    st.tuples(st.sampled_from([0.1, 0.2, 0.5, 0.7, 0.9]), st.integers(0, 1), st.sampled_from([0.0, 0.5, 1.0, 3.0])),
    min_size=1,
    max_size=30,
)


@settings(max_examples=60, deadline=None)
@given(rows)
def test_auc_counts_pairs(data: list[tuple[float, int, float]]) -> None:
    p, y, w = (np.array(column, dtype=float) for column in zip(*data, strict=True))
    won = total = 0.0
    for i in np.flatnonzero(y == 1):
        for j in np.flatnonzero(y == 0):
            total += w[i] * w[j]
            won += w[i] * w[j] * (1.0 if p[i] > p[j] else 0.5 if p[i] == p[j] else 0.0)
    auc = binary_metrics(p, y, w)["auc"]
    assert auc == pytest.approx(won / total) if total else math.isnan(auc)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_binary_metrics_against_sklearn(weighted: bool, dtype: type) -> None:
    rng = np.random.default_rng(0)
    p = rng.random(500).round(2).astype(dtype)  # ties, and some exact 0 and 1
    y = (rng.random(500) < 0.3 + 0.4 * p).astype(np.float32)
    w = rng.random(500) if weighted else None
    metrics = binary_metrics(p, y, w)
    assert metrics["auc"] == pytest.approx(sk.roc_auc_score(y, p, sample_weight=w), abs=1e-12)
    assert metrics["log_loss"] == pytest.approx(sk.log_loss(y, p, sample_weight=w), rel=1e-6)
    rate = np.average(y, weights=w)
    constant = sk.log_loss(y, np.full(500, rate), sample_weight=w)
    assert metrics["normalized_entropy"] == pytest.approx(metrics["log_loss"] / constant)
    assert metrics["calibration"] == pytest.approx(np.average(p, weights=w) / rate, rel=1e-6)


def test_log_loss_stays_finite_and_constant_predictions_have_entropy_one() -> None:
    assert binary_metrics(np.array([0.0, 1.0]), np.array([1, 0]))["log_loss"] == pytest.approx(
        -math.log(2.2e-16), rel=0.01
    )
    assert binary_metrics(np.full(4, 0.25), np.array([1, 0, 0, 0]))["normalized_entropy"] == pytest.approx(1)
    assert binary_metrics(np.full(4, 0.25), np.array([1, 0, 0, 0]))["calibration"] == pytest.approx(1)


def test_weights_repeat_rows() -> None:
    rng = np.random.default_rng(1)
    p, y, w = rng.random(50), rng.integers(0, 2, 50), rng.integers(0, 4, 50)
    repeated = binary_metrics(np.repeat(p, w), np.repeat(y, w))
    assert binary_metrics(p, y, w) == pytest.approx(repeated)


@pytest.mark.parametrize("label", [0, 1])
def test_one_class_has_no_auc(label: int) -> None:
    metrics = binary_metrics(np.array([0.2, 0.4]), np.full(2, label))
    assert math.isnan(metrics["auc"])
    assert math.isnan(metrics["normalized_entropy"])
    assert math.isfinite(metrics["log_loss"])


def test_nothing_to_measure_is_nan() -> None:
    assert all(math.isnan(value) for value in binary_metrics(np.empty(0), np.empty(0)).values())
    assert all(math.isnan(value) for value in binary_metrics(np.ones(2), np.ones(2), np.zeros(2)).values())
    assert all(math.isnan(value) for value in binary_metrics(np.array([0.1, np.nan]), np.array([0, 1])).values())


@pytest.mark.parametrize(
    ("p", "y", "w", "message"),
    [
        ([0.1], [2], None, "a label is 2.0: labels must be 0 or 1"),
        ([0.1], [np.nan], None, "a label is nan"),
        ([0.1, 0.2], [1], None, "must have one shape"),
        ([0.1], [1], [-1.0], "a weight is -1.0"),
        ([[0.1]], [[1]], None, "must have one shape"),
    ],
)
def test_bad_rows(p: list, y: list, w: list | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        binary_metrics(np.array(p), np.array(y), None if w is None else np.array(w))


def test_regression_metrics() -> None:
    rng = np.random.default_rng(2)
    p, y, w = rng.normal(size=(3, 40))
    w = np.abs(w)
    metrics = regression_metrics(p, y, w)
    assert metrics["mse"] == pytest.approx(sk.mean_squared_error(y, p, sample_weight=w))
    assert metrics["mae"] == pytest.approx(sk.mean_absolute_error(y, p, sample_weight=w))
    assert regression_metrics(p, y)["mae"] == pytest.approx(sk.mean_absolute_error(y, p))
    assert math.isnan(regression_metrics(p[:0], y[:0])["mse"])


def target_ranks(
    user: torch.Tensor, live: torch.Tensor, vectors: torch.Tensor, *rest: Any, **options: Any
) -> torch.Tensor:
    return ranking.target_ranks(user, live, Catalogue.whole(vectors), *rest, **options)


def brute_force(user: list, live: list, catalogue: list, target: list, seen: list[list[int]]) -> list[float]:
    ranks = []
    for b, mine in enumerate(target):
        best = [
            max(sum(x * y for x, y in zip(u, item, strict=True)) for u, ok in zip(user[b], live[b], strict=True) if ok)
            for item in catalogue
        ]
        others = [n for n in range(len(catalogue)) if n != mine and n not in seen[b]]
        ranks.append(sum(1.0 if best[n] > best[mine] else 0.5 if best[n] == best[mine] else 0.0 for n in others))
    return ranks


@pytest.mark.parametrize("at_once", [1, 60, 1 << 24])
def test_ranks_against_brute_force(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranking, "_SCORES_AT_ONCE", at_once)
    rng = torch.Generator().manual_seed(0)
    user = torch.randint(-2, 3, (9, 3, 2), generator=rng).float()  # whole numbers: many ties
    catalogue = torch.randint(-2, 3, (10, 2), generator=rng).float()
    live = torch.rand(9, 3, generator=rng) < 0.6
    live[:, 1] = True
    target = torch.randint(0, 10, (9,), generator=rng)
    seen = [torch.randint(0, 10, (n,), generator=rng).tolist() for n in (0, 3, 1, 9, 2, 0, 5, 4, 1)]
    seen[1].append(int(target[1]))  # a target that was seen is still the target
    seen[3] += seen[3][:2]  # an item seen twice is left out once
    jagged = Jagged(torch.tensor([n for ids in seen for n in ids]), torch.tensor([len(ids) for ids in seen]))
    arguments = user.tolist(), live.tolist(), catalogue.tolist(), target.tolist()
    assert target_ranks(user, live, catalogue, target, jagged).tolist() == brute_force(*arguments, seen)
    assert target_ranks(user, live, catalogue, target).tolist() == brute_force(*arguments, [[]] * 9)
    assert target_ranks(user, live, catalogue, target).dtype == torch.float32


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_parts_of_a_catalogue_add_up(parts: int) -> None:
    rng = torch.Generator().manual_seed(1)
    user = torch.randint(-2, 3, (6, 2, 2), generator=rng).float()
    vectors = torch.randint(-2, 3, (11, 2), generator=rng).float()
    live, target = torch.ones(6, 2).bool(), torch.randint(0, 11, (6,), generator=rng)
    among = torch.randint(0, 11, (6, 4), generator=rng)
    owner = torch.randint(0, parts, (11,), generator=rng)  # any items, in any order
    catalogues = []
    for part in range(parts):
        held = (owner == part).nonzero()[:, 0].flip(0)
        place = torch.full((11,), -1)
        place[held] = torch.arange(len(held))
        catalogues.append(Catalogue(vectors[held], place))

    def each_part(**options: Any) -> torch.Tensor:
        # Twice: the target's score is known once all parts have been asked, the places after that.
        asked: list[torch.Tensor] = []
        for catalogue in catalogues:
            ranking.target_ranks(user, live, catalogue, target, total=lambda x: asked.append(x) or x, **options)
        own = sum(asked[::2])
        places = []
        for catalogue in catalogues:
            given = iter([own])
            places.append(
                ranking.target_ranks(
                    user, live, catalogue, target, total=lambda x, given=given: next(given, x), **options
                )
            )
        return sum(places)

    assert torch.equal(each_part(), target_ranks(user, live, vectors, target))
    sampled = target_ranks(user, live, vectors, target, among=among)
    assert torch.equal(each_part(among=among), sampled)
    others = [{int(i) for i in row} - {int(t)} for row, t in zip(among, target, strict=True)]
    scores = torch.einsum("bqd,nd->bqn", user, vectors).amax(1)
    for b, ids in enumerate(others):
        own = scores[b, target[b]]
        assert sampled[b] == sum(float(scores[b, i] > own) + 0.5 * float(scores[b, i] == own) for i in ids)


@pytest.mark.parametrize(("block", "at_once"), [(3, 1), (4, 1 << 24), (1 << 14, 60)])
def test_the_best_items_against_sorting(block: int, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranking, "_ITEMS_AT_ONCE", block)
    monkeypatch.setattr(ranking, "_SCORES_AT_ONCE", at_once)
    rng = torch.Generator().manual_seed(2)
    user, vectors = torch.randn(7, 2, 4, generator=rng), torch.randn(11, 4, generator=rng)
    vectors[5] = math.nan  # never one of the best
    live = torch.tensor([[True, True]] * 5 + [[True, False], [False, False]])
    seen = [[], [0, 1, 2, 3], [4, 4, 9], list(range(11)), [5], [10], [3]]
    jagged = Jagged(torch.tensor([n for ids in seen for n in ids]), torch.tensor([len(ids) for ids in seen]))
    found, best = ranking.top_items(user, live, Catalogue.whole(vectors), 4, jagged)
    for b in range(7):
        scores = {
            n: max((float(user[b, q] @ vectors[n]) for q in range(2) if live[b, q]), default=-math.inf)
            for n in range(11)
        }
        left = [n for n in scores if n != 5 and n not in seen[b] and live[b].any()]
        rest = sorted(left, key=lambda n: -scores[n])[:4]
        assert found[b].tolist() == rest + [-1] * (4 - len(rest))
        assert best[b].tolist() == pytest.approx([scores[n] for n in rest] + [-math.inf] * (4 - len(rest)), rel=1e-5)
    one = ranking.top_items(user[:, :1], live[:, :1], Catalogue.whole(vectors), 30)
    assert one[0].shape == (7, 30)
    assert (one[0] >= 0).sum(dim=1).tolist() == [10] * 6 + [0]


def test_equal_scores_rank_in_the_middle() -> None:
    one = torch.ones(1, 1, 1)
    assert target_ranks(one, one[..., 0].bool(), torch.ones(9, 1), torch.tensor([3])).tolist() == [4]


def test_nan_is_never_a_good_rank() -> None:
    user, live = torch.ones(3, 1, 1), torch.tensor([[True], [True], [False]])
    catalogue = torch.tensor([[3.0], [math.nan], [1.0], [0.0]])
    # item 0 scores best but for the NaN, item 1 is the NaN, and the last user has no vector
    assert target_ranks(user, live, catalogue, torch.tensor([0, 1, 0])).tolist() == [1, 3, 3]
    assert target_ranks(user * math.nan, live, catalogue, torch.tensor([0, 2, 0])).tolist() == [3, 3, 3]
    metrics = ranking_metrics(torch.tensor([math.nan, 0.0]), ks=(1,))
    assert metrics == {"hit_rate@1": 0.5, "recall@1": 0.5, "ndcg@1": 0.5, "mrr@1": 0.5}


@pytest.mark.parametrize("other", [0.0, math.nan])  # what is no number is counted in another way
def test_more_items_than_float32_can_count(other: float) -> None:
    vectors = torch.zeros((1 << 24) + 5, 1)
    vectors[0], vectors[5], vectors[7] = 1, 2, other
    places = target_ranks(torch.ones(1, 1, 1), torch.ones(1, 1).bool(), vectors, torch.tensor([0]))
    assert places.tolist() == [2 if math.isnan(other) else 1]


def test_ranks_of_nobody() -> None:
    none = Jagged(torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int32))
    ids = torch.empty(0, dtype=torch.int64)
    assert target_ranks(torch.empty(0, 2, 3), torch.empty(0, 2).bool(), torch.ones(4, 3), ids, none).shape == (0,)


def test_ids_outside_the_catalogue() -> None:
    user, live, catalogue = torch.ones(1, 1, 1), torch.ones(1, 1).bool(), torch.ones(3, 1)
    with pytest.raises(ValueError, match="target id 3 is outside the catalogue of 3 items"):
        target_ranks(user, live, catalogue, torch.tensor([3]))
    with pytest.raises(ValueError, match="seen id -1"):
        target_ranks(user, live, catalogue, torch.tensor([0]), Jagged(torch.tensor([-1]), torch.tensor([1])))


def test_ranking_metrics() -> None:
    ranks = torch.tensor([0.0, 2.0, 2.5, 9.0, 10.0, 100.0])
    metrics = ranking_metrics(ranks, ks=(3, 10))
    assert metrics["hit_rate@3"] == pytest.approx(3 / 6)
    assert metrics["hit_rate@10"] == pytest.approx(4 / 6)
    assert metrics["ndcg@3"] == pytest.approx((1 + 1 / math.log2(4) + 1 / math.log2(4.5)) / 6)
    assert metrics["mrr@10"] == pytest.approx((1 + 1 / 3 + 1 / 3.5 + 1 / 10) / 6)
    assert all(math.isnan(value) for value in ranking_metrics(ranks[:0]).values())
    with pytest.raises(ValueError, match="k is 0"):
        ranking_metrics(ranks, ks=(0,))
    # one target a row: scikit-learn's ndcg, where there are no ties
    scores = np.random.default_rng(0).normal(size=(20, 30))
    target = np.arange(20)
    own = scores[np.arange(20), target]
    places = torch.tensor((scores > own[:, None]).sum(1).astype(np.float32))
    relevance = np.zeros((20, 30))
    relevance[np.arange(20), target] = 1
    assert ranking_metrics(places, ks=(5,))["ndcg@5"] == pytest.approx(sk.ndcg_score(relevance, scores, k=5))
