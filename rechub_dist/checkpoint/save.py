"""A rank's part of a checkpoint: one safetensors file, from a copy in host memory or from the live tensors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rechub_dist.checkpoint.manifest import SavedPiece, SavedTensor
from rechub_dist.checkpoint.tensors import DTYPE_NAMES, Entry, Piece, Tensors, framed, matrix_shape, shares

CHUNK = 32 << 20  # bytes that are written at once


@dataclass(frozen=True)
class RankFile:
    """What a rank is about to write.

    Attributes:
        name: of the file.
        header: of the safetensors file, framed.
        pieces: its tensors in the order of the file; live ones.
        tensors: what the manifest says of them.
        bytes: of the file's body.
    """

    name: str
    header: bytes
    pieces: list[Tensor]
    tensors: dict[str, SavedTensor]
    bytes: int


def plan_file(entries: Tensors, rank: int, world_size: int, name: str) -> RankFile:
    """What this rank writes to the file `name`; no tensor is touched."""
    # The largest elements first, so that each tensor lies at a multiple of its element size.
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


def stage(file: RankFile, buffer: Tensor | None) -> Tensor:
    """Copy the tensors to host memory as they will lie in the file: uint8 [bytes]; `buffer` is used where it fits."""
    cuda = any(piece.is_cuda for piece in file.pieces)
    if buffer is None or len(buffer) != file.bytes:
        buffer = torch.empty(file.bytes, dtype=torch.uint8, pin_memory=cuda)
    offset = 0
    for piece in file.pieces:
        size = piece.numel() * piece.dtype.itemsize
        buffer[offset : offset + size].view(piece.dtype).view(piece.shape).copy_(piece, non_blocking=True)
        offset += size
    if cuda:
        torch.cuda.current_stream().synchronize()
    return buffer


def chunks_of(file: RankFile, staged: Tensor | None) -> Iterator[memoryview]:
    """The file's bytes, from the copy in host memory, or else from the live tensors, little by little."""
    yield memoryview(file.header)
    if staged is not None:
        for start in range(0, len(staged), CHUNK):
            yield staged[start : start + CHUNK].numpy().data
        return
    for piece in file.pieces:
        rows = max(1, CHUNK // max(1, piece.shape[1] * piece.dtype.itemsize))
        for start in range(0, len(piece), rows):
            block = piece[start : start + rows].contiguous().cpu()
            yield block.view(-1).view(torch.uint8).numpy().data


def merge(parts: list[dict[str, SavedTensor]]) -> dict[str, SavedTensor]:
    """The whole checkpoint's tensors from what each rank has of them."""
    merged: dict[str, SavedTensor] = {}
    for part in parts:
        for key, tensor in part.items():
            known = merged.setdefault(key, SavedTensor(tensor.dtype, tensor.shape, []))
            known.pieces.extend(tensor.pieces)
    return dict(sorted(merged.items()))
