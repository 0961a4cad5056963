from __future__ import annotations

import math

import pytest
import test_catalogue as proof
import torch
from torch import Tensor

from rechub_dist.embedded import Embedded, Sequence
from rechub_dist.features import NegativeFeature, SequenceFeature, SparseFeature, Table
from rechub_dist.models import DIEN
from rechub_tests import cases
from rechub_tests.cases import history, item, shop, shops, user
from rechub_tests.reference import affine, assert_same, dice_mlp, gru, sigmoid, softmax

missed = SequenceFeature("missed", cases.ITEM, max_length=5)
missed_shops = SequenceFeature("missed_shops", cases.SHOP, max_length=5)
VARIANTS = {
    "AUGRU, drawn": cases.dien,
    "AIGRU, drawn": lambda: small(gru_type="AIGRU"),
    "AUGRU, given": lambda: small(negative_features=[missed, missed_shops]),
    "AIGRU, three extractors": lambda: small(gru_type="AIGRU", interest_units=[4, 2, 3]),
}


def small(**changes: object) -> DIEN:
    given = {
        "features": [user, cases.age],
        "behavior_features": [history, shops],
        "interest_units": [4],
        "gru_type": "AUGRU",
        "hidden_units": [6, 5],
        "target_features": [item, shop],
    }
    return DIEN(**(given | changes))


def variant(name: str) -> DIEN:
    torch.manual_seed(0)
    return VARIANTS[name]().double()


def evolve(model: DIEN, inputs: list[Tensor], weights: list[Tensor]) -> Tensor:
    """The final interest of one row, unit by unit."""
    H = len(inputs[0])
    if "gru.weight_ih_l0" in dict(model.evolution.named_parameters()):
        return gru(model.evolution.gru, [a * x for a, x in zip(weights, inputs, strict=True)])[-1]
    h = torch.zeros(H, dtype=torch.float64)
    for x, a in zip(inputs, weights, strict=True):
        W, U = affine(model.evolution.input, x), affine(model.evolution.recurrent, h)
        new = []
        for o in range(H):
            r, u = sigmoid(W[o] + U[o]), sigmoid(W[H + o] + U[H + o])
            candidate = torch.tanh(W[2 * H + o] + r * U[2 * H + o])
            new.append((1 - a * u) * h[o] + a * u * candidate)
        h = torch.stack(new)
    return h


@pytest.mark.parametrize("name", VARIANTS)
def test_forward_and_gradients(name: str) -> None:
    model = variant(name)
    for key, parameter in model.named_parameters():
        if key.endswith("alpha"):
            torch.nn.init.uniform_(parameter, 0.1, 0.5)
    lengths = [3, 0, 5, 1]
    embedded = cases.make_batch(model, 4, lengths=lengths)
    leaves = cases.vectors_of(embedded)
    negatives = [lookup.name for lookup in model.negative_lookups]
    others = [lookup.name for lookup in model.fields.lookups]  # the candidate's attributes come last
    width = 6

    def formula() -> Tensor:
        rows, losses = [], []
        for b, n in enumerate(lengths):
            e = [torch.cat([leaves["history"][b, t], leaves["shops"][b, t]]) for t in range(n)]
            other = [torch.cat([leaves[key][b, t] for key in negatives]) for t in range(n)]
            target = torch.cat([leaves["item"][b], leaves["shop"][b]])
            h = e
            for layer in model.extractor:
                h = gru(layer, h)
            interest = torch.zeros(model.next_behavior.in_features, dtype=torch.float64)
            loss = torch.zeros((), dtype=torch.float64)
            if n:
                W = model.attention.project.weight
                scores = [
                    sum(state[i] * W[i, j] * target[j] for i in range(len(state)) for j in range(width)) for state in h
                ]
                interest = evolve(model, h, softmax(scores))
            V = model.next_behavior.weight
            for t in range(n - 1):
                happened, drawn = (
                    sum(h[t][i] * V[j, i] * vector[t + 1][j] for i in range(len(h[t])) for j in range(width))
                    for vector in (e, other)
                )
                loss = loss - torch.log(sigmoid(happened)) - torch.log(1 - sigmoid(drawn))
            dense = [embedded.dense[feature.name][b] for feature in model.dense_features()]
            rows.append(torch.cat([*(leaves[key][b] for key in others), *dense, interest]))
            losses.append(loss / max(1, n - 1))
        logits = torch.stack(dice_mlp(model.mlp.layers, rows))
        return torch.cat([logits, torch.stack(losses)[:, None]], dim=1)

    assert_same(
        model, embedded, leaves, formula, lambda out: torch.cat([out.logits, out.aux["next_behavior"][:, None]], dim=1)
    )


@pytest.mark.parametrize("name", list(VARIANTS)[1:])
def test_variants_pass_the_catalogues_proof(name: str) -> None:
    for kind in proof.BATCHES:
        proof.test_every_parameter_gets_a_gradient(variant(name), kind)
        proof.test_shapes(variant(name), kind, True)
        proof.test_shapes(variant(name), kind, False)
    proof.test_padding_changes_nothing(variant(name), True, 1)
    proof.test_rows_are_independent_when_evaluated(variant(name))


@pytest.mark.parametrize("name", VARIANTS)
def test_not_even_nan_leaks_from_the_padding(name: str) -> None:
    model = variant(name)
    embedded = cases.make_batch(model, 4, lengths=[3, 0, 1, 5])
    expected = cases.real(model(embedded))
    garbage = cases.pad_with(embedded, math.nan, 2)
    output = model(garbage)
    torch.testing.assert_close(cases.real(output), expected)
    cases.loss_of(output).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def weights_of(model: DIEN, embedded: Embedded) -> Tensor:
    found = []
    handle = model.attention.register_forward_hook(lambda _, __, output: found.append(output))
    model(embedded)
    handle.remove()
    return found[0]


def test_attention_sums_to_one_over_what_is_real() -> None:
    model = cases.build(DIEN).eval()
    embedded = cases.make_batch(model, 4, lengths=[3, 0, 1, 5])
    weights = weights_of(model, embedded)
    torch.testing.assert_close(weights.sum(dim=1), torch.tensor([1.0, 0, 1, 1]).double())
    assert not weights[~embedded.sequences["history"].mask].any()
    assert (weights[0, 0] - weights[0, 1]).abs() > 1e-5
    embedded.vectors["item"] = embedded.vectors["item"] + 1
    assert (weights_of(model, embedded) - weights)[3].abs().max() > 1e-5


@pytest.mark.parametrize("name", ["AUGRU, drawn", "AIGRU, drawn"])
def test_the_order_of_behaviours_matters(name: str) -> None:
    model = variant(name).eval()
    embedded = cases.make_batch(model, 2, lengths=[4, 4])
    expected = model(embedded)
    for key, sequence in embedded.sequences.items():
        embedded.sequences[key] = Sequence(sequence.values.flip(1), sequence.lengths)
    other = model(embedded)
    assert (other.logits - expected.logits).abs().min() > 1e-6
    assert (other.aux["next_behavior"] - expected.aux["next_behavior"]).abs().min() > 1e-6


def test_augru_stays_where_nothing_is_attended() -> None:
    torch.manual_seed(0)
    augru = cases.build(DIEN).evolution
    x = torch.randn(2, 4, 3, dtype=torch.float64)
    weights = torch.tensor([[0.5, 0, 0, 0.5], [0, 0, 0, 0]], dtype=torch.float64)
    states = augru(x, weights)
    assert torch.equal(states[0, 0], states[0, 2])
    assert (states[0, 3] - states[0, 2]).abs().min() > 1e-6
    assert not states[1].any()


def test_the_auxiliary_loss_is_a_mean_over_what_follows() -> None:
    model = cases.build(DIEN).eval()
    embedded = cases.make_batch(model, 4, lengths=[0, 1, 2, 5])
    loss = model(embedded).aux["next_behavior"]
    assert loss.shape == (4,)
    assert (loss[:2] == 0).all()
    assert (loss[2:] > 0).all()
    torch.nn.init.zeros_(model.next_behavior.weight)
    torch.testing.assert_close(model(embedded).aux["next_behavior"], torch.tensor([0, 0, 2, 2]).double() * math.log(2))
    model.train()
    assert model(embedded).aux.keys() == {"next_behavior"}


def test_the_auxiliary_loss_can_be_learnt() -> None:
    model = cases.build(DIEN)
    embedded = cases.make_batch(model, 6, lengths=[5] * 6)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        losses.append(model(embedded).aux["next_behavior"].mean())
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]


def test_lookups_of_drawn_negatives() -> None:
    model = cases.dien()
    lookups = {lookup.name: lookup for lookup in model.lookups()}
    assert {name: (lookup.table.name, lookup.dim, lookup.pooling) for name, lookup in lookups.items()} == {
        "user": ("user", 4, "sum"),
        "tags": ("tag", 4, "mean"),
        "liked": ("item", 4, "mean"),
        "item": ("item", 4, "sum"),
        "shop": ("shop", 2, "sum"),
        "history": ("item", 4, None),
        "shops": ("shop", 2, None),
        "history.negative": ("item", 4, None),
        "shops.negative": ("shop", 2, None),
    }
    assert lookups["history.negative"].feature == NegativeFeature(
        "history.negative", cases.ITEM, like="history", count=1, exclude=("history",)
    )
    # A history may well hold every shop: then there would be nothing left to draw.
    assert lookups["shops.negative"].feature == NegativeFeature("shops.negative", cases.SHOP, like="shops")
    assert model.aligned_features() == (("history", "shops"),)
    assert [feature.name for feature in model.dense_features()] == ["age", "profile"]


def test_lookups_of_given_negatives() -> None:
    model = small(negative_features=[missed, missed_shops])
    negatives = [(lookup.feature, lookup.pooling) for lookup in model.lookups()[-2:]]
    assert negatives == [(missed, None), (missed_shops, None)]
    assert model.aligned_features() == (("history", "shops", "missed", "missed_shops"),)


def test_other_features_may_be_absent() -> None:
    model = DIEN([], [history], [3], "AIGRU", [], target_features=[item], activation="relu").double()
    assert model(cases.make_batch(model, 3)).logits.shape == (3, 1)


def test_dropout_and_batch_norm_are_the_mlps() -> None:
    model = small(dropout_rates=[0.1, 0.2], batch_norm=True)
    assert [layer.p for layer in model.mlp.layers if isinstance(layer, torch.nn.Dropout)] == [0.1, 0.2]
    norms = [name for name, layer in model.named_modules() if isinstance(layer, torch.nn.BatchNorm1d)]
    assert len(norms) == 4  # one a hidden layer, and Dice's
    assert all(name.startswith("mlp.") for name in norms)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gru_type": "GRU"}, "gru_type is 'GRU': use one of AUGRU, AIGRU"),
        ({"interest_units": []}, r"interest_units is empty: give at least one width"),
        ({"interest_units": [4, 0]}, r"interest_units are \[4, 0\]: .*at least 1"),
        ({"target_features": [shop, item]}, "'history' reads table 'item' .* 'shop' reads 'shop': make both"),
        ({"behavior_features": []}, "0 behavior_features and 2 target_features"),
        ({"features": [item]}, "'item' is listed twice"),
        ({"negative_features": [missed]}, "2 behavior_features and 1 negative_features: give one .* or leave"),
        ({"negative_features": []}, "2 behavior_features and 0 negative_features"),
        ({"negative_features": [missed_shops, missed]}, "'history' reads table 'item' and its negative feature 'mis"),
        ({"negative_features": [missed, SparseFeature("x", cases.SHOP)]}, "'x' is sparse: make it a SequenceFeature"),
        ({"negative_features": [missed, shops]}, "'shops' is listed twice"),
        (
            {"negative_features": [SequenceFeature("x", cases.ITEM, 4), missed_shops]},
            "'history' and 'x' keep the last 5 and the last 4 behaviours: give both the same max_length and keep",
        ),
        ({"activation": "rulu"}, "'rulu' is unknown"),
        ({"dropout_rates": [0.1]}, "1 dropout rates .* 2 hidden layers"),
    ],
)
def test_wrong_arguments(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**changes)


def test_behaviours_are_cut_alike() -> None:
    first = SequenceFeature("first", cases.SHOP, max_length=5, keep="first")
    with pytest.raises(ValueError, match="'history' and 'first' keep the last 5 and the first 5 behaviours"):
        small(behavior_features=[history, first])


def test_behaviours_need_a_width() -> None:
    bare = Table("bare", 5)
    with pytest.raises(ValueError, match=r"'bare' has no width.*embedding\.dim"):
        small(behavior_features=[SequenceFeature("h", bare, 3)], target_features=[SparseFeature("i", bare)])
