"""What is in a checkpoint -> live tensors, whatever pieces either side has; in bounded memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rechub_dist.checkpoint.folder import Folder, step_folder
from rechub_dist.checkpoint.manifest import (
    BLOCK,
    MANIFEST,
    CheckpointManifest,
    DamagedError,
    SavedPiece,
    checksum,
    parse,
)
from rechub_dist.checkpoint.tensors import DTYPES, Entry, Piece, matrix_shape
from rechub_dist.errors import shown

READ = 64 << 20  # bytes that are read at once, at most, but for a single row that is longer
_GAP = 64 << 10  # unwanted bytes that are read rather than to ask twice


def read_manifest(folder: Folder, step: int) -> CheckpointManifest:
    """A checkpoint's manifest; every file that it names is there at its full size.

    Raises:
        DamagedError: says which file is missing, short or not readable.
    """
    name = step_folder(step)
    manifest = parse(bytes(folder.read(f"{name}/{MANIFEST}")), folder.path(f"{name}/{MANIFEST}"))
    for file, record in manifest.files.items():
        size = folder.size(f"{name}/{file}")
        if size is None:
            raise DamagedError(f"{folder.path(f'{name}/{file}')} is missing")
        if size != record.size:
            raise DamagedError(f"{folder.path(f'{name}/{file}')} is damaged: {size} bytes instead of {record.size}")
    _check_places(manifest, folder.path(f"{name}/{MANIFEST}"))
    return manifest


def _check_places(manifest: CheckpointManifest, path: str) -> None:
    """Check that whatever the manifest names is in its files, so that to read it takes no more than they hold."""
    for file, record in manifest.files.items():
        if len(record.checksums) != -(-record.size // BLOCK):
            raise DamagedError(f"{path}: {file} has {len(record.checksums)} checksums for {record.size} bytes")
    for key, saved in manifest.tensors.items():
        itemsize, found = DTYPES[saved.dtype].itemsize, 0
        for piece in saved.pieces:
            found += piece.rows * piece.columns
            end = piece.offset + piece.rows * piece.columns * itemsize
            if piece.file not in manifest.files or end > manifest.files[piece.file].size:
                raise DamagedError(
                    f"{path}: a piece of {shown(key)} ends at byte {end} of {shown(piece.file)}, outside it"
                )
        rows, columns = matrix_shape(saved.shape)
        if found < rows * columns:
            raise DamagedError(f"{path}: the checkpoint lacks {rows * columns - found} elements of {shown(key)}")


def blocks_of(manifest: CheckpointManifest, rank: int = 0, world_size: int = 1) -> list[tuple[str, int]]:
    """The blocks of files, (file, index), that a rank verifies: all ranks' are of about equal size."""
    blocks = [(file, i) for file, record in manifest.files.items() for i in range(len(record.checksums))]
    return blocks[len(blocks) * rank // world_size : len(blocks) * (rank + 1) // world_size]


def verify(folder: Folder, manifest: CheckpointManifest, blocks: Iterable[tuple[str, int]]) -> Iterator[int]:
    """Compare blocks with their checksums; yields the bytes of each that is good.

    Raises:
        DamagedError: names the file and the bytes.
    """
    for file, index in blocks:
        record = manifest.files[file]
        name = f"{step_folder(manifest.step)}/{file}"
        start = index * BLOCK
        length = min(BLOCK, record.size - start)
        if checksum(folder.read(name, start, length)) != record.checksums[index]:
            raise DamagedError(
                f"{folder.path(name)} is damaged: bytes {start} to {start + length} do not have their checksum"
            )
        yield length


def consume(work: Iterator[int]) -> None:
    """Do all of a work that is told step by step."""
    for _ in work:
        pass


@dataclass(frozen=True)
class _Read:
    """Whole rows of a saved piece, and the live values [rows, columns] that some of their columns go to."""

    file: str
    offset: int
    rows: int
    saved: SavedPiece
    dtype: torch.dtype
    first_column: int
    target: Tensor

    @property
    def length(self) -> int:
        return self.rows * self.saved.columns * self.dtype.itemsize

    def deliver(self, data: memoryview) -> None:
        values = torch.frombuffer(data, dtype=self.dtype).view(self.rows, self.saved.columns)
        columns = self.target.shape[1]
        self.target.copy_(values[:, self.first_column : self.first_column + columns])


@torch.no_grad()
def read_tensors(folder: Folder, manifest: CheckpointManifest, wanted: Iterable[tuple[str, Entry]]) -> None:
    """Fill this rank's pieces of tensors from those that the checkpoint has under the given names.

    Only the rows that are needed are read, 64 MiB at a time.

    Raises:
        DamagedError: a tensor is missing or has holes, or the file cannot be read.
    """
    reads = [read for key, entry in wanted for read in _reads(folder, manifest, key, entry)]
    reads.sort(key=lambda read: (read.file, read.offset))
    name = step_folder(manifest.step)
    for group in _groups(reads):
        start, end = group[0].offset, max(read.offset + read.length for read in group)
        data = folder.read(f"{name}/{group[0].file}", start, end - start)
        for read in group:
            read.deliver(data[read.offset - start : read.offset - start + read.length])


def read_rows(folder: Folder, manifest: CheckpointManifest, key: str) -> Iterator[Tensor]:
    """A whole tensor as a matrix, block of rows after block of rows, each 64 MiB at most.

    Raises:
        DamagedError: as `read_tensors`.
    """
    saved = manifest.tensors[key]
    rows, columns = matrix_shape(saved.shape)
    dtype = DTYPES[saved.dtype]
    step = max(1, READ // max(1, columns * dtype.itemsize))
    for start in range(0, rows, step):
        block = torch.empty(min(step, rows - start), columns, dtype=dtype)
        read_tensors(folder, manifest, [(key, Entry(saved.shape, dtype, (Piece(start, 0, block),), replicated=False))])
        yield block


def _reads(folder: Folder, manifest: CheckpointManifest, key: str, entry: Entry) -> Iterator[_Read]:
    saved = manifest.tensors.get(key)
    where = folder.path(step_folder(manifest.step))
    if saved is None:
        raise DamagedError(f"checkpoint {where} has no {key}")
    dtype = DTYPES[saved.dtype]
    for piece in entry.pieces:
        covered = 0
        for part in saved.pieces:
            rows, columns = piece.values.shape
            top, bottom = max(piece.row, part.row), min(piece.row + rows, part.row + part.rows)
            left, right = max(piece.column, part.column), min(piece.column + columns, part.column + part.columns)
            if top >= bottom or left >= right:
                continue
            covered += (bottom - top) * (right - left)
            width = part.columns * dtype.itemsize
            step = max(1, READ // max(1, width))
            for start in range(top, bottom, step):
                end = min(start + step, bottom)
                live = piece.values[start - piece.row : end - piece.row, left - piece.column : right - piece.column]
                offset = part.offset + (start - part.row) * width
                yield _Read(part.file, offset, end - start, part, dtype, left - part.column, live)
        if covered != piece.values.numel():
            raise DamagedError(f"checkpoint {where} lacks {piece.values.numel() - covered} elements of {key}")


def _groups(reads: list[_Read]) -> Iterator[list[_Read]]:
    """Reads, sorted by place, that are done in one: neighbours, up to 64 MiB."""
    group: list[_Read] = []
    end = 0
    for read in reads:
        near = group and read.file == group[0].file and read.offset <= end + _GAP
        if group and not (near and max(end, read.offset + read.length) - group[0].offset <= READ):
            yield group
            group, end = [], 0
        group.append(read)
        end = max(end, read.offset + read.length)
    if group:
        yield group
