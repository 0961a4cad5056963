from __future__ import annotations

import pytest
import test_catalogue as proof
import torch
from torch import Tensor, nn

from rechub_dist.models import PLE
from rechub_tests import cases
from rechub_tests.reference import affine, assert_same, group_affine, group_relu_mlp, row_input, softmax

IDS, DENSE = ["user", "shop", "tags", "history"], ["age", "profile"]
# tasks, experts a task, shared experts, levels
SIZES = [(2, 2, 1, 3), (3, 1, 2, 2), (2, 2, 2, 1), (1, 1, 1, 2)]


def small(tasks: int = 2, own: int = 2, shared: int = 1, levels: int = 2, **changes: object) -> PLE:
    given = {
        "features": [cases.user, cases.age, cases.shop, cases.tags, cases.history, cases.profile],
        "expert_units": [5, 4],
        "num_experts": own,
        "num_layers": levels,
        "num_shared_experts": shared,
        "task_types": ["classification"] * tasks,
    }
    return PLE(**(given | changes))


def mix(scores: Tensor, experts: list[Tensor]) -> Tensor:
    return sum(weight * expert for weight, expert in zip(softmax(list(scores)), experts, strict=True))


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("towers", [None, [3]])
def test_forward_and_gradients(sizes: tuple[int, ...], towers: list[int] | None) -> None:
    torch.manual_seed(0)
    model = small(*sizes, tower_units=towers).double()
    tasks, own, shared, levels = sizes
    embedded = cases.make_batch(model, 2)

    def formula() -> Tensor:
        rows = []
        for b in range(2):
            x = row_input(embedded, IDS, DENSE, b)
            state, common = [x] * tasks, x
            for n, level in enumerate(model.levels):
                layers = level.experts.layers
                mine = [[group_relu_mlp(layers, k * own + i, state[k]) for i in range(own)] for k in range(tasks)]
                ours = [group_relu_mlp(layers, tasks * own + i, common) for i in range(shared)]
                state = [mix(group_affine(level.gates, k, state[k]), mine[k] + ours) for k in range(tasks)]
                if n < levels - 1:
                    common = mix(
                        affine(level.shared_gate, common), [*(expert for experts in mine for expert in experts), *ours]
                    )
            rows.append(torch.cat([group_relu_mlp(model.towers.layers, k, state[k]) for k in range(tasks)]))
        return torch.stack(rows)

    assert_same(model, embedded, embedded.vectors, formula)


@pytest.mark.parametrize("sizes", SIZES)
def test_all_sizes_pass_the_catalogues_proof(sizes: tuple[int, ...]) -> None:
    for kind in proof.BATCHES:
        torch.manual_seed(0)
        proof.test_every_parameter_gets_a_gradient(small(*sizes).double(), kind)
    assert small(*sizes).levels[-1].shared_gate is None
    assert all(level.shared_gate is not None for level in small(*sizes).levels[:-1])


def test_in_one_level_a_task_does_not_train_the_experts_of_another() -> None:
    torch.manual_seed(0)
    model = small(2, 2, 1, 1, tower_units=[3], activation="tanh").double()
    model(cases.make_batch(model, 8)).logits[:, 0].sum().backward()
    level = model.levels[0]
    for parameter in level.experts.parameters():  # two of task 0, two of task 1, one shared
        assert all(parameter.grad[i].any() for i in (0, 1, 4))
        assert not parameter.grad[[2, 3]].any()
    for parameter in (level.gates.weight, *model.towers.parameters()):
        assert parameter.grad[0].any()
        assert not parameter.grad[1].any()


def test_in_two_levels_it_does_through_the_shared_state() -> None:
    torch.manual_seed(0)
    model = small(2, 2, 1, 2, activation="tanh").double()  # relu may leave an expert dead
    model(cases.make_batch(model, 8)).logits[:, 0].sum().backward()
    first, second = model.levels
    assert all(grad.any() for grad in first.experts.layers[0].weight.grad)
    assert first.shared_gate.weight.grad.any()
    assert not first.gates.weight.grad[1].any()
    assert not second.experts.layers[0].weight.grad[[2, 3]].any()


def test_gates_sum_to_one_and_are_not_constant() -> None:
    model = cases.build(PLE).eval()
    embedded = cases.make_batch(model, 4)
    gates, shared = [], []
    for level in model.levels:
        level.gates.register_forward_hook(lambda _, __, output: gates.append(output.softmax(dim=2)))
        if level.shared_gate is not None:
            level.shared_gate.register_forward_hook(lambda _, __, output: shared.append(output.softmax(dim=1)))
    model(embedded)
    assert [gate.shape for gate in gates] == [(4, 2, 3)] * 3
    assert [gate.shape for gate in shared] == [(4, 5)] * 2
    for gate in (*gates, *shared):
        torch.testing.assert_close(gate.sum(dim=-1), torch.ones(gate.shape[:-1]).double())
        assert (gate[0] - gate[1]).abs().max() > 1e-6
    for gate in gates:
        assert (gate[:, 0] - gate[:, 1]).abs().max() > 1e-6


def test_experts_are_counted_by_task_or_by_level() -> None:
    by_task = small(tasks=3, own=2, shared=1, levels=2)
    by_level = small(tasks=3, own=6, shared=1, levels=2, experts_per="level")
    shapes = [{name: value.shape for name, value in model.state_dict().items()} for model in (by_task, by_level)]
    assert shapes[0] == shapes[1]
    assert [level.experts.groups for level in by_level.levels] == [7, 7]
    with pytest.raises(ValueError, match="num_experts is 4 per level, which 3 tasks cannot share equally"):
        small(tasks=3, own=4, experts_per="level")
    with pytest.raises(ValueError, match="experts_per is 'gate': use one of task, level"):
        small(experts_per="gate")


@pytest.mark.parametrize("changes", [{"batch_norm": True}, {"activation": "dice"}])
def test_statistics_stay_out_of_the_gates(changes: dict) -> None:
    model = small(tower_units=[3], **changes)
    owners = {
        name.split(".")[2 if name.startswith("levels") else 0]
        for name, module in model.named_modules()
        if isinstance(module, nn.BatchNorm1d)
    }
    assert owners == {"experts", "towers"}
    for level in model.levels:
        assert [name for name, _ in level.gates.named_parameters()] == ["weight"]
    for kind in proof.BATCHES:
        torch.manual_seed(0)
        proof.test_every_parameter_gets_a_gradient(small(tower_units=[3], **changes).double(), kind)
        proof.test_shapes(small(tower_units=[3], **changes).double(), kind, True)


def test_what_the_run_needs_to_know() -> None:
    model = cases.ple()
    assert model.num_tasks == 2
    assert model.task_types == ("classification", "regression")
    assert {lookup.name: (lookup.table.name, lookup.dim, lookup.pooling) for lookup in model.lookups()} == {
        "user": ("user", 4, "sum"),
        "shop": ("shop", 2, "sum"),
        "tags": ("tag", 4, "mean"),
        "history": ("item", 4, "mean"),
    }
    assert [feature.name for feature in model.dense_features()] == ["age", "profile"]


def test_widths_and_dropout_rates() -> None:
    model = small(dropout_rates=[0.1, 0.2], tower_units=[3], tower_dropout_rates=0.3)
    for level in model.levels:
        assert [layer.p for layer in level.experts.layers if isinstance(layer, nn.Dropout)] == [0.1, 0.2]
    assert [layer.p for layer in model.towers.layers if isinstance(layer, nn.Dropout)] == [0.3]
    shapes = [
        [layer.weight.shape for layer in mlp.layers if hasattr(layer, "weight")]
        for mlp in (*(level.experts for level in model.levels), model.towers)
    ]
    assert shapes == [[(5, 18, 5), (5, 5, 4)], [(5, 4, 5), (5, 5, 4)], [(2, 4, 3), (2, 3, 1)]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": 0}, "num_experts is 0: it must be at least 1"),
        ({"num_shared_experts": 0}, "num_shared_experts is 0: it must be at least 1"),
        ({"num_layers": 0}, "num_layers is 0: it must be at least 1"),
        ({"expert_units": []}, "expert_units is empty: give each expert at least one layer"),
        ({"task_types": []}, "at least one task"),
        ({"task_types": ["ranking"]}, "'ranking' is unknown: use one of classification, regression"),
        ({"activation": "rulu"}, "'rulu' is unknown"),
        ({"tower_dropout_rates": [0.1]}, "1 dropout rates .* 0 hidden layers"),
        ({"features": []}, "features is empty"),
    ],
)
def test_wrong_arguments(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**changes)
