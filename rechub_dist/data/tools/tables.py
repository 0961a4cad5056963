"""The splits of a data set as views of DuckDB, which reads their Parquet files out of core."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rechub_dist.config import StorageConfig
from rechub_dist.data.parquet.files import DataFile, OpenFiles
from rechub_dist.data.parquet.footers import Footer, read_footer
from rechub_dist.data.parquet.listing import find
from rechub_dist.data.parquet.manifest import Manifest, prepared_splits
from rechub_dist.data.parquet.scan import THREADS
from rechub_dist.data.parquet.storage import exists, is_remote, join, local_path
from rechub_dist.distributed.host import host_memory
from rechub_dist.errors import UserError, nearest, one_line, printable
from rechub_dist.redaction import redacted

SPLITS: Final = ("train", "train_prefixes", "valid", "test")
REMOTE_ROWS: Final = 5_000_000  # of a split in an object store that are read, unless a sample is asked for
_MEMORY, _MEMORY_SHARE = 4_000_000_000, 0.6  # bytes, and of what the host or the container has
_GROUPS = 64  # row groups that a sample is taken from, at least, if there are as many

_INTEGERS = {"TINYINT", "SMALLINT", "INTEGER", "BIGINT", "HUGEINT"}
_INTEGERS |= {f"U{name}" for name in _INTEGERS}
NUMBERS: Final = ("integer", "float", "decimal")
Progress = Callable[[str, int, int], None]  # what is being read, the number of steps done, of all


@dataclass(frozen=True)
class Split:
    """A split, or a data set without splits.

    Attributes:
        name: `train`, for example; empty without splits.
        path: path or address.
        manifest: its files; None if none of them has a row.
        schema: its columns, with Arrow types.
        rows: all rows.
        read: those that the view has: fewer than `rows` if it is a sample.
    """

    name: str
    path: str
    manifest: Manifest | None
    schema: pa.Schema
    rows: int
    read: int


@dataclass(frozen=True)
class Column:
    """A column of some splits.

    Attributes:
        name: in the files.
        arrow: its Arrow type by split; None where a split lacks the column.
        sql: its name in the views.
        types: by split, DuckDB's type; None where a split lacks the column or has no rows.
        type: the DuckDB type that holds the values of all splits.
        kind: integer, float, decimal, bool, text, binary, time (also dates), list, null or other.
    """

    name: str
    arrow: tuple[str | None, ...]
    sql: str
    types: tuple[str | None, ...]
    type: str
    kind: str

    @property
    def element(self) -> str:
        """For lists, the DuckDB type of their elements."""
        return _element(self.type)


class Tables:
    """The splits of a data set; a context manager.

    DuckDB reads local Parquet files itself. Of files elsewhere, and with `sample`, rows are first copied to Parquet
    files in a temporary folder, through the reader that training has (so with its retries).

    Args:
        path: prepared folder, or Parquet file, folder, pattern or address.
        sample: the most rows to read of each split; of a store, None stands for `REMOTE_ROWS`.
        memory: bytes for DuckDB; default 4 GB, or 60 % of what the host or the container has if that is less.
        progress: called while rows are copied.

    Attributes:
        path: as given, without secrets.
        root: the folder of `dataset.yaml`, if there is one.
        splits, columns: in their order.

    Raises:
        UserError: the data cannot be read.
    """

    def __init__(
        self,
        path: str,
        *,
        sample: int | None = None,
        memory: int | None = None,
        progress: Progress | None = None,
        settings: StorageConfig | None = None,
    ) -> None:
        self._stack = ExitStack()
        try:
            self._open(path, sample, memory, progress or _silent, settings or StorageConfig())
        except BaseException:
            self._stack.close()
            raise

    def _open(
        self, path: str, sample: int | None, memory: int | None, progress: Progress, settings: StorageConfig
    ) -> None:
        self.path, self._settings = redacted(path), settings
        names = _split_names(path, settings)
        alone = local_path(path) is not None and Path(str(local_path(path))).is_file()
        self.root = path if names else _above(path) if alone or _last(path) in SPLITS else path
        temporary = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="rechub-dist-"))
        self._folder = Path(temporary)
        bytes_ = memory or int(min(_MEMORY, _MEMORY_SHARE * host_memory()))
        options: dict[str, Any] = {
            "memory_limit": f"{bytes_}B",
            "temp_directory": f"{temporary}/spilled",
            "preserve_insertion_order": "false",
            "autoinstall_known_extensions": "false",
            "autoload_known_extensions": "false",
        }
        self._database = self._stack.enter_context(duckdb.connect(":memory:", config=options))
        self._database.execute("SET parquet_metadata_cache = true")  # known to DuckDB only now
        # Parquet statistics leave out NaN, and DuckDB concludes from those of half floats that there is none
        self._database.execute("SET disabled_optimizers = 'statistics_propagation'")
        found = [_split(name, join(path, name) if name else path, settings) for name in names or ("",)]
        if not any(split.rows for split in found):
            raise UserError(f"{path}: there are no rows in its Parquet files; write the data again")
        numbers = {name: i for i, name in enumerate(dict.fromkeys(name for s in found for name in s.schema.names))}
        views = [self._view(i, split, sample, numbers, progress) for i, split in enumerate(found)]
        self.splits = tuple(split for split, _ in views)
        self.columns = _columns(self.splits, [types for _, types in views], numbers)

    def __enter__(self) -> Tables:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def sampled(self) -> bool:
        """Whether some rows are not read."""
        return any(split.read < split.rows for split in self.splits)

    def column(self, name: str, option: str) -> Column:
        """The column of that name. Raises UserError, which names the option, if there is none."""
        for column in self.columns:
            if column.name == name:
                return column
        names = [column.name for column in self.columns]
        raise UserError(f"{option}: {self.path} has no column {printable(name)!r}; {nearest(name, names)}")

    def rows(self, sql: str) -> list[tuple[Any, ...]]:
        """The rows of a query. Raises UserError if the data cannot be read, or not within the memory."""
        try:
            return self._database.execute(sql).fetchall()
        except duckdb.OutOfMemoryException as error:
            raise UserError(
                f"{self.path}: DuckDB needs more memory or temporary disk space than it has "
                f"({one_line(error)[:150]}); profile fewer rows with --sample ROWS, or set TMPDIR to a larger disk"
            ) from None
        except duckdb.Error as error:
            raise UserError(f"{self.path}: DuckDB cannot read it ({one_line(error)[:300]}); check the files") from None

    def values(self, column: Column, splits: Sequence[int] | None = None, *, elements: bool = False) -> str:
        """SQL for rows (s: index of the split, v: value) of splits with rows that have the column, by default all.

        With `elements`, a row for each element of the lists.
        """
        chosen = range(len(self.splits)) if splits is None else splits
        parts = []
        for s in chosen:
            if (kind := column.types[s]) is not None:
                value = column.sql if kind == column.type else f"CAST({column.sql} AS {column.type})"
                parts.append(f"SELECT {s} AS s, {f'unnest({value})' if elements else value} AS v FROM split{s}")
        return " UNION ALL ".join(parts) or "SELECT 0 AS s, NULL AS v WHERE false"

    def sample(self, s: int, rows: int) -> None:
        """Make the view `sample`: at most so many rows of a split that has some, with their `position` in their file.

        They are from row groups spread evenly over the split, and the same ones each time.

        Raises:
            UserError: the data cannot be read.
        """
        split = self.splits[s]
        assert split.manifest is not None
        names = split.schema.names
        files = self._copied("sample", split, min(rows, split.rows), _silent)
        scan, _ = self._scan("sample", files)
        scan = f"{scan[:-1]}, file_row_number = true)"
        numbers = {column.name: column.sql for column in self.columns}
        columns = ", ".join(f"c{i} AS {numbers[name]}_" for i, name in enumerate(names))
        columns = f"SELECT {columns}, file_row_number AS position {scan}"
        renamed = ", ".join(f"{numbers[name]}_ AS {numbers[name]}" for name in names)
        self._database.execute(f"CREATE OR REPLACE VIEW sample AS SELECT {renamed}, position FROM ({columns})")

    def _view(
        self, index: int, split: Split, sample: int | None, numbers: dict[str, int], progress: Progress
    ) -> tuple[Split, dict[str, str]]:
        """Make the view of a split, with columns c0, c1, ... by `numbers`; returns it, and DuckDB's types by column."""
        if split.manifest is None:
            return split, {}
        names = split.schema.names
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise UserError(f"{split.path}: {names.count(twice)} columns are named {twice!r}; rename all but one")
        limit = REMOTE_ROWS if is_remote(split.path) and sample is None else sample
        few = limit if limit is not None and limit < split.rows else None
        if not is_remote(split.path) and few is None:
            files = [str(local_path(file.path)) for file in split.manifest.files if sum(file.counts)]
            scan, types = self._scan(f"split{index}", files)
            if set(types) == set(names):
                self._create(index, scan, {name: numbers[name] for name in names})
                return split, types
            # DuckDB ignores the case of names, has none that are empty, and renames what it cannot tell apart
        scan, types = self._scan(f"split{index}", self._copied(f"split{index}", split, few, progress))
        known = {name: f"c{i}" for i, name in enumerate(names)}
        self._create(index, scan, {known[name]: numbers[name] for name in names})
        read = split.rows if few is None else few
        return replace(split, read=read), {name: types[known[name]] for name in names}

    def _scan(self, view: str, files: list[str]) -> tuple[str, dict[str, str]]:
        """SQL that scans Parquet files, and DuckDB's types by the column's name in them."""
        self._database.execute(f"SET VARIABLE files_of_{view} = $1", [[_literal(file) for file in files]])
        scan = f"FROM read_parquet(getvariable('files_of_{view}'), hive_partitioning = false"
        types = {name: kind for name, kind, *_ in self.rows(f"DESCRIBE {scan})")}
        if len(files) > 1:  # all footers are read for this at each query, so only if they differ
            united = {name: kind for name, kind, *_ in self.rows(f"DESCRIBE {scan}, union_by_name = true)")}
            if united != types:
                scan, types = f"{scan}, union_by_name = true", united
        return f"{scan})", types

    def _create(self, index: int, scan: str, numbers: dict[str, int]) -> None:
        columns = ", ".join(f"{_quoted(name)} AS c{number}" for name, number in numbers.items())
        self._database.execute(f"CREATE VIEW split{index} AS SELECT {columns} {scan}")

    def _copied(self, view: str, split: Split, rows: int | None, progress: Progress) -> list[str]:
        """Copy a split's rows, or some of them, to local files with columns c0, c1, ...; returns the files."""
        assert split.manifest is not None
        names, opened = split.schema.names, OpenFiles()
        chosen = _chosen(split.manifest, rows)
        folder = self._folder / view
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()

        def copy(item: tuple[int, tuple[DataFile, int, int]]) -> str:
            number, (file, group, quota) = item
            table = opened.read(file, group, names).select(names)
            if quota < len(table):
                generator = np.random.default_rng(number)
                table = table.take(np.sort(generator.choice(len(table), quota, replace=False)))
            out = folder / f"{number}.parquet"
            pq.write_table(table.rename_columns([f"c{i}" for i in range(len(names))]), out)
            return str(out)

        try:
            with ThreadPoolExecutor(THREADS) as pool:
                files = []
                for file in pool.map(copy, enumerate(chosen)):
                    files.append(file)
                    progress(f"reading {split.name or 'rows'}", len(files), len(chosen))
                return files
        finally:
            opened.close()


def _chosen(manifest: Manifest, rows: int | None) -> list[tuple[DataFile, int, int]]:
    """Row groups, and how many rows to take of each: all, or `rows` of row groups that are spread evenly."""
    groups = [(file, group, count) for (file, group), count in zip(manifest.groups, manifest.counts, strict=True)]
    groups = [item for item in groups if item[2]]
    if rows is None:
        return groups
    number = min(_GROUPS, len(groups))
    while True:
        places = np.unique(np.linspace(0, len(groups) - 1, number).round().astype(int)).tolist()
        picked = [groups[place] for place in places]
        have = sum(count for *_, count in picked)
        if have >= rows or number == len(groups):
            break
        number = min(2 * number, len(groups))
    ends = np.cumsum([count for *_, count in picked])
    shares = np.diff([int(end) * rows // have for end in [0, *ends.tolist()]]).tolist()
    return [(file, group, share) for (file, group, _), share in zip(picked, shares, strict=True) if share]


def _split_names(path: str, settings: StorageConfig) -> tuple[str, ...]:
    """The names of the splits of a prepared folder, wherever it is; () for any other path."""
    if not is_remote(path):
        return prepared_splits(str(local_path(path)))
    if any(letter in path for letter in "*[") or path.partition("?")[0].endswith(".parquet"):
        return ()
    if not exists(join(path, "train"), settings):
        return ()
    return tuple(name for name in SPLITS if exists(join(path, name), settings))


def _split(name: str, path: str, settings: StorageConfig) -> Split:
    try:
        manifest = Manifest.read(path, settings)
    except UserError:
        if not name:
            raise
        footers = [read_footer(file.store, file.path) for file in find(path, settings)]
        if not all(isinstance(footer, Footer) and not any(footer.counts) for footer in footers):
            raise
        return Split(name, path, None, footers[0].schema, 0, 0)
    return Split(name, path, manifest, manifest.schema, manifest.rows, manifest.rows)


def _columns(splits: Sequence[Split], views: Sequence[dict[str, str]], numbers: dict[str, int]) -> tuple[Column, ...]:
    found = []
    for name, number in numbers.items():
        arrow = tuple(str(split.schema.field(name).type) if name in split.schema.names else None for split in splits)
        types = tuple(view.get(name) for view in views)
        kind = _common([kind for kind in types if kind is not None])
        found.append(Column(name, arrow, f"c{number}", types, kind, kind_of(kind)))
    return tuple(found)


def kind_of(type_: str) -> str:
    """The kind (see `Column`) of a DuckDB type."""
    if type_.endswith("]"):
        return "list"
    plain = type_.partition("(")[0]
    if plain in _INTEGERS:
        return "integer"
    kinds = {"FLOAT": "float", "DOUBLE": "float", "DECIMAL": "decimal", "BOOLEAN": "bool", "VARCHAR": "text"}
    kinds |= {"BLOB": "binary", "DATE": "time", '"NULL"': "null"}
    return "time" if plain.startswith("TIMESTAMP") else kinds.get(plain, "other")


def _common(types: list[str]) -> str:
    """A DuckDB type that holds the values of all of these."""
    types = [kind for kind in dict.fromkeys(types) if kind != '"NULL"'] or ['"NULL"']
    if len(types) == 1:
        return types[0]
    kinds = {kind_of(kind) for kind in types}
    if kinds == {"integer"}:
        return "HUGEINT"
    if kinds <= {*NUMBERS, "bool"}:
        return "DOUBLE"
    if kinds == {"time"}:
        return "TIMESTAMP"
    if kinds == {"list"}:
        return f"{_common([_element(kind) for kind in types])}[]"
    return "VARCHAR"


def _element(type_: str) -> str:
    return type_[: type_.rindex("[")]


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _literal(path: str) -> str:
    """A path as a pattern that matches it alone."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in path)


def _last(path: str) -> str:
    return path.partition("?")[0].rstrip("/").rpartition("/")[2]


def _above(path: str) -> str:
    """The folder that holds a path; with the options of an address."""
    base, mark, options = path.partition("?") if "://" in path else (path, "", "")
    above = base.rstrip("/").rpartition("/")[0]
    return (above or ("/" if base.startswith("/") else ".")) + mark + options


def _silent(_what: str, _done: int, _total: int) -> None:
    pass
