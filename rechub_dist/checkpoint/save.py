"""A rank's part of a checkpoint: one safetensors file, written from a host copy, or in part from the live tensors."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rechub_dist.checkpoint.manifest import SavedPiece, SavedTensor
from rechub_dist.checkpoint.tensors import DTYPE_NAMES, Entry, Piece, Tensors, framed, matrix_shape, shares

CHUNK = 32 << 20  # bytes written at once


@dataclass(frozen=True)
class RankFile:
    """The file that a rank is about to write.

    Attributes:
        name: file name.
        header: framed safetensors header.
        pieces: the live tensors, in file order.
        tensors: their entries for the manifest.
        bytes: size of the file's body.
    """

    name: str
    header: bytes
    pieces: list[Tensor]
    tensors: dict[str, SavedTensor]
    bytes: int


def plan_file(entries: Tensors, rank: int, world_size: int, name: str) -> RankFile:
    """Plan what this rank writes to the file `name`, without reading tensors. Not collective."""
    # Largest element types first, so that every tensor is aligned to its element size.
    own = sorted(shares(entries, rank, world_size), key=lambda item: -item[1].dtype.itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    places: list[tuple[str, Entry, Piece, int]] = []
    for key, entry, piece in own:
        rows, columns = piece.values.shape
        end = offset + rows * columns * entry.dtype.itemsize
        whole = (rows, columns) == matrix_shape(entry.shape)
        part = f"[{piece.row}:{piece.row + rows}, {piece.column}:{piece.column + columns}]"
        header[key if whole else key + part] = {
            "dtype": DTYPE_NAMES[entry.dtype],
            "shape": entry.shape if whole else (rows, columns)[: len(entry.shape)],
            "data_offsets": [offset, end],
        }
        places.append((key, entry, piece, offset))
        offset = end
    beginning = framed(header)
    tensors: dict[str, SavedTensor] = {}
    for key, entry, piece, begin in places:
        saved = tensors.setdefault(key, SavedTensor(DTYPE_NAMES[entry.dtype], entry.shape, []))
        saved.pieces.append(SavedPiece(name, len(beginning) + begin, piece.row, piece.column, *piece.values.shape))
    live = [piece.values for _, _, piece, _ in places]
    return RankFile(name, beginning, live, tensors, offset)


@dataclass(frozen=True)
class HostCopy:
    """The end of a file's body in host memory; its beginning is still to be read from the live tensors.

    Attributes:
        live: the tensors of the beginning, in blocks of rows.
        staged: the end, uint8 [bytes].
    """

    live: list[Tensor]
    staged: Tensor


def stage(file: RankFile, limit: int, buffer: Tensor | None = None) -> HostCopy:
    """Copy as much of the end of the body as fits into `limit` bytes; `buffer` is reused if its size matches."""
    blocks, size = list(_blocks(file)), 0
    first = len(blocks)
    while first and size + (more := _bytes(blocks[first - 1])) <= limit:
        first, size = first - 1, size + more
    if buffer is None or len(buffer) != size:
        buffer = torch.empty(size, dtype=torch.uint8)
    if any(block.is_cuda for block in blocks[first:]):
        _stage_by_halves(blocks[first:], buffer, pinned=True)
    else:
        offset = 0
        for block in blocks[first:]:
            _as(block, buffer[offset : offset + _bytes(block)]).copy_(block)
            offset += _bytes(block)
    return HostCopy(blocks[:first], buffer)


def _stage_by_halves(blocks: list[Tensor], buffer: Tensor, *, pinned: bool) -> None:
    """Copy through two small buffers: the device fills one while the host empties the other.

    Device copies are fast only into pinned memory, which is too scarce to pin the whole buffer.
    """
    largest = max(map(_bytes, blocks), default=0)
    halves = [torch.empty(largest, dtype=torch.uint8, pin_memory=pinned) for _ in range(2)]
    under_way: deque[tuple[Tensor, Tensor, torch.cuda.Event | None]] = deque()

    def settle() -> None:
        target, half, copied = under_way.popleft()
        if copied is not None:
            copied.synchronize()
        target.copy_(half)

    offset = 0
    for number, block in enumerate(blocks):
        if len(under_way) == len(halves):
            settle()
        size = _bytes(block)
        half = halves[number % 2][:size]
        _as(block, half).copy_(block, non_blocking=True)
        copied = None
        if block.is_cuda:
            copied = torch.cuda.Event()
            copied.record(torch.cuda.current_stream(block.device))
        under_way.append((buffer[offset : offset + size], half, copied))
        offset += size
    while under_way:
        settle()


def _blocks(file: RankFile) -> Iterator[Tensor]:
    """The live tensors in blocks of rows, of at most `CHUNK` bytes unless a single row is longer."""
    for piece in file.pieces:
        rows = max(1, CHUNK // max(1, piece.shape[1] * piece.dtype.itemsize))
        for start in range(0, len(piece), rows):
            yield piece[start : start + rows]


def _bytes(block: Tensor) -> int:
    return block.numel() * block.dtype.itemsize


def _as(block: Tensor, memory: Tensor) -> Tensor:
    """Bytes as a tensor like the block."""
    return memory.view(block.dtype).view(block.shape)


class Hold:
    """How long training waits for a save: until its tensors may change again."""

    def __init__(self, began: float) -> None:
        self.began = began  # monotonic
        self.seconds = 0.0
        self._ended = threading.Event()

    def end(self) -> None:
        """Let training go on, unless it has."""
        if not self._ended.is_set():
            self.seconds = time.monotonic() - self.began
            self._ended.set()

    def wait(self) -> None:
        """Return when training may go on."""
        self._ended.wait()


def chunks_of(file: RankFile, copy: HostCopy, hold: Hold) -> Iterator[memoryview]:
    """Yield the file's bytes in chunks; ends `hold` when the live tensors are not needed any more."""
    yield memoryview(file.header)
    for block in copy.live:
        yield block.contiguous().cpu().view(-1).view(torch.uint8).numpy().data
    hold.end()
    for start in range(0, len(copy.staged), CHUNK):
        yield copy.staged[start : start + CHUNK].numpy().data


def merge(parts: list[dict[str, SavedTensor]]) -> dict[str, SavedTensor]:
    """Merge all ranks' manifest entries into those of the whole checkpoint, sorted by name."""
    merged: dict[str, SavedTensor] = {}
    for part in parts:
        for key, tensor in part.items():
            known = merged.setdefault(key, SavedTensor(tensor.dtype, tensor.shape, []))
            known.pieces.extend(tensor.pieces)
    return dict(sorted(merged.items()))
