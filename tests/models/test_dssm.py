from __future__ import annotations

import pytest
import test_catalogue as proof
import torch
from torch import Tensor, nn

from rechub_dist.embedded import Embedded, Output
from rechub_dist.features import DenseFeature, SequenceFeature, SparseFeature, Table
from rechub_dist.models import DSSM
from rechub_tests import cases
from rechub_tests.reference import affine, assert_same, relu_mlp, row_input, unit

USER = [cases.user, cases.age, cases.tags, cases.history, cases.profile]
ITEM = [cases.item, cases.shop, cases.price]


def both(output: Output) -> Tensor:
    return torch.cat([output.user, output.item], dim=2)


def inputs(embedded: Embedded, b: int) -> tuple[Tensor, Tensor]:
    return (
        row_input(embedded, ["user", "tags", "history"], ["age", "profile"], b),
        row_input(embedded, ["item", "shop"], ["price"], b),
    )


@pytest.mark.parametrize(
    ("hidden_units", "options"),
    [([8, 6], {"temperature": 0.5}), ([], {}), ([5], {"activation": "tanh", "temperature": 2.0})],
)
def test_forward_and_gradients(hidden_units: list[int], options: dict) -> None:
    torch.manual_seed(0)
    model = DSSM(USER, ITEM, hidden_units, 0.0, 3, **options).double()
    embedded = cases.make_batch(model, 3)

    def tower(layers: nn.ModuleList, x: Tensor) -> Tensor:
        if options.get("activation") == "tanh":
            return affine(layers[2], torch.tanh(affine(layers[0], x)))
        return relu_mlp(layers, x)

    def formula() -> Tensor:
        rows = []
        for b in range(3):
            u, i = (
                unit(tower(side.mlp.layers, x))
                for side, x in zip((model.user_tower, model.item_tower), inputs(embedded, b), strict=True)
            )
            rows.append(torch.cat([u / options.get("temperature", 0.05), i])[None])
        return torch.stack(rows)

    assert_same(model, embedded, embedded.vectors, formula, both)


def test_serving_is_training() -> None:
    model = cases.build(DSSM)
    embedded = cases.make_batch(model, 3)
    output = model(embedded)
    user, mask = model.user(embedded)
    assert torch.equal(user, output.user)
    assert torch.equal(mask, output.user_mask)
    assert torch.equal(model.item(embedded)[:, None], output.item)


@pytest.mark.parametrize("temperature", [0.05, 1.0, 3.0])
def test_scores_are_cosines_over_the_temperature(temperature: float) -> None:
    torch.manual_seed(0)
    model = DSSM(USER, ITEM, [8], 0.0, 2, temperature=temperature).double()
    embedded = cases.make_batch(model, 200)
    output = model(embedded)
    scores = output.user[:, 0] @ output.item[:, 0].T
    assert scores.abs().max() <= (1 + 1e-12) / temperature
    assert scores.max() > 0.9 / temperature
    assert scores.min() < -0.9 / temperature
    angles = torch.cosine_similarity(model.user_tower(embedded)[:, None], model.item_tower(embedded)[None], dim=2)
    torch.testing.assert_close(scores, angles / temperature)


@pytest.mark.parametrize("side", ["user_tower", "item_tower"])
def test_a_vector_of_zeros_has_no_nan(side: str) -> None:
    model = cases.build(DSSM)
    for parameter in getattr(model, side).mlp.layers[-1].parameters():
        nn.init.zeros_(parameter)
    embedded = cases.make_batch(model, 3)
    output = model(embedded)
    vectors = output.user if side == "user_tower" else output.item
    assert not vectors.any()
    (output.user * output.item).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_the_output_width_sets_no_table() -> None:
    model = DSSM(USER, ITEM, [4], 0.0, 3)
    assert model.table_width is None
    assert {lookup.name: (lookup.table.name, lookup.dim, lookup.pooling) for lookup in model.lookups()} == {
        "user": ("user", 4, "sum"),
        "tags": ("tag", 4, "mean"),
        "history": ("item", 4, "mean"),
        "item": ("item", 4, "sum"),
        "shop": ("shop", 2, "sum"),
    }
    assert [lookup.name for lookup in model.item_lookups()] == ["item", "shop"]
    assert [feature.name for feature in model.dense_features()] == ["age", "profile", "price"]
    assert model(cases.make_batch(model.double(), 2)).user.shape == (2, 1, 3)


def test_the_history_is_the_one_sequence_over_the_items() -> None:
    def history(*features: SequenceFeature) -> object:
        return DSSM([cases.user, *features], ITEM, [4], 0.0, 3).history()

    assert history(cases.shops, cases.history) == cases.history
    assert history(cases.shops) is None
    assert history(cases.history, cases.liked) is None
    recent = SequenceFeature("recent", cases.history.table, max_length=2, column=cases.history.source)
    assert history(recent, cases.history) == history(cases.history, recent) == cases.history
    own = DSSM([cases.user, cases.liked], [cases.item, cases.history], [4], 0.0, 3)
    assert own.history() == cases.liked  # what is the item's is not what the user saw


@pytest.mark.parametrize("options", [{"batch_norm": True}, {"activation": "dice"}])
@pytest.mark.parametrize("kind", proof.BATCHES)
def test_batch_statistics(options: dict, kind: str) -> None:
    torch.manual_seed(0)
    proof.test_every_parameter_gets_a_gradient(DSSM(USER, ITEM, [8, 6], 0.0, 4, **options).double(), kind)
    proof.test_shapes(DSSM(USER, ITEM, [8, 6], 0.0, 4, **options).double(), kind, True)


def test_dropout_rates() -> None:
    model = DSSM(USER, ITEM, [8, 6], [0.1, 0.2], 4)
    for tower in (model.user_tower, model.item_tower):
        assert [layer.p for layer in tower.mlp.layers if isinstance(layer, nn.Dropout)] == [0.1, 0.2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"user_features": []}, "user_features is empty: give at least one feature"),
        ({"item_features": []}, "item_features is empty: give at least one feature"),
        ({"item_features": [cases.item, cases.user]}, "'user' is in user_features and in item_features: leave it out"),
        ({"item_features": [cases.price, cases.item]}, "starts with 'price', which is dense: put the item's id first"),
        ({"item_features": [cases.liked, cases.item]}, "starts with 'liked', which is sequence: put the item's id"),
        ({"item_features": ["item"]}, "'item' is not a feature: pass"),
        ({"user_features": [cases.user, cases.user]}, "'user' is listed twice"),
        ({"user_features": [SparseFeature("a", Table("t", 3))]}, "table 't' has no width: give the table a dim"),
        ({"temperature": 0.0}, r"temperature is 0\.0: it must be above 0"),
        ({"embedding_dim": 0}, "embedding_dim is 0: it must be at least 1"),
        ({"dropout_rates": [0.1, 0.2]}, "2 dropout rates .* 1 hidden layers"),
        ({"activation": "rulu"}, "'rulu' is unknown"),
    ],
)
def test_wrong_arguments(changes: dict, message: str) -> None:
    given = {"user_features": USER, "item_features": ITEM, "hidden_units": [4], "dropout_rates": 0.0}
    with pytest.raises(ValueError, match=message):
        DSSM(**({**given, "embedding_dim": 3} | changes))


def test_a_user_of_dense_values_alone() -> None:
    model = DSSM([DenseFeature("age")], [cases.item], [4], 0.0, 3).double()
    assert model(cases.make_batch(model, 2)).user.shape == (2, 1, 3)
    assert model.history() is None
