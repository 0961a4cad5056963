"""Standard JSON: Python's own writes NaN and Infinity, which the standard does not allow."""

from __future__ import annotations

import json
import math
from typing import Any


def dumps(tree: Any) -> str:
    """Serialise a tree as one line of JSON, with null for non-finite numbers."""
    return json.dumps(finite(tree), allow_nan=False)


def finite(tree: Any) -> Any:
    """The tree with None in place of each non-finite number."""
    if isinstance(tree, dict):
        return {key: finite(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [finite(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree
