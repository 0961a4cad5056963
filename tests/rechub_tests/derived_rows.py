"""Derived columns, computed row by row in plain Python: what tests compare `data.columns.derive` with."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from rechub_dist.derived import Age, Bucket, Derived, Hour, KeyValues, Lookup, Overlap, Ratio, Split, Weekday

PER_SECOND = {"s": 1, "ms": 1000, "us": 10**6, "ns": 10**9}
SECONDS = {"second": 1, "minute": 60, "hour": 3600, "day": 86400}


def is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def split(text: str | None, by: str) -> list[str] | None:
    return None if text is None else [piece.strip() for piece in text.split(by) if piece.strip()]


def row_by_row(one: Derived, row: dict[str, Any]) -> tuple[Any, ...]:  # noqa: PLR0911, PLR0912 - one case per kind
    """What `derive` is to make of a row."""
    match one:
        case Split():
            return (split(row[one.column], one.by),)
        case KeyValues():
            pieces = split(row[one.column], one.by)
            if pieces is None:
                return None, None
            pairs = [piece.rsplit(one.between, 1) if one.between in piece else [piece, "1"] for piece in pieces]
            kept = [(key.strip(), float(np.float32(weight))) for key, weight in pairs if key.strip()]
            return [key for key, _ in kept], [weight for _, weight in kept]
        case Hour() | Weekday():
            time = row[one.column]
            if is_missing(time) or math.isinf(time):
                return (None,)
            local = math.floor(time // PER_SECOND[one.unit]) + int(one.utc_offset * 3600)
            return (local // 3600 % 24 if isinstance(one, Hour) else (local // 86400 + 3) % 7,)
        case Age():
            then, now = row[one.column], row[one.now]
            if any(is_missing(time) or math.isinf(time) for time in (then, now)):
                return (None,)
            return ((now - then) / (PER_SECOND[one.unit] * SECONDS[one.per]),)
        case Bucket():
            value = row[one.column]
            return (None if is_missing(value) else sum(value >= boundary for boundary in one.boundaries),)
        case Ratio():
            above, below = row[one.column], row[one.over]
            if is_missing(above) or is_missing(below) or below == 0:
                return (None,)
            return (float(above) / float(below),)
        case Overlap():
            left = elements(row[one.left])
            common = len(set(left) & set(elements(row[one.right])))
            return (common / max(len(set(left)), 1) if one.share else common,)
        case Lookup():
            known: dict[Any, float] = {}
            for key, value in zip(row[one.of] or [], row[one.values] or [], strict=True):
                if key is not None and not is_missing(value):
                    known.setdefault(key, value)
            found = [known[key] for key in elements(row[one.keys]) if key in known]
            return (combined(found, one.combine) if found else one.default,)


def elements(value: Any) -> list[Any]:
    """The elements of a list that are not null, or the value itself."""
    return [each for each in (value if isinstance(value, list) else [value]) if each is not None]


def combined(found: list[float], how: str) -> float:
    if how == "first":
        return found[0]
    if how == "max":
        return max(found)
    total = 0.0
    for value in found:
        total += value
    return total if how == "sum" else total / len(found)
