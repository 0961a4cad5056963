"""What lies where: the Parquet files behind a path, their row groups and their schema, from the footers alone."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from rechub_dist.errors import UserError

_GLOB = re.compile(r"[*?\[]")
_URI_GLOB = re.compile(r"[*\[]")  # in an address, `?` begins the options


@dataclass(frozen=True)
class DataFile:
    """One Parquet file: where it is, its name below the data set's root, its bytes, and the rows of its row groups."""

    path: str
    name: str
    size: int
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Manifest:
    """A data set: its files in the order of their names, and the schema that they share.

    Attributes:
        path: as it was given.
        files: the files, sorted by name.
        schema: the columns' names and Arrow types; equal in all files but for the columns' order.
        filesystem: where the files are.
    """

    path: str
    files: tuple[DataFile, ...]
    schema: pa.Schema
    filesystem: Any = field(repr=False)

    @classmethod
    def read(cls, path: str, threads: int = 16) -> Manifest:
        """Find the files of `path` and read their footers, `threads` at a time.

        Args:
            path: a file; a folder, of which all `*.parquet` files below it count but those with a name (or a folder)
                that begins with `.` or `_`; or a pattern with `*`, `?`, `[...]` within a name and `**` over folders.
                An address such as `s3://bucket/folder` works as well.

        Raises:
            UserError: where nothing is there, a file cannot be read, there are no rows, or the files' columns differ.
        """
        filesystem, found = _find(path)
        with ThreadPoolExecutor(min(threads, len(found))) as pool:
            footers = list(pool.map(lambda item: _footer(filesystem, item[0].path), found))
        files, schemas = [], []
        for (info, name), (counts, schema) in zip(found, footers, strict=True):
            files.append(DataFile(info.path, name, int(info.size), counts))
            if sum(counts):  # writers give the columns of an empty file any type
                schemas.append((info.path, schema))
        if not schemas:
            raise UserError(f"{path}: there are no rows in its {len(files)} Parquet file(s); write the data again")
        for other, schema in schemas[1:]:
            _check_equal(schemas[0], (other, schema))
        return cls(path, tuple(files), schemas[0][1].remove_metadata(), filesystem)

    @cached_property
    def rows(self) -> int:
        """Rows of the data set."""
        return sum(self.counts)

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Rows of each row group, over all files in their order."""
        return tuple(count for file in self.files for count in file.counts)

    @cached_property
    def groups(self) -> tuple[tuple[DataFile, int], ...]:
        """For each entry of `counts`, the file and the index of the row group in it."""
        return tuple((file, index) for file in self.files for index in range(len(file.counts)))

    def fingerprint(self) -> str:
        """16 hexadecimal digits that identify the data by the files' names and row groups, wherever it lies."""
        text = "\n".join(f"{file.name}:{','.join(map(str, file.counts))}" for file in self.files)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def describe(path: str) -> dict[str, Any]:
    """A summary of a data set for people: what one wants to know before writing its schema.

    Returns:
        `path`, `files`, `bytes`, `rows`, `row_groups`, `row_group_rows` (`{min, max}`), `fingerprint`, and `columns`:
        a list of `{name, type, nulls}`. Nulls of flat columns come from the statistics in the footers; where there
        are none, and for lists (missing lists count, not missing elements), the column is read.

    Raises:
        UserError: as `Manifest.read`, and where a column has to be read and cannot.
    """
    manifest = Manifest.read(path)
    nulls = dict.fromkeys(manifest.schema.names, 0)
    for file in manifest.files:
        if sum(file.counts):
            for name, count in _nulls(manifest.filesystem, file, manifest.schema).items():
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


def unreadable(path: str, error: Exception, what: str = "it") -> UserError:
    """The one line for a file (or `what` in it) that Arrow fails to read."""
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if isinstance(error, OSError) and error.errno:
        return UserError(f"{path}: {what} cannot be read ({reason}); check that it is there and may be read")
    return UserError(f"{path}: {what} is truncated or corrupt ({reason}); write the file again or remove it")


def _find(path: str) -> tuple[Any, list[tuple[Any, str]]]:
    """The file system, and the files with their names below the root, sorted by name."""
    address = "://" in path
    base, _, options = path.partition("?") if address else (path, "", "")
    glob = _URI_GLOB if address else _GLOB
    parts = base.split("/")
    fixed = next((i for i, part in enumerate(parts) if glob.search(part)), len(parts))
    root = "/".join(parts[:fixed]) or ("/" if base.startswith("/") else ".")
    pattern = "/".join(parts[fixed:])
    try:
        if address:
            filesystem, root = pafs.FileSystem.from_uri(root + ("?" + options if options else ""))
        else:
            filesystem = pafs.LocalFileSystem()
        info = filesystem.get_file_info(root)
        if info.type == pafs.FileType.File and not pattern:
            return filesystem, [(info, PurePosixPath(root).name)]
        if info.type != pafs.FileType.Directory:
            raise UserError(f"{path}: there is no such file or folder; check the path of the data")
        listing = filesystem.get_file_info(pafs.FileSelector(root, recursive=True))
    except (OSError, pa.ArrowException) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{path}: cannot be listed ({str(error).splitlines()[0]}); check the path of the data"
        ) from None
    wanted = _translate(pattern) if pattern else re.compile(r"(?:[^._/][^/]*/)*[^._/][^/]*\.parquet")
    names = [(info, _below(info.path, root)) for info in listing if info.type == pafs.FileType.File]
    found = sorted((item for item in names if wanted.fullmatch(item[1])), key=lambda item: item[1])
    if not found and pattern:
        raise UserError(f"{path}: no file matches; check the pattern")
    if not found:
        raise UserError(f"{path}: there is no *.parquet file in this folder; name the folder that holds the data")
    return filesystem, found


def _below(path: str, root: str) -> str:
    """`path` relative to `root`, as the listing of `root` gives it."""
    root = root.rstrip("/")
    return path[len(root) + 1 :] if path.startswith(root + "/") else path.removeprefix("/")


def _translate(pattern: str) -> re.Pattern[str]:
    """A glob as a regular expression: `**` stands for any folders, the other signs for parts of one name.

    As in a shell, a name that begins with a dot is matched only where the pattern says the dot.
    """
    text = ""
    for match in re.finditer(r"\*\*/|\*\*|\*|\?|\[!?\]?[^\]]*\]|.", pattern):
        token = match.group()
        if len(token) > 1 or token in "*?":
            text += r"(?!\.)" if match.start() == 0 or pattern[match.start() - 1] == "/" else ""
        if token == "**/":
            text += r"(?:(?!\.)[^/]+/)*"
        elif token == "**":
            text += ".*"
        elif token == "*":
            text += "[^/]*"
        elif token == "?":
            text += "[^/]"
        elif len(token) > 1:
            text += (
                "[" + ("^" if token[1] == "!" else "") + re.escape(token[1:-1].lstrip("!")).replace(r"\-", "-") + "]"
            )
        else:
            text += re.escape(token)
    return re.compile(text)


def _footer(filesystem: Any, path: str) -> tuple[tuple[int, ...], pa.Schema]:
    """Rows of each row group, and the schema. Raises UserError for a file without a readable footer."""
    try:
        with filesystem.open_input_file(path) as source:
            parquet = pq.ParquetFile(source)
            metadata, schema = parquet.metadata, parquet.schema_arrow
            return tuple(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)), schema
    except (OSError, pa.ArrowException) as error:
        raise unreadable(path, error) from None


def _check_equal(first: tuple[str, pa.Schema], other: tuple[str, pa.Schema]) -> None:
    """Raise UserError where the columns' names or types differ."""
    mine, theirs = ({f.name: str(f.type) for f in schema} for _, schema in (first, other))
    if mine == theirs:
        return
    differences = [
        f"column {name!r} is {theirs.get(name, 'missing')}, not {mine.get(name, 'missing')}"
        for name in sorted(mine.keys() | theirs.keys())
        if mine.get(name) != theirs.get(name)
    ]
    more = f" and {len(differences) - 1} more" if len(differences) > 1 else ""
    raise UserError(
        f"{other[0]}: its columns differ from those of {first[0]}: {differences[0]}{more}; write the files with one "
        "schema, or keep them in separate folders"
    )


def _nulls(filesystem: Any, file: DataFile, schema: pa.Schema) -> dict[str, int]:
    """Missing values of each column of one file."""
    try:
        with filesystem.open_input_file(file.path) as source:
            parquet = pq.ParquetFile(source)
            counts = _null_statistics(parquet.metadata, schema.names)
            for name in schema.names:
                if name not in counts:
                    groups = range(len(file.counts))
                    counts[name] = sum(_column(parquet, group, name).null_count for group in groups)
            return counts
    except (OSError, pa.ArrowException) as error:
        raise unreadable(file.path, error) from None


def _column(parquet: pq.ParquetFile, group: int, name: str) -> pa.ChunkedArray:
    return parquet.read_row_group(group, columns=[name], use_threads=False).column(name)


def _null_statistics(metadata: Any, names: Sequence[str]) -> dict[str, int]:
    """Null counts of the flat columns whose every row group has them in its statistics."""
    counts: dict[str, int] = {}
    flat = {metadata.schema.column(i).path: i for i in range(metadata.num_columns)}
    for name in names:
        if name in flat and metadata.schema.column(flat[name]).max_repetition_level == 0:
            groups = [metadata.row_group(g).column(flat[name]) for g in range(metadata.num_row_groups)]
            if all(g.is_stats_set and g.statistics.has_null_count for g in groups):
                counts[name] = sum(g.statistics.null_count for g in groups)
    return counts
