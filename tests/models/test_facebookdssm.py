from __future__ import annotations

import pytest
import test_catalogue as proof
import torch
from torch import Tensor, nn

from rechub_dist.embedded import Embedded, Output
from rechub_dist.models import FacebookDSSM
from rechub_tests import cases
from rechub_tests.reference import affine, assert_same, group_relu_mlp, relu_mlp, row_input, unit

USER = [cases.user, cases.age, cases.tags, cases.history, cases.profile]
ITEM = [cases.item, cases.shop, cases.price]
TYPES = ["classification", "regression"]


def outputs(model: FacebookDSSM, embedded: Embedded, b: int) -> tuple[Tensor, Tensor]:
    """Row b's vectors before they are scaled."""
    return (
        relu_mlp(model.user_tower.mlp.layers, row_input(embedded, ["user", "tags", "history"], ["age", "profile"], b)),
        relu_mlp(model.item_tower.mlp.layers, row_input(embedded, ["item", "shop"], ["price"], b)),
    )


@pytest.mark.parametrize("hidden_units", [[8, 6], [3]])
@pytest.mark.parametrize("task_hidden_units", [None, [5, 4], []])
def test_forward_and_gradients(hidden_units: list[int], task_hidden_units: list[int] | None) -> None:
    torch.manual_seed(0)
    model = FacebookDSSM(USER, ITEM, hidden_units, 2, TYPES, task_hidden_units=task_hidden_units).double()
    embedded = cases.make_batch(model, 3)

    def formula() -> Tensor:
        rows = []
        for b in range(3):
            u, i = outputs(model, embedded, b)
            logits = [group_relu_mlp(model.heads.layers, k, torch.cat([u, i])) for k in range(2)]
            rows.append(torch.cat([unit(u), unit(i), *logits]))
        return torch.stack(rows)

    def read(output: Output) -> Tensor:
        return torch.cat([output.user[:, 0], output.item[:, 0], output.logits], dim=1)

    assert_same(model, embedded, embedded.vectors, formula, read)


def test_without_tasks_it_is_the_paper() -> None:
    model = FacebookDSSM(USER, ITEM, [8, 6], 0, []).double()
    embedded = cases.make_batch(model, 3)
    assert model.heads is None
    assert (model.num_tasks, model.task_types) == (0, ())
    assert model(embedded).logits is None

    def formula() -> Tensor:
        return torch.stack([torch.cat([unit(v) for v in outputs(model, embedded, b)])[None] for b in range(3)])

    assert_same(model, embedded, embedded.vectors, formula, lambda o: torch.cat([o.user, o.item], dim=2))


def test_vectors_have_unit_length() -> None:
    model = cases.build(FacebookDSSM)
    embedded = cases.make_batch(model, 50)
    output = model(embedded)
    user, mask = model.user(embedded)
    assert mask.all()
    for vectors in (output.user, output.item, user, model.item(embedded)):
        torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(vectors.shape[:-1]).double())
    assert torch.equal(user, output.user)
    assert torch.equal(model.item(embedded), output.item[:, 0])


def test_the_loss_is_the_papers() -> None:
    assert (FacebookDSSM.loss, cases.facebookdssm().margin) == ("hinge", 0.2)
    assert FacebookDSSM(USER, ITEM, [4], 0, [], margin=0.5).margin == 0.5


def test_tasks_train_both_towers_and_their_own_heads() -> None:
    model = cases.build(FacebookDSSM)
    model(cases.make_batch(model, 3)).logits[:, 0].sum().backward()
    for tower in (model.user_tower, model.item_tower):
        assert all(parameter.grad.any() for parameter in tower.parameters())
    for parameter in model.heads.parameters():
        assert parameter.grad[0].any()
        assert not parameter.grad[1].any()


def test_a_task_sees_how_long_the_vectors_are() -> None:
    model = cases.build(FacebookDSSM)
    embedded = cases.make_batch(model, 3)
    before = model(embedded)
    for parameter in model.user_tower.mlp.layers[-1].parameters():
        parameter.data *= 3
    after = model(embedded)
    torch.testing.assert_close(after.user, before.user)
    assert (after.logits - before.logits).abs().min() > 1e-6


def test_a_task_can_tell_which_user_an_item_suits() -> None:
    torch.manual_seed(0)
    u, i = torch.randn(2, 6).double(), torch.randn(2, 6).double()

    def coupling(heads: nn.Module) -> Tensor:
        a, b, c, d = (heads(torch.cat([u[x], i[y]])[None]) for x, y in ((0, 0), (0, 1), (1, 0), (1, 1)))
        return (a - b - c + d).abs().min()

    assert coupling(cases.build(FacebookDSSM).heads) > 1e-4
    linear = FacebookDSSM(USER, ITEM, [8, 6], 2, TYPES, task_hidden_units=[]).double().heads
    assert coupling(linear) < 1e-12


def test_what_the_run_needs_to_know() -> None:
    model = cases.facebookdssm()
    assert (model.num_tasks, model.task_types) == (2, ("classification", "regression"))
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
    assert model.history() == cases.history


def test_layers() -> None:
    model = FacebookDSSM(USER, ITEM, [8, 6, 5], 2, TYPES, dropout_rates=[0.1, 0.2], activation="tanh")
    for tower in (model.user_tower, model.item_tower):
        kinds = [nn.Linear, nn.Tanh, nn.Dropout]
        assert [type(layer) for layer in tower.mlp.layers] == [*kinds, *kinds, nn.Linear]
        assert [layer.p for layer in tower.mlp.layers if isinstance(layer, nn.Dropout)] == [0.1, 0.2]
        assert tower.mlp.out_dim == 5
    assert [layer.weight.shape for layer in model.heads.layers if hasattr(layer, "weight")] == [(2, 10, 5), (2, 5, 1)]
    with torch.no_grad():
        x = torch.randn(4)
        one = FacebookDSSM([cases.user], [cases.item], [3], 0, []).user_tower
        torch.testing.assert_close(one.mlp(x[None])[0], affine(one.mlp.layers[0], x))


@pytest.mark.parametrize("options", [{"batch_norm": True}, {"activation": "dice"}, {"task_hidden_units": []}])
@pytest.mark.parametrize("kind", proof.BATCHES)
def test_batch_statistics(options: dict, kind: str) -> None:
    torch.manual_seed(0)
    proof.test_every_parameter_gets_a_gradient(FacebookDSSM(USER, ITEM, [8, 6], 2, TYPES, **options).double(), kind)
    proof.test_shapes(FacebookDSSM(USER, ITEM, [8, 6], 2, TYPES, **options).double(), kind, True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_units": []}, r"hidden_units is empty: give at least the width of the vectors"),
        ({"hidden_units": [4, 0]}, r"hidden_units are \[4, 0\]"),
        ({"margin": 0.0}, r"margin is 0\.0: it must be above 0"),
        ({"num_tasks": 0}, "num_tasks is 0 and task_types .*one type for each"),
        ({"num_tasks": -1}, "num_tasks is -1"),
        ({"task_types": []}, r"num_tasks is 2 and task_types \[\]"),
        ({"task_types": ["ranking", "regression"]}, "'ranking' is unknown: use one of classification, regression"),
        ({"user_features": []}, "user_features is empty"),
        ({"item_features": [cases.item, cases.user]}, "'user' is in user_features and in item_features"),
        ({"item_features": [cases.price]}, "starts with 'price', which is dense"),
        ({"dropout_rates": [0.1, 0.2]}, "2 dropout rates .* 1 hidden layers"),
    ],
)
def test_wrong_arguments(changes: dict, message: str) -> None:
    given = {"user_features": USER, "item_features": ITEM, "hidden_units": [8, 4], "num_tasks": 2, "task_types": TYPES}
    with pytest.raises(ValueError, match=message):
        FacebookDSSM(**(given | changes))
