"""The manifest of a data set: its Parquet files, their row groups and schema, from the footers alone."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from rechub_dist.config import Selection, StorageConfig
from rechub_dist.data.parquet.files import DataFile, count_rows
from rechub_dist.data.parquet.footers import UNREADABLE, Footer, FooterCache, corrupt, read_footer
from rechub_dist.data.parquet.kinds import agree, family
from rechub_dist.data.parquet.listing import Found, find, partition_keys
from rechub_dist.data.parquet.pages import open_parquet
from rechub_dist.data.parquet.ranks import Alone, Ranks, divided
from rechub_dist.errors import UserError, nearest
from rechub_dist.skips import BadFileError, Skipped

Item = TypeVar("Item", Found, DataFile)
_DEFAULTS = StorageConfig()
_ALONE = Alone()

# Given a file's schema and path, what its columns are to the reader, by name. Files are consistent if that is the same
# for all, `null` agreeing with anything. Raises UserError for a file that is unusable by itself.
Fit = Callable[[pa.Schema, str], dict[str, str]]


def every_column(schema: pa.Schema, _where: str) -> dict[str, str]:
    """The strictest `Fit`: all files have the same columns, with types of the same family."""
    return {column.name: family(column.type) for column in schema}


@dataclass(frozen=True)
class Manifest:
    """A data set: its files in the order of their names, and their common schema.

    Attributes:
        path: as given.
        files: sorted by name; if there are several sources, source by source.
        schema: the columns' names, with Arrow types wide enough for all files: int64 if one file has int32 and another
            int64. Columns that are not read may be missing in some files.
        skip_bad: whether the rows of bad files are skipped instead of being an error.
        left_out: the files that are skipped as a whole, and so are not in `files`.
    """

    path: str
    files: tuple[DataFile, ...]
    schema: pa.Schema
    skip_bad: bool = False
    left_out: tuple[Skipped, ...] = ()

    @classmethod
    def read(
        cls,
        source: str | Selection | Sequence[str | Selection],
        settings: StorageConfig = _DEFAULTS,
        *,
        skip_bad: bool = False,
        threads: int = 16,
        ranks: Ranks = _ALONE,
        fit: Fit = every_column,
    ) -> Manifest:
        """Find the files of `source` and read their footers, or take them from the cache. Collective over `ranks`.

        If rows are selected by conditions, those that meet them are counted by row group, and the counts are cached,
        too.

        Args:
            source: a file; a folder, which stands for all `*.parquet` files below it, except names (of files or
                folders) that begin with `.` or `_`; or a pattern of either, with `*`, `?`, `[...]` within a name and
                `**` for any folders. Also an address such as `s3://bucket/folder`, a selection of hive partitions and
                rows, or a list of all these.
            settings: of the stores.
            skip_bad: leave out files without a readable footer, and those that do not fit or differ from most files.
            threads: number of footers that are read at once.
            ranks: the ranks that need the manifest, and divide the work.
            fit: decides whether files are usable and consistent.

        Raises:
            UserError: there is no file or no row, a file cannot be read, the files' columns differ, or conditions do
                not fit them.
        """
        sources = [source] if isinstance(source, str | Selection) else list(source)
        path = ", ".join(item if isinstance(item, str) else item.path for item in sources)
        found = ranks.from_main(lambda: [file for item in sources for file in find(item, settings)])
        twice = [file for file, count in Counter(item.path for item in found).items() if count > 1]
        if twice:
            raise UserError(f"{path}: {twice[0]} is in two of the paths; name each file once")
        ask = _Asking(settings, skip_bad, ranks, threads)
        footers = ask.about(str(sources), found, lambda item: read_footer(item.store, item.path))
        files: list[DataFile] = []
        left_out: list[Skipped] = []
        schemas: dict[str, pa.Schema] = {}
        for item, fault in zip(found, _faults(found, footers, path, fit, most=skip_bad), strict=True):
            footer = footers[len(files) + len(left_out)]
            if fault is None:
                assert isinstance(footer, Footer)
                files.append(_file(item, footer))
                schemas[item.path] = footer.schema
            elif skip_bad:
                left_out.append(Skipped(item.path, None, None, None, fault.reason, str(fault)))
            else:
                raise fault
        if any(file.where.items for file in files):
            files, bad = _counted(ask, f"{sources}: rows", files, schemas, path)
            left_out += bad
        shared = _united([schemas[file.path] for file in files if sum(file.counts)])
        return cls(path, tuple(files), shared, skip_bad, tuple(left_out))

    @cached_property
    def rows(self) -> int:
        """Rows of the data set."""
        return sum(self.counts)

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Rows of each row group that meet the conditions, over all files in their order."""
        return tuple(count for file in self.files for count in file.kept)

    @cached_property
    def groups(self) -> tuple[tuple[DataFile, int], ...]:
        """For each entry of `counts`, the file and the index of the row group in it."""
        return tuple((file, index) for file in self.files for index in range(len(file.counts)))

    def fingerprint(self) -> str:
        """16 hexadecimal digits that identify the data by its files' relative names and row groups, wherever it is.

        With conditions on rows, also by these and by the numbers of rows that meet them.
        """
        text = "\n".join(f"{file.name}:{','.join(map(str, file.counts))}" for file in self.files)
        text += "".join(f"\n{file.where}:{','.join(map(str, file.kept))}" for file in self.files if file.where.items)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def prepared_splits(path: str) -> tuple[str, ...]:
    """The names of the splits in a prepared folder on a local disk; () for any other path."""
    if not (Path(path) / "train").is_dir():
        return ()
    return tuple(name for name in ("train", "train_prefixes", "valid", "test") if (Path(path) / name).is_dir())


def describe(path: str) -> dict[str, Any]:
    """A summary of a data set for users who are about to write its schema.

    Returns:
        `path`, `files`, `bytes`, `rows`, `row_groups`, `row_group_rows` (`{min, max}`), `fingerprint`, and `columns`:
        a list of `{name, type, nulls}`. The nulls of flat columns are from the statistics in the footers; without
        these, and for lists (null lists count, null elements do not), the column is read.

    Raises:
        UserError: as `Manifest.read`, or a column cannot be read.
    """
    manifest = Manifest.read(path)
    nulls = dict.fromkeys(manifest.schema.names, 0)
    for file in manifest.files:
        if sum(file.counts):
            for name, count in _nulls(file, manifest.schema).items():
                nulls[name] += count
    sizes = [count for count in manifest.counts if count]
    return {
        "path": path,
        "files": len(manifest.files),
        "bytes": sum(file.size for file in manifest.files),
        "rows": manifest.rows,
        "row_groups": len(manifest.counts),
        "row_group_rows": {"min": min(sizes), "max": max(sizes)},
        "fingerprint": manifest.fingerprint(),
        "columns": [{"name": f.name, "type": str(f.type), "nulls": nulls[f.name]} for f in manifest.schema],
    }


@dataclass(frozen=True)
class _Asking:
    """Reads something from every file, by all ranks together, unless it is cached."""

    settings: StorageConfig
    skip_bad: bool
    ranks: Ranks
    threads: int

    def about(self, name: str, files: Sequence[Item], read: Callable[[Item], Footer]) -> list[Footer | BadFileError]:
        """The result of `read` for each file, cached under `name`; or with `skip_bad` its BadFileError. Collective."""
        cache, began = FooterCache(name), time.time()
        known = cache.load() if self.settings.cache else {}
        keys = [None if item.modified is None else (item.path, item.size, item.modified) for item in files]

        def one(place: int) -> Footer | BadFileError:
            key = keys[place]
            if key is not None and key in known:
                return known[key]
            try:
                return read(files[place])
            except BadFileError as error:
                if not self.skip_bad:
                    raise
                return error

        answers = divided(self.ranks, range(len(files)), one, self.threads)
        if self.settings.cache and any(key is not None and key not in known for key in keys):
            pairs = zip(keys, answers, strict=True)
            cache.store(((k, answer) for k, answer in pairs if k is not None and isinstance(answer, Footer)), began)
        return answers


def _file(item: Found, footer: Footer) -> DataFile:
    """A file with all its rows."""
    return DataFile(
        item.path,
        item.name,
        item.size,
        footer.counts,
        item.modified,
        footer.etag,
        item.store,
        item.where,
        kept=footer.counts,
    )


def _counted(
    ask: _Asking, name: str, files: list[DataFile], schemas: dict[str, pa.Schema], path: str
) -> tuple[list[DataFile], list[Skipped]]:
    """The files with their numbers of rows that meet the conditions; and those that are bad. Collective."""
    for file in files:
        schema = schemas[file.path]
        for column in file.where.names:
            if column not in schema.names:
                valid = [*partition_keys(file.path), *schema.names]
                raise UserError(
                    f"{path}: there is neither a partition nor a column {column!r}, which {file.where} needs; "
                    f"{nearest(column, valid)}"
                )
            if schema.names.count(column) > 1:
                raise UserError(
                    f"{file.path}: {schema.names.count(column)} columns are named {column!r}, which {file.where} "
                    f"needs; rename all but one"
                )
        file.where.rows(pa.table({name: pa.array([], schema.field(name).type) for name in file.where.names}), file.path)
    counted, bad = [], []
    answers = ask.about(name, files, lambda file: Footer(count_rows(file), schemas[file.path], file.etag))
    for file, answer in zip(files, answers, strict=True):
        if isinstance(answer, Footer):
            counted.append(replace(file, kept=answer.counts))
        else:
            bad.append(Skipped(file.path, None, None, None, answer.reason, str(answer)))
    if not any(count for file in counted for count in file.kept):
        rows = sum(sum(file.counts) for file in files)
        raise UserError(f"{path}: none of its {rows:,} rows meets {files[0].where}; check 'where'")
    return counted, bad


def _faults(
    found: list[Found], footers: list[Footer | BadFileError], path: str, fit: Fit, *, most: bool
) -> list[BadFileError | None]:
    """What is wrong with each file: its footer, its columns, or that these differ from the first file's (most files').

    Files without rows are always accepted, as writers give their columns arbitrary types.
    """
    fitting: dict[pa.Schema, dict[str, str]] = {}  # by schema, which many files share
    faults: dict[str, BadFileError] = {}
    columns: dict[str, dict[str, str]] = {}
    for item, footer in zip(found, footers, strict=True):
        if isinstance(footer, BadFileError):
            faults[item.path] = footer
        elif any(footer.counts):
            try:
                if footer.schema not in fitting:
                    fitting[footer.schema] = fit(footer.schema, item.path)
                columns[item.path] = fitting[footer.schema]
            except UserError as error:
                faults[item.path] = BadFileError(str(error), "schema")
    if not columns:
        if first := next((fault for fault in faults.values() if fault.reason == "schema"), None):
            raise first
        bad = next(iter(faults.values()), None)
        also = f" that can be read; the first that cannot: {bad}" if bad else "; write the data again"
        raise UserError(f"{path}: there are no rows in its {len(found)} Parquet file(s){also}")
    model = next(iter(columns))
    if most:
        [(usual, _)] = Counter(frozenset(own.items()) for own in columns.values()).most_common(1)
        model = next(file for file, own in columns.items() if own.items() == usual)
    for name, kind in columns[model].items():
        if kind.endswith("null"):
            columns[model] = {**columns[model], name: _first_kind(columns.values(), name)}
    for file, own in columns.items():
        if fault := _difference(model, columns[model], file, own):
            faults[file] = fault
    return [faults.get(item.path) for item in found]


def _first_kind(columns: Iterable[dict[str, str]], name: str) -> str:
    """What a column is in the first file in which it has values."""
    return next((own[name] for own in columns if not own.get(name, "null").endswith("null")), "null")


def _difference(model: str, wanted: dict[str, str], file: str, own: dict[str, str]) -> BadFileError | None:
    """What is wrong with a file whose columns are not those of the file `model`."""
    differences = [
        f"column {name!r} is {own.get(name, 'missing')}, not {wanted.get(name, 'missing')}"
        for name in sorted(wanted.keys() | own.keys())
        if not agree(wanted.get(name, ""), own.get(name, ""))
    ]
    if not differences:
        return None
    more = f" and {len(differences) - 1} more" if len(differences) > 1 else ""
    return BadFileError(
        f"{file}: its columns differ from those of {model}: {differences[0]}{more}; write the files with one "
        "schema, or keep them in separate folders",
        "schema",
    )


def _united(schemas: Sequence[pa.Schema]) -> pa.Schema:
    """The types that hold the values of all files, in the first file's order; the first file's if there are none."""
    different = list(dict.fromkeys(schemas))
    try:
        return pa.unify_schemas(different, promote_options="permissive")
    except pa.ArrowException:  # a dictionary beside plain strings; a duplicate name
        return different[0]


def _nulls(file: DataFile, schema: pa.Schema) -> dict[str, int]:
    """The number of nulls in each column of a file."""
    try:
        with file.store.open(file.store.inside(file.path)) as source:
            parquet = open_parquet(source)
            counts = _null_statistics(parquet.metadata, schema.names)
            for name in schema.names:
                if name not in counts:
                    groups = range(len(file.counts))
                    counts[name] = sum(_column(parquet, group, name).null_count for group in groups)
            return counts
    except UNREADABLE as error:
        raise corrupt(file.path, error) from None


def _column(parquet: pq.ParquetFile, group: int, name: str) -> pa.ChunkedArray:
    return parquet.read_row_group(group, columns=[name], use_threads=False).column(name)


def _null_statistics(metadata: Any, names: Sequence[str]) -> dict[str, int]:
    """The number of nulls in the flat columns for which all row groups have it in their statistics."""
    counts: dict[str, int] = {}
    flat = {metadata.schema.column(i).path: i for i in range(metadata.num_columns)}
    for name in names:
        if name in flat and metadata.schema.column(flat[name]).max_repetition_level == 0:
            groups = [metadata.row_group(g).column(flat[name]) for g in range(metadata.num_row_groups)]
            if all(g.is_stats_set and g.statistics.has_null_count for g in groups):
                counts[name] = sum(g.statistics.null_count for g in groups)
    return counts
