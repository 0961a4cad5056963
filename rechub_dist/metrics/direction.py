"""Which of two values of a metric is the better one, and which metric a run is watched by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from rechub_dist.errors import UserError, nearest

Direction = Literal["max", "min", "nearest_to_one"]


def goodness(value: float, direction: Direction) -> float:
    """A number that is higher, the better the value is; NaN of NaN."""
    if direction == "nearest_to_one":
        return -abs(value - 1)
    return value if direction == "max" else -value


def watched_metric(
    wanted: str | None, mode: Direction | None, reported: Mapping[str, Direction], where: str = "train.best_metric"
) -> tuple[str, Direction]:
    """The metric that tells the best step, and what makes it better.

    Args:
        wanted: its name; default: the first of `reported`.
        mode: in place of the metric's own direction.
        reported: what an evaluation reports (`Objective.metrics`).
        where: names the source of `wanted` in errors.

    Raises:
        UserError: there is no such metric.
    """
    name = next(iter(reported)) if wanted is None else wanted
    if name not in reported:
        raise UserError(f"{where}: no metric {name!r}: {nearest(name, reported)}")
    return name, mode or reported[name]
