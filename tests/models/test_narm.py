from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rechub_dist.embedded import Embedded, Sequence
from rechub_dist.features import SequenceFeature, Table
from rechub_dist.models import NARM
from rechub_tests import cases
from rechub_tests.reference import affine, assert_same, gru, sigmoid, softmax


def user_of(model: NARM, items: list[Tensor]) -> Tensor:
    """B c for one session, state by state."""
    states = gru(model.gru, items)
    zeros = torch.zeros(model.gru.hidden_size, dtype=torch.float64)
    final = states[-1] if states else zeros
    weights = []
    for h in states:
        hidden = sigmoid(affine(model.attention.query, final) + affine(model.attention.key, h))
        weights.append(sum(model.attention.score.weight[0, k] * hidden[k] for k in range(len(hidden))))
    if model.attention.normalize:
        weights = softmax(weights)
    purpose = sum((a * h for a, h in zip(weights, states, strict=True)), zeros)
    return affine(model.project, torch.cat([final, purpose]))


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("hidden_size", "attention_size"), [(6, 3), (4, 1)])
def test_forward_and_gradients(hidden_size: int, attention_size: int, normalize: bool) -> None:
    torch.manual_seed(0)
    model = NARM(11, hidden_size, attention_size, 0.0, 4, normalize_attention=normalize).double()
    lengths = [3, 0, 5, 1]
    embedded = cases.make_batch(model, 4, lengths=lengths)
    leaves = cases.vectors_of(embedded)

    def formula() -> Tensor:
        rows = []
        for b, n in enumerate(lengths):
            user = user_of(model, [leaves["history"][b, t] for t in range(n)])
            rows.append(torch.cat([user, leaves["item"][b]])[None])
        return torch.stack(rows)

    assert_same(model, embedded, leaves, formula, lambda o: torch.cat([o.user, o.item], dim=2))


def test_the_score_is_bilinear() -> None:
    model = cases.build(NARM)
    embedded = cases.make_batch(model, 3, lengths=[2, 4, 1])
    output = model(embedded)
    assert output.user_mask.all()
    assert torch.equal(model.item(embedded), embedded.vectors["item"])
    assert torch.equal(output.user, model.user(embedded)[0])
    assert [name for name, _ in model.project.named_parameters()] == ["weight"]
    assert model.project.weight.shape == (4, 12)


def weights_of(model: NARM, embedded: Embedded) -> Tensor:
    found: list[Tensor] = []
    handle = model.attention.register_forward_hook(lambda _module, _inputs, weights: found.append(weights))
    model.user(embedded)
    handle.remove()
    return found[0]


def test_attention_is_not_constant_not_normalised_and_skips_padding() -> None:
    model = cases.build(NARM)
    embedded = cases.make_batch(model, 3, lengths=[4, 0, 2])
    weights = weights_of(model, embedded)
    assert weights.shape == (3, 4)
    real = embedded.sequences["history"].mask
    assert not weights[~real].any()
    assert weights[0].diff().abs().min() > 1e-6
    assert not torch.isclose(weights.sum(dim=1), torch.ones(3).double()).any()
    # what the session ends with changes what counts in it
    changed = embedded.sequences["history"].values.detach().clone()
    changed[0, 3] += 1
    other = weights_of(model, Embedded(embedded.vectors, {"history": Sequence(changed, torch.tensor([4, 0, 2]))}))
    assert (other[0, :3] - weights[0, :3]).abs().min() > 1e-6


def test_every_item_and_their_order_matter() -> None:
    model = cases.build(NARM)
    embedded = cases.make_batch(model, 1, lengths=[4])
    values, lengths, _ = embedded.sequences["history"]
    before = model.user(embedded)[0]
    for t in range(4):
        changed = values.detach().clone()
        changed[0, t] += 1
        after = model.user(Embedded(embedded.vectors, {"history": Sequence(changed, lengths)}))[0]
        assert (after - before).abs().max() > 1e-6
    turned = Embedded(embedded.vectors, {"history": Sequence(values.flip(1), lengths)})
    assert (model.user(turned)[0] - before).abs().max() > 1e-6


def test_a_session_shorter_than_the_longest_is_the_same_alone() -> None:
    model = cases.build(NARM)
    embedded = cases.make_batch(model, 3, lengths=[2, 5, 0])
    together = model(embedded).user
    for row in range(3):
        torch.testing.assert_close(model(cases.row_of(embedded, row)).user[0], together[row])


def test_an_empty_history_has_a_user_of_zeros() -> None:
    model = cases.build(NARM)
    users, mask = model.user(cases.make_batch(model, 2, lengths=[0, 2]))
    assert (users[0] == 0).all()
    assert (users[1] != 0).any()
    assert mask.all()
    users.square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("fill", [math.nan, math.inf])
def test_not_even_nan_leaks_from_the_padding(fill: float) -> None:
    model = cases.build(NARM)
    embedded = cases.make_batch(model, 3, lengths=[3, 0, 1])
    garbage = cases.pad_with(embedded, fill, more=1)
    output = model(garbage)
    torch.testing.assert_close(cases.real(output), cases.real(model(embedded)))
    cases.loss_of(output).backward()
    assert garbage.sequences["history"].values.grad.isfinite().all()


@pytest.mark.parametrize("of_embeddings", [None, 0.5])
def test_dropout_of_the_embeddings_and_of_the_session(of_embeddings: float | None) -> None:
    torch.manual_seed(0)
    model = NARM(11, 64, 3, 0.25, 64, embedding_dropout_rate=of_embeddings).double()
    seen: list[tuple[Tensor, Tensor]] = []
    for dropout in (model.embedding_dropout, model.dropout):
        dropout.register_forward_hook(lambda _module, inputs, output: seen.append((inputs[0], output)))
    embedded = cases.make_batch(model, 20, lengths=[5] * 20)
    model(embedded)
    assert [before.shape for before, _ in seen] == [(20, 5, 64), (20, 128)]
    for (before, after), rate in zip(seen, (of_embeddings or 0.25, 0.25), strict=True):
        assert (after[before != 0] == 0).double().mean() == pytest.approx(rate, abs=0.05)
    model.eval()
    assert torch.equal(model(embedded).user, model(embedded).user)


def test_lookups() -> None:
    model = NARM(11, 6, 3, 0.0, 4, history="watched", item="next", max_length=7)
    watched, target = model.lookups()
    assert watched.feature == SequenceFeature("watched", Table("item", 11, init_std=0.02), max_length=7)
    assert (watched.name, watched.pooling, target.name, target.pooling) == ("watched", None, "next", "sum")
    assert watched.table == target.table == Table("item", 11, dim=4, init_std=0.02)
    assert model.item_lookups() == (target,)
    assert model.history() == watched.feature


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"item_num": 12, "history": cases.history}, "item_num is 12, but table 'item' has 11 rows: make them equal"),
        ({"history": cases.history, "item": cases.user}, "'history' reads table 'item' and item 'user' reads 'user'"),
        ({"embedding_dim": 8, "history": cases.history}, "table 'item' has dim 4, .*embedding_dim is 8"),
        ({"hidden_size": 0}, "hidden_size is 0: it must be at least 1"),
        ({"attention_size": 0}, "attention_size is 0: it must be at least 1"),
        ({"embedding_dim": 0}, "embedding_dim is 0: it must be at least 1"),
        ({"dropout_rate": -0.1}, r"dropout_rate is -0\.1: it must be at least 0 and less than 1"),
    ],
)
def test_wrong_arguments(arguments: dict, message: str) -> None:
    given = {"item_num": 11, "hidden_size": 6, "attention_size": 3, "dropout_rate": 0.1, "embedding_dim": 4}
    with pytest.raises(ValueError, match=message):
        NARM(**(given | arguments))
