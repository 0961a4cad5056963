from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rechub_dist.features import SparseFeature, Table
from rechub_dist.models import AFM
from rechub_tests import cases
from rechub_tests.cases import age, history, match, profile, tags, user
from rechub_tests.reference import affine, assert_same, first_order, relu_mlp, softmax

IDS, DENSE = ["user", "tags", "history", "match"], ["age", "profile"]


def built(attention_units: list[int], dropout_rate: float = 0.0, **options: Any) -> AFM:
    torch.manual_seed(0)
    model = AFM([user, age, tags, history, match, profile], attention_units, 4, dropout_rate, **options).double()
    nn.init.normal_(model.bias)
    return model


def products_of(embedded: cases.Embedded, names: list[str], b: int) -> list[Tensor]:
    v = [embedded.vectors[name][b] for name in names]
    return [v[i] * v[j] for i in range(len(v)) for j in range(i + 1, len(v))]


def logit(model: AFM, products: list[Tensor], first: Tensor) -> Tensor:
    scores = [affine(model.attention.score, relu_mlp(model.attention.mlp.layers, product)) for product in products]
    pooled = sum(a * product for a, product in zip(softmax(scores), products, strict=True))
    return model.bias + first + affine(model.projection, pooled)


@pytest.mark.parametrize("attention_units", [[6], [5, 3]])
def test_forward_and_gradients(attention_units: list[int]) -> None:
    model = built(attention_units)
    embedded = cases.make_batch(model, 4)

    def formula() -> Tensor:
        return torch.stack(
            [
                logit(model, products_of(embedded, IDS, b), first_order(model.first_order, embedded, IDS, DENSE, b))
                for b in range(4)
            ]
        )

    assert_same(model, embedded, embedded.vectors, formula)


def test_dropout_is_that_of_the_products() -> None:
    """One mask of the pair-wise products holds for the attention network and for the sum."""
    model = built([6], dropout_rate=0.5)
    embedded = cases.make_batch(model, 3)
    torch.manual_seed(7)
    mask = nn.Dropout(0.5)(torch.ones(3, 6, 4, dtype=torch.float64))
    assert mask.unique().tolist() == [0, 2]
    torch.manual_seed(7)
    logits = model(embedded).logits
    for b in range(3):
        products = [mask[b, p] * product for p, product in enumerate(products_of(embedded, IDS, b))]
        expected = logit(model, products, first_order(model.first_order, embedded, IDS, DENSE, b))
        torch.testing.assert_close(logits[b], expected)
    model.eval()
    torch.testing.assert_close(model(embedded).logits, built([6]).eval()(embedded).logits)


@pytest.mark.parametrize(("what", "shape"), [("weights", (3, 6)), ("output", (3, 4))])
def test_dropout_of_the_attention_network(what: str, shape: tuple[int, ...]) -> None:
    """As the authors' code has it: of the softmax's weights, or of the weighted sum."""
    model = built([6], dropout_rate=0.5, dropped=what)
    embedded = cases.make_batch(model, 3)
    torch.manual_seed(7)
    mask = nn.Dropout(0.5)(torch.ones(*shape, dtype=torch.float64))
    torch.manual_seed(7)
    logits = model(embedded).logits
    for b in range(3):
        products = products_of(embedded, IDS, b)
        scores = [affine(model.attention.score, relu_mlp(model.attention.mlp.layers, product)) for product in products]
        weights = softmax(scores)
        if what == "weights":
            weights = [kept * a for kept, a in zip(mask[b], weights, strict=True)]
        pooled = sum(a * product for a, product in zip(weights, products, strict=True))
        if what == "output":
            pooled = mask[b] * pooled
        first = first_order(model.first_order, embedded, IDS, DENSE, b)
        torch.testing.assert_close(logits[b], model.bias + first + affine(model.projection, pooled))
    model.eval()
    torch.testing.assert_close(model(embedded).logits, built([6]).eval()(embedded).logits)


def test_two_fields_make_one_pair_of_weight_one() -> None:
    model = AFM([user, tags], [3], 4, 0.0).double()
    embedded = cases.make_batch(model, 3)
    assert not [name for name, _ in model.named_parameters() if name.startswith("attention")]

    def formula() -> Tensor:
        rows = []
        for b in range(3):
            (product,) = products_of(embedded, ["user", "tags"], b)
            first = first_order(model.first_order, embedded, ["user", "tags"], [], b)
            rows.append(model.bias + first + affine(model.projection, product))
        return torch.stack(rows)

    assert_same(model, embedded, embedded.vectors, formula)


def test_attention_is_a_distribution_over_the_pairs() -> None:
    model = built([6]).eval()
    seen: list[Tensor] = []
    model.attention.register_forward_hook(lambda _module, _args, weights: seen.append(weights))
    model(cases.make_batch(model, 5))
    (weights,) = seen
    assert weights.shape == (5, 6)
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(5).double())
    assert weights.std(dim=1).min() > 1e-3  # over pairs
    assert weights.std(dim=0).min() > 1e-3  # over rows


def test_lookups() -> None:
    lookups = {lookup.name: lookup for lookup in cases.afm().lookups()}
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
    assert [feature.name for feature in cases.afm().dense_features()] == DENSE


def test_the_model_gives_the_width() -> None:
    model = AFM([SparseFeature("a", Table("a", 3)), SparseFeature("b", Table("b", 3))], [4], 5, 0.0)
    assert [lookup.dim for lookup in model.lookups()] == [5, 5, 1, 1]


@pytest.mark.parametrize(
    ("features", "units", "rate", "message"),
    [
        ([user, age], [4], 0.0, r"features has 1 with ids, \['user'\]: AFM needs pairs"),
        ([age], [4], 0.0, "features has 0 with ids"),
        ([], [4], 0.0, "features is empty"),
        ([user, cases.shop], [4], 0.0, "table 'shop' has dim 2, but the model's embedding_dim is 4"),
        ([user, tags], [], 0.0, "attention_units is empty: give at least one width"),
        ([user, tags], [0], 0.0, "every width must be at least 1"),
        ([user, tags], [4], 1.0, "dropout_rate is 1.0: it must be at least 0 and less than 1"),
        ([user, tags], [4], -0.1, "dropout_rate is -0.1"),
    ],
)
def test_wrong_arguments(features: list, units: list[int], rate: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AFM(features, units, 4, rate)


def test_dropout_of_something_else() -> None:
    with pytest.raises(ValueError, match="dropped is 'scores': use one of products, weights, output"):
        AFM([user, tags], [4], 4, 0.0, dropped="scores")
