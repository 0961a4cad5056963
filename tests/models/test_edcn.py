from __future__ import annotations

from typing import Any

import pytest
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
        ({"temperature": 0.0}, "temperature is 0.0: it must be above 0"),
        ({"dropout_rates": [0.1]}, "1 dropout rates .* 2 hidden layers"),
        ({"activation": "rulu"}, "'rulu' is unknown"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    given = {"features": [user, shop], "cross_num": 2, "hidden_units": [4, 4], "gate_type": "FGU"}
    with pytest.raises(ValueError, match=message):
        EDCN(**(given | arguments))
