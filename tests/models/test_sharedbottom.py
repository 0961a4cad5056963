from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rechub_dist.features import SparseFeature, Table
from rechub_dist.models import SharedBottom
from rechub_tests import cases
from rechub_tests.reference import assert_same, group_relu_mlp, relu_mlp


def test_forward_and_gradients() -> None:
    model = cases.build(SharedBottom)
    embedded = cases.make_batch(model, 3)

    def formula() -> Tensor:
        rows = []
        for b in range(3):
            x = torch.cat([embedded.vectors[name][b] for name in ("user", "shop", "history")])
            shared = relu_mlp(model.bottom.layers, torch.cat([x, embedded.dense["profile"][b]]))
            rows.append(torch.cat([group_relu_mlp(model.towers.layers, k, shared) for k in range(2)]))
        return torch.stack(rows)

    assert_same(model, embedded, embedded.vectors, formula)


def test_a_tower_is_its_tasks_own() -> None:
    model = cases.build(SharedBottom)
    model(cases.make_batch(model, 3)).logits[:, 0].sum().backward()
    assert all(parameter.grad is not None for parameter in model.bottom.parameters())
    for parameter in model.towers.parameters():
        assert parameter.grad[0].any()
        assert not parameter.grad[1].any()


def test_tables_keep_their_widths() -> None:
    model = SharedBottom([cases.user, cases.shop], [4], [], 1, ["regression"])
    assert [lookup.dim for lookup in model.lookups()] == [4, 2]


@pytest.mark.parametrize(
    ("num_tasks", "task_types", "message"),
    [
        (2, ["classification"], "num_tasks is 2 and task_types .*one type for each"),
        (0, [], "at least one task"),
        (1, ["ranking"], "'ranking' is unknown: use one of classification, regression"),
    ],
)
def test_wrong_tasks(num_tasks: int, task_types: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SharedBottom([cases.user], [4], [3], num_tasks, task_types)


def test_a_table_without_width() -> None:
    with pytest.raises(
        ValueError, match=r"table 't' has no width: give the table a dim, or set the run's embedding\.dim"
    ):
        SharedBottom([SparseFeature("a", Table("t", 3))], [4], [3], 1, ["regression"])
