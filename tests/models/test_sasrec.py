from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rechub_dist.embedded import Embedded, Sequence
from rechub_dist.features import SequenceFeature, SparseFeature, Table
from rechub_dist.models import SASRec
from rechub_tests import cases
from rechub_tests.reference import affine, layer_norm, softmax

D, HEADS = 4, 2


def states(model: SASRec, items: list[Tensor]) -> list[Tensor]:
    """The state at each position of one history, head by head and key by key."""
    x = [math.sqrt(D) * e + model.positions[t] for t, e in enumerate(items)]
    for block in model.blocks:
        normed = [layer_norm(block.attention_norm, vector) for vector in x]
        q, k, v = (
            [affine(p, n) for n in normed] for p in (block.attention.query, block.attention.key, block.attention.value)
        )
        attended = []
        for t in range(len(x)):
            heads = []
            for h in range(HEADS):
                part = slice(h * D // HEADS, (h + 1) * D // HEADS)
                scores = [(q[t][part] * k[s][part]).sum() / math.sqrt(D // HEADS) for s in range(t + 1)]
                heads.append(sum(a * v[s][part] for s, a in enumerate(softmax(scores))))
            attended.append(torch.cat(heads))
        x = [a + b for a, b in zip(x, attended, strict=True)]
        first, second = block.network[0], block.network[3]
        hidden = [affine(first, layer_norm(block.network_norm, vector)) for vector in x]
        x = [a + affine(second, h * (h > 0)) for a, h in zip(x, hidden, strict=True)]
    return [layer_norm(model.norm, vector) for vector in x]


def test_forward_and_gradients() -> None:
    model = cases.build(SASRec)
    lengths = [3, 0, 5, 1]
    embedded = cases.make_batch(model, 4, lengths=lengths)
    leaves = cases.vectors_of(embedded)
    history, item = embedded.sequences["history"].values, embedded.vectors["item"]

    expected_users, expected_items = [], []
    for b, n in enumerate(lengths):
        expected_users += states(model, [history[b, t] for t in range(n)])
        expected_items += [history[b, t + 1] if t + 1 < n else item[b] for t in range(n)]
    output = model(embedded)
    users, items = output.user[output.user_mask], output.item[output.user_mask]
    torch.testing.assert_close(users, torch.stack(expected_users))
    assert torch.equal(items, torch.stack(expected_items))

    targets = dict(model.named_parameters()) | leaves
    weight = torch.linspace(-1, 2, len(users)).double()
    actual = torch.autograd.grad((weight * (users * items).sum(1)).sum(), list(targets.values()))
    scores = [(u * i).sum() for u, i in zip(expected_users, expected_items, strict=True)]
    expected = torch.autograd.grad((weight * torch.stack(scores)).sum(), list(targets.values()))
    for name, a, e in zip(targets, actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-6, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


def numpy_states(model: SASRec, items: np.ndarray, heads: int) -> np.ndarray:
    """The states [n, D] of one left-padded history [n, D], as the authors' code computes them: [max_len, D] at a time.

    Rows before the first item are padding, which is zeroed after every block and hidden as a key.
    """
    w = {name: value.detach().numpy() for name, value in model.named_parameters()}
    length, width, n = model.max_len, items.shape[1], len(items)

    def norm(name: str, x: np.ndarray) -> np.ndarray:
        centred = x - x.mean(axis=1, keepdims=True)
        deviation = np.sqrt((centred**2).mean(axis=1, keepdims=True) + 1e-8)
        return w[f"{name}.weight"] * centred / deviation + w[f"{name}.bias"]

    def dense(name: str, x: np.ndarray) -> np.ndarray:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    real = (np.arange(length) >= length - n)[:, None]
    x = np.zeros((length, width))
    x[length - n :] = math.sqrt(width) * items
    x = (x + w["positions"]) * real
    hidden = ~np.tril(np.ones((length, length), bool)) | ~real[:, 0]
    for block in range(len(model.blocks)):
        of = f"blocks.{block}"
        queries = norm(f"{of}.attention_norm", x)
        q, k, v = (dense(f"{of}.attention.{p}", y) for p, y in (("query", queries), ("key", x), ("value", x)))
        attended = []
        for part in np.split(np.arange(width), heads):
            scores = np.where(hidden, -(2.0**32) + 1, q[:, part] @ k[:, part].T / math.sqrt(len(part)))
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            attended.append(weights / weights.sum(axis=1, keepdims=True) @ v[:, part])
        inputs = norm(f"{of}.network_norm", np.concatenate(attended, axis=1) + queries)
        network = dense(f"{of}.network.3", np.maximum(dense(f"{of}.network.0", inputs), 0))
        x = (network + inputs) * real
    return norm("norm", x)[length - n :]


def authors(num_layers: int = 2, **options: Any) -> SASRec:
    torch.manual_seed(0)
    options = {"block": "authors", "positions": "newest"} | options
    model = SASRec(11, 6, HEADS, num_layers, D, 0.0, **options).double()
    for parameter in model.parameters():  # norms and biases, which start as if they were not there, included
        torch.nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize("num_layers", [1, 2])
def test_the_authors_block_is_their_code(num_layers: int) -> None:
    model = authors(num_layers)
    lengths = [3, 0, 6, 1]
    embedded = cases.make_batch(model, 4, lengths=lengths)
    output = model(embedded)
    served, _ = model.user(embedded)
    for b, n in enumerate(lengths):
        if not n:
            assert not served[b].any()
            continue
        expected = numpy_states(model, embedded.sequences["history"].values[b, :n].detach().numpy(), HEADS)
        np.testing.assert_allclose(output.user[b, :n].detach().numpy(), expected, rtol=1e-9)
        np.testing.assert_allclose(served[b, 0].detach().numpy(), expected[-1], rtol=1e-9)
    output.user[output.user_mask].square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_positions_count_from_either_end() -> None:
    for options in ({}, {"block": "paper"}):
        oldest, newest = authors(positions="oldest", **options), authors(**options)
        full, short = ([cases.make_batch(model, 1, lengths=[n]) for model in (oldest, newest)] for n in (6, 4))
        torch.testing.assert_close(oldest(full[0]).user, newest(full[1]).user)
        assert (oldest(short[0]).user - newest(short[1]).user).abs().max() > 1e-3
        shifted = authors(**options)
        shifted.positions.data = oldest.positions.data.roll(2, dims=0)  # position 0 where four of six items begin
        torch.testing.assert_close(oldest(short[0]).user, shifted(short[1]).user)


@pytest.mark.parametrize("fill", [math.nan, math.inf])
def test_the_authors_block_leaks_no_padding(fill: float) -> None:
    model = authors()
    embedded = cases.make_batch(model, 3, lengths=[3, 0, 1])
    garbage = cases.pad_with(embedded, fill)
    torch.testing.assert_close(cases.real(model(garbage)), cases.real(model(embedded)))


def test_a_state_sees_its_prefix_and_all_of_it() -> None:
    model = cases.build(SASRec).eval()
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
    model = cases.build(SASRec).eval()
    embedded = cases.make_batch(model, 1, lengths=[5])
    trained = model(embedded).user[0]
    for n in range(1, 6):
        history = Sequence(embedded.sequences["history"].values, torch.tensor([n]))
        served, mask = model.user(Embedded(embedded.vectors, {"history": history}))
        torch.testing.assert_close(served[0, 0], trained[n - 1])
        assert mask.all()


def test_order_matters() -> None:
    model = cases.build(SASRec).eval()
    embedded = cases.make_batch(model, 1, lengths=[4])
    values, lengths, _ = embedded.sequences["history"]
    order = torch.tensor([2, 0, 1, 3])
    other = Embedded(embedded.vectors, {"history": Sequence(values[:, order], lengths)})
    assert (model.user(other)[0] - model.user(embedded)[0]).abs().max() > 1e-6


def test_an_empty_history_has_a_user_of_zeros() -> None:
    model = cases.build(SASRec).train()
    embedded = cases.make_batch(model, 2, lengths=[0, 2])
    users, mask = model.user(embedded)
    assert (users[0] == 0).all()
    assert (users[1] != 0).any()
    assert mask.all()
    users.square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("fill", [math.nan, math.inf])
def test_not_even_nan_leaks_from_the_padding(fill: float) -> None:
    model = cases.build(SASRec)
    embedded = cases.make_batch(model, 3, lengths=[3, 0, 1])
    expected = cases.real(model(embedded))
    garbage = cases.pad_with(embedded, fill)
    output = model(garbage)
    torch.testing.assert_close(cases.real(output), expected)
    cases.loss_of(output).backward()
    assert garbage.sequences["history"].values.grad.isfinite().all()


def test_dropout_is_for_training_only() -> None:
    model = SASRec(11, 6, 1, 1, 8, 0.5).double()
    embedded = cases.make_batch(model, 3, lengths=[5, 4, 3])
    assert not torch.equal(model(embedded).user, model(embedded).user)
    model.eval()
    assert torch.equal(model(embedded).user, model(embedded).user)


def test_names_make_features_over_one_table() -> None:
    model = SASRec(11, 6, 2, 1, 4, 0.1, history="watched", item="next")
    watched, target = model.lookups()
    assert watched.feature == SequenceFeature("watched", Table("item", 11, init_std=0.02), max_length=6)
    assert (watched.name, watched.pooling, target.name, target.pooling) == ("watched", None, "next", "sum")
    assert watched.table == target.table == Table("item", 11, dim=4, init_std=0.02)
    assert model.item_lookups() == (target,)


def test_features_bring_their_table() -> None:
    films = Table("film", 11, init_std=0.1)
    watched = SequenceFeature("watched", films, max_length=5)
    for item in (SparseFeature("item", films), "item"):
        model = SASRec(11, 6, 2, 1, 4, 0.1, history=watched, item=item)
        assert {lookup.table for lookup in model.lookups()} == {Table("film", 11, dim=4, init_std=0.1)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"item_num": 12, "history": cases.history}, "item_num is 12, but table 'item' has 11 rows: make them equal"),
        ({"history": cases.history, "item": cases.user}, "'history' reads table 'item' and item 'user' reads 'user'"),
        ({"history": SequenceFeature("h", cases.ITEM, 50)}, "max_length 50, but max_len is 6: lower the one or raise"),
        ({"history": "x", "item": "x"}, "both named 'x': give them different names"),
        ({"hidden_size": 8, "history": cases.history}, "table 'item' has dim 4, .*hidden_size is 8"),
        ({"block": "theirs"}, "block is 'theirs': use one of paper, authors"),
        ({"positions": "left"}, "positions is 'left': use one of oldest, newest"),
        ({"num_heads": 3}, "num_heads is 3: it must divide the width 4"),
        ({"max_len": 0}, "max_len is 0"),
        ({"num_layers": 0}, "num_layers is 0"),
    ],
)
def test_wrong_arguments(arguments: dict, message: str) -> None:
    given = {"item_num": 11, "max_len": 6, "num_heads": 2, "num_layers": 1, "hidden_size": 4, "dropout_rate": 0.1}
    with pytest.raises(ValueError, match=message):
        SASRec(**(given | arguments))


def test_a_history_that_is_too_long() -> None:
    model = SASRec(11, 2, 1, 1, 4, 0.0).double()
    with pytest.raises(ValueError, match="3 items, but max_len is 2"):
        model(cases.make_batch(model, 1, lengths=[3]))
