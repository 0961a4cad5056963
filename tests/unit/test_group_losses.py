"""Losses within groups, against their formulas group by group; and what a run file may say of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
import yaml

from rechub_dist.assembly.parts import build
from rechub_dist.assembly.readers import prediction_spec
from rechub_dist.batch import Batch
from rechub_dist.config import PointwiseConfig
from rechub_dist.config.objectives import GroupLossConfig
from rechub_dist.data.run_file import load_run
from rechub_dist.embedded import Embedded, Output
from rechub_dist.errors import UserError
from rechub_dist.features import Label
from rechub_dist.objectives import PointwiseObjective
from rechub_tests.runs import SCHEMA, run_file

LABELS = (Label("click"), Label("stay", type="regression"), Label("buy"))
RNG = np.random.default_rng(3)
N = 40
USERS = RNG.integers(0, 9, N) * 10**15 - 4 * 10**15  # integers of any width, below 0 too
WEIGHTS = RNG.integers(0, 3, N).astype(np.float32)


def batch_of(rows: int = N, keys: Any = USERS, weights: Any = WEIGHTS) -> Batch:
    rng = np.random.default_rng(4)
    labels = torch.tensor(rng.integers(0, 2, (rows, 3)), dtype=torch.float32)
    weight = None if weights is None else torch.tensor(weights[:rows])
    return Batch(rows, torch.empty(rows, 0), {}, labels, weight, keys={"user": pa.array(keys[:rows])})


def reference(name: str, scores: np.ndarray, labels: np.ndarray, weights: np.ndarray, users: np.ndarray) -> float:
    """The mean over positives, group by group."""
    loss = total = 0.0
    for user in np.unique(users):
        s, y, w = (column[(users == user) & (weights > 0)] for column in (scores, labels, weights))
        if len(set(y)) < 2:
            continue
        for i in np.flatnonzero(y):
            if name == "pairwise":
                each = np.average(np.log1p(np.exp(s[y == 0] - s[i])), weights=w[y == 0])
            else:
                each = np.log((w * np.exp(s)).sum()) - s[i]
            loss, total = loss + w[i] * each, total + w[i]
    return loss / total


def objective(name: str, share: float = 1.0, **config: Any) -> PointwiseObjective:
    group = GroupLossConfig(loss=name, group="user", share=share)  # type: ignore[arg-type]
    return PointwiseObjective(PointwiseConfig(group_loss=group, **config), LABELS)


def loss_of(made: PointwiseObjective, logits: torch.Tensor, batch: Batch, **aux: torch.Tensor) -> torch.Tensor:
    batch.weight_sums = made.weight_sums(batch)
    return made(Output(logits=logits, aux=aux), Embedded(), batch)


@pytest.mark.parametrize("name", ["pairwise", "listwise"])
@pytest.mark.parametrize("kind", ["integers", "strings"])
@pytest.mark.parametrize("weighted", [True, False])
def test_it_is_the_formula(name: str, kind: str, weighted: bool) -> None:
    batch = batch_of(
        keys=USERS if kind == "integers" else [f"user {user}" for user in USERS], weights=WEIGHTS if weighted else None
    )
    logits = torch.randn(N, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 5
    aux = torch.rand(N, dtype=torch.float64)
    weights = WEIGHTS if weighted else np.ones(N)
    made = objective(name, 0.75, task_weights={"buy": 3.0}, aux_weight=0.5)
    each = [
        F.binary_cross_entropy_with_logits(logits[:, t].float(), batch.labels[:, t], reduction="none") for t in (0, 2)
    ]
    rows = [np.average(loss.numpy(), weights=weights) for loss in each]
    groups = [reference(name, logits[:, t].numpy(), batch.labels[:, t].numpy(), weights, USERS) for t in (0, 2)]
    click, buy = (0.25 * one + 0.75 * other for one, other in zip(rows, groups, strict=True))
    stay = np.average((logits[:, 1] - batch.labels[:, 1]).square().numpy(), weights=weights)
    expected = click + stay + 3 * buy + 0.5 * np.average(aux.numpy(), weights=weights)
    assert float(loss_of(made, logits, batch, more=aux)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", ["pairwise", "listwise"])
def test_its_gradient_raises_positives_and_is_zero_elsewhere(name: str) -> None:
    batch = batch_of()
    logits = torch.randn(N, 3, requires_grad=True)
    loss_of(objective(name, task_weights={"stay": 0.0, "buy": 0.0}), logits, batch).backward()
    gradient = logits.grad[:, 0].numpy()  # type: ignore[index]
    for user in np.unique(USERS):
        rows = (user == USERS) & (WEIGHTS > 0)
        positive = batch.labels[:, 0].numpy() > 0
        if len(set(positive[rows])) < 2:
            assert not gradient[user == USERS].any()
        else:
            assert gradient[rows & ~positive].min() > 0
            assert gradient[rows].sum() == pytest.approx(0, abs=1e-7)  # a group's level is left alone
    assert not gradient[WEIGHTS == 0].any()
    if name == "pairwise":
        assert gradient[batch.labels[:, 0].numpy() > 0].max() <= 0


@pytest.mark.parametrize("name", ["pairwise", "listwise"])
@pytest.mark.parametrize("rows", [0, 1])
def test_without_a_pair_there_is_no_loss(name: str, rows: int) -> None:
    logits = torch.randn(rows, 3, requires_grad=True)
    loss = loss_of(objective(name, task_weights={"stay": 0.0}), logits, batch_of(rows))
    assert float(loss) == 0
    loss.backward()  # an exchange with other ranks needs it
    assert not logits.grad.any()  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["pairwise", "listwise"])
def test_it_is_finite_for_any_logit(name: str) -> None:
    logits = (torch.randn(N, 3) * 1e4).requires_grad_()
    loss = loss_of(objective(name, task_weights={"stay": 0.0}), logits, batch_of())
    loss.backward()
    assert loss.isfinite()
    assert logits.grad.isfinite().all()  # type: ignore[union-attr]


def test_the_column_is_read_to_train_and_not_to_predict(tmp_path: Path) -> None:
    (tmp_path / "dataset.yaml").write_text(yaml.safe_dump(SCHEMA))
    tree = {"name": "pointwise", "group_loss": {"loss": "listwise", "group": "session"}}
    parts = build(load_run(run_file(tmp_path, tmp_path, "DeepFM", objective=tree)), device="cpu", world_size=1)
    assert parts.spec.keys == ("session",)
    assert prediction_spec(parts).keys == ()


@pytest.mark.parametrize(
    ("group_loss", "message"),
    [
        ({"loss": "pairwis", "group": "user"}, "group_loss.loss: input should be 'pairwise' or 'listwise'"),
        ({"loss": "pairwise"}, "missing key 'objective.pointwise.group_loss.group'"),
        ({"loss": "pairwise", "grop": "user", "group": "a"}, r"unknown key .*group_loss.grop': did you mean 'group'\?"),
        ({"loss": "pairwise", "group": "user", "share": 0}, "group_loss.share: input should be greater than 0"),
    ],
)
def test_mistakes(tmp_path: Path, group_loss: dict[str, Any], message: str) -> None:
    (tmp_path / "dataset.yaml").write_text(yaml.safe_dump(SCHEMA))
    path = run_file(tmp_path, tmp_path, "DeepFM", objective={"name": "pointwise", "group_loss": group_loss})
    with pytest.raises(UserError, match=message):
        build(load_run(path), device="cpu", world_size=1)


def test_a_regression_label_has_no_positives() -> None:
    config = PointwiseConfig(group_loss=GroupLossConfig(loss="listwise", group="user"))
    with pytest.raises(UserError, match=r"objective\.group_loss: compares rows of label 1 with rows of label 0"):
        PointwiseObjective(config, LABELS[1:2])
