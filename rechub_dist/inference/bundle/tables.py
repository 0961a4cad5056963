"""A bundle's embedding tables: memory-mapped, looked up with NumPy alone."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from rechub_dist.errors import UserError
from rechub_dist.inference.bundle.manifest import TableRecord

Floats = NDArray[np.float32]
Ints = NDArray[Any]

SCALE: Final = ".scale"
LOW: Final = ".low"
DTYPES: Final[dict[str, np.dtype[Any]]] = {
    "I64": np.dtype("<i8"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "U8": np.dtype("u1"),
}  # fmt: skip
STORED: Final = {"fp32": "F32", "fp16": "F16", "int8": "U8"}  # by precision, the type of a table's elements
_LONGEST_HEADER: Final = 64 << 20


class Table(Protocol):
    """A table [rows, dim] to look up in."""

    def rows(self, ids: Ints) -> Floats:
        """The vectors of ids [n], float32 [n, dim]. The ids are within the table."""
        ...


@dataclass(frozen=True)
class MappedTable:
    """A table [rows, dim], of which the system reads what is looked up.

    Attributes:
        values: as stored: float32, float16, or uint8 in steps of `scale` from `low`, float32 [rows] each.
    """

    values: NDArray[Any]
    scale: Floats | None = None
    low: Floats | None = None

    def rows(self, ids: Ints) -> Floats:
        """The vectors of ids [n], float32 [n, dim]. The ids are within the table."""
        found: Floats = self.values[ids].astype(np.float32, copy=False)
        if self.scale is not None and self.low is not None:
            found = found * self.scale[ids][:, None] + self.low[ids][:, None]
        return found


def quantized(vectors: Floats) -> tuple[NDArray[np.uint8], Floats, Floats]:
    """Vectors [n, dim] in 256 steps from each row's smallest to its largest value: steps, scale [n] and low [n]."""
    low = vectors.min(axis=1)
    scale = ((vectors.max(axis=1) - low) / 255).astype(np.float32)
    steps = np.rint((vectors - low[:, None]) / np.where(scale > 0, scale, 1)[:, None])
    return steps.astype(np.uint8), scale, low


def mapped_tensors(path: Path, mode: Literal["r", "r+"] = "r") -> Callable[[str, str, tuple[int, ...]], NDArray[Any]]:
    """What maps a tensor of a safetensors file, given its name, type and shape; raises UserError if it is not there.

    Raises:
        UserError: it is no such file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
        if length > min(size - 8, _LONGEST_HEADER):
            raise UserError(f"{path} is damaged: its header is longer than the file; export the bundle again")
        try:
            header = json.loads(file.read(length))
        except ValueError:
            raise UserError(f"{path} is damaged: its header is no JSON; export the bundle again") from None

    def mapped(name: str, kind: str, shape: tuple[int, ...]) -> NDArray[Any]:
        entry = header.get(name)
        begin, end = entry["data_offsets"] if isinstance(entry, dict) and "data_offsets" in entry else (0, -1)
        dtype = DTYPES[kind]
        wanted = int(np.prod(shape)) * dtype.itemsize
        right = isinstance(entry, dict) and entry.get("dtype") == kind and tuple(entry.get("shape", ())) == shape
        if not right or end - begin != wanted or begin < 0 or 8 + length + end > size:
            raise UserError(f"{path}: table {name!r} is not there as {kind} {list(shape)}; export the bundle again")
        return np.memmap(path, dtype, mode, offset=8 + length + begin, shape=shape)

    return mapped


def open_tables(
    path: Path, tables: Mapping[str, TableRecord], mode: Literal["r", "r+"] = "r"
) -> dict[str, MappedTable]:
    """The tables in a file; with mode `r+` what is written into them is written into the file.

    Raises:
        UserError: the file does not hold the tables that the manifest names.
    """
    mapped, found = mapped_tensors(path, mode), {}
    for name, table in tables.items():
        values = mapped(name, STORED[table.precision], (table.rows, table.dim))
        if table.precision == "int8":
            found[name] = MappedTable(values, *(mapped(name + end, "F32", (table.rows,)) for end in (SCALE, LOW)))
        else:
            found[name] = MappedTable(values)
    return found


def pooled(table: Table, ids: Ints, offsets: Ints | None, weights: Floats | None, mean: bool) -> Floats:
    """The sums or means of the rows' vectors, float32 [B, dim]; `offsets` [B + 1] is None for one id in each row.

    A mean divides by the number of ids, or by the sum of their weights; rows without ids are zero.
    """
    vectors = table.rows(ids)
    if offsets is None:
        return vectors
    lengths = np.diff(offsets)
    if weights is not None:
        vectors = vectors * weights[:, None]
    sums = np.zeros((len(lengths), vectors.shape[1]), np.float32)
    live = lengths > 0
    if live.any():
        sums[live] = np.add.reduceat(vectors, offsets[:-1][live], axis=0)
    if not mean:
        return sums
    divisor = lengths.astype(np.float32)
    if weights is not None:
        divisor = np.zeros(len(lengths), np.float32)
        if live.any():
            divisor[live] = np.add.reduceat(weights, offsets[:-1][live])
    return (sums / np.where(divisor > 0, divisor, 1)[:, None]).astype(np.float32, copy=False)


def padded(table: Table, ids: Ints, offsets: Ints, length: int | None) -> tuple[Floats, NDArray[np.int64]]:
    """The rows' vectors right-padded with zeros, float32 [B, L, dim], and the lengths, int64 [B].

    L is `length`, else that of the longest row, and at least 1.
    """
    lengths = np.diff(offsets).astype(np.int64)
    longest = length or max(1, int(lengths.max(initial=0)))
    row = np.repeat(np.arange(len(lengths)), lengths)
    place = np.arange(len(ids)) - np.repeat(offsets[:-1], lengths)
    vectors = table.rows(ids)
    found = np.zeros((len(lengths), longest, vectors.shape[1]), np.float32)
    found[row, place] = vectors
    return found, lengths
