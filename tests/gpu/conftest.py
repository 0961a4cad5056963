"""Tests on a GPU. What asks for the fixture `device` runs on CPU as well, where it shows that the test itself works."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from rechub_dist.errors import UserError
from rechub_tests.fixtures import data_root
from rechub_tests.ranks import RankPool

__all__ = ["data_root"]


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A GPU test says so where it cannot run."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """The device that the test is about."""
    return str(request.param)


class OneRank(RankPool):
    """One rank, in a new process after a failure: a kernel that fails leaves its process without a usable device."""

    def __init__(self) -> None:
        super().__init__(1)

    def run(self, world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 300) -> list[Any]:
        """As `RankPool` does."""
        try:
            return super().run(world_size, function, *args, timeout=timeout)
        except UserError:
            raise
        except BaseException:
            self.close()
            super().__init__(1)
            raise


@pytest.fixture(scope="session")
def pool() -> Iterator[RankPool]:
    found = OneRank()
    yield found
    found.close()
