"""What the scores of a recall model are divided by: a number, or a parameter; never twice."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

from rechub_dist.assembly.parts import build
from rechub_dist.config import RetrievalConfig
from rechub_dist.data.run_file import load_run
from rechub_dist.embedded import Embedded, Output
from rechub_dist.embedded import Sequence as Padded
from rechub_dist.errors import UserError
from rechub_dist.objectives import RetrievalObjective
from rechub_tests import cases_recall as recall
from rechub_tests.runs import SCHEMA, run_file

B, D = 5, 4
USER, ITEM = torch.randn(2, B, 1, D, generator=torch.Generator().manual_seed(0)).unbind(0)


def objective(model: Any, **config: Any) -> RetrievalObjective:
    return RetrievalObjective(RetrievalConfig(log_q=False, negatives="in_batch", loss="softmax", **config), model, ())


def loss_of(made: RetrievalObjective, user: Tensor) -> Tensor:
    """The loss of B positives against each other."""
    ids = SimpleNamespace(values=lambda: torch.arange(B), lengths=lambda: torch.ones(B, dtype=torch.int64))
    batch: Any = SimpleNamespace(rows=B, labels=torch.empty(B, 0), weights=None, candidates=None, feature=lambda _: ids)
    batch.weight_sums = made.weight_sums(batch)
    output = Output(user=user, user_mask=torch.ones(B, 1, dtype=torch.bool), item=ITEM)
    return made(output, Embedded(), batch)


def expected(user: Tensor, temperature: Tensor | float) -> Tensor:
    return F.cross_entropy(user[:, 0] @ ITEM[:, 0].T / temperature, torch.arange(B))


def test_a_number_divides_the_scores() -> None:
    recall_model = recall.dssm()
    recall_model.temperature = 1.0
    torch.testing.assert_close(loss_of(objective(recall_model, temperature=0.3), USER), expected(USER, 0.3))


def test_it_takes_the_place_of_the_models_own() -> None:
    model = recall.dssm()  # whose vectors of users have the length 1 / 0.05
    torch.testing.assert_close(loss_of(objective(model, temperature=0.3), USER / 0.05), expected(USER, 0.3))
    torch.testing.assert_close(loss_of(objective(model, temperature="learn"), USER / 0.05), expected(USER, 0.05))
    torch.testing.assert_close(loss_of(objective(model), USER / 0.05), expected(USER, 0.05))


def test_its_gradient() -> None:
    made = objective(recall.dssm(), temperature="learn", temperature_start=0.4)
    [(name, parameter)] = made.named_parameters()
    assert (name, list(made.learned())) == ("_temperature.log_value", [name])
    loss_of(made, USER / 0.05).backward()
    log_value = torch.tensor(math.log(0.4), requires_grad=True)
    expected(USER, log_value.exp()).backward()
    torch.testing.assert_close(parameter.grad, log_value.grad)


def test_it_stays_above_a_hundredth() -> None:
    made = objective(recall.dssm(), temperature="learn", temperature_start=0.001)
    loss = loss_of(made, USER / 0.05)
    torch.testing.assert_close(loss, expected(USER, 0.01))
    loss.backward()
    [parameter] = made.parameters()
    assert parameter.grad != 0  # it may rise again


def test_users_are_ranked_and_exported_by_vectors_of_that_scale() -> None:
    model = recall.dssm().eval()
    history = Embedded(vectors={"history": torch.randn(B, D)}, sequences={"history": Padded(USER, torch.ones(B))})
    plain, _ = objective(model).ranking.user(history)
    scaled, _ = objective(model, temperature=0.5).ranking.user(history)
    torch.testing.assert_close(scaled, plain * 0.05 / 0.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"objective": {"temperature": 0.1}, "model": {"temperature": 0.2}},
            "objective.temperature: takes the place of DSSM's own; give it alone, or model.temperature alone",
        ),
        ({"objective": {"temperature": 0}}, "temperature.*: input should be greater than 0"),
        ({"objective": {"temperature": "lern"}}, "temperature.*: input should be 'learn'"),
        ({"objective": {"temperture": 1}}, "unknown key 'objective.retrieval.temperture': did you mean 'temperature'"),
        ({"objective": {"temperature_start": 1}}, "temperature_start is that of temperature: learn"),
    ],
)
def test_mistakes(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    (tmp_path / "dataset.yaml").write_text(yaml.safe_dump(SCHEMA))
    path = run_file(tmp_path, tmp_path, "DSSM", **changes)
    with pytest.raises(UserError, match=message):
        build(load_run(path), device="cpu", world_size=1)
