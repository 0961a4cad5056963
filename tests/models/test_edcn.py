from __future__ import annotations

from typing import Any

import pytest
import test_catalogue as proof
import torch
from torch import Tensor, nn

from rechub_dist.models import EDCN
from rechub_tests import cases
from rechub_tests.cases import age, history, profile, shop, tags, user
from rechub_tests.reference import affine, assert_same, relu_mlp, row_input, softmax, vector_cross

IDS, DENSE = ["user", "shop", "tags", "history"], ["age", "profile"]
WIDTHS = [4, 2, 4, 4, 1, 3]  # 18 in all


def built(gate_type: str, hidden_units: tuple[int, ...] = (18, 7, 18), temperature: float = 1.0) -> EDCN:
    torch.manual_seed(0)
    features = [user, age, shop, tags, history, profile]
    model = EDCN(features, len(hidden_units), list(hidden_units), gate_type, temperature=temperature).double()
    for layer in model.cross:
        nn.init.normal_(layer.bias)
    return model


def gate_of(model: EDCN, gate_type: str, layer: int, tower: int, temperature: float) -> Tensor:
    """The gate of each of the 18 dimensions."""
    shares = softmax([logit / temperature for logit in model.regulation.logits[layer, tower]])
    if gate_type == "BGU":
        return torch.stack([18 * share for share in shares])
    return torch.stack([6 * share for share, width in zip(shares, WIDTHS, strict=True) for _ in range(width)])


@pytest.mark.parametrize("hidden_units", [(18, 18), (7, 30), (18, 7, 18), (5,)])
@pytest.mark.parametrize(("gate_type", "temperature"), [("FGU", 1.0), ("BGU", 1.0), ("FGU", 0.3), ("BGU", 0.3)])
def test_forward_and_gradients(gate_type: str, temperature: float, hidden_units: tuple[int, ...]) -> None:
    model = built(gate_type, hidden_units, temperature)
    nn.init.normal_(model.regulation.logits)
    embedded = cases.make_batch(model, 3)

    def formula() -> Tensor:
        rows = []
        for b in range(3):
            bridge = row_input(embedded, IDS, DENSE, b)
            start = gate_of(model, gate_type, 0, 0, temperature) * bridge
            for layer in range(len(hidden_units)):
                crossed = gate_of(model, gate_type, layer, 0, temperature) * bridge
                cross = vector_cross(model.cross[layer], start, crossed)
                deep = relu_mlp(model.deep[layer].layers, gate_of(model, gate_type, layer, 1, temperature) * bridge)
                bridge = cross * deep
            rows.append(affine(model.output, torch.cat([cross, deep, bridge])))
        return torch.stack(rows)

    assert_same(model, embedded, embedded.vectors, formula)


def bridged(layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The bridge of one row."""
    if layer.kind == "pointwise_addition":
        return torch.stack([a + b for a, b in zip(x, y, strict=True)])
    if layer.kind == "concatenation":
        joined = affine(layer.linear, torch.cat([x, y]))
        return joined * (joined > 0)
    if layer.kind == "attention_pooling":
        hidden = [affine(layer.linear, vector) for vector in (x, y)]
        scores = [affine(layer.score, vector * (vector > 0)) for vector in hidden]
        shares = softmax(scores)
        return shares[0] * x + shares[1] * y
    return torch.stack([a * b for a, b in zip(x, y, strict=True)])


def normed(norm: nn.BatchNorm1d, rows: list[Tensor]) -> list[Tensor]:
    """(x - mean) / sqrt(variance + eps) * gain + bias of each column."""
    mean = sum(rows) / len(rows)
    variance = sum((row - mean) ** 2 for row in rows) / len(rows)
    return [(row - mean) / torch.sqrt(variance + norm.eps) * norm.weight + norm.bias for row in rows]


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize(
    "bridge_type", ["hadamard_product", "pointwise_addition", "concatenation", "attention_pooling"]
)
def test_bridges_and_norms_of_gates(bridge_type: str, batch_norm: bool) -> None:
    torch.manual_seed(0)
    features = [user, age, shop, tags, history, profile]
    model = EDCN(features, 2, [7, 18], "FGU", bridge_type=bridge_type, gate_batch_norm=batch_norm).double()
    for norm in model.gate_norms:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    assert len(model.gate_norms) == (4 if batch_norm else 0)
    embedded = cases.make_batch(model, 4)

    def formula() -> Tensor:
        bridges = [row_input(embedded, IDS, DENSE, b) for b in range(4)]
        for layer in range(2):
            gated = []
            for tower in range(2):
                rows = [gate_of(model, "FGU", layer, tower, 1.0) * bridge for bridge in bridges]
                gated.append(normed(model.gate_norms[2 * layer + tower], rows) if batch_norm else rows)
            if layer == 0:
                starts = gated[0]
            cross = [vector_cross(model.cross[layer], s, x) for s, x in zip(starts, gated[0], strict=True)]
            deep = [relu_mlp(model.deep[layer].layers, x) for x in gated[1]]
            bridges = [bridged(model.bridges[layer], x, y) for x, y in zip(cross, deep, strict=True)]
        rows = zip(cross, deep, bridges, strict=True)
        return torch.stack([affine(model.output, torch.cat(row)) for row in rows])

    assert_same(model, embedded, embedded.vectors, formula)
    for kind in proof.BATCHES:
        proof.test_every_parameter_gets_a_gradient(model, kind)


def test_a_plain_bridge_adds_nothing_to_a_checkpoint() -> None:
    names = list(built("FGU").state_dict())
    assert not [name for name in names if name.startswith(("bridges", "gate_norms"))]


@pytest.mark.parametrize("gate_type", ["FGU", "BGU"])
def test_gates_differ_and_sum_up(gate_type: str) -> None:
    gates = built(gate_type).regulation()
    assert gates.shape == (3, 2, 18)
    first = torch.tensor([0, 4, 6, 10, 14, 15])  # where each field begins
    if gate_type == "FGU":
        fields = gates[..., first]
        torch.testing.assert_close(fields.sum(dim=2), torch.full((3, 2), 6.0).double())
        assert torch.equal(gates, fields.repeat_interleave(torch.tensor(WIDTHS), dim=2))
        assert fields.std(dim=2).min() > 1e-3
    else:
        torch.testing.assert_close(gates.sum(dim=2), torch.full((3, 2), 18.0).double())
        assert gates.std(dim=2).min() > 1e-3
    assert gates.flatten(0, 1).std(dim=0).min() > 1e-4  # towers and layers have gates of their own
    torch.testing.assert_close(gates, torch.ones_like(gates), rtol=0, atol=0.5)


@pytest.mark.parametrize("gate_type", ["FGU", "BGU"])
def test_temperature_spreads_the_gates(gate_type: str) -> None:
    spread = [built(gate_type, temperature=t).regulation().std(dim=2) for t in (0.2, 1.0, 5.0)]
    assert (spread[0] > spread[1]).all()
    assert (spread[1] > spread[2]).all()


def test_sizes_are_the_user_s() -> None:
    deep = built("FGU", (18, 7)).deep
    shapes = [[tuple(layer.weight.shape) for layer in mlp.layers if isinstance(layer, nn.Linear)] for mlp in deep]
    assert shapes == [[(18, 18)], [(7, 18), (18, 7)]]


def test_dropout_rates_are_the_layers() -> None:
    model = EDCN([user, shop], 2, [6, 5], "FGU", dropout_rates=[0.5, 0.25], batch_norm=True)
    assert [layer.p for mlp in model.deep for layer in mlp.layers if isinstance(layer, nn.Dropout)] == [0.5, 0.25]
    norms = [layer.num_features for mlp in model.deep for layer in mlp.layers if isinstance(layer, nn.BatchNorm1d)]
    assert norms == [6, 5]


def test_lookups() -> None:
    model = cases.edcn()
    assert [(lookup.name, lookup.table.name, lookup.dim, lookup.pooling) for lookup in model.lookups()] == [
        ("user", "user", 4, "sum"),
        ("shop", "shop", 2, "sum"),
        ("tags", "tag", 4, "mean"),
        ("history", "item", 4, "mean"),
    ]
    assert [feature.name for feature in model.dense_features()] == DENSE


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cross_num": 0}, "cross_num is 0: it must be at least 1"),
        ({"cross_num": 3}, r"cross_num is 3 and hidden_units \[4, 4\]: .*give 3 hidden widths"),
        ({"features": []}, "features is empty"),
        ({"features": [user]}, "features has 1: .*at least two"),
        ({"gate_type": "GRU"}, "gate_type is 'GRU': use one of FGU, BGU"),
        ({"bridge_type": "sum"}, "bridge_type is 'sum': use one of hadamard_product, pointwise_addition, conc"),
        ({"temperature": 0.0}, "temperature is 0.0: it must be above 0"),
        ({"dropout_rates": [0.1]}, "1 dropout rates .* 2 hidden layers"),
        ({"activation": "rulu"}, "'rulu' is unknown"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    given = {"features": [user, shop], "cross_num": 2, "hidden_units": [4, 4], "gate_type": "FGU"}
    with pytest.raises(ValueError, match=message):
        EDCN(**(given | arguments))
