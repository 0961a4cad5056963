from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rechub_dist.embedded import Embedded
from rechub_dist.features import Feature, SequenceFeature, Table
from rechub_dist.layers.capsule import DynamicRouting, squash
from rechub_dist.models import MIND
from rechub_tests import cases
from rechub_tests.cases import history
from rechub_tests.reference import assert_same, relu_mlp, row_input, softmax

USER = [cases.user, cases.age, cases.shop, cases.tags, cases.liked, cases.profile]
LENGTHS = [9, 0, 4, 1, 3, 16]


def mind(
    iterations: int = 3, interests: int = 3, user_features: list[Feature] | None = None, **options: object
) -> MIND:
    torch.manual_seed(0)
    given = {"readout": "attention"} | options
    return MIND(11, interests, iterations, 8, 4, user_features=user_features, **given).double()


def live_of(interests: int, n: int) -> int:
    return max(1, min(interests, math.floor(math.log2(n)))) if n else 1


def squashed(z: Tensor, power: float) -> Tensor:
    square = sum(value**2 for value in z)
    return (square / (1 + square)) ** power * z / torch.sqrt(square) if square > 0 else z


def cosine(x: Tensor, y: Tensor) -> Tensor:
    return x.dot(y) / torch.sqrt(x.dot(x) * y.dot(y))


def routed(routing: DynamicRouting, items: list[Tensor], live: int) -> list[Tensor]:
    """The live capsules of one history, behaviour by behaviour and interest by interest."""
    S = routing.bilinear.weight
    mapped = [torch.stack([S[o].dot(e) for o in range(len(S))]) for e in items]
    b = [[routing.start[i, j] for j in range(live)] for i in range(len(items))]
    for iteration in range(routing.iterations):
        w = [softmax(logits) for logits in b]
        last = iteration + 1 == routing.iterations
        rows = [e.detach() if routing.last_gradient and not last else e for e in mapped]
        z = [sum((w[i][j] * e for i, e in enumerate(rows)), torch.zeros(len(S)).double()) for j in range(live)]
        u = [squashed(vector, routing.squash_power) for vector in z]
        if not last and routing.scale is None:
            b = [[b[i][j] + u[j].dot(e) for j in range(live)] for i, e in enumerate(rows)]
        elif not last:
            b = [[routing.scale * cosine(z[j], e) for j in range(live)] for e in rows]
    return u


def interests_of(model: MIND, embedded: Embedded, b: int, n: int) -> list[Tensor]:
    values = embedded.sequences["history"].values
    capsules = routed(model.routing, [values[b, t] for t in range(n)], live_of(model.routing.start.shape[1], n))
    profile = []
    if model.fields.width:
        profile = [row_input(embedded, ["user", "shop", "tags", "liked"], ["age", "profile"], b)]
    return [relu_mlp(model.mlp.layers, torch.cat([u, *profile])) for u in capsules]


@pytest.mark.parametrize("iterations", [1, 2, 3, 5])
@pytest.mark.parametrize("power", [1.0, 1.5, 2.0])
@pytest.mark.parametrize("user_features", [None, USER])
def test_forward_and_gradients(iterations: int, power: float, user_features: list[Feature] | None) -> None:
    model = mind(iterations, user_features=user_features, attention_power=power)
    embedded = cases.make_batch(model, 6, lengths=LENGTHS)
    leaves = cases.vectors_of(embedded)

    def formula() -> Tensor:
        rows = []
        for b, n in enumerate(LENGTHS):
            interests = interests_of(model, embedded, b, n)
            label = leaves["item"][b]
            scores = [sum(v[d] * label[d] for d in range(4)) for v in interests]
            weights = softmax([torch.sign(x) * abs(x) ** power for x in scores])
            user = sum(w * v for w, v in zip(weights, interests, strict=True))
            rows.append(torch.cat([user, label])[None])
        return torch.stack(rows)

    assert_same(model, embedded, leaves, formula, lambda o: torch.cat([o.user, o.item], dim=2))
    assert model(embedded).user_mask.all()


ROUTINGS: list[dict[str, Any]] = [
    {"squash_power": 0.5},
    {"squash_power": 2.0},
    {"routing_scale": 20.0},
    {"last_gradient": True},
    {"squash_power": 0.75, "routing_scale": 2.0, "last_gradient": True, "start_std": 0.3, "bilinear_std": 1.0},
]


@pytest.mark.parametrize("iterations", [1, 2, 3])
@pytest.mark.parametrize("options", ROUTINGS)
def test_other_routings(options: dict[str, Any], iterations: int) -> None:
    model = mind(iterations, readout="max", **options)
    embedded = cases.make_batch(model, 6, lengths=LENGTHS)
    leaves = cases.vectors_of(embedded)

    def formula() -> Tensor:
        rows = []
        for b, n in enumerate(LENGTHS):
            interests = interests_of(model, embedded, b, n)
            interests += [interests[0]] * (3 - len(interests))
            rows.append(torch.cat([*interests, leaves["item"][b]])[None])
        return torch.stack(rows)

    assert_same(model, embedded, leaves, formula, lambda o: torch.cat([o.user, o.item], dim=2))
    output = model(cases.make_batch(model, 2, lengths=[0, 2]))
    output.user.square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_the_last_iteration_alone_gives_another_gradient() -> None:
    gradients = []
    for last in (False, True):
        model = mind(3, last_gradient=last)
        embedded = cases.make_batch(model, 2, lengths=[9, 4])
        model(embedded).user.square().sum().backward()
        gradients.append(model.routing.bilinear.weight.grad)
    assert (gradients[0] - gradients[1]).abs().max() > 1e-6
    assert gradients[1].abs().min() > 0


def test_where_weights_start() -> None:
    torch.manual_seed(0)
    plain, other = MIND(11, 8, 1, 64, 64), MIND(11, 8, 1, 64, 64, bilinear_std=1.0, start_std=0.1, zero_biases=True)
    assert float(plain.routing.bilinear.weight.std()) == pytest.approx(1 / math.sqrt(3 * 64), rel=0.1)
    assert float(other.routing.bilinear.weight.std()) == pytest.approx(1, rel=0.1)
    assert float(other.routing.start.std()) == pytest.approx(0.1, rel=0.2)
    biases = [[layer.bias for layer in model.mlp.layers if isinstance(layer, nn.Linear)] for model in (plain, other)]
    assert all(bias.any() for bias in biases[0])
    assert not any(bias.any() for bias in biases[1])


def test_the_best_interest_alone_is_the_limit_of_the_power() -> None:
    best, sharp = mind(readout="best"), mind(attention_power=60.0)
    interests = 3 * torch.randn(20, 3, 4).double()
    label, live = torch.randn(20, 4).double(), torch.arange(3) < torch.randint(1, 4, (20, 1))
    weights = best.label_weights(interests, live, label)
    for b in range(20):
        scores = [float(interests[b, j] @ label[b]) for j in range(int(live[b].sum()))]
        assert weights[b].tolist() == [float(j == scores.index(max(scores))) for j in range(3)]
        if max(scores) > 2:
            torch.testing.assert_close(sharp.label_weights(interests, live, label)[b], weights[b], atol=1e-3, rtol=0)


def test_training_by_the_maximum_scores_as_serving_does() -> None:
    model = mind(readout="max", user_features=USER)
    embedded = cases.make_batch(model, 6, lengths=LENGTHS)
    output = model(embedded)
    interests, live = model.user(embedded)
    items, own = torch.randn(7, 4).double(), torch.randn(6, 2, 4).double()

    def formula(b: int, item: Tensor) -> Tensor:
        return max(sum(v[d] * item[d] for d in range(4)) for v in interests[b][live[b]])

    assert output.user.shape == (6, 1, 12)
    user = output.user[:, 0]
    expected = torch.stack([torch.stack([formula(b, item) for item in items]) for b in range(6)])
    torch.testing.assert_close(model.score(user, items), expected)
    expected = torch.stack([torch.stack([formula(b, item) for item in own[b]]) for b in range(6)])
    torch.testing.assert_close(model.score_own(user, own), expected)
    torch.testing.assert_close(model.score_own(user, own[:, 1]), expected[:, 1])
    assert model.score(user[:0], items).shape == (0, 7)


@pytest.mark.parametrize("iterations", [1, 3])
def test_the_interests_that_serve(iterations: int) -> None:
    model = mind(iterations, user_features=USER)
    embedded = cases.make_batch(model, 6, lengths=LENGTHS)
    interests, live = model.user(embedded)
    assert live.sum(dim=1).tolist() == [3, 1, 2, 1, 1, 3]
    for b, n in enumerate(LENGTHS):
        torch.testing.assert_close(interests[b][live[b]], torch.stack(interests_of(model, embedded, b, n)))
    assert torch.equal(model.item(embedded), embedded.vectors["item"])


def test_the_number_of_interests_by_length() -> None:
    powers = [2**k + d for k in range(2, 40) for d in (-1, 0, 1)]
    lengths = [*range(70), *powers]
    for interests in (1, 2, 5, 80):
        live = DynamicRouting(4, interests, 1, 1).live(torch.tensor(lengths))
        assert live.sum(dim=1).tolist() == [max(1, min(interests, n.bit_length() - 1)) for n in lengths]
        assert not (live[:, 1:] & ~live[:, :-1]).any()  # the first ones
    assert DynamicRouting(4, 3, 1, 1).live(torch.tensor([], dtype=torch.long)).shape == (0, 3)


def test_behaviours_are_shared_out_among_live_interests() -> None:
    model = mind(interests=4)
    embedded = cases.make_batch(model, 3, lengths=[9, 5, 1])
    seen: list[Tensor] = []
    weigh = model.routing.weights

    def record(logits: Tensor, live: Tensor) -> Tensor:
        seen.append(weigh(logits, live))
        return seen[-1]

    model.routing.weights = record
    _, live = model.user(embedded)
    assert live.sum(dim=1).tolist() == [3, 2, 1]
    assert len(seen) == 3
    for weights in seen:
        torch.testing.assert_close(weights.sum(dim=2), torch.ones(3, 9).double())
        assert not weights.transpose(1, 2)[~live].any()
        assert (weights.sum(dim=1)[0, :3] - 1).abs().max() > 0.1  # over the interests, not over the history
    assert (seen[0] - seen[1]).abs().max() > 1e-4
    assert (seen[1] - seen[2]).abs().max() > 1e-4


def test_interests_differ_since_their_starts_do() -> None:
    model = mind()
    embedded = cases.make_batch(model, 1, lengths=[9])
    interests = model.user(embedded)[0][0]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert (interests[i] - interests[j]).abs().max() > 1e-3
    model.routing.start[:] = 0
    interests = model.user(embedded)[0][0]
    torch.testing.assert_close(interests[0], interests[1])


def test_evaluation_is_training_and_always_the_same() -> None:
    model = mind(user_features=USER)
    embedded = cases.make_batch(model, 3, lengths=[9, 5, 1])
    trained, served = model.train().user(embedded)[0], model.eval().user(embedded)[0]
    assert torch.equal(trained, served)
    assert torch.equal(model.user(embedded)[0], served)
    assert "routing.start" in model.state_dict()
    torch.manual_seed(1)
    other = MIND(11, 3, 3, 8, 4, user_features=USER).double()
    assert not torch.equal(other.routing.start, model.routing.start)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.user(embedded)[0], served)


def test_the_starts_are_standard_normal() -> None:
    start = DynamicRouting(4, 8, 1, 2000).start
    assert start.shape == (2000, 8)
    assert abs(float(start.mean())) < 0.05
    assert float(start.std()) == pytest.approx(1, abs=0.05)
    assert not start.requires_grad


@pytest.mark.parametrize("iterations", [1, 2, 3, 4, 7])
def test_every_number_of_iterations_trains_the_map(iterations: int) -> None:
    model = mind(iterations)
    embedded = cases.make_batch(model, 2, lengths=[9, 4])
    model(embedded).user.square().sum().backward()
    assert model.routing.bilinear.weight.grad.abs().min() > 0
    more = copy.deepcopy(model)
    more.routing.iterations += 1
    assert (more.user(embedded)[0] - model.user(embedded)[0]).abs().max() > 1e-9


def test_squash_keeps_directions_and_makes_lengths_below_one() -> None:
    z = torch.randn(50, 3, dtype=torch.float64) * torch.logspace(-3, 3, 50, dtype=torch.float64)[:, None]
    norm = z.norm(dim=1)
    for power in (0.5, 0.75, 1.0, 2.0):
        u = squash(z, power)
        torch.testing.assert_close(u.norm(dim=1), (norm**2 / (1 + norm**2)) ** power)
        assert (u.norm(dim=1) < 1).all()
        torch.testing.assert_close(u / u.norm(dim=1, keepdim=True), z / norm[:, None])
        zero = torch.zeros(2, 3, requires_grad=True)
        squash(zero, power).sum().backward()
        assert not squash(zero, power).any()
        assert zero.grad.isfinite().all()
        if power >= 1:
            assert (zero.grad.abs() < 1e-20).all()


@pytest.mark.parametrize("power", [1.0, 1.5, 2.0, 3.0])
def test_the_label_picks_its_interests(power: float) -> None:
    model = mind(attention_power=power)
    interests = torch.tensor([[[2.0, 0, 0, 0], [-3.0, 0, 0, 0], [9.0, 0, 0, 0]]]).double()
    label = torch.tensor([[1.0, 0, 0, 0]]).double()
    weights = model.label_weights(interests, torch.tensor([[True, True, False]]), label)[0]
    expected = softmax([torch.tensor(2.0**power), torch.tensor(-(3.0**power))])
    torch.testing.assert_close(weights, torch.tensor([*expected, 0.0]).double())
    assert weights[0] > 0.99  # an even power of the worse one would be the larger


def test_a_larger_power_is_more_decided() -> None:
    interests = torch.tensor([[[3.0, 0, 0, 0], [2.0, 0, 0, 0], [1.5, 0, 0, 0]]]).double()
    label, live = torch.tensor([[1.0, 0, 0, 0]]).double(), torch.ones(1, 3, dtype=torch.bool)
    best = [float(mind(attention_power=p).label_weights(interests, live, label)[0, 0]) for p in (1.0, 1.5, 2.0, 4.0)]
    assert best == sorted(best)
    assert best[0] < 0.7
    assert best[-1] > 0.99


@pytest.mark.parametrize("power", [1.0, 1.2, 2.0])
def test_a_label_of_zeros_has_a_finite_gradient(power: float) -> None:
    model = mind(attention_power=power)
    embedded = cases.make_batch(model, 2, lengths=[9, 5])
    embedded.vectors["item"] = torch.zeros(2, 4, dtype=torch.float64, requires_grad=True)
    output = model(embedded)
    output.user.square().sum().backward()
    gradient = embedded.vectors["item"].grad
    assert gradient.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert gradient.any() == (power == 1)


def test_an_empty_history_has_one_interest_which_the_user_features_make() -> None:
    model = mind(user_features=USER)
    embedded = cases.make_batch(model, 2, lengths=[0, 0])
    interests, live = model.user(embedded)
    assert live.tolist() == [[True, False, False]] * 2
    assert (interests[0, 0] - interests[1, 0]).abs().max() > 1e-3
    alone = mind()
    interests = alone.user(cases.make_batch(alone, 2, lengths=[0, 0]))[0]
    assert torch.equal(interests[0], interests[1])


@pytest.mark.parametrize("fill", [math.nan, math.inf])
def test_not_even_nan_leaks_from_the_padding(fill: float) -> None:
    model = mind()
    embedded = cases.make_batch(model, 3, lengths=[9, 0, 4])
    garbage = cases.pad_with(embedded, fill, more=1)
    output = model(garbage)
    torch.testing.assert_close(cases.real(output), cases.real(model(embedded)))
    cases.loss_of(output).backward()
    assert garbage.sequences["history"].values.grad.isfinite().all()


def test_lookups() -> None:
    model = MIND(11, 3, 3, 8, 4, history="watched", item="next", max_length=7)
    watched, target = model.lookups()
    assert watched.feature == SequenceFeature("watched", Table("item", 11, init_std=0.02), max_length=7)
    assert (watched.name, watched.pooling, target.name, target.pooling) == ("watched", None, "next", "sum")
    assert watched.table == target.table == Table("item", 11, dim=4, init_std=0.02)
    assert model.item_lookups() == (target,)
    assert model.routing.start.shape == (7, 3)
    assert not model.dense_features()

    model = MIND(11, 3, 3, 8, 4, history=history, user_features=USER)
    assert {lookup.name: (lookup.dim, lookup.pooling) for lookup in model.lookups()} == {
        "history": (4, None),
        "item": (4, "sum"),
        "user": (4, "sum"),
        "shop": (2, "sum"),
        "tags": (4, "mean"),
        "liked": (4, "mean"),
    }
    assert [feature.name for feature in model.dense_features()] == ["age", "profile"]
    assert model.routing.start.shape == (5, 3)
    assert model.history() == history  # `liked` reads the same table
    whole = SequenceFeature("whole", history.table, max_length=9, column=history.source)
    assert MIND(11, 3, 3, 8, 4, history=history, user_features=[whole]).history() == whole
    assert [layer.out_features for layer in model.mlp.layers if isinstance(layer, nn.Linear)] == [8, 4]


def test_user_features_may_be_none_or_an_empty_list() -> None:
    for features in (None, []):
        assert len(MIND(11, 3, 3, 8, 4, user_features=features).lookups()) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"item_num": 12, "history": history}, "item_num is 12, but table 'item' has 11 rows: make them equal"),
        ({"history": history, "item": cases.user}, "'history' reads table 'item' and item 'user' reads 'user'"),
        ({"embedding_dim": 8, "history": history}, "table 'item' has dim 4, .*embedding_dim is 8"),
        ({"user_features": [cases.item]}, "user_features has 'item', which is the history or the item: leave it out"),
        ({"user_features": [history]}, "user_features has 'history', which is"),
        ({"user_features": [cases.user, cases.user]}, "'user' is listed twice"),
        ({"num_interests": 0}, "num_interests is 0: it must be at least 1"),
        ({"routing_iterations": 0}, "routing_iterations is 0: it must be at least 1"),
        ({"hidden_size": 0}, "hidden_size is 0: it must be at least 1"),
        ({"embedding_dim": 0}, "embedding_dim is 0: it must be at least 1"),
        ({"readout": "mean"}, "readout is 'mean': use one of attention, best, max"),
        ({"squash_power": 0.4}, r"squash_power is 0\.4: it must be at least 0\.5"),
        ({"routing_scale": 0.0}, r"routing_scale is 0\.0: it must be a number above 0"),
        ({"attention_power": 0.5}, r"attention_power is 0\.5: it must be at least 1"),
    ],
)
def test_wrong_arguments(arguments: dict, message: str) -> None:
    given = {"item_num": 11, "num_interests": 3, "routing_iterations": 3, "hidden_size": 8, "embedding_dim": 4}
    with pytest.raises(ValueError, match=message):
        MIND(**(given | arguments))


def test_a_history_that_is_too_long() -> None:
    model = MIND(11, 3, 3, 8, 4, max_length=2).double()
    with pytest.raises(ValueError, match="3 items, but its max_length is 2: cut it, or raise max_length"):
        model(cases.make_batch(model, 1, lengths=[3]))
