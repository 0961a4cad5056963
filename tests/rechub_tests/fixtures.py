"""Fixtures of several folders of tests; a conftest.py imports those that it wants."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from rechub_tests.ranks import RankPool
from rechub_tests.runs import write_data


@pytest.fixture(scope="session")
def pool() -> Iterator[RankPool]:
    """Rank processes, started once."""
    found = RankPool()
    yield found
    found.close()


@pytest.fixture(scope="session")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small data set."""
    root = tmp_path_factory.mktemp("data")
    write_data(root)
    return root
