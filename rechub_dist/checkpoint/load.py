"""Load checkpoints into live tensors under any sharding, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from rechub_dist.checkpoint.coverage import check_coverage
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

READ = 64 << 20  # bytes read at once, unless a single row is longer
_NEAR = 1 << 20
_GAP = 64 << 10  # read up to so many unneeded bytes rather than send another request


def read_manifest(folder: Folder, step: int) -> CheckpointManifest:
    """A checkpoint's manifest; every file that it names is there at its full size, and holds what the manifest says.

    Raises:
        DamagedError: says which file is missing, short, elsewhere or not readable, or what the manifest contradicts.
    """
    name = step_folder(step)
    manifest = parse(bytes(folder.read(f"{name}/{MANIFEST}")), folder.path(f"{name}/{MANIFEST}"))
    if manifest.step != step:
        raise DamagedError(f"{folder.path(f'{name}/{MANIFEST}')} is of step {manifest.step}, not of step {step}")
    for file, record in manifest.files.items():
        path, size = folder.path(f"{name}/{file}"), folder.size(f"{name}/{file}")
        if size is None:
            raise DamagedError(f"{path} is missing")
        if folder.leads_out(name, file):
            raise DamagedError(f"{path} is a link to another folder")
        if size != record.size:
            raise DamagedError(f"{path} is damaged: {size} bytes instead of {record.size}")
    check_coverage(manifest, folder.path(name))
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
    """The blocks (file, index) that a rank verifies; each rank gets about the same number."""
    blocks = [(file, i) for file, record in manifest.files.items() for i in range(len(record.checksums))]
    return blocks[len(blocks) * rank // world_size : len(blocks) * (rank + 1) // world_size]


def verify(folder: Folder, manifest: CheckpointManifest, blocks: Iterable[tuple[str, int]]) -> Iterator[int]:
    """Verify the checksums of blocks; yields the size in bytes of each verified block.

    Raises:
        DamagedError: names the file and the byte range.
    """
    for file, index in blocks:
        record = manifest.files[file]
        name = f"{step_folder(manifest.step)}/{file}"
        start = index * BLOCK
        length = min(BLOCK, record.size - start)
        if checksum(folder.read(name, start, length)) != record.checksums[index]:
            raise DamagedError(
                f"{folder.path(name)} is damaged: bytes {start} to {start + length} do not match their checksum"
            )
        yield length


def consume(work: Iterator[int]) -> None:
    """Run an iterator to its end, ignoring its items."""
    for _ in work:
        pass


@dataclass(frozen=True)
class _Read:
    """Whole rows of a saved piece, and the live values [rows, columns] to fill from some of their columns."""

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
    """Fill this rank's pieces of tensors from the checkpoint. Not collective.

    Reads only the rows that are needed, 64 MiB at a time.

    Args:
        folder: the checkpoint folder.
        manifest: of the checkpoint.
        wanted: (name in the checkpoint, entry to fill) pairs.

    Raises:
        DamagedError: a tensor is missing or incomplete, or a file cannot be read.
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
    """Yield a whole tensor, viewed as a matrix, in blocks of rows of at most 64 MiB: [rows, columns] each.

    Raises:
        DamagedError: as `read_tensors`.
    """
    saved = manifest.tensors[key]
    rows, columns = matrix_shape(saved.shape)
    dtype = DTYPES[saved.dtype]
    step = max(1, READ // max(1, columns * dtype.itemsize))
    for start in range(0, rows if columns else 0, step):
        block = torch.empty(min(step, rows - start), columns, dtype=dtype)
        read_tensors(folder, manifest, [(key, Entry(saved.shape, dtype, (Piece(start, 0, block),), replicated=False))])
        yield block


def read_some(folder: Folder, manifest: CheckpointManifest, key: str, rows: Tensor) -> Tensor:
    """Some rows of a tensor, viewed as a matrix: [n, columns].

    What lies between two rows is read with them where it is at most 1 MiB, so that rows which lie close together, or
    in a store, do not take a request each.

    Args:
        folder: the checkpoint folder.
        manifest: of the checkpoint.
        key: of the tensor.
        rows: int64 [n], ascending, no two alike.

    Raises:
        DamagedError: as `read_tensors`.
    """
    saved = manifest.tensors[key]
    columns, dtype = matrix_shape(saved.shape)[1], DTYPES[saved.dtype]
    width = max(1, columns * dtype.itemsize)
    found = torch.empty(len(rows), columns, dtype=dtype)
    apart = (rows.diff() * width > _NEAR) | (rows * width // READ).diff().bool()
    starts = [0, *(apart.nonzero()[:, 0] + 1).tolist(), len(rows)]
    for start, end in pairwise(starts if len(rows) else []):
        first, last = int(rows[start]), int(rows[end - 1])
        block = torch.empty(last - first + 1, columns, dtype=dtype)
        read_tensors(folder, manifest, [(key, Entry(saved.shape, dtype, (Piece(first, 0, block),), replicated=False))])
        found[start:end] = block[rows[start:end] - first]
    return found


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
    """Group neighbouring reads, sorted by position, into single reads of up to 64 MiB."""
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
