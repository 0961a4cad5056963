from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rechub_dist.models import DCNv2
from rechub_tests import cases
from rechub_tests.cases import age, profile, shop, tags, user
from rechub_tests.reference import affine, assert_same, relu_mlp, row_input, softmax, vector_cross

LAYERS: dict[str, dict[str, Any]] = {
    "matrix": {},
    "vector": {"cross_parameterization": "vector"},
    "low rank": {"low_rank": 3},
    "mixture": {"low_rank": 3, "num_experts": 4},
}


def built(layer: str, hidden_units: list[int], structure: str = "parallel") -> DCNv2:
    torch.manual_seed(0)
    model = DCNv2([user, age, shop, tags, profile], 2, hidden_units, structure=structure, **LAYERS[layer]).double()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return model


def times(matrix: Tensor, x: Tensor) -> Tensor:
    """x^T M, element by element."""
    return torch.stack([sum(x[i] * matrix[i, o] for i in range(len(x))) for o in range(matrix.shape[1])])


def mixture(layer: nn.Module, x0: Tensor, x: Tensor) -> Tensor:
    gates = softmax(list(affine(layer.gate, x)))
    rank = layer.mix.weight.shape[1]
    total = x
    for i, gate in enumerate(gates):
        hidden = torch.tanh(times(layer.mix.weight[i], torch.tanh(times(layer.reduce.weight[i], x))))
        expert = times(layer.expand.weight[:, i * rank : (i + 1) * rank].T, hidden)
        total = total + gate * x0 * (expert + layer.expand.bias)
    return total


def cross(kind: str, layer: nn.Module, x0: Tensor, x: Tensor) -> Tensor:
    if kind == "vector":
        return vector_cross(layer, x0, x)
    if kind == "matrix":
        return x0 * affine(layer.linear, x) + x
    if kind == "low rank":
        return x0 * affine(layer.expand, affine(layer.reduce, x)) + x
    return mixture(layer, x0, x)


@pytest.mark.parametrize("hidden_units", [[8, 6], []])
@pytest.mark.parametrize("structure", ["parallel", "stacked"])
@pytest.mark.parametrize("kind", LAYERS)
def test_forward_and_gradients(kind: str, structure: str, hidden_units: list[int]) -> None:
    model = built(kind, hidden_units, structure)
    embedded = cases.make_batch(model, 3)

    def formula() -> Tensor:
        rows = []
        for b in range(3):
            x0 = x = row_input(embedded, ["user", "shop", "tags"], ["age", "profile"], b)
            for layer in model.cross.layers:
                x = cross(kind, layer, x0, x)
            if structure == "stacked":
                x = relu_mlp(model.mlp.layers, x)
            elif hidden_units:
                x = torch.cat([x, relu_mlp(model.mlp.layers, x0)])
            rows.append(affine(model.output, x))
        return torch.stack(rows)

    assert_same(model, embedded, embedded.vectors, formula)


def test_gates_are_a_distribution_that_the_row_sets() -> None:
    model = built("mixture", [])
    embedded = cases.make_batch(model, 5)
    seen: list[Tensor] = []
    layer = model.cross.layers[1]
    layer.expand.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    layer.mix.register_forward_hook(lambda _module, _args, y: torch.ones_like(y) * 10)  # tanh(10) is 1 - 4e-9
    model(embedded)
    gates = seen[0].unflatten(1, (4, 3))  # each expert's gate, once a column of its low rank
    torch.testing.assert_close(gates.sum(dim=1), torch.ones(5, 3).double())
    assert gates.min() > 0
    assert gates.std(dim=0).min() > 1e-3  # over rows
    assert gates.std(dim=1).min() > 1e-3  # over experts


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("training", [True, False])
def test_a_row_alone(kind: str, training: bool) -> None:
    model = built(kind, [4]).train(training)
    embedded = cases.make_batch(model, 3)
    torch.testing.assert_close(model(cases.row_of(embedded, 1)).logits, model(embedded).logits[1:2])


def test_sizes() -> None:
    # 14 = 4 + 2 + 4 + 1 + 3
    shapes = {
        kind: {name: tuple(p.shape) for name, p in built(kind, []).cross.layers[0].named_parameters()}
        for kind in LAYERS
    }
    assert shapes == {
        "matrix": {"linear.weight": (14, 14), "linear.bias": (14,)},
        "vector": {"linear.weight": (1, 14), "bias": (14,)},
        "low rank": {"reduce.weight": (3, 14), "expand.weight": (14, 3), "expand.bias": (14,)},
        "mixture": {
            "gate.weight": (4, 14),
            "reduce.weight": (4, 14, 3),
            "mix.weight": (4, 3, 3),
            "expand.weight": (14, 12),
            "expand.bias": (14,),
        },
    }


def test_lookups() -> None:
    model = cases.dcnv2()
    assert [(lookup.name, lookup.table.name, lookup.dim, lookup.pooling) for lookup in model.lookups()] == [
        ("user", "user", 4, "sum"),
        ("shop", "shop", 2, "sum"),
        ("tags", "tag", 4, "mean"),
        ("history", "item", 4, "mean"),
    ]
    assert [feature.name for feature in model.dense_features()] == ["age", "profile"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cross_num": 0}, "cross_num is 0: it must be at least 1"),
        ({"features": []}, "features is empty"),
        ({"cross_parameterization": "tensor"}, "cross_parameterization is 'tensor': use one of matrix, vector"),
        ({"structure": "both"}, "structure is 'both': use one of parallel, stacked"),
        ({"num_experts": 0, "low_rank": 2}, "num_experts is 0: it must be at least 1"),
        ({"num_experts": 2}, "num_experts is 2, .*: give low_rank as well"),
        ({"cross_parameterization": "vector", "low_rank": 2}, "low_rank is 2, but .* 'vector': make it 'matrix', or"),
        ({"low_rank": 0}, "low_rank is 0: .* at least 1 and at most the input's width, 4"),
        ({"low_rank": 5}, "low_rank is 5"),
        ({"dropout_rates": [0.1, 0.2]}, "2 dropout rates .* 1 hidden layers"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DCNv2(**({"features": [user], "cross_num": 1, "hidden_units": [4]} | arguments))
