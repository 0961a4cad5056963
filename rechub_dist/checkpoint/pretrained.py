"""Load pretrained vectors from a file into this rank's pieces of a table."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from rechub_dist.checkpoint.load import READ
from rechub_dist.checkpoint.tensors import Entry
from rechub_dist.config import PretrainedConfig, StorageConfig
from rechub_dist.data.parquet.files import DataFile, OpenFiles
from rechub_dist.data.parquet.kinds import is_list
from rechub_dist.data.parquet.manifest import Manifest
from rechub_dist.data.parquet.storage import locate
from rechub_dist.errors import UserError, nearest, one_line

T = TypeVar("T")


@torch.no_grad()
def load_vectors(config: PretrainedConfig, entry: Entry, storage: StorageConfig) -> int:
    """Fill rows of a table, given the entry of its weights; returns the number of vectors in the file. Not collective.

    From a .npy file this rank's rows are read, 64 MiB at a time; from a Parquet file the ids, and the vectors of row
    groups that contain one of this rank's ids, one row group at a time.

    Raises:
        UserError: names the file, what is wrong with it and what is needed.
    """
    if config.file.partition("?")[0].endswith(".npy"):
        return _Npy(config, entry, storage).load()
    return _Parquet(config, entry, storage).load()


class _Vectors:
    def __init__(self, config: PretrainedConfig, entry: Entry, storage: StorageConfig) -> None:
        self.config = config
        self.entry = entry
        self.rows, self.width = entry.shape
        self.storage = storage
        self.store, self.path = locate(config.file, storage)

    def with_retries(self, work: Callable[[Any], T]) -> T:
        """Open the file and return `work(file)`, with retries."""

        def attempt(_number: int) -> T:
            with self.store.open(self.path) as source:
                return work(source)

        return self.store.with_retries(attempt, f"warm_start.embeddings: {self.config.file}")

    def wrong(self, what: str) -> UserError:
        """An error about the file."""
        return UserError(f"warm_start.embeddings: {self.config.file}: {what} (table {self.config.table!r})")

    def checked(self, vectors: np.ndarray) -> Tensor:
        """The vectors as the table is to have them. Raises UserError for NaN, infinity, and what its range lacks."""
        found = torch.from_numpy(vectors)
        if not found.isfinite().all():
            raise self.wrong("has non-finite vectors; replace or remove them")
        found = found.to(self.entry.dtype)
        if not found.isfinite().all():
            raise self.wrong("has numbers that fp16 cannot hold (up to 65,504); set precision: fp32 for the table")
        return found


class _Npy(_Vectors):
    def load(self) -> int:
        shape, dtype, start = self._header()
        for piece in self.entry.pieces:
            rows, columns = piece.values.shape
            step = max(1, READ // max(1, self.width * dtype.itemsize))
            for first in range(piece.row, min(piece.row + rows, shape[0]), step):
                last = min(first + step, piece.row + rows, shape[0])
                row = self.width * dtype.itemsize
                offset, length = start + first * row, (last - first) * row
                data = self.with_retries(lambda source, o=offset, n=length: source.read_at(n, o))  # type: ignore[misc]
                if len(data) < length:
                    raise self.wrong(f"ends before row {last:,} of {shape[0]:,}; write it again")
                vectors = np.frombuffer(data, dtype).reshape(last - first, self.width)
                part = vectors[:, piece.column : piece.column + columns].astype(np.float32)
                piece.values[first - piece.row : last - piece.row].copy_(self.checked(part))
        return shape[0]

    def _header(self) -> tuple[tuple[int, ...], np.dtype[Any], int]:
        head = io.BytesIO(self.with_retries(lambda source: source.read_at(min(source.size(), 4096), 0)))
        try:
            version = np.lib.format.read_magic(head)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = read(head)
        except Exception as error:  # whatever NumPy's parser of Python literals raises
            raise self.wrong(f"not a .npy file ({one_line(error)[:100]}); write it by numpy.save") from error
        if dtype.kind != "f" or fortran or len(shape) != 2:
            raise self.wrong(
                f"has {dtype} {shape}{' in column order' * fortran}; floats [rows, width] in row order are needed"
            )
        if shape[1] != self.width or shape[0] > self.rows:
            raise self.wrong(f"is {shape[0]} x {shape[1]}, but the table is {self.rows} x {self.width}; make it fit")
        return shape, dtype, head.tell()


class _Parquet(_Vectors):
    def load(self) -> int:
        manifest = self._of_file(lambda: Manifest.read(self.config.file, self.storage))
        for column in (self.config.id, self.config.vector):
            if column not in manifest.schema.names:
                raise self.wrong(f"has no column {column!r}: {nearest(column, manifest.schema.names)}")
        ids, vector = (manifest.schema.field(name).type for name in (self.config.id, self.config.vector))
        if not pa.types.is_integer(ids):
            raise self.wrong(f"column {self.config.id!r} is {ids}; integers, row numbers of the table, are needed")
        if not is_list(vector) or not pa.types.is_floating(vector.value_type):
            raise self.wrong(f"column {self.config.vector!r} is {vector}; lists of floats are needed")
        self._seen = [np.zeros(len(piece.values), dtype=bool) for piece in self.entry.pieces]
        self._files = OpenFiles()
        for file, group in manifest.groups:
            self._group(file, group)
        self._files.close()
        return manifest.rows

    def _of_file(self, work: Callable[[], T]) -> T:
        """What `work` reads, what is wrong with the file being said of the key that names it."""
        try:
            return work()
        except UserError as error:
            raise UserError(f"warm_start.embeddings: {error}") from error

    def _column(self, file: DataFile, group: int, name: str) -> Any:
        found = self._of_file(lambda: self._files.read(file, group, [name])).column(name).combine_chunks()
        if found.null_count:
            raise self.wrong(f"column {name!r} has nulls in row group {group}; give each row a value")
        return found

    def _group(self, file: DataFile, group: int) -> None:
        ids = self._column(file, group, self.config.id).to_numpy(zero_copy_only=False)
        outside = (ids < 0) | (ids >= self.rows)
        if outside.any():
            raise self.wrong(
                f"id {ids[outside][0]} is out of range: the table has {self.rows} rows; enlarge it, or remove the id"
            )
        mine = [
            np.flatnonzero((ids >= piece.row) & (ids < piece.row + len(piece.values))) for piece in self.entry.pieces
        ]
        if not any(len(rows) for rows in mine):
            return
        column = self._column(file, group, self.config.vector)
        flat = column.flatten().to_numpy(zero_copy_only=False)
        if column.value_lengths().unique().to_pylist() != [self.width]:
            raise self.wrong(
                f"row group {group} has vectors that do not have the table's width, {self.width}; make them equal"
            )
        vectors = flat.reshape(len(ids), self.width)
        for piece, rows, seen in zip(self.entry.pieces, mine, self._seen, strict=True):
            target = ids[rows].astype(np.int64) - piece.row
            unique, counts = np.unique(target, return_counts=True)
            twice = unique[(counts > 1) | seen[unique]]
            if len(twice):
                raise self.wrong(f"id {twice[0] + piece.row} is duplicated; remove one")
            seen[unique] = True
            part = vectors[rows, piece.column : piece.column + piece.values.shape[1]].astype(np.float32)
            piece.values[torch.from_numpy(target)] = self.checked(part).to(piece.values)
