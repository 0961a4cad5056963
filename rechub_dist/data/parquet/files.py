"""The Parquet files of a data set, and reading row groups from them."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rechub_dist.data.parquet.conditions import Conditions
from rechub_dist.data.parquet.footers import corrupt, etag, footer_bytes, parse_footer, read_exactly
from rechub_dist.data.parquet.pages import open_parquet
from rechub_dist.data.parquet.row_group import RowGroup, UndecodableError, path_of
from rechub_dist.data.parquet.storage import Store
from rechub_dist.skips import BadFileError

T = TypeVar("T")

_OPEN_FILES = 64
_PIECE, _GAP = 8 << 20, 64 << 10  # bytes fetched at once after a failure; bytes between two columns fetched with them


@dataclass(frozen=True)
class DataFile:
    """One Parquet file as it was when the manifest was read, or those of its rows that meet conditions.

    Attributes:
        path: path or address, as users write it.
        name: relative to the data set's root.
        size: in bytes.
        counts: rows of each row group.
        modified: time of modification in nanoseconds; None if the store does not report it.
        etag: version of the object; None if the store does not report it.
        store: the file system.
        where: conditions; rows that do not meet them are invisible.
        kept: rows of each row group that meet them.
    """

    path: str
    name: str
    size: int
    counts: tuple[int, ...]
    modified: int | None
    etag: str | None
    store: Store = field(repr=False)
    where: Conditions
    kept: tuple[int, ...]

    def whole(self) -> DataFile:
        """The file with all its rows."""
        return replace(self, where=Conditions(()), kept=self.counts)


class OpenFiles:
    """A cache of open files for a pass over a data set; the least recently used are closed.

    Thread-safe: a file that one thread is reading is opened once more for another.
    """

    def __init__(self) -> None:
        self._files: OrderedDict[str, pq.ParquetFile] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, file: DataFile, group: int, columns: list[str]) -> pa.Table:
        """Columns of the rows of a row group that meet the file's conditions. Raises as `convert`."""
        return self.convert(file, group, columns, RowGroup.table)

    def convert(self, file: DataFile, group: int, uses: list[str], conversion: Callable[[RowGroup], T]) -> T:
        """The result of `conversion` on the rows of a row group that meet the file's conditions.

        The first attempt leaves the reading to Arrow. If it fails, further attempts fetch the bytes in pieces, each of
        which has to succeed only once, and then decode them: if complete bytes cannot be decoded, the file is corrupt;
        anything else is a failure of the store, and is retried until the deadline.

        Args:
            file: the file.
            group: index of the row group in it.
            uses: the columns in the order in which the conversion uses them, each as often as it is used.
            conversion: called in another thread, and once more if an attempt fails or hangs, so it must not change what
                an earlier call may still use. Its own exceptions are raised here.

        Raises:
            BadFileError: the file is missing or corrupt, or has changed since the manifest was read.
            UserError: the store has failed until its deadline.
        """
        # An attempt that hangs keeps its file: it is removed here, and put back only by an attempt that succeeds.
        with self._lock:
            opened = self._files.pop(file.path, None)
        pieces: dict[int, bytes] = {}

        def work(attempt: int) -> tuple[pq.ParquetFile, Future[T]]:
            parquet = source = opened if opened and attempt == 0 else open_file(file)
            columns = {*uses, *file.where.names}
            if columns - set(parquet.schema_arrow.names):
                raise _changed(file)
            if attempt:
                _fetch(parquet, file, group, columns, pieces)
                source = _in_memory(parquet, file, pieces)
            outcome: Future[T] = Future()
            try:
                found = RowGroup(source, group, uses, whole=file.store.remote and attempt == 0)
                outcome.set_result(conversion(_meeting(file, source, group, found)))
            except UndecodableError as error:
                raise corrupt(file.path, error.reason, f"row group {group}") if attempt else error.reason from None
            except Exception as error:  # not the store's fault: a retry would not help
                outcome.set_exception(error)
            return parquet, outcome

        parquet, outcome = file.store.with_retries(work, f"{file.path}: row group {group}")
        with self._lock:
            spare = self._files.pop(file.path, None)  # another thread's
            self._files[file.path] = parquet
            if spare is None and len(self._files) > _OPEN_FILES:
                _, spare = self._files.popitem(last=False)
        if spare is not None:
            spare.close(force=True)
        return outcome.result()

    def close(self) -> None:
        """Close all files."""
        while self._files:
            self._files.popitem()[1].close(force=True)


def count_rows(file: DataFile) -> tuple[int, ...]:
    """The rows of each row group that meet the file's conditions. Raises as `OpenFiles.convert`."""
    whole, files = file.whole(), OpenFiles()
    try:
        return tuple(
            len(file.where.rows(files.read(whole, group, file.where.names), file.path))
            for group in range(len(file.counts))
        )
    finally:
        files.close()


def open_file(file: DataFile) -> pq.ParquetFile:
    """Open a file, after a check that it is still the one of the manifest.

    Raises:
        BadFileError: it has changed, or its footer is corrupt.
        OSError: the store fails; to be called within `Store.with_retries`.
    """
    source = file.store.open(file.store.inside(file.path))
    version = etag(source)
    if version is not None and file.etag is not None:
        same = version == file.etag
    else:
        info = file.store.filesystem.get_file_info(file.store.inside(file.path))
        same = file.modified is None or info.mtime_ns == file.modified
    if not same or source.size() != file.size:
        raise _changed(file)
    metadata = parse_footer(footer_bytes(source), file.path)
    if tuple(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)) != file.counts:
        raise _changed(file)
    # from an object store, a row group's bytes are fetched in few requests
    return open_parquet(source, metadata=metadata, pre_buffer=file.store.remote)


def _meeting(file: DataFile, source: pq.ParquetFile, group: int, found: RowGroup) -> RowGroup:
    """The rows of a row group that meet the file's conditions."""
    if not file.where.items:
        return found
    rows = file.where.rows(RowGroup(source, group, file.where.names).table(), file.path)
    if len(rows) != file.kept[group]:
        raise _changed(file)
    return found if len(rows) == found.num_rows else found.take(rows)


def _fetch(parquet: pq.ParquetFile, file: DataFile, group: int, columns: set[str], pieces: dict[int, bytes]) -> None:
    """Add to `pieces`, by offset, the bytes of a row group's columns that are not there yet."""
    source: Any = file.store.open(file.store.inside(file.path))
    with source:
        try:
            spans = _spans(parquet.metadata, group, columns)
        except UndecodableError as error:
            raise corrupt(file.path, error.reason, f"row group {group}") from None
        for start, stop in spans:
            if not 0 <= start <= stop <= file.size:
                raise corrupt(file.path, ValueError("its footer points beyond its end"), f"row group {group}")
            for offset in range(start, stop, _PIECE):
                if offset not in pieces:
                    pieces[offset] = read_exactly(source, offset, min(_PIECE, stop - offset))


def _in_memory(parquet: pq.ParquetFile, file: DataFile, pieces: dict[int, bytes]) -> pq.ParquetFile:
    """The file in memory, with zeros outside of the pieces."""
    content = np.zeros(file.size, np.uint8)  # untouched pages take no memory
    for offset, piece in pieces.items():
        content[offset : offset + len(piece)] = np.frombuffer(piece, np.uint8)
    return open_parquet(pa.BufferReader(pa.py_buffer(content)), metadata=parquet.metadata)


def _spans(metadata: pq.FileMetaData, group: int, columns: set[str]) -> list[tuple[int, int]]:
    """The byte ranges (start, stop) of a row group's columns; ranges with small gaps are merged."""
    places = []
    row_group = metadata.row_group(group)
    for index in range(row_group.num_columns):
        chunk = row_group.column(index)
        path = path_of(chunk)
        if any(path == name or path.startswith(f"{name}.") for name in columns):
            first = chunk.dictionary_page_offset
            start = chunk.data_page_offset if first is None else min(first, chunk.data_page_offset)
            places.append((start, start + chunk.total_compressed_size))
    joined: list[tuple[int, int]] = []
    for start, stop in sorted(places):
        if joined and start - joined[-1][1] <= _GAP:
            joined[-1] = (joined[-1][0], max(stop, joined[-1][1]))
        else:
            joined.append((start, stop))
    return joined


def _changed(file: DataFile) -> BadFileError:
    return BadFileError(
        f"{file.path}: it has changed since the run began; leave the data of a run as it is, or begin a new run",
        "changed",
    )
