"""Tests keep their caches to themselves."""

from __future__ import annotations

import os
import tempfile

os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="rechub-dist-tests-")
