"""Adagrad with momentum against its formula, weight by weight, and what it does to rows without a gradient."""

from __future__ import annotations

import math

import pytest
import torch

from rechub_dist.embedding.adagrad import MomentumAdagrad


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize(("decay", "initial"), [(0.0, 0.0), (0.3, 0.2)])
def test_equals_the_formula(lazy: bool, decay: float, initial: float) -> None:
    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(4, 3, dtype=torch.float64))
    optimizer = MomentumAdagrad(
        [parameter], lr=0.5, momentum=0.6, weight_decay=decay, initial_accumulator_value=initial, lazy=lazy
    )
    state = [[w, 0.0, initial] for w in parameter.detach().flatten().tolist()]
    for step in range(6):
        grads = torch.randn(4, 3, dtype=torch.float64)
        grads[step % 4] = 0  # a row that was not looked up
        grads[(step + 1) % 4, 0] = 0  # a zero in one that was
        optimizer.param_groups[0]["lr"] = lr = 0.5 / (step + 1)
        parameter.grad = grads
        optimizer.step()
        for place, (one, g) in enumerate(zip(state, grads.flatten().tolist(), strict=True)):
            if lazy and place // 3 == step % 4:
                continue
            decayed = g + decay * one[0]
            one[2] += decayed * decayed
            one[1] = 0.6 * one[1] + lr * decayed / (math.sqrt(one[2]) + 1e-8)
            one[0] -= one[1]
    expected = torch.tensor([w for w, _, _ in state], dtype=torch.float64)
    torch.testing.assert_close(parameter.detach().flatten(), expected)


def test_without_momentum_it_is_adagrad() -> None:
    torch.manual_seed(0)
    start = torch.randn(5, 2)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    optimizers = MomentumAdagrad([ours], lr=0.1, momentum=0.0), torch.optim.Adagrad([theirs], lr=0.1, eps=1e-8)
    for _ in range(5):
        ours.grad = torch.randn(5, 2)
        theirs.grad = ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(ours, theirs)
