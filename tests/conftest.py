"""Tests keep their caches to themselves; what those on an object store share."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator

import hypothesis
import pytest

from rechub_tests.object_store import FaultyProxy

# How long an example takes says how busy the machine is. The same examples each time: `make fuzz` tries others.
hypothesis.settings.register_profile("rechub_dist", deadline=None, derandomize=True)
hypothesis.settings.load_profile("rechub_dist")

os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="rechub-dist-tests-")


@pytest.fixture
def proxy(server: int) -> Iterator[FaultyProxy]:
    """A proxy before the module's own `server`."""
    found = FaultyProxy(server)
    yield found
    found.close()
