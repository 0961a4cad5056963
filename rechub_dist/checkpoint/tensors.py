"""The tensors that a checkpoint saves and loads: each rank holds rectangular pieces of them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rechub_dist.checkpoint.manifest import Dtype

# The names that safetensors files have for them.
DTYPES: dict[Dtype, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

# Canonical names of a table's optimizer states, by our optimizers; a class of the user's own has names of its own.
TABLE_STATES: dict[str, tuple[str, ...]] = {
    "sgd": (),
    "adagrad": ("sum",),
    "rowwise_adagrad": ("rowwise_sum",),
    "adam": ("exp_avg", "exp_avg_sq", "step"),
    "lazy_adam": ("exp_avg", "exp_avg_sq"),
    "partial_rowwise_adam": ("exp_avg", "exp_avg_sq"),
    "momentum_sgd": ("momentum_buffer",),
    "momentum_adagrad": ("sum", "momentum_buffer"),
    "ftrl": ("z", "n"),
}


@dataclass(frozen=True)
class Piece:
    """Part of a tensor viewed as a matrix, [first dimension, product of the others].

    Attributes:
        row, column: its position in the matrix.
        values: the live tensor [rows, columns]; loads write into it.
    """

    row: int
    column: int
    values: Tensor


@dataclass(frozen=True)
class Entry:
    """A tensor, and this rank's pieces of it.

    Attributes:
        shape: shape of the whole tensor.
        dtype: element type.
        pieces: the pieces that this rank holds.
        replicated: whether every rank holds the whole tensor, so that only one of them saves it.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: tuple[Piece, ...]
    replicated: bool

    @staticmethod
    def whole(tensor: Tensor) -> Entry:
        """The entry of a replicated tensor."""
        return Entry(tuple(tensor.shape), tensor.dtype, (Piece(0, 0, as_matrix(tensor)),), replicated=True)

    def first_rows(self, rows: int) -> Entry:
        """The entry of the first `rows` rows, with this rank's pieces of them."""
        cut = (Piece(p.row, p.column, p.values[: max(0, rows - p.row)]) for p in self.pieces)
        return Entry((rows, *self.shape[1:]), self.dtype, tuple(p for p in cut if p.values.numel()), self.replicated)


Tensors = Mapping[str, Entry]  # by canonical name


def framed(header: dict[str, object]) -> bytes:
    """The start of a safetensors file: header length and header, padded so that the body is 8-byte aligned."""
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """The shape of a tensor viewed as a matrix: (first dimension, product of the others)."""
    return (shape[0], math.prod(shape[1:])) if shape else (1, 1)


def as_matrix(tensor: Tensor) -> Tensor:
    """View a tensor as a matrix, [first dimension, product of the others]."""
    return tensor if tensor.dim() == 2 else tensor.view(matrix_shape(tuple(tensor.shape)))


def shares(entries: Tensors, rank: int, world_size: int) -> list[tuple[str, Entry, Piece]]:
    """The (name, entry, piece) triples that this rank saves: its pieces, and its share of the replicated tensors.

    Replicated tensors are balanced by size. All ranks compute the same assignment without communication.
    """
    found = [(key, entry, piece) for key, entry in entries.items() if not entry.replicated for piece in entry.pieces]
    loads = [0] * world_size
    replicated = [(-math.prod(e.shape) * e.dtype.itemsize, key) for key, e in entries.items() if e.replicated]
    for size, key in sorted(replicated):
        owner = loads.index(min(loads))
        loads[owner] -= size
        if owner == rank:
            found.append((key, entries[key], entries[key].pieces[0]))
    return [(key, entry, piece) for key, entry, piece in found if piece.values.numel()]
