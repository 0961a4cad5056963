"""The machinery of faults is that of benchmarks/survival.py, the small data set that of tests/distributed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent.parent / "benchmarks"), str(HERE.parent / "distributed")]

from faults.hosts import Hosts, possible  # noqa: E402
from ranks import RankPool  # noqa: E402
from ray_runs import TwoNodes  # noqa: E402
from runs import write_data  # noqa: E402


@pytest.fixture(scope="session")
def launch_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("launch-data")
    write_data(root, 6000)
    return root


@pytest.fixture(scope="session")
def pool() -> Iterator[RankPool]:
    found = RankPool()
    yield found
    found.close()


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
