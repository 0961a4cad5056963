"""Losses of single labels: their formulas, their gradients, and what a run file may say of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

from rechub_dist.assembly.parts import build
from rechub_dist.data.run_file import load_run
from rechub_dist.embedded import Output
from rechub_dist.errors import UserError
from rechub_dist.objectives import PointwiseObjective
from rechub_dist.objectives.label_losses import cross_entropy, focal, huber
from rechub_tests.runs import SCHEMA, run_file

X = torch.tensor([0.3, -1.2, 2.0, 0.1, -0.7, 3.0], dtype=torch.float64)
Y = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 1.0], dtype=torch.float64)


def test_cross_entropy_is_torchs() -> None:
    expected = F.binary_cross_entropy_with_logits(X, Y, reduction="none", pos_weight=torch.tensor(4.0))
    torch.testing.assert_close(cross_entropy(X, Y, positive_weight=4.0), expected)
    plain = F.binary_cross_entropy_with_logits(X, Y, reduction="none")
    assert torch.equal(cross_entropy(X, Y), plain)  # to the bit, as before there were arguments
    p, soft = X.sigmoid(), torch.where(Y > 0, 0.95, 0.05)
    expected = -(3 * soft * p.log() + (1 - soft) * (1 - p).log())
    torch.testing.assert_close(cross_entropy(X, Y, positive_weight=3.0, label_smoothing=0.1), expected)


def test_focal_is_the_papers() -> None:
    p = X.sigmoid()
    of_label = torch.where(Y > 0, p, 1 - p)
    alpha = torch.where(Y > 0, 0.25, 0.75)
    torch.testing.assert_close(focal(X, Y), -alpha * (1 - of_label) ** 2 * of_label.log())
    torch.testing.assert_close(focal(X, Y, gamma=0.0, alpha=None), cross_entropy(X, Y))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_is_finite_for_any_logit(gamma: float) -> None:
    for label in (0.0, 1.0):
        logits = torch.tensor([-1e4, -60.0, 0.0, 60.0, 1e4], requires_grad=True)
        loss = focal(logits, torch.full_like(logits, label), gamma=gamma)
        loss.sum().backward()
        assert loss.isfinite().all()
        assert logits.grad is not None
        assert logits.grad.isfinite().all()


def test_huber() -> None:
    error, loss = np.array([0.2, -0.5, 3.0]), np.array([0.02, 0.125, 0.5 * (3.0 - 0.25)])
    found = huber(torch.tensor(error), torch.zeros(3, dtype=torch.float64), delta=0.5)
    assert found.tolist() == pytest.approx(loss)


@pytest.mark.parametrize(
    ("loss", "where_it_is_least"),
    [
        (lambda x, y: cross_entropy(x, y, positive_weight=4.0), lambda q: 4 * q / (4 * q + 1 - q)),
        (lambda x, y: cross_entropy(x, y, label_smoothing=0.1), lambda q: q * 0.9 + 0.05),
    ],
)
def test_what_is_predicted_where_the_loss_is_least(
    loss: Callable[[Tensor, Tensor], Tensor], where_it_is_least: Callable[[float], float]
) -> None:
    q = 0.2
    logit = torch.tensor(where_it_is_least(q), dtype=torch.float64).logit().requires_grad_()
    (q * loss(logit, torch.ones(())) + (1 - q) * loss(logit, torch.zeros(()))).backward()
    assert logit.grad is not None
    assert abs(float(logit.grad)) < 1e-7


def objective_of(folder: Path, objective: dict[str, Any]) -> PointwiseObjective:
    model = {"task_types": ["classification", "classification", "regression"], "num_tasks": 3}
    data = {"labels": ["click", "buy", "stay"]}
    tree = {"name": "pointwise", **objective}
    path = run_file(folder, folder, "SharedBottom", data=data, model=model, objective=tree)
    found = build(load_run(path), device="cpu", world_size=1).objective
    assert isinstance(found, PointwiseObjective)
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "dataset.yaml").write_text(yaml.safe_dump(SCHEMA))
    return tmp_path


def test_a_run_file_names_losses_for_all_labels_and_for_one(folder: Path) -> None:
    objective = objective_of(
        folder,
        {
            "loss": "focal",
            "loss_arguments": {"gamma": 1, "alpha": None},
            "label_losses": {
                "buy": {"loss": "cross_entropy", "loss_arguments": {"positive_weight": 4}},
                "stay": {"loss": "huber", "loss_arguments": {"delta": 0.5}},
            },
            "task_weights": {"stay": 0.5},
        },
    )
    logits, labels = torch.randn(5, 3), torch.tensor([[1.0, 0.0, 2.0]] * 5)
    expected = (
        focal(logits[:, 0], labels[:, 0], gamma=1.0, alpha=None)
        + cross_entropy(logits[:, 1], labels[:, 1], positive_weight=4.0)
        + 0.5 * huber(logits[:, 2], labels[:, 2], delta=0.5)
    )
    torch.testing.assert_close(objective.losses(Output(logits=logits), labels), expected)
    predictions = objective.predictions(Output(logits=logits))
    torch.testing.assert_close(predictions["buy"], logits[:, 1].sigmoid())


def test_a_loss_for_all_is_for_labels_of_its_type(folder: Path) -> None:
    logits, labels = torch.randn(5, 3), torch.tensor([[1.0, 0.0, 2.0]] * 5)
    objective = objective_of(folder, {"loss": "huber"})
    expected = (
        F.binary_cross_entropy_with_logits(logits[:, :2], labels[:, :2], reduction="none").sum(dim=1)
        + F.huber_loss(logits[:, 2], labels[:, 2], reduction="none")
    )  # fmt: skip
    torch.testing.assert_close(objective.losses(Output(logits=logits), labels), expected)


WRONG = [
    ({"loss": "focl"}, r"objective.pointwise.loss: unknown name 'focl' \(write .*\); did you mean 'focal'\?"),
    (
        {"loss": "focal", "loss_arguments": {"gama": 1}},
        "unknown key 'objective.loss_arguments.gama': did you mean 'gamma'",
    ),
    ({"loss": "focal", "loss_arguments": {"gamma": -1}}, "objective.loss_arguments.gamma: input should be greater"),
    ({"loss": "focal", "loss_arguments": {"alpha": 2}}, "objective.loss_arguments.alpha: input should be less"),
    ({"loss": "cross_entropy", "loss_arguments": {"label_smoothing": 1}}, "loss_arguments.label_smoothing: .* less"),
    ({"loss": "huber", "loss_arguments": {"delta": 0}}, "objective.loss_arguments.delta: input should be greater"),
    ({"label_losses": {"by": {"loss": "focal"}}}, "objective.label_losses: no label 'by': did you mean 'buy'"),
    ({"label_losses": {"buy": {"loss": "hubr"}}}, "label_losses.buy.loss: no loss of a label 'hubr': did you mean"),
    ({"label_losses": {"buy": {"los": "focal"}}}, r"unknown key .*label_losses.buy.los': did you mean 'loss'\?"),
    (
        {"label_losses": {"buy": {"loss": "huber"}}},
        r"label_losses.buy.loss: huber is a loss of labels of type regression, got buy \(classification\); choose "
        "cross_entropy or focal",
    ),
    (
        {"label_losses": {"buy": {"loss": "focal", "loss_arguments": {"delta": 1}}}},
        "unknown key 'objective.label_losses.buy.loss_arguments.delta': valid: alpha, gamma",
    ),
    ({"loss_arguments": {"gamma": 1}}, "loss_arguments are those of the loss that loss names"),
]


@pytest.mark.parametrize(("objective", "message"), WRONG, ids=lambda value: str(value)[-45:])
def test_a_mistake_is_one_line(folder: Path, objective: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        objective_of(folder, objective)
    assert "\n" not in str(error.value)


def test_a_loss_that_no_label_has_the_type_for(folder: Path) -> None:
    path = run_file(folder, folder, "DeepFM", objective={"name": "pointwise", "loss": "huber"})
    with pytest.raises(UserError, match=r"objective.loss: huber is a loss of labels of type regression, got click"):
        build(load_run(path), device="cpu", world_size=1)
