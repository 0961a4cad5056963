from __future__ import annotations

import math

import pytest
import test_catalogue as proof
import torch
from torch import Tensor, nn

from rechub_dist.embedded import Sequence
from rechub_dist.features import DenseFeature, SequenceFeature, SparseFeature, Table, TimeGapFeature
from rechub_dist.models import BST
from rechub_tests import cases
from rechub_tests.cases import gaps, history, item, kind, kinds, shop, user
from rechub_tests.reference import affine, assert_same, layer_norm, relu_mlp, softmax

MAX_LENGTH = 5
VARIANTS = {
    "time gaps": cases.bst,
    "indices": lambda: small(num_layers=1),
    "indices, one head, three blocks": lambda: small(num_heads=1, num_layers=3),
    "no other features": lambda: small(features=[], time_gaps=gaps),
}


def small(**changes: object) -> BST:
    given = {
        "features": [user, cases.age],
        "behavior_features": [history, kinds],
        "num_heads": 2,
        "num_layers": 1,
        "hidden_size": 4,
        "dropout_rate": 0.0,
        "target_features": [item, kind],
        "hidden_units": [5],
        "feedforward_units": 6,
    }
    return BST(**(given | changes))


def variant(name: str) -> BST:
    torch.manual_seed(0)
    model = VARIANTS[name]().double()
    nn.init.normal_(model.positions)  # their start is too small to be seen
    return model


def transform(model: BST, x: list[Tensor]) -> list[Tensor]:
    """The blocks' outputs for one row without padding, head by head and key by key."""
    for block in model.blocks:
        attention = block.attention
        q, k, v = ([affine(layer, e) for e in x] for layer in (attention.query, attention.key, attention.value))
        size = len(x[0]) // attention.num_heads
        s = []
        for t in range(len(x)):
            heads = []
            for h in range(attention.num_heads):
                part = slice(h * size, (h + 1) * size)
                scores = [(q[t][part] * k[j][part]).sum() / math.sqrt(size) for j in range(len(x))]
                heads.append(sum(a * v[j][part] for j, a in enumerate(softmax(scores))))
            s.append(layer_norm(block.attention_norm, x[t] + affine(attention.output, torch.cat(heads))))
        x = []
        for e in s:
            hidden = affine(block.network[0], e)
            hidden = hidden * (hidden > 0) + 0.01 * hidden * (hidden <= 0)
            x.append(layer_norm(block.network_norm, e + affine(block.network[3], hidden)))
    return x


@pytest.mark.parametrize("name", VARIANTS)
def test_forward_and_gradients(name: str) -> None:
    model = variant(name)
    lengths = [3, 0, 5, 1]
    embedded = cases.make_batch(model, 4, lengths=lengths)
    leaves = cases.vectors_of(embedded)
    timed = "gaps" in embedded.sequences

    def formula() -> Tensor:
        logits = []
        for b, n in enumerate(lengths):
            x = [affine(model.input, torch.cat([leaves["item"][b], leaves["kind"][b], model.positions[0]]))]
            for t in range(n):
                position = leaves["gaps"][b, t] if timed else model.positions[n - t]
                x.append(affine(model.input, torch.cat([leaves["history"][b, t], leaves["kinds"][b, t], position])))
            candidate, *behaviors = transform(model, x)
            zeros = torch.zeros((MAX_LENGTH - n) * 4, dtype=torch.float64)
            others = [leaves[lookup.name][b] for lookup in model.fields.lookups]
            dense = [embedded.dense[feature.name][b] for feature in model.dense_features()]
            flat = torch.cat([*others, *dense, candidate, *behaviors[::-1], zeros])
            logits.append(relu_mlp(model.mlp.layers, flat, slope=0.01))
        return torch.stack(logits)

    assert_same(model, embedded, leaves, formula)


@pytest.mark.parametrize("name", list(VARIANTS)[1:])
def test_variants_pass_the_catalogues_proof(name: str) -> None:
    for batch in proof.BATCHES:
        proof.test_every_parameter_gets_a_gradient(variant(name), batch)
        proof.test_shapes(variant(name), batch, True)
        proof.test_shapes(variant(name), batch, False)
    proof.test_padding_changes_nothing(variant(name), True, 1)
    proof.test_padding_changes_nothing(variant(name), False, 0)
    proof.test_rows_are_independent_when_evaluated(variant(name))


@pytest.mark.parametrize("name", VARIANTS)
def test_not_even_nan_leaks_from_the_padding(name: str) -> None:
    model = variant(name)
    embedded = cases.make_batch(model, 4, lengths=[3, 0, 1, 5])
    expected = cases.real(model(embedded))
    output = model(cases.pad_with(embedded, math.nan, 2))
    torch.testing.assert_close(cases.real(output), expected)


def test_every_position_reaches_the_logit() -> None:
    model = variant("indices").eval()
    embedded = cases.make_batch(model, 1, lengths=[5])
    before = model(embedded).logits
    values, lengths, _ = embedded.sequences["history"]
    for t in range(5):
        changed = values.detach().clone()
        changed[0, t] += torch.tensor([1.0, -2.0, 0.5, 3.0])
        embedded.sequences["history"] = Sequence(changed, lengths)
        assert (model(embedded).logits - before).abs().max() > 1e-6


def test_order_matters_through_positions_and_slots_alone() -> None:
    model = variant("indices").eval()
    order = torch.tensor([2, 0, 3, 1])

    def slots(shuffled: bool) -> Tensor:
        embedded = cases.make_batch(model, 1, lengths=[4])
        for key, (values, lengths, _) in embedded.sequences.items():
            embedded.sequences[key] = Sequence(values[:, order] if shuffled else values, lengths)
        found = []
        handle = model.mlp.register_forward_hook(lambda _, inputs, __: found.append(inputs[0]))
        model(embedded)
        handle.remove()
        return found[0][0, model.fields.width :].unflatten(0, (MAX_LENGTH + 1, 4))

    assert (slots(True)[0] - slots(False)[0]).abs().max() > 1e-6
    nn.init.zeros_(model.positions)
    plain, shuffled = slots(False), slots(True)
    torch.testing.assert_close(shuffled[0], plain[0])  # the candidate sees a set
    newest_first = [4 - int(t) for t in order.flip(0)]
    torch.testing.assert_close(shuffled[1:5], plain[newest_first])
    assert not plain[5:].any()


def test_positions_that_a_batch_does_not_reach_are_not_trained() -> None:
    model = variant("indices")
    assert model.positions.shape == (MAX_LENGTH + 1, 4)
    model(cases.make_batch(model, 3, lengths=[2, 0, 3])).logits.square().sum().backward()
    reached = model.positions.grad.abs().sum(dim=1) > 0
    assert reached.tolist() == [True, True, True, True, False, False]


def test_of_a_longer_history_the_newest_count() -> None:
    model = variant("indices").eval()
    embedded = cases.make_batch(model, 1, lengths=[5])
    expected = model(embedded).logits
    for key, (values, lengths, _) in embedded.sequences.items():
        older = torch.randn(1, 2, values.shape[2], dtype=torch.float64)
        embedded.sequences[key] = Sequence(torch.cat([older, values], dim=1), lengths + 2)
    torch.testing.assert_close(model(embedded).logits, expected)


def test_lookups() -> None:
    model = cases.bst()
    assert {lookup.name: (lookup.table.name, lookup.dim, lookup.pooling) for lookup in model.lookups()} == {
        "user": ("user", 4, "sum"),
        "shop": ("shop", 2, "sum"),
        "tags": ("tag", 4, "mean"),
        "liked": ("item", 4, "mean"),
        "item": ("item", 4, "sum"),
        "kind": ("kind", 4, "sum"),
        "history": ("item", 4, None),
        "kinds": ("kind", 4, None),
        "gaps": ("gaps", 4, None),
    }
    assert model.aligned_features() == (("history", "kinds", "gaps"),)
    assert small().aligned_features() == (("history", "kinds"),)
    assert [feature.name for feature in model.dense_features()] == ["age", "profile"]
    assert model.positions.shape == (1, 4)


def test_tables_without_a_width_take_the_models() -> None:
    other = SparseFeature("other", Table("other", 3))
    assert [lookup.dim for lookup in small(features=[other, shop]).lookups()[:2]] == [4, 2]


def test_sizes() -> None:
    model = BST([DenseFeature("x")], [history], 2, 2, 4, 0.1, target_features=[item])
    units = [layer.out_features for layer in model.mlp.layers if isinstance(layer, nn.Linear)]
    assert units == [1024, 512, 256, 1]
    assert model.mlp.layers[0].in_features == 1 + 6 * 4
    assert [block.network[0].out_features for block in model.blocks] == [16, 16]
    assert {layer.p for layer in model.modules() if isinstance(layer, nn.Dropout)} == {0.1}
    assert any(isinstance(layer, nn.LeakyReLU) for layer in model.mlp.layers)


def test_dropout_is_for_training_only() -> None:
    model = small(dropout_rate=0.5).double()
    embedded = cases.make_batch(model, 3, lengths=[5, 4, 3])
    assert not torch.equal(model(embedded).logits, model(embedded).logits)
    model.eval()
    assert torch.equal(model(embedded).logits, model(embedded).logits)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 3}, "num_heads is 3: it must divide the width 4"),
        ({"num_heads": 0}, "num_heads is 0"),
        ({"num_layers": 0}, "num_layers is 0: it must be at least 1"),
        ({"dropout_rate": 1.0}, r"dropout_rate is 1\.0: it must be at least 0 and less than 1"),
        ({"feedforward_units": 0}, "feedforward_units is 0: it must be at least 1"),
        ({"hidden_size": 8}, "table 'item' has dim 4, but the model's hidden_size is 8"),
        ({"target_features": [kind, item]}, "'history' reads table 'item' .* 'kind' reads 'kind': make both"),
        ({"target_features": []}, "2 behavior_features and 0 target_features"),
        ({"features": [item]}, "'item' is listed twice"),
        ({"time_gaps": history}, "'history' is listed twice"),
        ({"time_gaps": SparseFeature("x", cases.SHOP)}, "time_gaps is .*make it a TimeGapFeature"),
        (
            {"time_gaps": TimeGapFeature("g", "times", "now", (1.0,), max_length=4)},
            "'history' and 'g' keep the last 5 and the last 4 behaviours: give both the same max_length and keep",
        ),
        (
            {"behavior_features": [history, SequenceFeature("k", kind.table, 6)]},
            "'history' and 'k' keep the last 5 and the last 6",
        ),
        ({"activation": "rulu"}, "'rulu' is unknown"),
    ],
)
def test_wrong_arguments(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**changes)
