"""Losses and what is scored, against formulas in float64 numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rechub_dist.batch import Batch
from rechub_dist.config import EntireSpaceConfig, PointwiseConfig
from rechub_dist.embedded import Embedded, Output
from rechub_dist.errors import UserError
from rechub_dist.features import Label
from rechub_dist.objectives import EntireSpaceObjective, PointwiseObjective, TaskObjective

CLICK, BUY, LIKE, STAY = Label("click"), Label("buy"), Label("like"), Label("stay", type="regression")


def batch_of(labels: list[list[float]], weights: list[float] | None = None) -> Batch:
    weight = None if weights is None else torch.tensor(weights)
    return Batch(len(labels), torch.empty(len(labels), 0), {}, torch.tensor(labels), weight)


def loss_of(objective: TaskObjective, output: Output, batch: Batch) -> float:
    batch.weight_sums = objective.weight_sums(batch)
    return float(objective(output, Embedded(), batch))


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


LOGITS = np.array([[0.3, -1.2], [2.0, 0.1], [-0.7, 3.0]])


def test_pointwise_by_type_weight_and_row() -> None:
    objective = PointwiseObjective(PointwiseConfig(task_weights={"stay": 0.25}), (CLICK, STAY))
    labels, weights = [[1, 2.5], [0, 0.5], [1, -1]], [1.0, 3.0, 0.5]
    p, y, w = sigmoid(LOGITS[:, 0]), np.array(labels), np.array(weights)
    entropy = -(y[:, 0] * np.log(p) + (1 - y[:, 0]) * np.log(1 - p))
    expected = (w * (entropy + 0.25 * (LOGITS[:, 1] - y[:, 1]) ** 2)).sum() / w.sum()
    output = Output(logits=torch.tensor(LOGITS))
    assert loss_of(objective, output, batch_of(labels, weights)) == pytest.approx(expected, rel=1e-6)
    scores = objective.scores(output, batch_of(labels, weights))
    assert list(scores) == list(objective.scored) == ["click", "stay"]
    assert scores["click"].predictions.tolist() == pytest.approx(p)
    assert scores["stay"].predictions.tolist() == pytest.approx(LOGITS[:, 1])
    assert scores["click"].weights.tolist() == weights


def test_further_losses_are_weighted_by_row() -> None:
    aux = {"next_behavior": torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)}
    labels, weights = [[1.0], [0.0], [1.0]], [1.0, 3.0, 0.5]
    plain = Output(logits=torch.tensor(LOGITS[:, :1]))
    both = Output(logits=torch.tensor(LOGITS[:, :1]), aux=aux)
    for aux_weight in (1.0, 0.5, 0.0):
        objective = PointwiseObjective(PointwiseConfig(aux_weight=aux_weight), (CLICK,))
        difference = loss_of(objective, both, batch_of(labels, weights)) - loss_of(
            objective, plain, batch_of(labels, weights)
        )
        assert difference == pytest.approx(aux_weight * (1 + 6 + 2) / 4.5, abs=1e-6)


def test_entire_space_is_the_papers_loss() -> None:
    objective = EntireSpaceObjective(EntireSpaceConfig(task_weights={"like": 0.5}), (CLICK, BUY, LIKE))
    logits = np.hstack([LOGITS, [[0.4], [-2.0], [1.0]]])
    labels = np.array([[1, 1, 0], [1, 0, 1], [0, 1, 0]], float)  # a conversion without a click is none
    click, *conversions = sigmoid(logits).T
    y = labels[:, 0]
    expected = -(y * np.log(click) + (1 - y) * np.log(1 - click))
    for weight, conversion, z in zip((1, 0.5), conversions, labels[:, 1:].T, strict=True):
        joint = click * conversion
        expected -= weight * (y * z * np.log(joint) + (1 - y * z) * np.log(1 - joint))
    output, batch = Output(logits=torch.tensor(logits)), batch_of(labels.tolist(), [1.0, 2.0, 3.0])
    assert loss_of(objective, output, batch) == pytest.approx((expected * [1, 2, 3]).sum() / 6, rel=1e-6)
    scores = objective.scores(output, batch)
    assert set(scores) == set(objective.scored)
    assert list(objective.scored) == ["click", "buy", "like", "buy_given_click", "like_given_click"]
    assert scores["buy"].predictions.tolist() == pytest.approx(click * conversions[0])
    assert scores["buy"].targets.tolist() == [1, 0, 0]
    assert scores["buy_given_click"].predictions.tolist() == pytest.approx(conversions[0])
    assert scores["buy_given_click"].weights.tolist() == [1, 2, 0]


@pytest.mark.parametrize(
    ("click", "conversion"), [(60, 60), (-60, 60), (60, -60), (-60, -60), (1000, 1000), (0, -1000)]
)
@pytest.mark.parametrize("label", [0.0, 1.0])
def test_entire_space_is_stable(click: float, conversion: float, label: float) -> None:
    objective = EntireSpaceObjective(EntireSpaceConfig(), (CLICK, BUY))
    logits = torch.tensor([[click, conversion]], dtype=torch.float32, requires_grad=True)
    loss = objective.losses(Output(logits=logits), torch.tensor([[label, label]])).sum()
    loss.backward()
    assert loss.isfinite()
    assert logits.grad.isfinite().all()
    a, b = (np.longdouble(value) for value in (click, conversion))
    log_p = -np.logaddexp(0, -a) - np.logaddexp(0, -b)
    log_not = np.logaddexp(np.logaddexp(-a, -b), -a - b) + log_p
    expected = (np.logaddexp(0, -a) - log_p) if label else (np.logaddexp(0, a) - log_not)
    assert float(loss) == pytest.approx(float(expected), rel=1e-5, abs=1e-12)


def test_the_conversion_has_no_loss_of_its_own() -> None:
    # Where a click is out of the question, nothing is learnt about conversions; a loss on clicks alone would differ.
    objective = EntireSpaceObjective(EntireSpaceConfig(), (CLICK, BUY))
    logits = torch.tensor([[-40.0, 0.3]], requires_grad=True)
    objective.losses(Output(logits=logits), torch.tensor([[0.0, 0.0]])).sum().backward()
    assert abs(logits.grad[0, 1]) < 1e-15
    # The gradient of the joint loss reaches both networks.
    logits = torch.tensor([[0.5, 0.3]], requires_grad=True)
    objective.losses(Output(logits=logits), torch.tensor([[1.0, 0.0]])).sum().backward()
    joint = sigmoid(np.array(0.5)) * sigmoid(np.array(0.3))
    by_conversion = joint / (1 - joint) * (1 - sigmoid(np.array(0.3)))
    assert logits.grad[0, 1].item() == pytest.approx(float(by_conversion), rel=1e-5)


def test_empty_batches() -> None:
    for objective in (
        PointwiseObjective(PointwiseConfig(), (CLICK, BUY)),
        EntireSpaceObjective(EntireSpaceConfig(), (CLICK, BUY)),
    ):
        batch = Batch(0, torch.empty(0, 0), {}, torch.empty(0, 2))
        assert loss_of(objective, Output(logits=torch.empty(0, 2)), batch) == 0
        assert all(
            len(score.predictions) == 0 for score in objective.scores(Output(logits=torch.empty(0, 2)), batch).values()
        )


def test_wrong_labels() -> None:
    with pytest.raises(UserError, match="at least one label"):
        PointwiseObjective(PointwiseConfig(), ())
    with pytest.raises(UserError, match="no label 'clik': did you mean 'click'"):
        PointwiseObjective(PointwiseConfig(task_weights={"clik": 1}), (CLICK,))
    for labels in ((CLICK,), (CLICK, STAY)):
        with pytest.raises(UserError, match="entire_space takes a click label and at least one conversion"):
            EntireSpaceObjective(EntireSpaceConfig(), labels)
