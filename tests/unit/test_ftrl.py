"""FTRL-Proximal against its algorithm, weight by weight, and what it does to weights without a gradient."""

from __future__ import annotations

import math

import pytest
import torch

from rechub_dist.embedding.ftrl import Ftrl


@pytest.mark.parametrize(("l1", "l2", "initial"), [(0.0, 0.0, 0.0), (0.3, 0.0, 0.1), (0.2, 0.5, 0.0)])
def test_equals_the_algorithm(l1: float, l2: float, initial: float) -> None:
    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(4, 3, dtype=torch.float64))
    optimizer = Ftrl([parameter], lr=0.5, beta=0.7, l1=l1, l2=l2, initial_accumulator=initial)
    state = [[w, 0.0, initial] for w in parameter.detach().flatten().tolist()]
    zeros = 0
    for step in range(6):
        grads = torch.randn(12, dtype=torch.float64)
        grads[step] = 0
        optimizer.param_groups[0]["lr"] = lr = 0.5 / (step + 1)
        parameter.grad = grads.view(4, 3)
        optimizer.step()
        for one, g in zip(state, grads.tolist(), strict=True):
            if g:
                one[1] += g - (math.sqrt(one[2] + g * g) - math.sqrt(one[2])) / lr * one[0]
                one[2] += g * g
                z, n = one[1:]
                one[0] = 0.0 if abs(z) <= l1 else -(z - math.copysign(l1, z)) / ((0.7 + math.sqrt(n)) / lr + l2)
                zeros += one[0] == 0
    expected = torch.tensor([w for w, _, _ in state], dtype=torch.float64)
    torch.testing.assert_close(parameter.detach().flatten(), expected)
    assert (zeros > 0) == (l1 > 0)


def test_a_rate_of_zero_changes_nothing() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = Ftrl([parameter], lr=0.0)
    parameter.grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(parameter, torch.ones(3))
    assert not optimizer.state[parameter]["n"].any()
