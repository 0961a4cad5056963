"""What is learned from the train split alone: counts of values, bins of equal counts, means and deviations.

Each is made in two steps, so that the rows may lie in several databases: a query gives what one of them holds, and a
function puts together what all of them gave.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa

from rechub_dist.data.columns.frequencies import vocabulary_name
from rechub_dist.data.importing.engine import Engine, quoted
from rechub_dist.data.importing.histories import Lists
from rechub_dist.data.importing.plan import RESERVED
from rechub_dist.data.importing.rows import DRAWN, ROWS, SPLIT
from rechub_dist.errors import UserError

TRAIN = f"{SPLIT} = 0"
MAX_FLOAT32: Final = float(np.finfo(np.float32).max)
_UPTO = f"{RESERVED}upto"
_PIECE = 1 << 18


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


@dataclass
class Asked:
    """What features need to know of train.

    Attributes:
        counts: by embedding table, the columns whose values have ids in it.
        kinds: by embedding table, the type of the values, in the database's words.
        moments: numbers, with their transforms.
        quantiles: numbers, with how many bins of equal counts.
        longest: columns of lists.
    """

    counts: dict[str, tuple[str, ...]] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)
    moments: list[tuple[str, str]] = field(default_factory=list)
    quantiles: list[tuple[str, int]] = field(default_factory=list)
    longest: list[str] = field(default_factory=list)


@dataclass
class Facts:
    """The answers, by the same keys."""

    counts: dict[str, pa.Table] = field(default_factory=dict)
    moments: dict[tuple[str, str], Moments] = field(default_factory=dict)
    quantiles: dict[tuple[str, int], tuple[float, ...]] = field(default_factory=dict)
    longest: dict[str, int] = field(default_factory=dict)


def learn(engine: Engine, asked: Asked, lists: Mapping[str, Lists]) -> Facts:
    """The facts of the rows of one database; `lists` are the histories' columns."""
    found = Facts()
    for table, columns in asked.counts.items():
        kind = asked.kinds[table]
        found.counts[table] = ordered_counts(engine, count_query(engine, columns, kind, lists), kind, columns)
    for column, transform in asked.moments:
        found.moments[column, transform] = moments(engine, column, transform)
    for column, bins in asked.quantiles:
        found.quantiles[column, bins] = quantiles(engine, spread_query(column), bins)
    for column in asked.longest:
        found.longest[column] = longest(engine, column)
    return found


def write_facts(engine: Engine, asked: Asked, lists: Mapping[str, Lists], file: Callable[[str], Path]) -> Facts:
    """The facts of one of several databases: those of a few numbers, while counts go to the files of their names."""
    found = Facts()
    for table, columns in asked.counts.items():
        engine.save(count_query(engine, columns, asked.kinds[table], lists), file(counts_name(table)))
    for column, transform in asked.moments:
        found.moments[column, transform] = moments(engine, column, transform)
    for column in dict(asked.quantiles):
        engine.save(spread_query(column), file(spread_name(column)))
    for column in asked.longest:
        found.longest[column] = longest(engine, column)
    return found


def merge_facts(engine: Engine, asked: Asked, parts: Sequence[Facts], files: Callable[[str], Sequence[Path]]) -> Facts:
    """The facts of all databases, of what `write_facts` gave of each."""
    found = Facts()
    for table, columns in asked.counts.items():
        kind = asked.kinds[table]
        counts = engine.saved(files(counts_name(table)), {"value": kind, "count": "BIGINT"})
        found.counts[table] = ordered_counts(engine, counts, kind, columns)
    for key in asked.moments:
        found.moments[key] = sum((part.moments[key] for part in parts), Moments())
    for column, bins in asked.quantiles:
        found.quantiles[column, bins] = quantiles(engine, engine.saved(files(spread_name(column))), bins)
    for column in asked.longest:
        found.longest[column] = max(part.longest[column] for part in parts)
    return found


def counts_name(table: str) -> str:
    """The name of the file of a table's counts."""
    return f"counts-{vocabulary_name(table)}"


def spread_name(column: str) -> str:
    """The name of the file of a number's values."""
    return f"spread-{vocabulary_name(column)}"


def count_query(engine: Engine, columns: Iterable[str], kind: str, lists: Mapping[str, Lists]) -> str:
    """A query for how often each value occurs in train in the columns, of lists their elements: `value`, `count`."""
    kinds = engine.columns(ROWS)
    parts = []
    for i, name in enumerate(columns):
        if name in lists:
            engine.create(table := f"{RESERVED}elements_{i}", _elements(engine, lists[name]))
            parts.append(f"select value::{kind} as value, count from {table}")
        else:
            value = f"unnest({quoted(name)})" if kinds[name].endswith("[]") else quoted(name)
            parts.append(f"select {value}::{kind} as value, 1 as count from {ROWS} where {TRAIN} and not {DRAWN}")
    return (
        f"select value, sum(count)::BIGINT as count from ({' union all '.join(parts)}) where value is not null "
        "group by value"
    )


def _elements(engine: Engine, lists: Lists) -> pa.RecordBatchReader:
    """The values of a history's events, each with the number of train rows whose list has it."""
    events = lists.events
    schema = pa.schema([("value", events.kind), ("count", pa.int64())])
    if not len(events):
        return pa.RecordBatchReader.from_batches(schema, [])
    # At each event, how many lists begin and how many have ended; in a file, for there are as many as rows.
    changes = np.memmap(engine.folder / "changes", np.int64, "w+", shape=(len(events) + 1,))
    for batch in engine.stream(
        f"select {quoted(lists.begin)} as a, {quoted(lists.length)} as n from {ROWS} where {TRAIN} and not {DRAWN}"
    ):
        begin = batch["a"].to_numpy()
        np.add.at(changes, begin, 1)
        np.add.at(changes, begin + batch["n"].to_numpy(), -1)

    def pieces() -> Iterator[pa.RecordBatch]:
        open_lists = 0
        for first in range(0, len(events), _PIECE):
            piece = slice(first, min(first + _PIECE, len(events)))
            counts = open_lists + np.cumsum(changes[piece])
            open_lists = int(counts[-1])
            yield pa.RecordBatch.from_arrays([events.take(piece), pa.array(counts)], schema=schema)

    return pa.RecordBatchReader.from_batches(schema, pieces())


def ordered_counts(engine: Engine, counts: str, kind: str, columns: Iterable[str]) -> pa.Table:
    """The values of a query of counts, in which one may come several times, by descending count, then value.

    Args:
        engine: any.
        counts: as `count_query` gives it.
        kind: the type of its values.
        columns: where they come from, for errors.

    Raises:
        UserError: integers that no type of 64 bits has together.
    """
    counted = f"select value, sum(count)::BIGINT as count from ({counts}) where count > 0 group by value"
    if kind == "HUGEINT":
        low, high = engine.run(f"select min(value), max(value) from ({counted})")[0]
        if low is not None and low < 0 and high >= 2**63:
            listed = ", ".join(map(repr, columns))
            raise UserError(
                f"features: columns {listed} share a table, but hold {low} and {high}: no type of 64 bits has both"
            )
        narrow = "UBIGINT" if high is not None and high >= 2**63 else "BIGINT"
        counted = f"select value::{narrow} as value, count from ({counted})"
    return engine.table(f"{counted} order by count desc, value")


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
    return float(f"{number:.15g}")


def longest(engine: Engine, column: str) -> int:
    """The length of the longest list of a column in train; 0 if there is none."""
    return int(engine.value(f"select max(len({quoted(column)})) from {ROWS} where {TRAIN}") or 0)


def spread_query(column: str) -> str:
    """A query for how often each finite number occurs in train: `x`, `n`."""
    value = f"{quoted(column)}::DOUBLE"
    return f"select {value} as x, count(*) as n from {ROWS} where {TRAIN} and isfinite({value}) group by x"


def quantiles(engine: Engine, numbers: str, bins: int) -> tuple[float, ...]:
    """Boundaries that cut numbers into bins of equal counts; fewer where values recur often.

    Args:
        engine: any.
        numbers: a query as `spread_query` gives, in which a number may come several times.
        bins: how many.
    """
    engine.run(
        f"create or replace temp table {_UPTO} as select x, sum(n) over (order by x) as upto from "
        f"(select x, sum(n) as n from ({numbers}) group by x)"
    )
    rows = int(engine.value(f"select coalesce(max(upto), 0) from {_UPTO}"))
    places = sorted({rows * i // bins for i in range(1, bins)}) if rows else []
    listed = ", ".join(f"({place})" for place in places)
    found = engine.run(
        f"select distinct u.x from (values {listed}) as p(place) asof join {_UPTO} as u on p.place < u.upto "
        f"where u.x > (select min(x) from {_UPTO}) order by u.x"
    ) if places else []  # fmt: skip
    engine.run(f"drop table {_UPTO}")
    return tuple(x for (x,) in found)
