from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rechub_dist.features import DenseFeature, SparseFeature, Table
from rechub_dist.models import DeepFM
from rechub_tests import cases
from rechub_tests.reference import affine, assert_same, relu_mlp


def test_forward_and_gradients() -> None:
    model = cases.build(DeepFM)
    embedded = cases.make_batch(model, 4)
    fields = ["user", "tags", "history"]

    def formula() -> Tensor:
        logits = []
        for b in range(4):
            v = [embedded.vectors[name][b] for name in fields]
            dense = [*embedded.dense["age"][b], *embedded.dense["profile"][b]]
            y = sum(embedded.vectors[f"{name}.linear"][b, 0] for name in fields)
            y = y + sum(model.first_order.linear.weight[0, i] * value for i, value in enumerate(dense))
            for i in range(len(v)):
                for j in range(i + 1, len(v)):
                    y = y + sum(v[i][d] * v[j][d] for d in range(4))
            logits.append(y + relu_mlp(model.mlp.layers, torch.cat([*v, torch.stack(dense)])))
        return torch.stack(logits)

    assert_same(model, embedded, embedded.vectors, formula)


def test_without_dense_features_or_hidden_layers() -> None:
    model = DeepFM([cases.user], [], 0.0, 4).double()
    embedded = cases.make_batch(model, 2)

    def formula() -> Tensor:
        return torch.stack(
            [
                embedded.vectors["user.linear"][b] + affine(model.mlp.layers[0], embedded.vectors["user"][b])
                for b in range(2)
            ]
        )

    assert_same(model, embedded, embedded.vectors, formula)


def test_lookups() -> None:
    lookups = {lookup.name: lookup for lookup in cases.deepfm().lookups()}
    assert {name: (lookup.table.name, lookup.dim, lookup.pooling) for name, lookup in lookups.items()} == {
        "user": ("user", 4, "sum"),
        "tags": ("tag", 4, "mean"),
        "history": ("item", 4, "mean"),
        "user.linear": ("user.linear", 1, "sum"),
        "tags.linear": ("tag.linear", 1, "mean"),
        "history.linear": ("item.linear", 1, "mean"),
    }
    assert lookups["user.linear"].table.init_std == 0


def test_the_model_gives_the_width() -> None:
    model = DeepFM([SparseFeature("a", Table("a", 3))], [4], 0.0, embedding_dim=5)
    assert model.lookups()[0].dim == 5


@pytest.mark.parametrize(
    ("features", "rates", "message"),
    [
        ([SparseFeature("a", Table("t", 3, dim=8))], 0.0, "table 't' has dim 8, .* embedding_dim is 4: .*leave"),
        ([cases.user], [0.1, 0.2, 0.3], "3 dropout rates .* 2 hidden layers .*one rate a layer, or a single number"),
        ([cases.user], 1.0, "at least 0 and less than 1"),
        ([DenseFeature("x")], 0.0, "at least one sparse or sequence feature"),
        ([], 0.0, "features is empty"),
        ([cases.user, cases.user], 0.0, "'user' is listed twice"),
        (["user"], 0.0, "'user' is not a feature: pass"),
    ],
)
def test_wrong_arguments(features: list, rates: float | list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DeepFM(features, [4, 3], rates, 4)


def test_wrong_activation() -> None:
    with pytest.raises(ValueError, match=r"'rulu' is unknown: use one of .*relu"):
        DeepFM([cases.user], [4], 0.0, 4, activation="rulu")
