"""How often each value of a column occurs, and the vocabulary of those that occur often enough."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rechub_dist.data.columns.strings import is_string
from rechub_dist.data.parquet.kinds import is_list
from rechub_dist.data.parquet.manifest import Manifest
from rechub_dist.data.parquet.outputs import check_file, refuse_overlap, whole_file
from rechub_dist.data.parquet.pages import write_parquet
from rechub_dist.data.parquet.scan import THREADS, scan
from rechub_dist.errors import UserError, nearest

_MARK = {b"rechub_dist": b"vocabulary"}  # in the file's metadata
_WHAT = "a vocabulary that rechub-dist has written"
_WAITING = 1_000_000  # counts that wait before they are merged


class Frequencies:
    """The counts of values that come in pieces.

    Pieces wait until they hold as many counts as have been merged (a million at least). So memory is bounded by the
    number of distinct values, whatever the rows: about 120 bytes for each integer at the peak, when pieces are merged,
    and 220 for a short string (measured on six million).

    Args:
        kind: int64, uint64 or large_string (see `value_type`).
    """

    def __init__(self, kind: pa.DataType) -> None:
        self._schema = pa.schema([("value", kind), ("count", pa.int64())])
        self._merged = self._schema.empty_table()
        self._waiting: list[pa.Table] = []

    def add(self, counted: pa.Table) -> None:
        """Add the counts of a piece, as `count_values` gives them."""
        self._waiting.append(counted)
        if sum(piece.num_rows for piece in self._waiting) >= max(_WAITING, self._merged.num_rows):
            self._merge()

    def __len__(self) -> int:
        """The number of distinct values."""
        self._merge()
        return int(self._merged.num_rows)

    @property
    def merged(self) -> int:
        """The number of distinct values among those merged so far: what takes memory, and costs nothing to ask."""
        return int(self._merged.num_rows)

    def sorted(self) -> pa.Table:
        """Columns `value` and `count`, by count, the most frequent first, then by value."""
        self._merge()
        return self._merged.sort_by([("count", "descending"), ("value", "ascending")])

    def _merge(self) -> None:
        if self._waiting:
            together = pa.concat_tables([self._merged, *self._waiting])
            self._waiting = []
            summed = together.group_by("value").aggregate([("count", "sum")])
            self._merged = summed.rename_columns({"count_sum": "count"}).select(["value", "count"])


def value_type(kind: pa.DataType) -> pa.DataType | None:
    """The type that values of a column are counted in; None where the column holds neither integers nor strings."""
    kind = kind.value_type if is_list(kind) else kind
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if is_string(kind):
        return pa.large_string()
    if not pa.types.is_integer(kind):
        return None
    return pa.uint64() if pa.types.is_uint64(kind) else pa.int64()


def count_values(column: pa.ChunkedArray, kind: pa.DataType) -> pa.Table:
    """The distinct values of a piece of a column (of its lists' elements) and their counts; nulls are left out."""
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
    """A vocabulary that has been written: values seen and their occurrences, how many of each were kept, and rows."""

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
    progress: Callable[[int, int], None] | None = None,
    threads: int = THREADS,
) -> list[VocabularySummary]:
    """Count the values of columns in one pass, and write the vocabulary of those that are frequent enough.

    Args:
        path: the Parquet data.
        columns: integers or strings, or lists of them.
        out: a `.parquet` file for one vocabulary over all of the columns (features that share a table need that), or
            a folder for one a column, `<column>.parquet`.
        min_count: values that occur less often are left out.
        max_size: keep the most frequent ones only.
        first_id: the id of the most frequent value; the ids below are free, for unknown values for one.
        progress: called with the row groups that are done and their number.
        threads: that read.

    Raises:
        UserError: no such column, a column of another type, columns of different types for one vocabulary, bad data,
            or no value that is frequent enough.
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
        raise UserError(f"{path}: one vocabulary needs columns of one type, but column {listed}; make one a column")
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
        write_vocabulary(target, frequencies, min_count, max_size, first_id, out_columns[target])
        for target, frequencies in found.items()
    ]


def vocabulary_name(column: str) -> str:
    """The name of the file of a column's vocabulary; what has a meaning in paths and patterns is written as `%2F`."""
    return re.sub(r"[/\\?*\[\]%\x00-\x1f]", lambda found: f"%{ord(found[0]):02X}", column) + ".parquet"


def is_vocabulary(path: Path) -> bool:
    """Whether a file is a vocabulary that was written here."""
    try:
        return (pq.read_schema(path).metadata or {}).items() >= _MARK.items()
    except (OSError, pa.ArrowException):
        return False


def frequent(every: pa.Table, min_count: int, max_size: int | None = None, first_id: int = 1) -> pa.Table:
    """Of sorted counts, those that reach `min_count`, with their ids: columns `value`, `id` (int64) and `count`."""
    kept = every.filter(pc.field("count") >= min_count).slice(0, max_size)
    return kept.add_column(1, "id", pa.array(np.arange(first_id, first_id + kept.num_rows)))


def write_vocabulary(
    path: Path,
    frequencies: Frequencies,
    min_count: int,
    max_size: int | None = None,
    first_id: int = 1,
    columns: tuple[str, ...] = (),
) -> VocabularySummary:
    """Write the values that occur `min_count` times: `value`, `id` (int64, in the order of frequency) and `count`.

    Raises:
        UserError: where there is none, or the file cannot be written.
    """
    every = frequencies.sorted()
    kept = frequent(every, min_count, max_size, first_id)
    if not kept.num_rows:
        most = every["count"][0].as_py() if every.num_rows else 0
        raise UserError(
            f"{path}: no value of {', '.join(columns) or 'the column'} occurs {min_count} times (the most frequent "
            f"one of {every.num_rows} does {most} times); lower min_count"
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
