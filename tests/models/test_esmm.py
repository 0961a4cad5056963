from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from rechub_dist.features import SparseFeature, Table
from rechub_dist.models import ESMM
from rechub_tests import cases
from rechub_tests.reference import assert_same, group_relu_mlp, row_input


@pytest.mark.parametrize(("hidden", "tower"), [([8, 6], [5]), ([4], []), ([], [3]), ([], [])])
@pytest.mark.parametrize("conversions", [1, 3])
def test_forward_and_gradients(hidden: list[int], tower: list[int], conversions: int) -> None:
    torch.manual_seed(0)
    features = [cases.user, cases.tags, cases.history, cases.age, cases.profile]
    model = ESMM(features, hidden, tower, 4, num_conversions=conversions).double()
    embedded = cases.make_batch(model, 3)

    def formula() -> Tensor:
        x = [row_input(embedded, ["user", "tags", "history"], ["age", "profile"], b) for b in range(3)]
        tasks = range(1 + conversions)
        return torch.stack([torch.cat([group_relu_mlp(model.networks.layers, k, row) for k in tasks]) for row in x])

    assert_same(model, embedded, embedded.vectors, formula)


def test_only_embeddings_are_shared() -> None:
    model = cases.build(ESMM)
    embedded = cases.make_batch(model, 3)
    model(embedded).logits[:, 1].sum().backward()
    for parameter in model.parameters():
        assert parameter.shape[0] == 3
        assert parameter.grad[1].any()
        assert not parameter.grad[[0, 2]].any()
    assert all(vectors.grad.any() for vectors in embedded.vectors.values())


def test_what_the_run_needs_to_know() -> None:
    model = cases.esmm()
    assert model.objectives == ("entire_space",)
    assert model.num_tasks == 3
    assert model.task_types == ("classification",) * 3
    assert ESMM([cases.user], [4], [3], 4).num_tasks == 2


def test_lookups() -> None:
    lookups = cases.esmm().lookups()
    assert {lookup.name: (lookup.table.name, lookup.dim, lookup.pooling) for lookup in lookups} == {
        "user": ("user", 4, "sum"),
        "tags": ("tag", 4, "mean"),
        "history": ("item", 4, "mean"),
    }
    assert [feature.name for feature in cases.esmm().dense_features()] == ["age", "profile"]
    assert ESMM([SparseFeature("a", Table("a", 3))], [4], [3], 5).lookups()[0].dim == 5


def test_widths_and_dropout_rates_are_those_of_the_whole_network() -> None:
    model = ESMM([cases.user], [4, 5], [3], 4, dropout_rates=[0.1, 0.2, 0.3])
    assert [layer.p for layer in model.networks.layers if isinstance(layer, nn.Dropout)] == [0.1, 0.2, 0.3]
    widths = [layer.weight.shape[2] for layer in model.networks.layers if hasattr(layer, "weight")]
    assert widths == [4, 5, 3, 1]
    model = ESMM([cases.user], [4, 5], [3], 4, dropout_rates=0.2, activation="tanh", batch_norm=True)
    kinds = [type(layer).__name__ for layer in model.networks.layers]
    assert kinds == ["GroupedLinear", "BatchNorm1d", "Tanh", "Dropout"] * 3 + ["GroupedLinear"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_conversions": 0}, "num_conversions is 0: it must be at least 1"),
        ({"features": [cases.shop]}, "table 'shop' has dim 2, but the model's embedding_dim is 4"),
        ({"features": []}, "features is empty"),
        ({"dropout_rates": [0.1]}, "1 dropout rates .* 2 hidden layers"),
        ({"tower_units": [0]}, "every width must be at least 1"),
    ],
)
def test_wrong_arguments(arguments: dict, message: str) -> None:
    given = {"features": [cases.user], "hidden_units": [4], "tower_units": [3], "embedding_dim": 4}
    with pytest.raises(ValueError, match=message):
        ESMM(**(given | arguments))
