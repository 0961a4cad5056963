"""Which models, and which combinations, stand for all in the tests that run at each change; the others are run before a
release.
"""

from __future__ import annotations

from typing import Any

import pytest

from rechub_dist.models import catalogue

# plain features, a sequence and its target, several tasks and outputs in [0, 1], two towers, a sequence alone
MODELS = ("DeepFM", "DIN", "ESMM", "DSSM", "SASRec")


def slow(*values: Any) -> Any:
    """A parameter set that is slow, and one more combination of what faster ones show."""
    return pytest.param(*values, marks=[pytest.mark.slow, pytest.mark.combination])


def each_model(*rest: Any, fast: tuple[str, ...] = MODELS) -> list[Any]:
    """A parameter set for each model, `(model, *rest)`; slow, unless it is one of `fast`, which stand for others."""
    return [pytest.param(model, *rest) if model in fast else slow(model, *rest) for model in catalogue()]
