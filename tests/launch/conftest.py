"""The machinery of faults is that of benchmarks/survival.py, the small data set that of the other tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from faults.hosts import Hosts, possible
from rechub_tests.fixtures import pool
from rechub_tests.ray_runs import TwoNodes
from rechub_tests.runs import write_data

__all__ = ["pool"]


@pytest.fixture(scope="session")
def launch_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("launch-data")
    write_data(root, 6000)
    return root


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    """Two hosts with a cable each."""
    if not possible():
        pytest.skip("needs the right to make network namespaces (root), and iproute2")
    found = Hosts(2)
    yield found
    found.close()


@pytest.fixture(scope="session")
def two_nodes() -> Iterator[TwoNodes]:
    pytest.importorskip("ray", reason="ray is not installed (the extra `ray`)")
    found = TwoNodes()
    yield found
    found.close()
