"""Weighting of several labels against each other, against the papers' algorithms in plain torch."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn

from rechub_dist.assembly.parts import build
from rechub_dist.batch import Batch
from rechub_dist.config import PointwiseConfig
from rechub_dist.data.run_file import load_run
from rechub_dist.embedded import Embedded, Output
from rechub_dist.errors import UserError
from rechub_dist.features import Label
from rechub_dist.objectives import PointwiseObjective
from rechub_dist.objectives.weighting import shortest, without_conflicts
from rechub_tests.runs import SCHEMA, run_file

LABELS = (Label("click"), Label("buy"), Label("stay", type="regression"))
X = torch.randn(30, 4, generator=torch.Generator().manual_seed(1))
Y = torch.cat([(X[:, :2] > 0).float(), 3 * X[:, 2:3]], dim=1)


class Net(nn.Module):
    """Two shared layers and a linear tower a task."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.shared = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5))
        self.towers = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.towers(torch.tanh(self.shared(x)))

    def losses(self) -> list[Tensor]:
        logits = self(X)
        cross = [F.binary_cross_entropy_with_logits(logits[:, t], Y[:, t]) for t in (0, 1)]
        return [*cross, F.mse_loss(logits[:, 2], Y[:, 2])]

    def gradients(self, parameters: list[nn.Parameter]) -> Tensor:
        """Of each loss, [T, P]."""
        found = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in self.losses()]
        return torch.stack([torch.cat([part.flatten() for part in parts]) for parts in found])


def objective(net: Net, name: str, **config: Any) -> PointwiseObjective:
    chosen = PointwiseConfig(task_weighting=name, **config)  # type: ignore[arg-type]
    return PointwiseObjective(chosen, LABELS, shared=tuple(net.shared.parameters()))


def loss_of(net: Net, made: PointwiseObjective, weights: Tensor | None = None, **aux: Tensor) -> Tensor:
    batch = Batch(len(X), torch.empty(len(X), 0), {}, Y, weights)
    batch.weight_sums = made.weight_sums(batch)
    return made(Output(logits=net(X), aux=aux), Embedded(), batch)


def test_uncertainty_is_the_papers() -> None:
    net = Net()
    made = objective(net, "uncertainty", aux_weight=0.5)
    [(name, log_variances)] = made.named_parameters()
    assert name == "weighting.log_variances"
    log_variances.data = torch.tensor([0.3, -0.7, 1.1])
    sigma = (log_variances.detach() / 2).exp()
    losses = net.losses()
    aux = torch.rand(30)
    expected = sum(loss / sigma[t] ** 2 + sigma[t].log() for t, loss in enumerate(losses[:2]))
    expected = expected + losses[2] / (2 * sigma[2] ** 2) + sigma[2].log() + 0.5 * aux.mean()
    loss = loss_of(net, made, more=aux)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert log_variances.grad is not None
    assert log_variances.grad[0] == pytest.approx(float(0.5 - losses[0] * (-log_variances[0]).exp()), rel=1e-5)


def test_gradnorm_is_the_papers() -> None:
    net, alpha, lr = Net(), 1.5, 0.05
    made = objective(net, "gradnorm", gradnorm_alpha=alpha, gradnorm_lr=lr)
    last = net.shared[2].weight
    weights, first = torch.ones(3, requires_grad=True), None
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    for _ in range(6):
        losses = torch.stack(net.losses())
        first = losses.detach() if first is None else first
        norms = torch.stack([torch.autograd.grad(loss, last, retain_graph=True)[0].norm() for loss in losses])
        rates = losses.detach() / first
        target = ((weights * norms).mean() * (rates / rates.mean()) ** alpha).detach()
        [gradient] = torch.autograd.grad((weights * norms - target).abs().sum(), weights)
        expected = (weights.detach() * losses).sum()
        loss = loss_of(net, made)
        torch.testing.assert_close(loss, expected)
        with torch.no_grad():
            weights = weights - lr * gradient
            weights = (weights * 3 / weights.sum()).requires_grad_()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(made.learned()["weighting.weight"], weights.detach())
    assert (weights.detach() - 1).abs().max() > 0.1


def projected(gradients: np.ndarray) -> np.ndarray:
    """PCGrad on the vectors themselves."""
    count, total = len(gradients), np.zeros(gradients.shape[1])
    for i in range(count):
        own = gradients[i].copy()
        for j in [*range(i + 1, count), *range(i)]:
            if (product := own @ gradients[j]) < 0:
                own -= product / (gradients[j] @ gradients[j]) * gradients[j]
        total += own
    return total


@pytest.mark.parametrize("name", ["pareto", "pcgrad"])
def test_what_is_shared_gets_the_weighted_gradient(name: str) -> None:
    net = Net()
    gradients = net.gradients(list(net.shared.parameters())).double().numpy()
    products = gradients @ gradients.T
    if name == "pareto":
        weights = shortest(products)
    else:
        weights = without_conflicts(products)
        np.testing.assert_allclose(weights @ gradients, projected(gradients), rtol=1e-6, atol=1e-9)
    loss = loss_of(net, objective(net, name))
    torch.testing.assert_close(loss, sum(w * one for w, one in zip(weights.tolist(), net.losses(), strict=True)))
    loss.backward()
    found = torch.cat([parameter.grad.flatten() for parameter in net.shared.parameters()])  # type: ignore[union-attr]
    np.testing.assert_allclose(found.numpy(), weights @ gradients, rtol=1e-4, atol=1e-6)
    # a tower is trained on its own loss times the same weight
    plain = Net()
    plain.losses()[0].backward()
    torch.testing.assert_close(net.towers.weight.grad[0], weights[0] * plain.towers.weight.grad[0])  # type: ignore[index]


@pytest.mark.parametrize("count", [2, 3, 5])
def test_the_shortest_sum(count: int) -> None:
    rng = np.random.default_rng(count)
    for scale in (1e-6, 1.0, 1e6):
        vectors = rng.normal(size=(count, 8)) * scale + scale
        weights = shortest(vectors @ vectors.T)
        assert weights.min() >= 0
        assert weights.sum() == pytest.approx(1)
        found = weights @ vectors
        # none of the vectors makes less of it than itself: what characterises the shortest
        assert (vectors @ found >= found @ found * (1 - 1e-9) - 1e-12 * scale**2).all()
        if count == 2:
            one, other = vectors
            share = np.clip((other - one) @ other / ((one - other) @ (one - other)), 0, 1)
            np.testing.assert_allclose(weights, [share, 1 - share], atol=1e-12)


def test_vectors_that_are_alike_or_nought() -> None:
    np.testing.assert_allclose(shortest(np.ones((3, 3))), np.full(3, 1 / 3))
    np.testing.assert_allclose(shortest(np.zeros((2, 2))), [0.5, 0.5])
    np.testing.assert_allclose(without_conflicts(np.zeros((2, 2))), [1, 1])


def test_surgery_on_vectors() -> None:
    rng = np.random.default_rng(0)
    for count, _ in itertools.product((2, 3, 4), range(5)):
        vectors = rng.normal(size=(count, 3))
        weights = without_conflicts(vectors @ vectors.T)
        np.testing.assert_allclose(weights @ vectors, projected(vectors), atol=1e-9)
        assert weights.min() >= 1 - 1e-12  # nothing is ever unlearnt


@pytest.mark.parametrize("name", ["gradnorm", "pareto", "pcgrad"])
def test_a_loss_that_is_not_finite_is_none_afterwards(name: str) -> None:
    net = Net()
    with torch.no_grad():
        net.towers.bias[0] = torch.nan
    assert not loss_of(net, objective(net, name)).isfinite()  # for the guard to see


def built(folder: Path, model: str, objective: dict[str, Any], /, **sections: Any) -> Any:
    (folder / "dataset.yaml").write_text(yaml.safe_dump(SCHEMA))
    tree = {"name": "pointwise", **objective}
    return build(load_run(run_file(folder, folder, model, objective=tree, **sections)), device="cpu", world_size=1)


@pytest.mark.parametrize("model", ["SharedBottom", "MMoE", "PLE"])
def test_each_model_says_what_its_tasks_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    more = {"num_layers": 2} if model == "PLE" else {}
    parts = built(tmp_path, model, {"task_weighting": "pareto"}, model=more)
    model_ = parts.train_module.model
    x = torch.randn(6, model_.fields.width)
    monkeypatch.setattr(type(model_.fields), "concat", lambda *_: x)
    logits = model_(Embedded()).logits
    shared = model_.shared_parameters()
    names = {name for name, parameter in model_.named_parameters() if any(parameter is one for one in shared)}
    assert len(names) == len(shared) > 0
    for t in range(2):  # each task's loss reaches every one of them, wholly
        for gradient in torch.autograd.grad(logits[:, t].sum(), shared, retain_graph=True):
            assert gradient.flatten(1).any(dim=1).all() if gradient.dim() > 2 else gradient.any()
    assert any(parameter.dim() > 1 for parameter in shared)
    towers = {name for name, _ in model_.named_parameters() if name.startswith("towers")}
    assert not names & towers


@pytest.mark.parametrize(
    ("model", "objective", "sections", "message"),
    [
        ("SharedBottom", {"task_weighting": "gradnrm"}, {}, "task_weighting: input should be 'fixed', 'uncertainty'"),
        (
            "SharedBottom",
            {"task_weighting": "pareto", "task_weights": {"click": 2}},
            {},
            "objective.task_weights: are for task_weighting: fixed, and pareto finds its own",
        ),
        ("DeepFM", {"task_weighting": "uncertainty"}, {}, "uncertainty weighs several labels, and this run has one"),
        (
            "PLE",
            {"task_weighting": "gradnorm"},
            {"model": {"num_layers": 1}},
            "gradnorm follows the gradients of dense parameters that all tasks share, and this model names none",
        ),
        ("SharedBottom", {"task_weighting": "pcgrad"}, {"train": {"compile": True}}, "train.compile: what is compiled"),
        ("ESMM", {"name": "entire_space", "task_weighting": "pareto"}, {}, "unknown key 'objective.entire_space.task_"),
    ],
)
def test_mistakes(
    tmp_path: Path, model: str, objective: dict[str, Any], sections: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        built(tmp_path, model, objective, **sections)
