from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from rechub_dist.models import DCN
from rechub_tests import cases
from rechub_tests.cases import age, profile, shop, user
from rechub_tests.reference import affine, assert_same, relu_mlp, row_input, vector_cross

IDS, DENSE = ["user", "shop", "tags", "history"], ["age", "profile"]


def built(hidden_units: list[int]) -> DCN:
    torch.manual_seed(0)
    model = DCN([user, age, shop, cases.tags, cases.history, profile], 3, hidden_units).double()
    for layer in model.cross.layers:
        nn.init.normal_(layer.bias)
    return model


@pytest.mark.parametrize("hidden_units", [[8, 6], [5], []])
def test_forward_and_gradients(hidden_units: list[int]) -> None:
    model = built(hidden_units)
    embedded = cases.make_batch(model, 4)

    def formula() -> Tensor:
        rows = []
        for b in range(4):
            x0 = x = row_input(embedded, IDS, DENSE, b)
            for layer in model.cross.layers:
                x = vector_cross(layer, x0, x)
            if hidden_units:
                x = torch.cat([x, relu_mlp(model.mlp.layers, x0)])
            rows.append(affine(model.output, x))
        return torch.stack(rows)

    assert_same(model, embedded, embedded.vectors, formula)


def test_the_cross_network_is_of_bounded_degree() -> None:
    """Along a ray t x_0, without biases, L layers give a polynomial of degree L + 1 in t, and no less."""
    model = DCN([profile], 2, []).double()
    x0 = torch.randn(1, 3, dtype=torch.float64)
    values = model.cross(torch.arange(5, dtype=torch.float64)[:, None] * x0)
    differences = [values.diff(n=order, dim=0) for order in (3, 4)]
    assert differences[0].abs().min() > 1e-6
    torch.testing.assert_close(differences[1], torch.zeros(1, 3).double())


def test_biases_start_at_zero_and_dropout_stays_in_the_deep_network() -> None:
    model = DCN([user], 2, [8, 8], dropout_rates=[0.5, 0.25])
    assert not any(layer.bias.any() for layer in model.cross.layers)
    assert [layer.p for layer in model.mlp.layers if isinstance(layer, nn.Dropout)] == [0.5, 0.25]
    assert not [layer for layer in model.cross.modules() if isinstance(layer, nn.Dropout)]


def test_lookups() -> None:
    model = cases.dcn()
    assert [(lookup.name, lookup.table.name, lookup.dim, lookup.pooling) for lookup in model.lookups()] == [
        ("user", "user", 4, "sum"),
        ("shop", "shop", 2, "sum"),
        ("tags", "tag", 4, "mean"),
        ("history", "item", 4, "mean"),
    ]
    assert [feature.name for feature in model.dense_features()] == ["age", "profile"]


@pytest.mark.parametrize("cross_num", [0, -2])
def test_no_cross_layers(cross_num: int) -> None:
    with pytest.raises(ValueError, match=f"cross_num is {cross_num}: it must be at least 1"):
        DCN([user], cross_num, [4])


def test_wrong_features_and_rates() -> None:
    with pytest.raises(ValueError, match="features is empty"):
        DCN([], 1, [4])
    with pytest.raises(ValueError, match="table 'visit' has no width"):
        DCN([cases.visit], 1, [4])
    with pytest.raises(ValueError, match=r"1 dropout rates .* 0 hidden layers"):
        DCN([user], 1, [], dropout_rates=[0.1])
