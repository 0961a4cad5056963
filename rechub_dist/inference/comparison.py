"""How far a bundle may be, and is, from the run that it was exported from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rechub_dist.errors import UserError
from rechub_dist.inference.bundle.manifest import Precision
from rechub_dist.metrics.direction import Direction, goodness

# Of a probability, or of a vector's largest number. Half a step of a row's range is 1/510 of it with int8 and 1/30 with
# int4, and a model adds up many.
TOLERANCES: Final[dict[Precision, float]] = {"fp32": 1e-5, "fp16": 2e-3, "int8": 3e-2, "int4": 0.3}


@dataclass(frozen=True)
class Comparison:
    """How far a bundle is from its run, on some rows.

    Attributes:
        rows: their number.
        differences: by output the largest: absolute for scores, relative to the largest number for vectors.
        metrics: of the run's scores and of the bundle's, where the rows have labels; `overlap@10` is the share of the
            run's ten best items that are among the ten, so that the run's own is 1.
        directions: what makes each of these better.
    """

    rows: int
    differences: dict[str, float]
    metrics: dict[str, tuple[float, float]] = field(default_factory=dict)
    directions: dict[str, Direction] = field(default_factory=dict)

    @property
    def checked(self) -> dict[str, float]:
        """The differences, and `rows`."""
        return {"rows": float(self.rows), **self.differences}

    @property
    def finite(self) -> dict[str, tuple[float, float]]:
        """The metrics that the rows can tell."""
        return {name: pair for name, pair in self.metrics.items() if np.isfinite(pair).all()}

    @property
    def cost(self) -> float:
        """What the first metric loses; NaN where there is none."""
        for name, (run, bundle) in self.metrics.items():
            return goodness(run, self.directions[name]) - goodness(bundle, self.directions[name])
        return float("nan")


def refuse(found: Comparison, tables: Precision, tolerance: float | None = None, max_cost: float | None = None) -> None:
    """Refuse a bundle that is too far from its run.

    Args:
        found: how far.
        tables: the precision of its tables.
        tolerance: the largest difference allowed; default: that of the precision.
        max_cost: what the first metric may lose; default: anything.

    Raises:
        UserError: it is.
    """
    most = TOLERANCES[tables] if tolerance is None else tolerance
    for name, apart in found.differences.items():
        if not apart <= most:
            raise UserError(
                f"the bundle's {name} differ by up to {apart:.2g} from the run's, and {most:.2g} is allowed: there "
                "is no bundle; --tolerance allows more"
            )
    if max_cost is None:
        return
    if not found.finite:
        raise UserError("--max-cost: the checked rows have no labels to measure it by; name others with --check-data")
    if not found.cost <= max_cost:
        name, (run, bundle) = next(iter(found.metrics.items()))
        raise UserError(
            f"{name} is {bundle:.5f} for the bundle and {run:.5f} for the run, and a loss of {max_cost:g} is allowed: "
            "there is no bundle; --max-cost allows more"
        )


def as_array(column: pa.ChunkedArray) -> NDArray[Any]:
    """A column's numbers, [n], or lists of one size, [n, C]."""
    if not pa.types.is_fixed_size_list(column.type):
        return np.asarray(column.to_numpy())
    flat = np.concatenate([np.empty(0, np.float32), *(chunk.flatten().to_numpy() for chunk in column.chunks)])
    return flat.reshape(len(column), column.type.list_size)


def largest(one: NDArray[Any], other: NDArray[Any]) -> float:
    """The largest difference of two arrays' numbers; infinite for arrays of different shapes."""
    if one.shape != other.shape:
        return float("inf")
    return float(np.abs(one.astype(np.float64) - other).max(initial=0.0))
