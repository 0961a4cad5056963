from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rechub_dist.features import DenseFeature, SparseFeature, Table
from rechub_dist.models import WideDeep
from rechub_tests import cases
from rechub_tests.cases import age, history, match, profile, shop, tags, user, visit
from rechub_tests.reference import affine, assert_same, first_order, relu_mlp, row_input


def test_forward_and_gradients() -> None:
    model = cases.build(WideDeep)
    embedded = cases.make_batch(model, 4)

    def formula() -> Tensor:
        rows = []
        for b in range(4):
            wide = first_order(model.wide, embedded, ["user", "visit", "history"], ["age"], b)
            x = row_input(embedded, ["user", "shop", "tags", "history", "match"], ["age", "profile"], b)
            rows.append(wide + relu_mlp(model.mlp.layers, x))
        return torch.stack(rows)

    assert_same(model, embedded, embedded.vectors, formula)


def test_one_kind_of_feature_a_part() -> None:
    model = WideDeep([visit], [profile], [], 0.0).double()
    embedded = cases.make_batch(model, 3)

    def formula() -> Tensor:
        return torch.stack(
            [
                embedded.vectors["visit.linear"][b] + affine(model.mlp.layers[0], embedded.dense["profile"][b])
                for b in range(3)
            ]
        )

    assert_same(model, embedded, embedded.vectors, formula)


def test_lookups() -> None:
    lookups = {lookup.name: lookup for lookup in cases.widedeep().lookups()}
    assert {name: (lookup.table.name, lookup.dim, lookup.pooling) for name, lookup in lookups.items()} == {
        "user.linear": ("user.linear", 1, "sum"),
        "visit.linear": ("visit.linear", 1, "sum"),
        "history.linear": ("item.linear", 1, "mean"),
        "user": ("user", 4, "sum"),
        "shop": ("shop", 2, "sum"),
        "tags": ("tag", 4, "mean"),
        "history": ("item", 4, "mean"),
        "match": ("match", 4, "sum"),
    }
    assert lookups["visit.linear"].table.rows == 9


def test_dense_features_are_the_union_in_order() -> None:
    model = WideDeep([profile, age, user], [age, DenseFeature("price"), shop], [4], 0.0)
    assert [feature.name for feature in model.dense_features()] == ["profile", "age", "price"]


def test_a_dense_feature_of_both_parts_counts_in_both() -> None:
    model = WideDeep([age], [age], [], 0.0)
    embedded = cases.Embedded(dense={"age": torch.tensor([[2.0], [-1.0]])})
    weight = model.wide.linear.weight[0, 0] + model.mlp.layers[0].weight[0, 0]
    logits = model(embedded).logits[:, 0]
    torch.testing.assert_close(logits[0] - logits[1], 3 * weight)


@pytest.mark.parametrize(
    ("wide", "deep", "message"),
    [
        ([], [user], "wide_features is empty: give both parts"),
        ([user], [], "deep_features is empty"),
        ([user, user], [user], "'user' is listed twice: leave one out"),
        ([user], [tags, tags], "'tags' is listed twice"),
        ([user], [history, visit], "table 'visit' has no width: give the table a dim"),
        ([user], ["tags"], "'tags' is not a feature"),
        ([DenseFeature("age", dim=2)], [age], "'age' has another dim in wide_features than in .*the same feature"),
        (
            [SparseFeature("match", Table("m", 3))],
            [match],
            "'match' has another kind in wide_features than in .* another name",
        ),
    ],
)
def test_wrong_features(wide: list, deep: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WideDeep(wide, deep, [4], 0.0)


def test_wrong_dropout_rates() -> None:
    with pytest.raises(ValueError, match=r"1 dropout rates \[0\.1\] for 2 hidden layers"):
        WideDeep([user], [user], [4, 3], [0.1])
