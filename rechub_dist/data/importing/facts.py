"""What is learned from the train split alone: counts of values, bins of equal counts, means and deviations."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Final

import numpy as np
import pyarrow as pa

from rechub_dist.data.importing.engine import Engine, quoted
from rechub_dist.data.importing.rows import DRAWN, ROWS, SPLIT

TRAIN = f"{SPLIT} = 0"
MAX_FLOAT32: Final = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Moments:
    """How many finite values there are, their mean, and the sum of squared deviations from it."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    @property
    def deviation(self) -> float:
        """The standard deviation; 1 where all values are equal."""
        found = math.sqrt(self.squares / self.count) if self.count else 0.0
        return found if found > 0 else 1.0

    def __add__(self, other: Moments) -> Moments:
        count = self.count + other.count
        if not count:
            return self
        apart = other.mean - self.mean
        mean = self.mean + apart * other.count / count
        return Moments(count, mean, self.squares + other.squares + apart * apart * self.count * other.count / count)


def count_values(engine: Engine, columns: Iterable[str]) -> pa.Table:
    """The values of columns in train, of lists their elements: `value` and `count`, by descending count, then value."""
    kinds = engine.columns(ROWS)
    parts = []
    for name in columns:
        kind = kinds[name]
        value = f"unnest({quoted(name)})" if kind.endswith("[]") else quoted(name)
        cast = "VARCHAR" if "VARCHAR" in kind else "UBIGINT" if kind.startswith("UBIGINT") else "BIGINT"
        parts.append(f"select {value}::{cast} as value from {ROWS} where {TRAIN} and not {DRAWN}")
    return engine.table(
        f"select value, count(*) as count from ({' union all '.join(parts)}) where value is not null "
        "group by value order by count desc, value"
    )


def moments(engine: Engine, column: str, transform: str) -> Moments:
    """Those of a number's values in train that can be read as float32, after its transform.

    They are summed as integers of 128 bits, exactly: whatever the order of the rows, the result is the same.
    """
    value = f"{quoted(column)}::DOUBLE"
    usable = f"isfinite({value})" if transform == "log" else f"abs({value}) <= {MAX_FLOAT32!r}"
    after = f"sign({value}) * ln(1 + abs({value}))" if transform == "log" else value
    rows = f"(select {after} as x from {ROWS} where {TRAIN} and {usable})"
    count, most = engine.run(f"select count(x), max(abs(x)) from {rows}")[0]
    if not count:
        return Moments()
    mean = float(_sum(engine, "x", rows, most) / count)
    squares = f"(x - {mean!r}::DOUBLE) ** 2"
    return Moments(count, mean, float(_sum(engine, squares, rows, engine.value(f"select max({squares}) from {rows}"))))


def _sum(engine: Engine, expression: str, rows: str, most: float) -> Fraction:
    """The sum of numbers of magnitude `most` or less, each rounded to a multiple of most / 2^80 or so."""
    if not most:
        return Fraction(0)
    scale = min(max(80 - math.frexp(most)[1], -1000), 1000)
    total = engine.value(f"select sum(({expression} * {2.0**scale!r}::DOUBLE)::HUGEINT) from {rows}")
    return Fraction(int(total)) / Fraction(2) ** scale


def steady(number: float) -> float:
    """A number without the digits that depend on the order of a sum: the same rows give the same schema."""
    return float(f"{number:.12g}")


def quantiles(engine: Engine, column: str, bins: int) -> tuple[float, ...]:
    """Boundaries that cut a number's values in train into bins of equal counts; fewer where values recur often."""
    value = f"{quoted(column)}::DOUBLE"
    finite = f"from {ROWS} where {TRAIN} and isfinite({value})"
    rows = engine.value(f"select count(*) {finite}")
    if not rows:
        return ()
    places = sorted({rows * i // bins for i in range(1, bins)})
    found = engine.run(
        f"select distinct x from (select {value} as x, row_number() over (order by {value}) - 1 as n {finite}) "
        f"where n in ({', '.join(map(str, places))}) and x > (select min({value}) {finite}) order by x"
    )
    return tuple(x for (x,) in found)
