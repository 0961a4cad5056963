"""Retrieval losses against their formulas in numpy; counts of positives; what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from rechub_dist.batch import Batch
from rechub_dist.config import RetrievalConfig, SamplingConfig, StorageConfig
from rechub_dist.data.counts import count_positives
from rechub_dist.data.parquet.manifest import Manifest
from rechub_dist.distributed.collectives import gather_rows
from rechub_dist.embedded import Embedded, to_padded
from rechub_dist.errors import UserError
from rechub_dist.features import Label, SequenceFeature, SparseFeature, Table
from rechub_dist.models import NARM
from rechub_dist.objectives import RetrievalObjective, losses
from rechub_dist.objectives.negatives import Negatives
from rechub_tests import cases_recall as recall

RNG = np.random.default_rng(0)
POSITIVE, NEGATIVE = RNG.normal(size=5), RNG.normal(size=(5, 4))
MASK = np.array([[1, 1, 1, 1], [1, 0, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0], [1, 1, 0, 1]], bool)


def sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


def log_softmax_weights(row: np.ndarray) -> np.ndarray:
    return np.exp(row) / np.exp(row).sum()


def reference(name: str, p: float, n: np.ndarray) -> float:  # noqa: PLR0911 - one a loss
    """The loss of one positive and the negatives that count."""
    if name == "bce":
        return -math.log(sigmoid(p)) - np.log(1 - sigmoid(n)).sum()
    if name == "gbce":
        alpha = len(n) / 9
        beta = alpha * (0.75 * (1 - 1 / alpha) + 1 / alpha) if alpha else 0.25
        return -math.log(sigmoid(p) ** beta) - np.log(1 - sigmoid(n)).sum()
    if name == "softmax":
        return -math.log(math.exp(p) / (math.exp(p) + np.exp(n).sum()))
    if not len(n):
        return 0.0
    if name == "bpr":
        return -np.log(sigmoid(p - n)).mean()
    if name == "hinge":
        return np.maximum(0, (1 - p) - (1 - n) + 0.2).mean()
    w = log_softmax_weights(n)
    if name == "bpr_max":
        return -math.log((w * sigmoid(p - n)).sum()) + 0.5 * (w * n**2).sum()
    assert name == "top1_max"
    return (w * (sigmoid(n - p) + sigmoid(n**2))).sum()


OPTIONS = {"gbce": {"items": 10, "t": 0.75}, "bpr_max": {"regularization": 0.5}, "hinge": {"margin": 0.2}}


@pytest.mark.parametrize("name", ["bce", "gbce", "softmax", "bpr", "bpr_max", "top1_max", "hinge"])
def test_losses(name: str) -> None:
    positive = torch.tensor(POSITIVE, requires_grad=True)
    negative = torch.tensor(NEGATIVE, requires_grad=True)
    loss = getattr(losses, name)(positive, negative, torch.tensor(MASK), **OPTIONS.get(name, {}))
    expected = [reference(name, p, n[m]) for p, n, m in zip(POSITIVE, NEGATIVE, MASK, strict=True)]
    np.testing.assert_allclose(loss.detach().numpy(), expected, rtol=1e-9)
    loss.sum().backward()
    assert positive.grad.isfinite().all()
    assert negative.grad.isfinite().all()
    assert not negative.grad[~torch.tensor(MASK)].any()  # what does not count is not trained


def test_gbce_without_calibration_is_bce() -> None:
    arguments = torch.tensor(POSITIVE), torch.tensor(NEGATIVE), torch.tensor(MASK)
    torch.testing.assert_close(losses.gbce(*arguments, items=10, t=0.0), losses.bce(*arguments))


def test_gbce_as_its_authors_normalise_it() -> None:
    # Binary cross-entropy of all K + 1 scores, the positive's times beta, and the mean over them.
    scores, targets = torch.tensor(np.hstack([POSITIVE[:, None], NEGATIVE])), torch.zeros(5, 5)
    targets[:, 0] = 1
    alpha = 4 / 9
    beta = alpha * (0.75 * (1 - 1 / alpha) + 1 / alpha)
    terms = F.binary_cross_entropy_with_logits(scores, targets.double(), reduction="none")
    expected = torch.where(targets > 0, beta * terms, terms).mean(dim=1)
    every = torch.ones(5, 4, dtype=torch.bool)
    found = losses.gbce(torch.tensor(POSITIVE), torch.tensor(NEGATIVE), every, items=10, t=0.75, reduction="mean")
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["bce", "gbce", "softmax", "bpr", "bpr_max", "top1_max", "hinge"])
def test_no_rows(name: str) -> None:
    empty = torch.empty(0), torch.empty(0, 4), torch.empty(0, 4, dtype=torch.bool)
    assert getattr(losses, name)(*empty, **OPTIONS.get(name, {})).shape == (0,)


def test_one_process_gathers_its_own_rows() -> None:
    rows = torch.randn(3, 2)
    assert gather_rows(rows) is rows


SOURCES = [
    {"negatives": "in_batch", "loss": "softmax", "log_q": False},
    {"negatives": "in_batch", "loss": "bpr_max"},
    {"negatives": "sampled", "loss": "bpr", "num_negatives": 3},
    {"negatives": "sampled", "loss": "softmax", "num_negatives": 3, "share_negatives": True},
    {"negatives": "full", "loss": "hinge"},
]


@pytest.mark.parametrize("config", SOURCES)
def test_losses_are_of_the_models_training_scores(config: dict[str, Any]) -> None:
    """A model that doubles its scores has the loss of one whose users are twice as long."""

    class Doubled(NARM):
        def score(self, user: Tensor, items: Tensor) -> Tensor:
            return 2 * super().score(user, items)

        def score_own(self, user: Tensor, items: Tensor) -> Tensor:
            return 2 * super().score_own(user, items)

    doubled = Doubled(11, 4, 4, 0.0, 4)
    longer = recall.narm()
    longer.load_state_dict(doubled.state_dict())
    longer.project.weight.data *= 2
    table = torch.linspace(-1, 1, 44).view(11, 4).sin()
    ids = {"item": [[3], [7], [3], [1]], "history": [[1, 2], [], [3, 4], [5]]}
    ids["negatives"] = [[0, 5, 6], [2, 3, 8], [9, 10, 4], [0, 1, 2]]
    ids["catalogue"] = [[*range(11)], [], [], []]
    lengths = {name: torch.tensor([len(row) for row in rows]) for name, rows in ids.items()}
    flat = {name: torch.tensor([i for row in rows for i in row]) for name, rows in ids.items()}
    embedded = Embedded(
        {"item": table[flat["item"]]},
        {name: to_padded(table[flat[name]], lengths[name]) for name in ids if name != "item"},
    )
    jagged = KeyedJaggedTensor(list(ids), torch.cat([*flat.values()]), lengths=torch.cat([*lengths.values()]))
    found = []
    for model in (doubled, longer):
        made = objective(model, **config)
        batch = Batch(4, torch.empty(4, 0), {"all": jagged}, torch.empty(4, 0))
        batch.weight_sums = made.weight_sums(batch)
        found.append(made(model(embedded), embedded, batch))
    torch.testing.assert_close(*found)
    assert found[0] > 0


# --- counts


def test_counts_of_positives(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    histories = [[0, 1, 2, 2], [], [3], [4, 4]]
    for part in range(2):
        table = pa.table({"item": [5, 6, 7, 5], "history": pa.array(histories, pa.list_(pa.int64()))})
        pq.write_table(table, tmp_path / "train" / f"{part}.parquet", row_group_size=3)
    manifest, table = Manifest.read(str(tmp_path / "train")), Table("item", 9)
    item, history = SparseFeature("item", table), SequenceFeature("history", table, max_length=3)
    for ranks in (1, 2, 3):
        rows = sum(count_positives(manifest, item, None, rank, ranks) for rank in range(ranks))
        assert rows.tolist() == [0, 0, 0, 0, 0, 4, 2, 2, 0]
        every = sum(count_positives(manifest, item, history, rank, ranks) for rank in range(ranks))
        # of the kept [1, 2, 2] the first follows nothing, and the row without a history has no positive
        assert every.tolist() == [0, 0, 4, 0, 2, 4, 0, 2, 0]


# --- what is refused, and defaults


def objective(model: Any, labels: tuple[Label, ...] = (), **config: Any) -> RetrievalObjective:
    return RetrievalObjective(RetrievalConfig(**config), model, labels)


def told(negatives: Negatives) -> tuple[str, bool, bool | None]:
    return negatives.source, negatives.shared, negatives.log_q


def test_defaults_are_the_models() -> None:
    made = objective(recall.sasrec())
    assert (made.loss, *told(made.negatives)) == ("bce", "sampled", False, False)
    [lookup] = made.lookups()
    assert (lookup.feature.like, lookup.feature.exclude) == ("history", ("history", "item"))
    made = objective(recall.dssm())
    assert (made.loss, *told(made.negatives)) == ("softmax", "in_batch", True, True)
    assert made.lookups() == ()
    assert objective(recall.narm()).negatives.source == "full"
    assert [lookup.feature.kind for lookup in objective(recall.narm()).lookups()] == ["catalogue"]


def test_negatives_of_items_with_further_features() -> None:
    with pytest.raises(UserError, match=r"sampled draws ids of 'item' alone.*use in_batch"):
        objective(recall.dssm(more=True), negatives="sampled")


def test_log_q_is_for_a_softmax_over_shared_candidates() -> None:
    for config in ({"loss": "bpr"}, {"negatives": "full"}, {"negatives": "sampled"}):
        with pytest.raises(UserError, match=r"objective\.log_q: corrects a softmax over shared candidates"):
            objective(recall.dssm(), log_q=True, **config)


@pytest.mark.parametrize("loss", ["softmax", "bpr", "bpr_max", "top1_max"])
def test_log_q_is_on_where_shared_candidates_of_a_softmax_are_not_equally_likely(loss: str) -> None:
    popular = {"sampling": {"name": "popularity", "power": 0.3}, "num_negatives": 2}
    cases: list[tuple[dict[str, Any], bool]] = [
        ({"negatives": "in_batch"}, True),
        ({"negatives": "in_batch_and_sampled", **popular}, True),
        ({"negatives": "sampled", "share_negatives": True, **popular}, True),
        ({"negatives": "sampled", "share_negatives": True}, False),
        ({"negatives": "sampled", **popular}, False),
    ]
    for config, corrected in cases:
        made = objective(recall.dssm(), loss=loss, **config)
        assert made.negatives.log_q == (corrected and loss == "softmax"), config


def test_log_q_is_the_chance_to_be_a_candidate() -> None:
    made = objective(recall.dssm(), negatives="in_batch_and_sampled", num_negatives=2, log_q=True)
    made.negatives.set_counts(torch.tensor([1, 0, 3] + [0] * 8))
    assert made.negatives.draw_weights(StorageConfig()) is None

    class Batch:
        weight_sums = torch.tensor([5.0, 5.0, 5.0])

    found = made._log_q(torch.tensor([0, 1, 2]), Batch())
    shares, draw = np.array([0.25, 0.0, 0.75]), 1 / 11
    np.testing.assert_allclose(found.exp().numpy(), 1 - (1 - shares) ** 5 * (1 - draw) ** 10, rtol=1e-6)


@pytest.mark.parametrize("array", [np.ones(3), -np.ones(11), np.zeros(11)])
def test_weights_from_a_file(tmp_path: Path, array: np.ndarray) -> None:
    np.save(tmp_path / "w.npy", array)
    made = objective(recall.sasrec(), sampling=SamplingConfig(name="file", path=str(tmp_path / "w.npy")))
    with pytest.raises(UserError, match="11 weights, one an item, are needed"):
        made.negatives.draw_weights(StorageConfig())
    np.save(tmp_path / "w.npy", np.arange(11.0))
    assert made.negatives.draw_weights(StorageConfig()).tolist() == list(range(11))
    (tmp_path / "w.npy").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"w\.npy cannot be read"):
        made.negatives.draw_weights(StorageConfig())
