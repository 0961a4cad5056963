from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from rechub_dist.features import DenseFeature
from rechub_dist.layers.bilinear import Bilinear
from rechub_dist.models import FiBiNET
from rechub_tests import cases
from rechub_tests.cases import age, history, match, profile, shop, tags, user
from rechub_tests.reference import affine, assert_same, first_order, relu_mlp

IDS, DENSE = ["user", "tags", "history", "match"], ["age", "profile"]
KINDS = ["field_all", "field_each", "field_interaction"]


def built(kind: str, reduction_ratio: int = 2, hidden_units: tuple[int, ...] = (8, 6)) -> FiBiNET:
    torch.manual_seed(0)
    features = [user, age, tags, history, match, profile]
    return FiBiNET(features, kind, list(hidden_units), reduction_ratio).double()


def bilinear(kind: str, layer: Bilinear, v: list[Tensor]) -> list[Tensor]:
    """(v_i W) * v_j of all pairs, the matrices numbered by hand."""
    products, pair = [], 0
    for i in range(len(v)):
        for j in range(i + 1, len(v)):
            if kind == "field_all":
                matrix = layer.linear.weight.T
            else:
                matrix = layer.linear.weight[i if kind == "field_each" else pair]
            left = [sum(v[i][k] * matrix[k, o] for k in range(len(v[i]))) for o in range(len(v[i]))]
            products.append(torch.stack(left) * v[j])
            pair += 1
    return products


def importance(model: FiBiNET, v: list[Tensor]) -> Tensor:
    z = torch.stack([sum(field) / len(field) for field in v])
    hidden = affine(model.senet.squeeze, z)
    weights = affine(model.senet.excite, hidden * (hidden > 0))
    return weights * (weights > 0)


@pytest.mark.parametrize("reduction_ratio", [1, 2, 9])
@pytest.mark.parametrize("hidden_units", [(8, 6), ()])
@pytest.mark.parametrize("kind", KINDS)
def test_forward_and_gradients(kind: str, hidden_units: tuple[int, ...], reduction_ratio: int) -> None:
    model = built(kind, reduction_ratio, hidden_units)
    nn.init.normal_(model.senet.excite.weight, mean=0.3)  # some weights of fields are cut off
    embedded = cases.make_batch(model, 4)

    def formula() -> Tensor:
        rows = []
        for b in range(4):
            v = [embedded.vectors[name][b] for name in IDS]
            a = importance(model, v)
            p = bilinear(kind, model.raw, v)
            q = bilinear(kind, model.weighted, [a[i] * v[i] for i in range(len(v))])
            x = torch.cat([*p, *q, *(embedded.dense[name][b] for name in DENSE)])
            rows.append(first_order(model.first_order, embedded, IDS, DENSE, b) + relu_mlp(model.mlp.layers, x))
        return torch.stack(rows)

    assert_same(model, embedded, embedded.vectors, formula)


@pytest.mark.parametrize("kind", KINDS)
def test_two_fields(kind: str) -> None:
    model = FiBiNET([user, tags], kind, [3], 1).double()
    embedded = cases.make_batch(model, 3)
    assert model(embedded).logits.shape == (3, 1)
    assert sum(parameter.numel() for parameter in model.raw.parameters()) == 16


@pytest.mark.parametrize(("kind", "matrices"), [("field_all", 1), ("field_each", 3), ("field_interaction", 6)])
def test_number_of_matrices(kind: str, matrices: int) -> None:
    model = built(kind)
    for layer in (model.raw, model.weighted):
        assert sum(parameter.numel() for parameter in layer.parameters()) == matrices * 16
    assert not torch.equal(*(next(layer.parameters()) for layer in (model.raw, model.weighted)))


@pytest.mark.parametrize(("reduction_ratio", "hidden"), [(1, 4), (2, 2), (3, 1), (9, 1)])
def test_the_reduction(reduction_ratio: int, hidden: int) -> None:
    model = built("field_all", reduction_ratio)
    assert tuple(model.senet.squeeze.weight.shape) == (hidden, 4)
    assert tuple(model.senet.excite.weight.shape) == (4, hidden)


@pytest.mark.parametrize("reduction_ratio", [1, 4])
def test_at_the_start_every_field_can_have_weight(reduction_ratio: int) -> None:
    for seed in range(20):
        torch.manual_seed(seed)
        senet = FiBiNET([user, tags, history, match], "field_all", [], reduction_ratio).senet
        weights = senet(torch.randn(64, 4, 4))
        assert (weights >= 0).all()
        assert (weights > 0).any(dim=0).all()
        assert weights.std(dim=0).min() > 0  # the row sets them
        assert weights.std(dim=1).max() > 0  # and they differ between fields


def test_lookups() -> None:
    lookups = {lookup.name: lookup for lookup in cases.fibinet().lookups()}
    assert {name: (lookup.table.name, lookup.dim, lookup.pooling) for name, lookup in lookups.items()} == {
        "user": ("user", 4, "sum"),
        "tags": ("tag", 4, "mean"),
        "history": ("item", 4, "mean"),
        "match": ("match", 4, "sum"),
        "user.linear": ("user.linear", 1, "sum"),
        "tags.linear": ("tag.linear", 1, "mean"),
        "history.linear": ("item.linear", 1, "mean"),
        "match.linear": ("match.linear", 1, "sum"),
    }
    assert [feature.name for feature in cases.fibinet().dense_features()] == DENSE


@pytest.mark.parametrize(
    ("features", "kind", "ratio", "message"),
    [
        ([user, tags, shop], "field_all", 2, "table 'shop' has dim 2, but table 'user' has 4: .*one dim"),
        ([user, age], "field_all", 2, r"features has 1 with ids, \['user'\]: FiBiNET needs pairs"),
        ([DenseFeature("x")], "field_all", 2, "features has 0 with ids"),
        ([], "field_all", 2, "features is empty"),
        ([user, cases.visit], "field_all", 2, "table 'visit' has no width"),
        ([user, tags], "all", 2, "bilinear_type is 'all': use one of field_all, field_each, field_interaction"),
        ([user, tags], "field_all", 0, "reduction_ratio is 0: it must be at least 1"),
    ],
)
def test_wrong_arguments(features: list, kind: str, ratio: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FiBiNET(features, kind, [4], ratio)
