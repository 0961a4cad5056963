"""Counts the values of columns, and writes vocabularies of the frequent ones."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from rechub_dist.config.section import ROW_WISE_ABOVE
from rechub_dist.data.columns.strings import is_string
from rechub_dist.data.parquet.kinds import is_list
from rechub_dist.data.parquet.manifest import Manifest
from rechub_dist.data.parquet.outputs import check_file, whole_file
from rechub_dist.data.parquet.overlap import refuse_overlap
from rechub_dist.data.parquet.pages import read_schema, write_parquet
from rechub_dist.data.parquet.scan import THREADS, scan
from rechub_dist.errors import UserError, nearest
from rechub_dist.skips import BadFileError

_MARK = {b"rechub_dist": b"vocabulary"}  # in the file's metadata
_WHAT = "a vocabulary that rechub-dist has written"
_WAITING = 1_000_000  # counts that are collected before they are merged


class Frequencies:
    """Adds up counts of values that come in pieces.

    Pieces are merged once they hold as many counts as the merged table (at least a million). So memory is bounded by
    the number of distinct values, whatever the rows: at the peak, when pieces are merged, about 120 bytes per integer
    and 220 per short string (measured on six million).

    Args:
        kind: type of the values: int64, uint64 or large_string (`value_type`).
    """

    def __init__(self, kind: pa.DataType) -> None:
        self._schema = pa.schema([("value", kind), ("count", pa.int64())])
        self._merged = self._schema.empty_table()
        self._waiting: list[pa.Table] = []

    def add(self, counted: pa.Table) -> None:
        """Add the counts of a piece, as `count_values` returns them."""
        self._waiting.append(counted)
        if sum(piece.num_rows for piece in self._waiting) >= max(_WAITING, self._merged.num_rows):
            self._merge()

    def __len__(self) -> int:
        """The number of distinct values."""
        self._merge()
        return int(self._merged.num_rows)

    @property
    def merged(self) -> int:
        """The number of distinct values merged so far: a lower bound of the length, without the cost of merging."""
        return int(self._merged.num_rows)

    def sorted(self) -> pa.Table:
        """A table with columns `value` and `count`, by descending count, then by value."""
        self._merge()
        return self._merged.sort_by([("count", "descending"), ("value", "ascending")])

    def _merge(self) -> None:
        if self._waiting:
            together = pa.concat_tables([self._merged, *self._waiting])
            self._waiting = []
            summed = together.group_by("value").aggregate([("count", "sum")])
            self._merged = summed.rename_columns({"count_sum": "count"}).select(["value", "count"])


def value_type(kind: pa.DataType) -> pa.DataType | None:
    """The type in which a column's values are counted; None if they are neither integers nor strings."""
    kind = kind.value_type if is_list(kind) else kind
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if is_string(kind):
        return pa.large_string()
    if not pa.types.is_integer(kind):
        return None
    return pa.uint64() if pa.types.is_uint64(kind) else pa.int64()


def count_values(column: pa.ChunkedArray, kind: pa.DataType) -> pa.Table:
    """Counts of a column's (or its lists') values, without nulls: columns `value`, `count`; a value once per chunk."""
    pieces = []
    for chunk in column.chunks:
        array = chunk.flatten() if is_list(chunk.type) else chunk
        counted = pc.value_counts(array)
        values = counted.field("values")
        if pa.types.is_dictionary(values.type):
            values = values.dictionary_decode()
        pieces.append(pa.table({"value": values.cast(kind), "count": counted.field("counts")}))
    none = pa.schema([("value", kind), ("count", pa.int64())]).empty_table()
    return pa.concat_tables([none, *pieces]).filter(pc.field("value").is_valid())


@dataclass(frozen=True)
class VocabularySummary:
    """A vocabulary that has been written.

    Attributes:
        path: its file.
        columns: the columns that were counted.
        distinct, kept: different values in the data, and in the vocabulary.
        occurrences, covered: all values in the data, and those that the vocabulary contains.
        rows: rows that a table needs for it: the largest id + 1.
    """

    path: Path
    columns: tuple[str, ...]
    distinct: int
    kept: int
    occurrences: int
    covered: int
    rows: int


def build_vocabularies(
    path: str,
    columns: Sequence[str],
    out: Path,
    *,
    min_count: int = 1,
    max_size: int | None = None,
    first_id: int = 1,
    scatter: bool | None = None,
    progress: Callable[[int, int], None] | None = None,
    threads: int = THREADS,
) -> list[VocabularySummary]:
    """Count the values of columns in one pass, and write vocabularies of the frequent ones; returns one summary each.

    Args:
        path: the Parquet data.
        columns: columns of integers, strings, or lists of them.
        out: a `.parquet` file for one vocabulary of all columns (as features that share a table need), or a folder for
            one per column, `<column>.parquet`.
        min_count: values that occur less often are left out.
        max_size: keep so many of the most frequent values.
        first_id: the id of the most frequent value; lower ids stay free, for unknown values for example.
        scatter: spread frequent values evenly over the ids, for tables that are sharded by rows; None: if there are
            as many as that by default takes.
        progress: called with the number of row groups that are done, and of all.
        threads: number of reading threads.

    Raises:
        UserError: a column does not exist or has an unsuitable type, columns of one vocabulary differ in type, bad
            data, no value is frequent enough, or a file cannot be written.
    """
    for option, value, least in (("min_count", min_count, 1), ("max_size", max_size, 1), ("first_id", first_id, 0)):
        if value is not None and value < least:
            raise UserError(f"{option} is {value}, must be at least {least}")
    manifest = Manifest.read(path)
    columns = tuple(dict.fromkeys(columns))
    kinds = {name: _kind(manifest, name) for name in columns}
    shared = out.suffix == ".parquet"
    if shared and len({pa.types.is_integer(kind) for kind in kinds.values()}) > 1:
        listed = ", ".join(f"{name!r} is {manifest.schema.field(name).type}" for name in columns)
        raise UserError(f"{path}: one vocabulary needs columns of one type, but column {listed}; build one per column")
    if shared:
        kind = max(kinds.values(), key=pa.types.is_uint64)
        kinds = dict.fromkeys(columns, kind)
    targets = {name: out if shared else out / vocabulary_name(name) for name in columns}
    for target in targets.values():
        refuse_overlap(str(target), [path, *(file.path for file in manifest.files)])
        check_file(target, is_vocabulary, _WHAT)
    found = {targets[name]: Frequencies(kinds[name]) for name in columns}

    def count(table: pa.Table) -> dict[str, pa.Table]:
        try:
            return {name: count_values(table.column(name), kinds[name]) for name in columns}
        except pa.ArrowInvalid as error:
            raise UserError(f"{path}: the columns {', '.join(columns)} cannot be counted together: {error}") from None

    for done, (_, counted) in enumerate(scan(manifest, list(columns), count, threads), 1):
        for name, table in counted.items():
            found[targets[name]].add(table)
        if progress is not None:
            progress(done, len(manifest.counts))
    out_columns = {target: tuple(name for name in columns if targets[name] == target) for target in found}
    return [
        write_vocabulary(target, frequencies, min_count, max_size, first_id, out_columns[target], scatter=scatter)
        for target, frequencies in found.items()
    ]


def vocabulary_name(column: str) -> str:
    """The file name of a column's vocabulary; characters special in paths and patterns are percent-encoded (`%2F`)."""
    return re.sub(r"[/\\?*\[\]%\x00-\x1f]", lambda found: f"%{ord(found[0]):02X}", column) + ".parquet"


def is_vocabulary(path: Path) -> bool:
    """Whether a file is a vocabulary written by `write_vocabulary`."""
    try:
        return (read_schema(path).metadata or {}).items() >= _MARK.items()
    except BadFileError:
        return False


def frequent(
    every: pa.Table, min_count: int, max_size: int | None = None, first_id: int = 1, *, scatter: bool | None = None
) -> pa.Table:
    """Those of sorted counts that reach `min_count`, with ids: a table with columns `value`, `id` (int64), `count`.

    Ids ascend by descending count, or `scatter` them, so that any range of ids has its share of the frequent values;
    None: of as many values as have a table sharded by rows, unless a run says otherwise.
    """
    kept = every.filter(pc.field("count") >= min_count).slice(0, max_size)
    scatter = kept.num_rows >= ROW_WISE_ABOVE if scatter is None else scatter
    places = scattered(kept.num_rows) if scatter else np.arange(kept.num_rows)
    return kept.add_column(1, "id", pa.array(first_id + places))


def scattered(count: int) -> npt.NDArray[np.int64]:
    """An order of 0 .. count - 1 in which every run of neighbours is spread evenly: int64 [count].

    Multiples of the golden section modulo 1 lie as far from each other as any sequence's (Knuth, The Art of Computer
    Programming 3, section 6.4); here of a whole number near it that has no factor in common with `count`.
    """
    step = max(1, round(count * 0.6180339887498949))
    while math.gcd(step, count) > 1:
        step += 1
    return np.arange(count, dtype=np.int64) * step % max(1, count)


def write_vocabulary(
    path: Path,
    frequencies: Frequencies,
    min_count: int,
    max_size: int | None = None,
    first_id: int = 1,
    columns: tuple[str, ...] = (),
    *,
    scatter: bool | None = None,
) -> VocabularySummary:
    """Write the values that occur `min_count` times: columns `value`, `id` (int64, as `frequent` has it) and `count`.

    Raises:
        UserError: there is no such value, or the file cannot be written.
    """
    every = frequencies.sorted()
    kept = frequent(every, min_count, max_size, first_id, scatter=scatter)
    if not kept.num_rows:
        most = every["count"][0].as_py() if every.num_rows else 0
        raise UserError(
            f"{path}: no value of {', '.join(columns) or 'the column'} occurs {min_count} times (the most frequent "
            f"of {every.num_rows} occurs {most} times); lower min_count"
        )
    with whole_file(path, is_vocabulary, _WHAT) as working:
        write_parquet(kept.replace_schema_metadata(_MARK), working)
    occurrences, covered = (int(pc.sum(table["count"]).as_py() or 0) for table in (every, kept))
    return VocabularySummary(
        path, columns, every.num_rows, kept.num_rows, occurrences, covered, first_id + kept.num_rows
    )


def _kind(manifest: Manifest, name: str) -> pa.DataType:
    if name not in manifest.schema.names:
        raise UserError(f"{manifest.path}: there is no column {name!r}; {nearest(name, manifest.schema.names)}")
    kind = value_type(manifest.schema.field(name).type)
    if kind is None:
        raise UserError(
            f"{manifest.path}: column {name!r} is {manifest.schema.field(name).type}, but a vocabulary needs "
            "integers or strings, or lists of them"
        )
    return kind
