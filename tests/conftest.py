"""Tests keep their caches to themselves; what those on an object store share."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from rechub_tests.object_store import FaultyProxy

# How long an example takes says how busy the machine is. The same examples each time: `make fuzz` tries others.
hypothesis.settings.register_profile("rechub_dist", deadline=None, derandomize=True)
hypothesis.settings.load_profile("rechub_dist")

os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="rechub-dist-tests-")


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Small bundles by name, made once for all who read them; who changes one copies it first."""
    from rechub_tests.serving import make_bundles  # noqa: PLC0415 - with all that trains, which few tests need

    return make_bundles(tmp_path_factory.mktemp("bundles"))


@pytest.fixture
def proxy(server: int) -> Iterator[FaultyProxy]:
    """A proxy before the module's own `server`."""
    found = FaultyProxy(server)
    yield found
    found.close()
