from __future__ import annotations

from dataclasses import replace

import pytest
import test_catalogue as proof
import torch
from torch import Tensor, nn

from rechub_dist.embedded import Jagged
from rechub_dist.embedding.local import LocalTables
from rechub_dist.features import DenseFeature, Feature, SequenceFeature, SparseFeature, Table
from rechub_dist.models import YoutubeDNN
from rechub_tests import cases
from rechub_tests.reference import affine, assert_same, relu_mlp, row_input

USER = [cases.user, cases.age, cases.shop, cases.tags, cases.history, cases.profile]


@pytest.mark.parametrize("hidden_units", [[8, 6], []])
@pytest.mark.parametrize("items", [[cases.item], [cases.item, cases.kind, cases.price]])
def test_forward_and_gradients(hidden_units: list[int], items: list[Feature]) -> None:
    torch.manual_seed(0)
    model = YoutubeDNN(USER, items, hidden_units, 4, 3).double()
    embedded = cases.make_batch(model, 3)

    def formula() -> Tensor:
        rows = []
        for b in range(3):
            x = row_input(embedded, ["user", "shop", "tags", "history"], ["age", "profile"], b)
            v = embedded.vectors["item"][b]
            if len(items) > 1:
                v = affine(model.item_map, row_input(embedded, ["item", "kind"], ["price"], b))
            rows.append(torch.cat([relu_mlp(model.user_tower.mlp.layers, x), v])[None])
        return torch.stack(rows)

    assert_same(model, embedded, embedded.vectors, formula, lambda o: torch.cat([o.user, o.item], dim=2))
    user, mask = model.user(embedded)
    assert torch.equal(user, model(embedded).user)
    assert mask.all()


def test_an_item_that_is_its_id_has_its_raw_embedding() -> None:
    model = YoutubeDNN(USER, [cases.item], [8], 4, 3).double()
    embedded = cases.make_batch(model, 3)
    assert torch.equal(model.item(embedded), embedded.vectors["item"])
    assert not list(model.item_map.parameters())
    several = cases.build(YoutubeDNN)
    assert [name for name, _ in several.item_map.named_parameters()] == ["weight"]


def test_the_newest_watched_items_enter() -> None:
    oldest = SequenceFeature("oldest", cases.SHOP, max_length=9, keep="first")
    short = SequenceFeature("short", cases.SHOP, max_length=2, keep="first")
    model = YoutubeDNN([cases.user, cases.history, oldest, short, cases.gaps], [cases.item], [4], 4, 3)
    found = {lookup.name: lookup for lookup in model.lookups()}
    assert found["history"].feature == replace(cases.history, max_length=3, keep="last")
    assert found["oldest"].feature == replace(oldest, max_length=3, keep="last")
    assert found["short"].feature == short
    assert found["gaps"].feature == replace(cases.gaps, max_length=3)
    assert {found[name].pooling for name in ("history", "oldest", "short", "gaps")} == {"mean"}
    assert found["user"].feature == cases.user
    assert model.history() == found["history"].feature
    # as long as it may be
    assert YoutubeDNN([cases.history], [cases.item], [4], 4, 5).history() == cases.history


def test_the_mean_of_what_was_watched() -> None:
    model = YoutubeDNN([cases.history], [cases.item], [], 4, 3)
    tables = LocalTables(model.lookups())
    ids = {"history": Jagged(torch.tensor([1, 2, 7]), torch.tensor([2, 1, 0])), "item": Jagged.single(torch.arange(3))}
    weight = tables.weight("item")
    x = torch.stack([(weight[1] + weight[2]) / 2, weight[7], torch.zeros(4)])
    user, _ = model.user(tables(ids))
    torch.testing.assert_close(user[:, 0], model.user_tower.mlp(x))
    torch.testing.assert_close(model.item(tables(ids)), weight[:3])


def test_lookups_and_widths() -> None:
    model = cases.youtubednn()
    assert {lookup.name: (lookup.table.name, lookup.dim, lookup.pooling) for lookup in model.lookups()} == {
        "user": ("user", 4, "sum"),
        "shop": ("shop", 2, "sum"),
        "tags": ("tag", 4, "mean"),
        "history": ("item", 4, "mean"),
        "item": ("item", 4, "sum"),
        "kind": ("kind", 4, "sum"),
    }
    assert [lookup.name for lookup in model.item_lookups()] == ["item", "kind"]
    assert [feature.name for feature in model.dense_features()] == ["age", "profile", "price"]
    # with a map a table may have another width than the vectors
    wide = YoutubeDNN([cases.history], [cases.item, cases.price], [4], 7, 3).double()
    assert [lookup.dim for lookup in wide.lookups()] == [4, 4]
    assert wide(cases.make_batch(wide, 2)).item.shape == (2, 1, 7)


def test_the_user_has_both_signs() -> None:
    model = cases.build(YoutubeDNN)
    user = model(cases.make_batch(model, 200)).user
    assert user.min() < 0 < user.max()


@pytest.mark.parametrize("options", [{"batch_norm": True}, {"activation": "dice"}])
@pytest.mark.parametrize("kind", proof.BATCHES)
def test_batch_statistics(options: dict, kind: str) -> None:
    torch.manual_seed(0)
    proof.test_every_parameter_gets_a_gradient(YoutubeDNN(USER, [cases.item], [8, 6], 4, 3, **options).double(), kind)
    proof.test_shapes(YoutubeDNN(USER, [cases.item], [8, 6], 4, 3, **options).double(), kind, True)


def test_dropout_rates() -> None:
    layers = YoutubeDNN(USER, [cases.item], [8, 6], 4, 3, dropout_rates=[0.1, 0.2]).user_tower.mlp.layers
    assert [layer.p for layer in layers if isinstance(layer, nn.Dropout)] == [0.1, 0.2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embedding_dim": 5}, "table 'item' has dim 4, .* embedding_dim is 5: .*leave"),
        ({"embedding_dim": 0}, "embedding_dim is 0: it must be at least 1"),
        ({"max_seq_len": 0}, "max_seq_len is 0: it must be at least 1"),
        ({"user_features": [cases.user]}, "user_features has no history: give at least one SequenceFeature"),
        ({"user_features": []}, "user_features is empty"),
        ({"item_features": []}, "item_features is empty"),
        ({"item_features": [DenseFeature("x"), cases.item]}, "starts with 'x', which is dense: put the item's id"),
        ({"item_features": [cases.item, cases.history]}, "'history' is in user_features and in item_features"),
        ({"dropout_rates": [0.1, 0.2]}, "2 dropout rates .* 1 hidden layers"),
        ({"item_features": [SparseFeature("i", Table("item", 11, dim=8))]}, "has dim 8, .* embedding_dim is 4"),
    ],
)
def test_wrong_arguments(changes: dict, message: str) -> None:
    given = {"user_features": USER, "item_features": [cases.item], "hidden_units": [4], "embedding_dim": 4}
    with pytest.raises(ValueError, match=message):
        YoutubeDNN(**({**given, "max_seq_len": 3} | changes))
