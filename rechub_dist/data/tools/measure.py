"""Computes the figures of columns by queries of DuckDB."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from itertools import accumulate
from typing import Any, Final

from rechub_dist.data.tools.figures import ColumnProfile, Histogram, Lengths, Overlap, Part, Top
from rechub_dist.data.tools.guess import time_unit
from rechub_dist.data.tools.tables import NUMBERS, Column, Tables, kind_of

BINS: Final = 24
TOP: Final = 10  # values that are shown
_CANDIDATES = 100  # for the most frequent values, where not all are counted
_LONGEST = 200  # characters of a value
_LOG_FROM = 100.0  # a range from which the logarithm may be the better scale
_EXACT = 2.0**53  # up to which floats tell integers apart
_CROWDED = 0.9  # share of the values in one bin from which it is

Pairs = Sequence[tuple[Column, ColumnProfile]]
_Aggregates = list[tuple[str, str]]  # (attribute of Part, or a name that begins with _; SQL)


class Measure:
    """Fills in the figures of columns: first `summarise`, then the values and the histograms."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables
        self._lengths: dict[tuple[str, int], dict[int, int]] = {}  # by column and split, how many lists have a length
        self._ends: dict[str, list[float]] = {}  # by column, the ends of its ranges, as bins are cut

    def summarise(self, s: int, pairs: Pairs) -> None:
        """Ranges, means, lengths and numbers of what is missing, of columns in a split; `distinct` estimated."""
        name = self._tables.splits[s].name
        read = [(c, found.parts[name], c.types[s]) for c, found in pairs if c.types[s] is not None]
        if not read:
            return
        wanted = [_of_lists(c.sql) if kind_of(str(t)) == "list" else _of_values(str(t), c.sql) for c, _, t in read]
        select = ", ".join(sql for items in wanted for _, sql in items)
        [values] = self._tables.rows(f"SELECT {select} FROM split{s}")
        rest = iter(values)
        for (column, part, type_), items in zip(read, wanted, strict=True):
            self._fill(s, column, part, {name: next(rest) for name, _ in items})
            if kind_of(str(type_)) == "list" and part.elements:
                inner = str(type_)[: str(type_).rindex("[")]
                of_elements = _of_values(inner, "v")
                select = ", ".join(sql for _, sql in of_elements)
                [seen] = self._tables.rows(f"SELECT {select} FROM (SELECT unnest({column.sql}) AS v FROM split{s})")
                found = dict(zip((name for name, _ in of_elements), seen, strict=True))
                part.element_nulls = part.elements - found.pop("_count")
                self._fill(s, column, part, found)

    def _fill(self, s: int, column: Column, part: Part, found: dict[str, Any]) -> None:
        if "_count" in found:
            part.nulls = part.rows - found["_count"]
        if "_lengths" in found:
            self._lengths[column.name, s] = counts = dict(sorted((found["_lengths"] or {}).items()))
            part.lengths = _lengths(counts, part.rows)
            part.elements, part.element_nulls = sum(length * n for length, n in counts.items()), 0
            self._ends.setdefault(column.name, []).extend(map(float, counts))
        part.nans, part.infinities = found.get("nans", part.nans), found.get("infinities", part.infinities)
        part.low, part.high = _plain(found.get("low", part.low)), _plain(found.get("high", part.high))
        if found.get("mean") is not None:
            part.mean = float(found["mean"])
        if "_distinct" in found:
            most = (part.elements or 0) if column.kind == "list" else part.rows - part.nulls - part.nans
            part.distinct, part.about = min(found["_distinct"], most), True
        if column.kind != "list":
            ends = [found.get("_first", found.get("low")), found.get("_last", found.get("high"))]
            self._ends.setdefault(column.name, []).extend(float(end) for end in ends if end is not None)

    def count_values(self, column: Column, found: ColumnProfile) -> None:
        """Count all values, in DuckDB's table `counted` (v, and n0, n1, ... by split): `distinct` and `top` exactly."""
        self._count(column)
        splits = range(len(self._tables.splits))
        distinct = ", ".join(f"count(*) FILTER (WHERE n{s} > 0)" for s in splits)
        [numbers] = self._tables.rows(f"SELECT {distinct} FROM counted")
        for split, number in zip(self._tables.splits, numbers, strict=True):
            if split.name in found.parts:
                found.parts[split.name].distinct, found.parts[split.name].about = number, False
        self._top(column, found)

    def estimate_top(self, column: Column, found: ColumnProfile) -> None:
        """Count those values that are probably the most frequent: `top` alone."""
        self._tables.rows(
            f"CREATE OR REPLACE TEMP TABLE candidates AS SELECT DISTINCT unnest(c) AS v FROM "
            f"(SELECT approx_top_k(v, {_CANDIDATES}) AS c FROM ({self._values(column)}) GROUP BY s)"
        )
        self._count(column, "WHERE v IN (SELECT v FROM candidates)")
        found.chosen_about = True
        self._top(column, found)

    def overlaps(self, others: Sequence[int]) -> list[Overlap]:
        """What the last `count_values` says of the values of these splits: how many are in split 0."""
        found = []
        for s in others:
            [(distinct, known, rows, known_rows)] = self._tables.rows(
                f"SELECT count(*) FILTER (WHERE n{s} > 0), count(*) FILTER (WHERE n{s} > 0 AND n0 > 0), "
                f"coalesce(sum(n{s}), 0), coalesce(sum(n{s}) FILTER (WHERE n0 > 0), 0) FROM counted"
            )
            cold = 1 - known / distinct if distinct else None
            cold_rows = float(1 - known_rows / rows) if rows else None
            name = self._tables.splits[s].name
            found.append(Overlap(name, distinct, known, int(rows), int(known_rows), cold, cold_rows))
        return found

    def _values(self, column: Column) -> str:
        """SQL for the values of all splits, without null and NaN."""
        lists = column.kind == "list"
        kind = kind_of(column.element) if lists else column.kind
        where = "v IS NOT NULL" + (" AND NOT isnan(v)" if kind == "float" else "")
        return f"SELECT s, v FROM ({self._tables.values(column, elements=lists)}) WHERE {where}"

    def _count(self, column: Column, where: str = "") -> None:
        numbers = ", ".join(f"count(*) FILTER (WHERE s = {s}) AS n{s}" for s in range(len(self._tables.splits)))
        self._tables.rows(
            f"CREATE OR REPLACE TEMP TABLE counted AS SELECT v, {numbers} FROM ({self._values(column)}) {where} "
            "GROUP BY v"
        )

    def _top(self, column: Column, found: ColumnProfile) -> None:
        """The values of `counted` with the largest share in any split; of equal ones, the smallest."""
        names = [split.name for split in self._tables.splits]
        of: list[int] = []
        for name in names:
            part = found.parts.get(name)
            lists = part is not None and part.elements is not None
            of.append(0 if part is None else (part.elements or 0) - (part.element_nulls or 0) if lists else part.rows)
        shares = [f"n{s} / {number}" for s, number in enumerate(of) if number]
        order = "".join(f"{share} DESC, " for share in [f"greatest({', '.join(shares)}, 0)", *shares])
        kind = kind_of(column.element) if column.kind == "list" else column.kind
        value = "v" if kind in (*NUMBERS, "bool") else f"left(CAST(v AS VARCHAR), {_LONGEST})"
        numbers = ", ".join(f"n{s}" for s in range(len(of)))
        rows = self._tables.rows(
            f"SELECT {value}, {numbers} FROM counted ORDER BY {order if shares else ''}v LIMIT {TOP}"
        )
        for v, *counts in rows:
            here = {name: count for name, count in zip(names, counts, strict=True) if name in found.parts}
            portion = {name: here[name] / n if n else None for name, n in zip(names, of, strict=True) if name in here}
            found.top.append(Top(_plain(v), here, portion))

    def fill_histograms(self, pairs: Pairs) -> None:
        """The histograms of columns: of numbers and times, and of the lengths of lists."""
        plans = {column.name: _bins(column, self._ends.get(column.name, [])) for column, _ in pairs}
        chosen = [(column, found, plan) for column, found in pairs if (plan := plans[column.name]) is not None]
        counted: dict[tuple[str, int], list[dict[int, int]]] = {}  # for each scale, by bin
        for s in range(len(self._tables.splits)):
            read = [(column, plan) for column, _, plan in chosen if column.types[s] is not None]
            scanned = [(column, plan) for column, plan in read if column.kind != "list"]
            select = [sql for column, plan in scanned for sql in _binned(column, str(column.types[s]), plan)]
            rest = iter(self._tables.rows(f"SELECT {', '.join(select)} FROM split{s}")[0] if select else ())
            for column, plan in scanned:
                counted[column.name, s] = [next(rest) or {} for _ in plan]
            for column, plan in read:
                if column.kind == "list":
                    lengths = self._lengths[column.name, s].items()
                    counted[column.name, s] = [_sums((scale.bin(k), n) for k, n in lengths) for scale in plan]
        for column, found, plan in chosen:
            here = {s: counts for (name, s), counts in counted.items() if name == column.name}
            best = _best(plan, list(here.values()))
            scale = plan[best]
            found.histogram = Histogram(_HISTOGRAM_OF.get(column.kind, "values"), scale.name, scale.edges())
            for s, split in enumerate(self._tables.splits):
                if split.name in found.parts:
                    bins = here[s][best] if s in here else {}
                    found.parts[split.name].bins = [int(bins.get(i, 0)) for i in range(scale.bins)]


_HISTOGRAM_OF = {"list": "lengths", "time": "times"}


class _Scale:
    """Bins from `low` to `high`: `each` has one for every integer.

    With `whole`, linear bins hold equally many integers.
    """

    def __init__(self, name: str, low: float, high: float, *, whole: bool = False) -> None:
        self.name, self.low, self._high, self._whole = name, low, high, whole
        self._start, end = (_signed_log(low), _signed_log(high)) if name == "log" else (low, high)
        self._width = (end - self._start) / BINS
        self.bins = int(high - low) + 1 if name == "each" else BINS if self._width > 0 else 1
        if whole:
            self._width = float(math.ceil((high - low + 1) / BINS))
            self.bins = math.ceil((high - low + 1) / self._width)

    @property
    def usable(self) -> bool:
        return math.isfinite(self._width)

    def edges(self) -> list[float]:
        if self.name == "each":
            return [self.low + i for i in range(self.bins)]
        ends = [self._start + i * self._width for i in range(self.bins + 1)]
        if self._whole:
            return ends
        inner = [math.copysign(math.expm1(abs(end)), end) for end in ends[1:-1]] if self.name == "log" else ends[1:-1]
        return [self.low, *inner, self._high]

    def bin(self, value: float) -> int:
        """The bin of a value, computed as by `sql`."""
        if self.name == "each":
            return int(value - self.low)
        if self.bins == 1:
            return 0
        x = _signed_log(value) if self.name == "log" else value
        return max(0, min(self.bins - 1, math.floor((x - self._start) / self._width)))

    def sql(self, value: str) -> str:
        if self.name == "each":
            return f"CAST({value} - CAST({self.low!r} AS DOUBLE) AS INTEGER)"
        if self.bins == 1:
            return "0"
        x = f"sign({value}) * ln(1 + abs({value}))" if self.name == "log" else value
        at = f"floor(({x} - CAST({self._start!r} AS DOUBLE)) / CAST({self._width!r} AS DOUBLE))"
        return f"CAST(greatest(0, least({self.bins - 1}, {at})) AS INTEGER)"


def _bins(column: Column, ends: list[float]) -> list[_Scale] | None:
    """The scales that a column's histogram may have; None without a histogram."""
    kind = column.kind
    if kind not in (*NUMBERS, "bool", "time", "list") or not ends:
        return None
    low, high = min(ends), max(ends)
    whole = kind in ("integer", "bool", "list") and max(-low, high) < _EXACT
    if whole and high - low < BINS:
        return [_Scale("each", low, high)]
    scales = [_Scale("linear", low, high, whole=whole)]
    if kind != "time" and high - low > _LOG_FROM:
        scales.append(_Scale("log", low, high))
    return [scale for scale in scales if scale.usable]


def _binned(column: Column, type_: str, plan: list[_Scale]) -> list[str]:
    """SQL for the number of a split's finite values by bin, for each scale."""
    kind = kind_of(type_)
    known = _moment(type_, column.sql)
    value = f"epoch({known})" if kind == "time" else f"CAST({known} AS DOUBLE)"
    where = f"isfinite({known})" if kind in ("float", "time") else "true"
    return [f"histogram({scale.sql(value)}) FILTER (WHERE {column.sql} IS NOT NULL AND {where})" for scale in plan]


def _best(plan: list[_Scale], counted: list[list[dict[int, int]]]) -> int:
    """Which scale shows the values best: the first, unless most are in one of its bins, and fewer in the other's."""
    if len(plan) == 1:
        return 0
    crowded = []
    for i in range(len(plan)):
        total = _sums(item for counts in counted for item in counts[i].items())
        crowded.append(max(total.values(), default=0) / max(1, sum(total.values())))
    return 1 if crowded[0] > _CROWDED and crowded[1] < crowded[0] else 0


def _of_lists(sql: str) -> _Aggregates:
    return [("_count", f"count({sql})"), ("_lengths", f"histogram(len({sql}))")]


def _of_values(type_: str, sql: str) -> _Aggregates:
    """The aggregates of values of a type."""
    kind, found = kind_of(type_), [("_count", f"count({sql})")]
    if kind == "null":
        return found
    found.append(("_distinct", f"approx_count_distinct({sql})"))
    if kind == "float":
        found += [("nans", f"count(*) FILTER (WHERE isnan({sql}))")]
    if kind in ("float", "time"):
        known = _moment(type_, sql)
        where = f"FILTER (WHERE isfinite({known}))"
        out = f"NOT isfinite({known})" + (f" AND NOT isnan({sql})" if kind == "float" else "")
        found += [("infinities", f"count(*) FILTER (WHERE {out})")]
    else:
        where = ""
    if kind == "time":
        found += [("low", f"CAST(min({sql}) {where} AS VARCHAR)"), ("high", f"CAST(max({sql}) {where} AS VARCHAR)")]
        found += [("_first", f"epoch(min({known}) {where})"), ("_last", f"epoch(max({known}) {where})")]
    elif kind in (*NUMBERS, "bool"):
        number = f"CAST({sql} AS INTEGER)" if kind == "bool" else sql
        found += [("low", f"min({number}) {where}"), ("high", f"max({number}) {where}")]
        found += [("mean", f"{'favg' if kind == 'float' else 'avg'}({number}) {where}")]
    return found


def _moment(type_: str, sql: str) -> str:
    """The value in a type whose `isfinite` and `epoch` DuckDB knows."""
    return f"CAST({sql} AS TIMESTAMPTZ)" if type_ == "TIMESTAMPTZ_NS" else sql


def _lengths(counts: dict[int, int], rows: int) -> Lengths | None:
    """The figures of lengths, from the number of lists of each (ascending)."""
    number = sum(counts.values())
    if not number:
        return None
    lengths, ends = list(counts), list(accumulate(counts.values()))

    def at(place: int) -> int:
        return next(length for length, end in zip(lengths, ends, strict=True) if place < end)

    def quantile(q: float) -> float:
        place = q * (number - 1)
        below = at(math.floor(place))
        return below + (at(math.ceil(place)) - below) * (place - math.floor(place))

    mean = sum(length * n for length, n in counts.items()) / number
    empty = (counts.get(0, 0) + rows - number) / rows
    return Lengths(lengths[0], quantile(0.5), quantile(0.95), lengths[-1], mean, empty)


def time_range(low: Any, high: Any, ends: list[Any]) -> tuple[str, str]:
    """Two times as text; numbers in the unit that `ends` fit, or as they are if there is none."""
    if isinstance(low, str):
        return low, high
    unit = time_unit(min(ends), max(ends))
    return _time_text(low, unit), _time_text(high, unit)


def _time_text(number: Any, unit: str | None) -> str:
    if unit is None:
        return f"{number}"
    if unit == "day":
        return f"{str(int(number))[:4]}-{str(int(number))[4:6]}-{str(int(number))[6:]}"
    micros = int(number * {"s": 10**6, "ms": 10**3, "us": 1}[unit]) if unit != "ns" else int(number) // 1000
    return (datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=micros)).replace(tzinfo=None).isoformat(" ")


def _sums(items: Any) -> dict[int, int]:
    total: dict[int, int] = {}
    for key, number in items:
        total[key] = total.get(key, 0) + number
    return total


def _signed_log(value: float) -> float:
    return math.copysign(math.log1p(abs(value)), value)


def _plain(value: Any) -> Any:
    """A value as JSON has it: decimals are numbers where a float has them exactly, infinite numbers are text."""
    if isinstance(value, Decimal):
        number = int(value) if value == value.to_integral_value() else float(value)
        return number if Decimal(repr(number)) == value else str(value)
    if isinstance(value, float):
        return value + 0.0 if math.isfinite(value) else str(value)  # not -0.0
    return value
