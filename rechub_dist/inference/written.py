"""Folders of Parquet parts that inference writes, local or in a store, whole once `_SUCCESS` is there. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import pyarrow as pa
import pyarrow.parquet as pq

from rechub_dist.config import StorageConfig
from rechub_dist.data.columns.fit import file_columns, reading
from rechub_dist.data.columns.values import one_array
from rechub_dist.data.parquet.files import OpenFiles
from rechub_dist.data.parquet.manifest import Manifest
from rechub_dist.data.parquet.pages import parquet_writer
from rechub_dist.data.parquet.partitions import COMPLETE
from rechub_dist.data.parquet.storage import join, locate, read_text
from rechub_dist.data.spec import BatchSpec
from rechub_dist.errors import UserError, nearest

ROWS_A_GROUP: Final = 1 << 17
SOURCE_FILE, SOURCE_ROW = "source_file", "source_row"


def part_name(number: int) -> str:
    """The name of a part of an output."""
    return f"part-{number:05d}.parquet"


class PartFile:
    """A part of an output, written group by group.

    Args:
        out: the folder, a path or an address.
        number: of the part.
        again: what to do again once a failure is mended: `predict`.
        storage: settings of the store.
        rows: of a row group.
    """

    def __init__(
        self,
        out: str,
        number: int,
        again: str,
        storage: StorageConfig | None = None,
        *,
        rows: int = ROWS_A_GROUP,
    ) -> None:
        self._out, self._again = out, again
        store, inside = locate(out, storage or StorageConfig())
        self._filesystem = store.filesystem
        self._path = f"{inside.rstrip('/')}/{part_name(number)}"
        self._rows = rows
        self._waiting: list[pa.Table] = []
        self._stream: pa.NativeFile | None = None
        self._writer: pq.ParquetWriter | None = None

    def write(self, table: pa.Table) -> None:
        """Write rows. Raises UserError if the store fails."""
        self._waiting.append(table)
        if sum(table.num_rows for table in self._waiting) >= self._rows:
            self._flush()

    def close(self) -> None:
        """Write what is left. Raises UserError if the store fails."""
        self._flush()
        if self._writer is not None and self._stream is not None:
            try:
                self._writer.close()
                self._stream.close()
            except OSError as error:
                raise _failed(self._out, self._again, error) from error

    def _flush(self) -> None:
        if not self._waiting:
            return
        table = pa.concat_tables(self._waiting).combine_chunks()
        self._waiting = []
        try:
            if self._writer is None:
                self._stream = self._filesystem.open_output_stream(self._path)
                self._writer = parquet_writer(self._stream, table.schema)
            self._writer.write_table(table.cast(self._writer.schema), row_group_size=self._rows)
        except OSError as error:
            raise _failed(self._out, self._again, error) from error


def finish(out: str, again: str, storage: StorageConfig | None = None, text: str = "") -> None:
    """Mark an output as whole, after all parts are closed, with a text. Raises UserError if the store fails."""
    store, inside = locate(out, storage or StorageConfig())
    try:
        with store.filesystem.open_output_stream(f"{inside.rstrip('/')}/{COMPLETE}") as sink:
            sink.write(text.encode())
    except OSError as error:
        raise _failed(out, again, error) from error


def _failed(where: str, again: str, error: OSError) -> UserError:
    return UserError(f"--out: {where} cannot be written: {error.strerror or error}; fix it and {again} again")


@dataclass(frozen=True)
class FileRows:
    """Rows of files for a bundle, in shares of their row groups.

    Attributes:
        manifest: the files.
        spec: what is read of a row.
        keep: columns to copy.
    """

    manifest: Manifest
    spec: BatchSpec
    keep: tuple[str, ...]

    @classmethod
    def of(cls, data: str, spec: BatchSpec, keep: Sequence[str], made: Sequence[str]) -> FileRows:
        """The rows of files.

        Args:
            data: Parquet file, folder, glob or address.
            spec: what is read of a row.
            keep: columns to copy.
            made: the names of the columns that are written beside them.

        Raises:
            UserError: no such data, data that does not fit, or a column to keep that is not there, or is one of `made`.
        """

        def fit(schema: pa.Schema, where: str) -> dict[str, str]:
            return file_columns(schema, spec, where)

        manifest = Manifest.read(data, fit=fit)
        names = manifest.schema.names
        for column in keep:
            if column in (SOURCE_FILE, SOURCE_ROW, *made):
                raise UserError(f"--keep {column}: a column of this name is what is written; leave it out")
            if (count := names.count(column)) != 1:
                what = f"{count} columns of this name; rename one" if count else "no such column"
                raise UserError(f"--keep {column}: {manifest.path} has {what}; {nearest(column, names)}")
        return cls(manifest, spec, tuple(keep))

    def groups(self, shard: int = 0, shards: int = 1) -> Iterator[tuple[pa.Table, pa.Table]]:
        """By row group of a share: the rows, and `source_file`, `source_row` (int64) and the columns to keep of them.

        Raises:
            UserError: a file cannot be read.
        """
        firsts = {file.path: 0 for file in self.manifest.files}
        opened = OpenFiles()
        try:
            for number, (file, group) in enumerate(self.manifest.groups):
                first, rows = firsts[file.path], file.counts[group]
                firsts[file.path] = first + rows
                if number % shards != shard:
                    continue
                uses = reading(self.spec, self.manifest.schema.names).uses
                table = opened.read(file.whole(), group, list(dict.fromkeys([*uses, *self.keep])))
                own = {
                    SOURCE_FILE: pa.repeat(file.path, rows),
                    SOURCE_ROW: pa.array(range(first, first + rows), pa.int64()),
                }
                own |= {name: one_array(table, name) for name in self.keep}
                yield table, pa.table(own)
        finally:
            opened.close()


@dataclass(frozen=True)
class Written:
    """Vectors that were written.

    Attributes:
        batches: of the columns asked for (all that there are, if none), row group by row group.
        fingerprint: what identifies items and model; '' if the folder does not say.
    """

    batches: Iterator[pa.Table]
    fingerprint: str


def read_vectors(folder: str, columns: Sequence[str]) -> Written:
    """The vectors in a folder that is whole.

    Raises:
        UserError: it is not whole, or has no such columns.
    """
    text = read_text(join(folder, COMPLETE), StorageConfig())
    if text is None:
        raise UserError(
            f"{folder} is neither a bundle nor a whole folder of vectors (it has no {COMPLETE}): rechub-dist vectors "
            "writes one"
        )
    manifest = Manifest.read(folder)
    names = list(columns) or list(manifest.schema.names)
    for name in names:
        if name not in manifest.schema.names:
            raise UserError(f"{folder} has no column {name!r}; {nearest(name, manifest.schema.names)}")

    def batches() -> Iterator[pa.Table]:
        opened = OpenFiles()
        try:
            for file, group in manifest.groups:
                yield opened.read(file, group, names)
        finally:
            opened.close()

    return Written(batches(), text.strip())
