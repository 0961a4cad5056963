"""JSON that any parser takes: Python's own has NaN and Infinity, which the standard does not know."""

from __future__ import annotations

import json
import math
from typing import Any


def dumps(tree: Any) -> str:
    """A tree as one line of JSON, null standing for a number that is not finite."""
    return json.dumps(finite(tree), allow_nan=False)


def finite(tree: Any) -> Any:
    """The tree with None for each number that is not finite."""
    if isinstance(tree, dict):
        return {key: finite(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [finite(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree
