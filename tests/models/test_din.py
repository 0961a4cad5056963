from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rechub_dist.features import SequenceFeature, SparseFeature, Table
from rechub_dist.models import DIN
from rechub_tests import cases
from rechub_tests.cases import history, item, shop, shops, user
from rechub_tests.reference import assert_same, dice_mlp


def weights_of(model: DIN, embedded: cases.Embedded) -> Tensor:
    behaviors = torch.cat([embedded.sequences["history"].values, embedded.sequences["shops"].values], dim=2)
    target = torch.cat([embedded.vectors["item"], embedded.vectors["shop"]], dim=1)
    return model.attention.weights(behaviors, target, embedded.sequences["history"].mask)


def test_forward_and_gradients() -> None:
    model = cases.build(DIN)
    for name, parameter in model.named_parameters():
        if name.endswith("alpha"):
            torch.nn.init.uniform_(parameter, 0.1, 0.5)
    lengths = [2, 0, 3, 1]
    embedded = cases.make_batch(model, 4, lengths=lengths)
    leaves = cases.vectors_of(embedded)

    def formula() -> Tensor:
        target = [torch.cat([embedded.vectors["item"][b], embedded.vectors["shop"][b]]) for b in range(4)]
        behavior = {
            (b, t): torch.cat([leaves["history"][b, t], leaves["shops"][b, t]])
            for b in range(4)
            for t in range(lengths[b])
        }
        pairs = [torch.cat([e, target[b], e - target[b], e * target[b]]) for (b, _), e in behavior.items()]
        weight = dict(zip(behavior, dice_mlp(model.attention.mlp.layers, pairs), strict=True))
        rows = []
        for b in range(4):
            interest = sum((weight[b, t] * behavior[b, t] for t in range(lengths[b])), torch.zeros(6).double())
            rows.append(torch.cat([embedded.vectors["user"][b], target[b], embedded.dense["age"][b], interest]))
        return torch.stack(dice_mlp(model.mlp.layers, rows))

    assert_same(model, embedded, leaves, formula)


def test_attention_depends_on_behaviour_and_target() -> None:
    model = cases.build(DIN).eval()
    embedded = cases.make_batch(model, 2, lengths=[3, 3])
    weights = weights_of(model, embedded)
    assert (weights[:, 0] - weights[:, 1]).abs().min() > 1e-4
    embedded.vectors["item"] = embedded.vectors["item"] + 1
    assert (weights_of(model, embedded) - weights).abs().min() > 1e-4


def test_attention_is_not_normalised_and_skips_padding() -> None:
    model = cases.build(DIN).eval()
    embedded = cases.make_batch(model, 3, lengths=[3, 0, 1])
    weights = weights_of(model, embedded)
    assert (weights[1] == 0).all()
    assert (weights[2, 1:] == 0).all()
    assert not torch.isclose(weights.sum(dim=1), torch.ones(3).double()).any()
    # a behaviour done twice counts twice
    twice = cases.make_batch(model, 1, lengths=[2])
    for name, sequence in twice.sequences.items():
        twice.sequences[name] = cases.Sequence(sequence.values[:, :1].expand(-1, 2, -1), sequence.lengths)
    assert torch.equal(*weights_of(model, twice).unbind(1))


def test_training_and_evaluation_agree_where_nothing_is_normalised() -> None:
    model = DIN([], [history, shops], [3], [4], "relu", target_features=[item, shop]).double()
    embedded = cases.make_batch(model, 4, lengths=[3, 0, 1, 5])
    torch.testing.assert_close(weights_of(model.eval(), embedded), weights_of(model.train(), embedded))


def test_order_of_behaviours_does_not_matter() -> None:
    model = cases.build(DIN).eval()
    embedded = cases.make_batch(model, 2, lengths=[4, 4])
    expected = model(embedded).logits
    for name, sequence in embedded.sequences.items():
        embedded.sequences[name] = cases.Sequence(sequence.values.flip(1), sequence.lengths)
    torch.testing.assert_close(model(embedded).logits, expected)


def test_lookups() -> None:
    assert {lookup.name: (lookup.table.name, lookup.pooling) for lookup in cases.din().lookups()} == {
        "user": ("user", "sum"),
        "item": ("item", "sum"),
        "shop": ("shop", "sum"),
        "history": ("item", None),
        "shops": ("shop", None),
    }
    assert [feature.name for feature in cases.din().dense_features()] == ["age"]


@pytest.mark.parametrize("activation", ["dice", "prelu", "relu", "sigmoid"])
def test_other_features_may_be_absent(activation: str) -> None:
    model = DIN([], [history], [3], [4], activation, target_features=[item]).double()
    assert model(cases.make_batch(model, 3)).logits.shape == (3, 1)


OTHER = Table("other", 5, dim=4)


@pytest.mark.parametrize(
    ("features", "behaviors", "targets", "message"),
    [
        ([], [history], [SparseFeature("x", OTHER)], "'history' reads table 'item' .* 'x' reads 'other': make both"),
        ([], [history, shops], [shop, item], "'history' reads table 'item' .* 'shop' reads 'shop'"),
        ([], [history], [], "1 behavior_features and 0 target_features"),
        ([], [], [], "at least one behaviour feature"),
        ([item], [history], [item], "'item' is listed twice: leave one out"),
        ([history], [history], [item], "'history' is listed twice"),
        ([], [item], [shop], "'item' is sparse: make it a SequenceFeature"),
        ([], [history], [shops], "'shops' is sequence: make it a SparseFeature"),
        ([SparseFeature("x", Table("t", 3))], [history], [item], "'t' has no width: give the table a dim, or set the"),
    ],
)
def test_wrong_arguments(features: list, behaviors: list, targets: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DIN(features, behaviors, [4], [4], "dice", target_features=targets)


def test_behaviours_need_a_width() -> None:
    bare = Table("bare", 5)
    with pytest.raises(ValueError, match=r"'bare' has no width.*embedding\.dim"):
        DIN([user], [SequenceFeature("h", bare, 3)], [4], [4], target_features=[SparseFeature("i", bare)])
