"""Writes deltas of bundles, and folds them into a whole bundle. To fold takes no torch."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from rechub_dist.data.parquet.outputs import whole_folder
from rechub_dist.data.parquet.overlap import refuse_overlap
from rechub_dist.errors import UserError
from rechub_dist.inference.bundle.deltas import (
    DELTA,
    IDS,
    ROWS,
    DeltaManifest,
    State,
    changed_rows,
    state_tables,
    stored,
    stored_rows,
)
from rechub_dist.inference.bundle.manifest import (
    KIND,
    TABLES,
    BundleManifest,
    Precision,
    check_content,
    read_manifest,
    record,
    write_manifest,
)
from rechub_dist.inference.bundle.tables import DTYPES, LOW, SCALE, MappedTable, open_tables

DELTA_KIND: Final = "delta"
Progress = Callable[[str, int, int], None]  # what is done, and how many bytes of how many
_BLOCK: Final = 16 << 20  # bytes that are compared, or written, at once
_ENDS: Final = {"values": "", "scale": SCALE, "low": LOW}  # of a tensor's name, by what it is of a table
_SAME: Final = ("model", "kind", "item", "history", "lookups", "graphs")  # keys that a delta cannot change


@dataclass(frozen=True)
class Difference:
    """What an export has changed of a state; by `compare`.

    Attributes:
        before: the state.
        folder: the export, whole.
        after: its manifest.
        changed: bool [rows] of each table that has changed: which of its rows.
        files: the other files that have changed, or are new.
    """

    before: State
    folder: Path
    after: BundleManifest
    changed: Mapping[str, NDArray[np.bool_]]
    files: tuple[str, ...]

    @property
    def size(self) -> int:
        """Bytes of a delta of it, but for its manifest."""
        tables = open_tables(self.folder / TABLES, self.after.tables)
        rows = sum(int(flags.sum()) * (8 + _row_bytes(tables[name])) for name, flags in self.changed.items())
        return rows + sum(self.after.files[name].size for name in self.files)


def compare(before: State, folder: Path, say: Progress | None = None) -> Difference:
    """Compare a state with a later export, block by block; in memory is a byte for each row.

    Rows differ when what is stored of them does: of int8 the steps, the scale or the lowest value.

    Raises:
        UserError: no delta can lead from the one to the other.
    """
    after = read_manifest(folder)
    _check_alike(before, folder, after)
    old, new = state_tables(before), open_tables(folder / TABLES, after.tables)
    total, done, changed = sum(len(table.values) * _row_bytes(table) for table in new.values()), 0, {}
    for name, table in new.items():
        flags = np.zeros(len(table.values), np.bool_)
        for first, end in _blocks(table):
            flags[first:end] = _differ(stored_rows(old[name], first, end), stored_rows(table, first, end))
            done += (end - first) * _row_bytes(table)
            if say is not None:
                say("compare", done, total)
        if flags.any():
            changed[name] = flags
    files = tuple(n for n, file in after.files.items() if n != TABLES and before.manifest.files.get(n) != file)
    return Difference(before, folder, after, changed, files)


def write_delta(found: Difference, work: Path) -> DeltaManifest:
    """Write the delta of a difference into an empty folder."""
    if found.changed:
        _write_rows(found, work / ROWS)
    for name in found.files:
        (work / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(found.folder / name, work / name)
    manifest = DeltaManifest(
        parent=found.before.manifest.seal,
        parent_step=found.before.manifest.step,
        result=found.after,
        rows={name: int(flags.sum()) for name, flags in found.changed.items()},
        files={name: record(work / name) for name in (*([ROWS] if found.changed else []), *found.files)},
    ).sealed
    (work / DELTA).write_text(manifest.model_dump_json(indent=1), encoding="utf-8")
    return manifest


def fold(state: State, out: Path) -> BundleManifest:
    """Write the bundle that a bundle and its deltas make: file for file the export that the last delta was made of.

    Raises:
        UserError: a file is damaged, or `out` cannot be written.
    """
    refuse_overlap(str(out), [str(state.base), *(str(place) for place, _ in state.deltas)])
    for path, file in state.records.items():
        check_content(path, file)
    with whole_folder(out, KIND, replace=True) as work:
        for name, path in state.files.items():
            (work / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, work / name)
        for place, delta in state.deltas:
            for name, table in open_tables(work / TABLES, state.manifest.tables, "r+").items():
                if (rows := changed_rows(place, delta).get(name)) is not None:
                    for part, array in stored(rows.table).items():
                        stored(table)[part][rows.ids] = array
        check_content(work / TABLES, state.manifest.files[TABLES])
        write_manifest(work, state.manifest)
    return state.manifest


def stored_precision(manifest: BundleManifest) -> Precision:
    """How a bundle's tables are stored; narrow ones take no less room in steps than in fp16."""
    there = {table.precision for table in manifest.tables.values()}
    precisions: tuple[Precision, ...] = ("int4", "int8", "fp16")
    return next((precision for precision in precisions if precision in there), "fp32")


def _check_alike(before: State, folder: Path, after: BundleManifest) -> None:
    """Raise UserError if a state and an export differ in more than weights, vocabularies and items."""
    now, then, reason = after, before.manifest, None
    if any(getattr(now, key) != getattr(then, key) for key in _SAME):
        reason = "its features are others than in"
    if now.model != then.model:
        reason = f"its model is {now.model}, and {then.model} in"
    for name in now.tables:
        one, other = now.tables[name], then.tables.get(name)
        if reason is None and other is not None and one != other:
            reason = (
                f"table {name!r} is {one.rows} x {one.dim} in {one.precision}, and {other.rows} x {other.dim} in "
                f"{other.precision} in"
            )
    if reason is None and _head(folder / TABLES) != _head(before.files[TABLES]):
        reason = "its tables are laid out otherwise than in"
    if reason is not None:
        raise UserError(f"no delta leads here: {reason} version {then.label}; export in full, without --since")


def _head(path: Path) -> bytes:
    """The header of a safetensors file, which has been read before."""
    with path.open("rb") as file:
        return file.read(int.from_bytes(file.read(8), "little"))


def _row_bytes(table: MappedTable) -> int:
    return sum(array[:1].nbytes for array in stored(table).values())


def _blocks(table: MappedTable) -> Iterator[tuple[int, int]]:
    step = max(1, _BLOCK // _row_bytes(table))
    for first in range(0, len(table.values), step):
        yield first, min(first + step, len(table.values))


def _differ(one: Mapping[str, NDArray[Any]], other: Mapping[str, NDArray[Any]]) -> NDArray[np.bool_]:
    """Which rows differ in any bit, bool [rows]."""
    found = np.zeros(len(one["values"]), np.bool_)
    for name, array in one.items():
        bits = np.dtype(f"u{array.itemsize}")
        apart = array.view(bits) != other[name].view(bits)
        found |= apart if apart.ndim == 1 else apart.any(axis=1)
    return found


def _write_rows(found: Difference, path: Path) -> None:
    """Write the rows that have changed as a safetensors file."""
    from rechub_dist.checkpoint.tensors import framed  # noqa: PLC0415 - torch is slow to import

    tables = open_tables(found.folder / TABLES, found.after.tables)
    parts: list[tuple[str, str, NDArray[Any] | None]] = []  # tensor, table, what its rows are of; None: their ids
    for name in found.changed:
        parts += [(name + IDS, name, None)]
        parts += [(name + _ENDS[part], name, array) for part, array in stored(tables[name]).items()]
    kinds = {dtype: kind for kind, dtype in DTYPES.items()}
    header: dict[str, Any] = {}
    end = 0
    # Longer numbers first, so that each tensor is aligned.
    parts.sort(key=lambda part: -8 if part[2] is None else -part[2].itemsize)
    for tensor, name, array in parts:
        count = int(found.changed[name].sum())
        dtype, shape = (np.dtype("<i8"), ()) if array is None else (array.dtype, array.shape[1:])
        begin, end = end, end + count * int(np.prod(shape)) * dtype.itemsize
        header[tensor] = {"dtype": kinds[dtype], "shape": (count, *shape), "data_offsets": [begin, end]}
    with path.open("wb") as file:
        file.write(framed(header))
        for _, name, array in parts:
            for first, last in _blocks(tables[name]):
                ids = first + np.flatnonzero(found.changed[name][first:last])
                file.write(np.ascontiguousarray(ids.astype("<i8") if array is None else array[ids]).data)
