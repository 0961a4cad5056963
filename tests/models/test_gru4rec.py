from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import Tensor, nn

from rechub_dist.embedded import Embedded, Output, Sequence
from rechub_dist.features import SequenceFeature, SparseFeature, Table
from rechub_dist.models import GRU4Rec
from rechub_tests import cases
from rechub_tests.reference import affine, assert_same, gru


def states(model: GRU4Rec, items: list[Tensor]) -> list[Tensor]:
    """The state after each item of one session, layer by layer and unit by unit."""
    for number in range(model.gru.num_layers):
        items = gru(model.gru, items, number)
    return items if isinstance(model.project, nn.Identity) else [affine(model.project, h) for h in items]


def real_pairs(output: Output) -> Tensor:
    return torch.cat([output.user[output.user_mask], output.item[output.user_mask]], dim=1)


@pytest.mark.parametrize("num_layers", [1, 2, 3])
@pytest.mark.parametrize("hidden_size", [4, 6])
def test_forward_and_gradients(num_layers: int, hidden_size: int) -> None:
    torch.manual_seed(0)
    model = GRU4Rec(11, hidden_size, num_layers, 0.0, 4).double()
    lengths = [3, 0, 5, 1]
    embedded = cases.make_batch(model, 4, lengths=lengths)
    leaves = cases.vectors_of(embedded)

    def formula() -> Tensor:
        rows = []
        for b, n in enumerate(lengths):
            session = [leaves["history"][b, t] for t in range(n)]
            following = [*session[1:], leaves["item"][b]]
            rows += [torch.cat([h, e]) for h, e in zip(states(model, session), following, strict=False)]
        return torch.stack(rows)

    assert model.gru.num_layers == num_layers
    assert_same(model, embedded, leaves, formula, real_pairs)


def test_a_state_sees_its_prefix_and_all_of_it() -> None:
    model = cases.build(GRU4Rec).eval()
    embedded = cases.make_batch(model, 1, lengths=[5])
    before = model(embedded).user[0]
    for t in range(5):
        history = embedded.sequences["history"].values.detach().clone()
        history[0, t] += torch.tensor([1.0, -2.0, 0.5, 3.0])
        changed = Embedded(embedded.vectors, {"history": Sequence(history, torch.tensor([5]))})
        difference = (model(changed).user[0] - before).abs().amax(dim=1)
        assert (difference[:t] == 0).all()
        assert (difference[t:] > 1e-6).all()


def test_training_and_serving_agree_on_every_prefix() -> None:
    model = cases.build(GRU4Rec).eval()
    embedded = cases.make_batch(model, 1, lengths=[5])
    trained = model(embedded).user[0]
    for n in range(1, 6):
        history = Sequence(embedded.sequences["history"].values, torch.tensor([n]))
        served, mask = model.user(Embedded(embedded.vectors, {"history": history}))
        torch.testing.assert_close(served[0, 0], trained[n - 1])
        assert mask.all()


def test_items_are_scored_by_the_embeddings_that_are_read() -> None:
    model = cases.build(GRU4Rec)
    embedded = cases.make_batch(model, 3, lengths=[2, 0, 4])
    assert torch.equal(model.item(embedded), embedded.vectors["item"])
    history, item = model.lookups()
    assert history.table == item.table


def test_an_empty_history_has_a_user_of_zeros() -> None:
    model = cases.build(GRU4Rec)
    users, mask = model.user(cases.make_batch(model, 2, lengths=[0, 2]))
    assert (users[0] == 0).all()
    assert (users[1] != 0).any()
    assert mask.all()
    users.square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("fill", [math.nan, math.inf])
def test_not_even_nan_leaks_from_the_padding(fill: float) -> None:
    model = cases.build(GRU4Rec)
    embedded = cases.make_batch(model, 3, lengths=[3, 0, 1])
    expected = cases.real(model(embedded))
    garbage = cases.pad_with(embedded, fill)
    output = model(garbage)
    torch.testing.assert_close(cases.real(output), expected)
    cases.loss_of(output).backward()
    assert garbage.sequences["history"].values.grad.isfinite().all()


@pytest.mark.parametrize("num_layers", [1, 2])
def test_dropout_is_for_training_only(num_layers: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch's, about the dropout between the layers of one
        model = GRU4Rec(11, 8, num_layers, 0.5, 8).double()
    assert (model.dropout.p, model.gru.dropout) == (0.5, 0.5 if num_layers > 1 else 0.0)
    embedded = cases.make_batch(model, 3, lengths=[5, 4, 3])
    assert not torch.equal(model(embedded).user, model(embedded).user)
    model.eval()
    assert torch.equal(model(embedded).user, model(embedded).user)


@pytest.mark.parametrize("num_layers", [1, 2])
def test_dropout_after_every_layer(num_layers: int) -> None:
    torch.manual_seed(0)
    model = GRU4Rec(11, 16, num_layers, 0.0, 16, hidden_dropout_rate=0.5).double()
    assert (model.dropout.p, model.gru.dropout) == (0.0, 0.5 if num_layers > 1 else 0.0)
    embedded = cases.make_batch(model, 20, lengths=[5] * 20)
    assert (model(embedded).user == 0).double().mean() == pytest.approx(0.5, abs=0.05)
    model.eval()
    plain = GRU4Rec(11, 16, num_layers, 0.0, 16).double().eval()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model(embedded).user, plain(embedded).user)


def test_scores_go_through_an_elu_in_training() -> None:
    torch.manual_seed(0)
    users, items, own = torch.randn(5, 4).double(), torch.randn(7, 4).double(), torch.randn(5, 3, 4).double()
    plain, model = GRU4Rec(11, 4, 1, 0.0, 4), GRU4Rec(11, 4, 1, 0.0, 4, elu=0.5)

    def formula(s: float) -> float:
        return s if s > 0 else 0.5 * (math.exp(s) - 1)

    for scores in (lambda m: m.score(users, items), lambda m: m.score_own(users, own)):
        expected = [[formula(float(s)) for s in row] for row in scores(plain)]
        torch.testing.assert_close(scores(model), torch.tensor(expected).double())
        assert (scores(plain) < 0).any()
    expected = [formula(float(u @ i)) for u, i in zip(users, own[:, 0], strict=True)]
    torch.testing.assert_close(model.score_own(users, own[:, 0]), torch.tensor(expected).double())


def test_the_states_have_a_map_where_they_need_one() -> None:
    def maps(hidden_size: int) -> list[str]:
        return [name for name, _ in GRU4Rec(11, hidden_size, 1, 0.0, 4).project.named_parameters()]

    assert maps(4) == []
    assert maps(6) == ["weight"]


def test_names_make_features_over_one_table() -> None:
    model = GRU4Rec(11, 6, 1, 0.0, 4, history="watched", item="next", max_length=7)
    watched, target = model.lookups()
    assert watched.feature == SequenceFeature("watched", Table("item", 11, init_std=0.02), max_length=7)
    assert (watched.name, watched.pooling, target.name, target.pooling) == ("watched", None, "next", "sum")
    assert watched.table == target.table == Table("item", 11, dim=4, init_std=0.02)
    assert model.item_lookups() == (target,)
    assert model.history() == watched.feature
    assert GRU4Rec(11, 6, 1, 0.0, 4).history().max_length == 50


def test_features_bring_their_table() -> None:
    films = Table("film", 11, init_std=0.1)
    watched = SequenceFeature("watched", films, max_length=5)
    for item in (SparseFeature("item", films), "item"):
        model = GRU4Rec(11, 6, 1, 0.1, 4, history=watched, item=item)
        assert {lookup.table for lookup in model.lookups()} == {Table("film", 11, dim=4, init_std=0.1)}
        assert model.history() == watched


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"item_num": 12, "history": cases.history}, "item_num is 12, but table 'item' has 11 rows: make them equal"),
        ({"history": cases.history, "item": cases.user}, "'history' reads table 'item' and item 'user' reads 'user'"),
        ({"history": "x", "item": "x"}, "both named 'x': give them different names"),
        ({"embedding_dim": 8, "history": cases.history}, "table 'item' has dim 4, .*embedding_dim is 8"),
        ({"hidden_size": 0}, "hidden_size is 0: it must be at least 1"),
        ({"num_layers": 0}, "num_layers is 0: it must be at least 1"),
        ({"embedding_dim": 0}, "embedding_dim is 0: it must be at least 1"),
        ({"max_length": 0}, "max_length is 0, must be at least 1"),
        ({"hidden_dropout_rate": 1.0}, r"hidden_dropout_rate is 1\.0: it must be at least 0 and less than 1"),
        ({"elu": 0.0}, r"elu is 0\.0: it must be a number above 0"),
        ({"dropout_rate": 1.0}, r"dropout_rate is 1\.0: it must be at least 0 and less than 1"),
    ],
)
def test_wrong_arguments(arguments: dict, message: str) -> None:
    given = {"item_num": 11, "hidden_size": 6, "num_layers": 2, "dropout_rate": 0.1, "embedding_dim": 4}
    with pytest.raises(ValueError, match=message):
        GRU4Rec(**(given | arguments))
