"""JSON that other parsers take."""

from __future__ import annotations

import json
import math

from rechub_dist.reporting.strict_json import dumps


def test_numbers_that_are_not_finite_are_null_wherever_they_are() -> None:
    tree = {"auc": math.nan, "rows": 3, "more": [math.inf, (-math.inf, 0.1)], "name": "NaN", "none": None}
    wanted = {"auc": None, "rows": 3, "more": [None, [None, 0.1]], "name": "NaN", "none": None}
    assert json.loads(dumps(tree)) == wanted
