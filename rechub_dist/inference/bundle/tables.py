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
from rechub_dist.inference.bundle.manifest import Precision, TableRecord

Floats = NDArray[np.float32]
Ints = NDArray[Any]

SCALE: Final = ".scale"
LOW: Final = ".low"
DTYPES: Final[dict[str, np.dtype[Any]]] = {
    "I64": np.dtype("<i8"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "U8": np.dtype("u1"),
}  # fmt: skip
_MOST: Final = float(np.finfo(np.float16).max)
_LONGEST_HEADER: Final = 64 << 20


def precision_of(wanted: Precision, dim: int) -> Precision:
    """How a table of this width is stored: in fp16 where steps with their scale and low would take as much room."""
    with_steps = {"int8": dim + 8, "int4": (dim + 1) // 2 + 4}  # bytes of a row
    return "fp16" if wanted in with_steps and 2 * dim <= with_steps[wanted] else wanted


def tensors_of(name: str, table: TableRecord) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The tensors that hold a table, by name: the type of their elements, and their shape."""
    one_a_row = (table.rows,)
    match table.precision:
        case "fp32":
            return {name: ("F32", (table.rows, table.dim))}
        case "fp16":
            return {name: ("F16", (table.rows, table.dim))}
        case "int8":
            steps = (table.rows, table.dim)
            return {name: ("U8", steps), name + SCALE: ("F32", one_a_row), name + LOW: ("F32", one_a_row)}
        case "int4":
            halves = (table.rows, (table.dim + 1) // 2)
            return {name: ("U8", halves), name + SCALE: ("F16", one_a_row), name + LOW: ("F16", one_a_row)}


def stored(vectors: Floats, precision: Precision) -> tuple[NDArray[Any], ...]:
    """What the tensors of `tensors_of` hold, in that order, for vectors [n, dim].

    Raises:
        OverflowError: a number is beyond what the precision can hold.
    """
    if precision == "fp32":
        return (vectors.astype("<f4"),)
    if precision != "int8" and (largest := float(np.abs(vectors).max(initial=0))) > _MOST:
        raise OverflowError(f"{largest:g} is beyond {_MOST:g}, the largest number of fp16")
    if precision == "fp16":
        return (vectors.astype("<f2"),)
    if precision == "int8":
        return _steps(vectors, 255, np.dtype("<f4"))
    steps, scale, low = _steps(vectors, 15, np.dtype("<f2"))
    even = np.pad(steps, ((0, 0), (0, steps.shape[1] % 2)))
    return even[:, ::2] | even[:, 1::2] << 4, scale, low


def _steps(
    vectors: Floats, most: int, kind: np.dtype[Any]
) -> tuple[NDArray[np.uint8], NDArray[np.floating], NDArray[np.floating]]:
    """Vectors [n, dim] in steps 0 to `most` from each row's smallest to its largest value: steps, scale and low [n]."""
    low = vectors.min(axis=1).astype(kind)
    above = vectors - low.astype(np.float32)[:, None]  # from the low as it is stored
    scale = (above.max(axis=1) / most).astype(kind)
    each = scale.astype(np.float32)
    steps = np.rint(above / np.where(each > 0, each, 1)[:, None])
    return np.clip(steps, 0, most).astype(np.uint8), scale, low


class Table(Protocol):
    """A table [rows, dim] to look up in."""

    def rows(self, ids: Ints) -> Floats:
        """The vectors of ids [n], float32 [n, dim]. The ids are within the table."""
        ...


@dataclass(frozen=True)
class MappedTable:
    """A table [rows, dim], of which the system reads what is looked up.

    Attributes:
        record: its shape and precision.
        values: as stored: float32, float16, or uint8 in steps of `scale` from `low`; of int4 two steps in each byte,
            the first in its lower half.
        scale, low: float32 or float16 [rows] each, of int8 and int4.
    """

    record: TableRecord
    values: NDArray[Any]
    scale: NDArray[np.floating] | None = None
    low: NDArray[np.floating] | None = None

    def rows(self, ids: Ints) -> Floats:
        """The vectors of ids [n], float32 [n, dim]. The ids are within the table."""
        there = self.values[ids]
        if self.record.precision == "int4":
            both = np.stack([there & 15, there >> 4], axis=2)
            there = both.reshape(len(there), 2 * there.shape[1])[:, : self.record.dim]
        found: Floats = there.astype(np.float32, copy=False)
        if self.scale is not None and self.low is not None:
            scale, low = (of_row[ids].astype(np.float32, copy=False) for of_row in (self.scale, self.low))
            found = found * scale[:, None] + low[:, None]
        return found


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
    mapped = mapped_tensors(path, mode)
    return {
        name: MappedTable(
            table, *(mapped(tensor, *kind_and_shape) for tensor, kind_and_shape in tensors_of(name, table).items())
        )
        for name, table in tables.items()
    }


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
