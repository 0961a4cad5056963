"""Global batch normalisation on one rank is torch's own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from rechub_dist.distributed.batchnorm import globalize


@pytest.fixture(autouse=True)
def one_rank() -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("momentum", [0.1, None])  # None: the mean of all batches so far
def test_the_running_statistics(momentum: float | None) -> None:
    torch.manual_seed(0)
    found, wanted = (nn.Sequential(nn.BatchNorm1d(3, momentum=momentum).double()).train() for _ in range(2))
    globalize(found)
    found(torch.randn(1, 3, dtype=torch.float64))  # one row, which torch refuses, changes nothing
    for rows in (5, 2, 9):
        x = torch.randn(rows, 3, dtype=torch.float64)
        torch.testing.assert_close(found(x), wanted(x))
    for name, value in wanted.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], value, msg=name)


def test_a_small_variance_of_large_values() -> None:
    """The mean of squares less the square of the mean has none of it left in float32."""
    torch.manual_seed(0)
    x = (1e3 + torch.randn(64, 3)).requires_grad_()
    of_double = x.detach().double().requires_grad_()
    found, wanted = nn.Sequential(nn.BatchNorm1d(3)).train(), nn.BatchNorm1d(3).double().train()
    globalize(found)
    output, exact = found(x), wanted(of_double)
    torch.testing.assert_close(output.double(), exact, rtol=1e-3, atol=1e-3)
    weights = torch.randn(64, 3)
    (output * weights).sum().backward()
    (exact * weights).sum().backward()
    torch.testing.assert_close(x.grad.double(), of_double.grad, rtol=1e-3, atol=1e-3)


def test_values_whose_variance_is_infinite_are_not_normalised_to_zeros() -> None:
    norm = nn.Sequential(nn.BatchNorm1d(2)).train()
    globalize(norm)
    assert norm(torch.tensor([[3e38, 1.0], [0.0, 2.0]]))[:, 0].isnan().all()
