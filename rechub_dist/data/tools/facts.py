"""Statistics of the columns of a data set, from its footers where these have them, else from its rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from rechub_dist.data.columns.frequencies import Frequencies, count_values, value_type
from rechub_dist.data.parquet.kinds import is_list, is_number
from rechub_dist.data.parquet.manifest import Manifest
from rechub_dist.data.parquet.scan import THREADS, footers, scan

SMALL_TABLE = 1_000_000  # rows that a table may have regardless of the number of rows of data
_FEW_ROWS = 100  # with fewer rows it means nothing that all values differ


@dataclass
class Facts:
    """Statistics of a column, over the rows of all splits or those seen so far.

    Attributes:
        low, high: the smallest and the largest number (of list elements, for lists); None if there is none.
        nulls: missing values or lists; NaN counts as missing.
        gaps: missing elements of lists.
        shortest, longest: lengths of lists; None if there is none.
        values: the counts of the values in the train split, if they have to be counted.
        index: whether it is the index of the pandas data frame that was written.
    """

    name: str
    type: pa.DataType
    low: Any = None
    high: Any = None
    nulls: int = 0
    gaps: int = 0
    shortest: int | None = None
    longest: int | None = None
    values: Frequencies | None = None
    index: bool = False

    def add(self, other: Facts) -> None:
        """Merge the statistics of other rows."""
        self.low, self.high = _either(min, self.low, other.low), _either(max, self.high, other.high)
        self.shortest = _either(min, self.shortest, other.shortest)
        self.longest = _either(max, self.longest, other.longest)
        self.nulls += other.nulls
        self.gaps += other.gaps

    @property
    def element(self) -> pa.DataType:
        """The type of the values, or of list elements, without dictionary encoding."""
        kind = self.type.value_type if is_list(self.type) else self.type
        return kind.value_type if pa.types.is_dictionary(kind) else kind

    @property
    def binary(self) -> bool:
        """Whether both 0 and 1 occur, nothing else, and no value is missing."""
        return not is_list(self.type) and is_number(self.type) and (self.low, self.high, self.nulls) == (0, 1, 0)


def gather(
    train: Manifest, others: list[Manifest], progress: Callable[[int, int], None] | None = None, threads: int = THREADS
) -> list[Facts]:
    """The statistics of the train split's columns, over all splits; values are counted in train only.

    Columns are read unless the footers have their exact statistics (the range of integers, the number of nulls).
    Distinct values are counted, in memory, for columns where their number decides what the column is.

    Raises:
        UserError: the data cannot be read.
    """
    found: dict[str, Facts] = {}
    done = 0
    total = sum(len(manifest.counts) for manifest in (train, *others))
    for manifest in (train, *others):
        facts = {item.name: Facts(item.name, item.type) for item in manifest.schema}
        known = _from_footers(manifest, facts)
        if manifest is train:
            for fact in facts.values():
                if is_id(fact) and (fact.name not in known or _is_telling(fact, manifest.rows)):
                    fact.values = Frequencies(value_type(fact.type))
        unread = {fact.name for fact in facts.values() if is_supported(fact) and fact.name not in known}
        counted = {fact.name for fact in facts.values() if fact.values is not None}
        columns = sorted(unread | counted)

        def look(
            table: pa.Table, columns: list[str] = columns, unread: set[str] = unread, counted: set[str] = counted
        ) -> list[tuple[Facts, pa.Table | None]]:
            return [
                (
                    _look(name, table.column(name)) if name in unread else Facts(name, table.column(name).type),
                    count_values(table.column(name), value_type(table.column(name).type)) if name in counted else None,
                )
                for name in columns
            ]

        for _, seen in scan(manifest, columns, look, threads) if columns else ():
            for fact, values in seen:
                facts[fact.name].add(fact)
                counts = facts[fact.name].values
                if values is not None and counts is not None:
                    counts.add(values)
            done += 1
            if progress is not None:
                progress(done, total)
        for name, fact in facts.items():
            if manifest is train:
                found[name] = fact
            elif name in found:
                found[name].add(fact)
    return list(found.values())


def fits(f: Facts, rows: int) -> bool:
    """Whether a table with a row for each id up to the largest is small enough."""
    return f.low is None or (f.low >= 0 and f.high < max(SMALL_TABLE, 2 * rows))


def numbers_rows(f: Facts, rows: int) -> bool:
    """Whether all rows of the train split have different values, so that none recurs."""
    return not is_list(f.type) and f.values is not None and rows >= _FEW_ROWS and len(f.values) == rows


def is_id(f: Facts) -> bool:
    """Whether the values are integers or strings."""
    return value_type(f.type) is not None


def is_supported(f: Facts) -> bool:
    """Whether the column has a type that can be read."""
    return is_number(f.element) or is_id(f)


def _is_telling(f: Facts, rows: int) -> bool:
    """Whether the number of distinct integers is more informative than their range."""
    return f.low is not None and (not fits(f, rows) or f.high - f.low + 1 >= max(rows, _FEW_ROWS))


def _index_names(metadata: Any) -> set[str]:
    """The columns that hold the index of a pandas frame."""
    try:
        names = json.loads((metadata.metadata or {}).get(b"pandas", b"{}")).get("index_columns", [])
    except (ValueError, AttributeError):
        return set()
    return {name for name in names if isinstance(name, str)}


def _from_footers(manifest: Manifest, facts: dict[str, Facts]) -> list[str]:
    """Fill in the flat integer columns that have statistics in all row groups; returns their names."""
    wanted = {name for name, fact in facts.items() if pa.types.is_integer(fact.type)}
    indices: set[str] = set()
    for metadata in footers(manifest):
        indices |= _index_names(metadata)
        places = {metadata.schema.column(i).path: i for i in range(metadata.num_columns)}
        for name in list(wanted):
            chunks = [metadata.row_group(g).column(places[name]) for g in range(metadata.num_row_groups)]
            chunks = [chunk for chunk in chunks if chunk.num_values]
            if not all(chunk.is_stats_set and chunk.statistics.has_null_count for chunk in chunks):
                wanted.discard(name)
            for statistics in (chunk.statistics for chunk in chunks if name in wanted):
                seen = Facts(name, facts[name].type, nulls=statistics.null_count)
                if statistics.has_min_max:
                    seen.low, seen.high = statistics.min, statistics.max
                elif statistics.num_values:
                    wanted.discard(name)
                facts[name].add(seen)
    for name, fact in facts.items():
        if name not in wanted:  # discard what some row groups have added
            facts[name] = Facts(name, fact.type)
        facts[name].index = name in indices
    return sorted(wanted)


def _look(name: str, column: pa.ChunkedArray) -> Facts:
    """The statistics of a piece of a column that has been read."""
    facts = Facts(name, column.type)
    for chunk in column.chunks:
        values, seen = chunk, Facts(name, column.type, nulls=chunk.null_count)
        if is_list(chunk.type):
            lengths = pc.min_max(pc.list_value_length(chunk)).as_py()
            values = chunk.flatten()
            seen.shortest, seen.longest, seen.gaps = lengths["min"], lengths["max"], values.null_count
        if pa.types.is_dictionary(values.type):
            values = values.dictionary_decode()
        if pa.types.is_float16(values.type):  # with which Arrow cannot compute
            values = values.cast(pa.float32())
        if is_number(values.type):
            if pa.types.is_floating(values.type):
                nan = int(pc.sum(pc.is_nan(values)).as_py() or 0)
                values = values.filter(pc.is_finite(values))
                seen.nulls, seen.gaps = (seen.nulls, seen.gaps + nan) if is_list(chunk.type) else (seen.nulls + nan, 0)
            seen.low, seen.high = pc.min_max(values).as_py().values()
        facts.add(seen)
    return facts


def _either(choose: Callable[[Any, Any], Any], a: Any, b: Any) -> Any:
    return a if b is None else b if a is None else choose(a, b)
