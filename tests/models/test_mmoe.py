from __future__ import annotations

import math
from typing import get_args

import pytest
import test_catalogue as proof
import torch
from torch import Tensor, nn

from rechub_dist.embedded import Embedded
from rechub_dist.layers import activation
from rechub_dist.models import MMoE
from rechub_dist.models.multitask.mmoe import GateActivation
from rechub_tests import cases
from rechub_tests.reference import assert_same, group_affine, group_relu_mlp, row_input, sigmoid, softmax

IDS, DENSE = ["user", "shop", "tags", "history"], ["age", "profile"]
FORMULAS = {
    "softmax": softmax,
    "gelu": lambda s: [x * 0.5 * (1 + torch.erf(x / math.sqrt(2))) for x in s],
    "leaky_relu": lambda s: [x * (x > 0) + 0.01 * x * (x <= 0) for x in s],
    "relu": lambda s: [x * (x > 0) for x in s],
    "sigmoid": lambda s: [sigmoid(x) for x in s],
    "silu": lambda s: [x * sigmoid(x) for x in s],
    "tanh": lambda s: [(x.exp() - (-x).exp()) / (x.exp() + (-x).exp()) for x in s],
}


def small(**changes: object) -> MMoE:
    given = {
        "features": [cases.user, cases.age, cases.shop, cases.tags, cases.history, cases.profile],
        "expert_units": [5, 4],
        "num_experts": 3,
        "num_tasks": 2,
    }
    return MMoE(**(given | changes))


def gates_of(model: MMoE, embedded: Embedded) -> Tensor:
    x = model.fields.concat(embedded)
    return model.gates(x).softmax(dim=2)


@pytest.mark.parametrize("name", get_args(GateActivation))
@pytest.mark.parametrize("towers", [None, [5]])
def test_forward_and_gradients(name: str, towers: list[int] | None) -> None:
    torch.manual_seed(0)
    model = small(gate_activation=name, tower_units=towers, num_tasks=3).double()
    embedded = cases.make_batch(model, 3)
    if name == "prelu":
        nn.init.uniform_(model.gate_activation.weight)

    def gate(k: int, scores: list[Tensor]) -> list[Tensor]:
        if name == "prelu":
            slopes = model.gate_activation.weight[3 * k : 3 * k + 3]
            return [x * (x > 0) + slope * x * (x <= 0) for slope, x in zip(slopes, scores, strict=True)]
        return FORMULAS[name](scores)

    def formula() -> Tensor:
        rows = []
        for b in range(3):
            x = row_input(embedded, IDS, DENSE, b)
            experts = [group_relu_mlp(model.experts.layers, i, x) for i in range(3)]
            logits = []
            for k in range(3):
                weights = gate(k, list(group_affine(model.gates, k, x)))
                mixed = sum(weight * expert for weight, expert in zip(weights, experts, strict=True))
                logits.append(group_relu_mlp(model.towers.layers, k, mixed))
            rows.append(torch.cat(logits))
        return torch.stack(rows)

    assert_same(model, embedded, embedded.vectors, formula)


def test_gates_are_the_tasks_own_and_sum_to_one() -> None:
    model = cases.build(MMoE)
    gates = gates_of(model, cases.make_batch(model, 5))
    assert gates.shape == (5, 2, 3)
    torch.testing.assert_close(gates.sum(dim=2), torch.ones(5, 2).double())
    assert (gates[:, 0] - gates[:, 1]).abs().min() > 1e-5
    assert (gates[0] - gates[1]).abs().min() > 1e-5


def test_a_task_trains_its_own_gate_and_tower_and_all_experts() -> None:
    model = cases.build(MMoE)
    model(cases.make_batch(model, 6)).logits[:, 0].sum().backward()
    for parameter in (model.gates.weight, *model.towers.parameters()):
        assert parameter.grad[0].any()
        assert not parameter.grad[1].any()
    assert all(grad.any() for parameter in model.experts.parameters() for grad in parameter.grad)


def test_every_gate_activation_without_statistics_is_offered() -> None:
    plain = {
        name
        for name in activation._ACTIVATIONS
        if not any(isinstance(module, nn.BatchNorm1d) for module in activation.activation(name, 2).modules())
    }
    assert set(get_args(GateActivation)) == plain | {"softmax"}


@pytest.mark.parametrize("changes", [{"batch_norm": True}, {"expert_activation": "dice"}, {"tower_activation": "dice"}])
def test_statistics_stay_out_of_the_gates(changes: dict) -> None:
    model = small(tower_units=[4], **changes).double()
    embedded = cases.make_batch(model, 5)
    assert any(isinstance(module, nn.BatchNorm1d) for module in model.modules())
    assert [name for name, _ in model.gates.named_parameters()] == ["weight"]
    alone = cases.row_of(embedded, 0)
    torch.testing.assert_close(gates_of(model, alone), gates_of(model, embedded)[:1])
    for kind in proof.BATCHES:
        torch.manual_seed(0)
        proof.test_every_parameter_gets_a_gradient(small(tower_units=[4], **changes).double(), kind)


def test_one_expert_may_have_gates_that_are_not_softmax() -> None:
    torch.manual_seed(0)
    proof.test_every_parameter_gets_a_gradient(small(num_experts=1, gate_activation="sigmoid").double(), "several")


def test_task_types() -> None:
    assert cases.mmoe().task_types is None
    assert cases.mmoe().num_tasks == 2
    assert small(task_types=["regression", "classification"]).task_types == ("regression", "classification")


def test_lookups() -> None:
    assert {lookup.name: (lookup.table.name, lookup.dim, lookup.pooling) for lookup in cases.mmoe().lookups()} == {
        "user": ("user", 4, "sum"),
        "shop": ("shop", 2, "sum"),
        "tags": ("tag", 4, "mean"),
        "history": ("item", 4, "mean"),
    }
    assert [feature.name for feature in cases.mmoe().dense_features()] == ["age", "profile"]


def test_widths_and_dropout_rates() -> None:
    model = small(dropout_rates=[0.1, 0.2], tower_units=[4], tower_dropout_rates=0.3)
    assert [layer.p for layer in model.experts.layers if isinstance(layer, nn.Dropout)] == [0.1, 0.2]
    assert [layer.p for layer in model.towers.layers if isinstance(layer, nn.Dropout)] == [0.3]
    assert [layer.weight.shape for layer in model.experts.layers if hasattr(layer, "weight")] == [(3, 18, 5), (3, 5, 4)]
    assert [layer.weight.shape for layer in model.towers.layers if hasattr(layer, "weight")] == [(2, 4, 4), (2, 4, 1)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": 1}, "num_experts is 1, of which a softmax gate is always 1: give at least 2 experts"),
        ({"num_experts": 0, "gate_activation": "relu"}, "num_experts is 0: it must be at least 1"),
        ({"expert_units": []}, "expert_units is empty: give each expert at least one layer"),
        ({"gate_activation": "dice"}, "gate_activation is 'dice': use one of softmax, .*tanh"),
        ({"expert_activation": "rulu"}, "'rulu' is unknown"),
        ({"num_tasks": 0}, "num_tasks is 0 .*at least one task"),
        ({"task_types": ["regression"]}, "num_tasks is 2 and task_types .*one type for each"),
        ({"task_types": ["regression", "ranking"]}, "'ranking' is unknown: use one of classification, regression"),
        ({"dropout_rates": [0.1]}, "1 dropout rates .* 2 hidden layers"),
        ({"features": []}, "features is empty"),
    ],
)
def test_wrong_arguments(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**changes)
