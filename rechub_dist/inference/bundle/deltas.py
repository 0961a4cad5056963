"""Deltas: what a later export changes of a bundle; and the state that a bundle and the deltas after it make.

```
delta/
  delta.json              this manifest; written last, so that a folder without it is no delta
  rows.safetensors        of each table that changed `NAME.ids`, and these rows as tables.safetensors has them
  score.onnx, ...         the bundle's other files that changed, or are new
```

A delta names the seal of the state that it follows, and has the manifest of the state that it leads to. That is the
manifest of the whole export that it was made of, so that both have the same seal.

A folder of publications, which `rechub-dist publish` writes, holds bundles and deltas by number: `000001-bundle`,
`000002-delta`. Its state is that of its last bundle and the deltas after it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from rechub_dist.errors import UserError
from rechub_dist.inference.bundle.manifest import (
    FORMAT,
    ITEMS,
    MANIFEST,
    TABLES,
    BundleManifest,
    FileRecord,
    Sealed,
    check_sizes,
    label,
    read_manifest,
    read_sealed,
)
from rechub_dist.inference.bundle.tables import Floats, Ints, MappedTable, Table, mapped_tensors, open_tables

DELTA: Final = "delta.json"
ROWS: Final = "rows.safetensors"
IDS: Final = ".ids"
_AGAIN: Final = "export the delta again"
_PUBLISHED: Final = re.compile(r"(\d{6,})-(bundle|delta)")


class DeltaManifest(Sealed):
    """The content of delta.json."""

    format: Literal[1] = FORMAT
    parent: str = Field(pattern="^[0-9a-f]{32}$", description="the seal of the state that it follows")
    parent_step: int = Field(ge=0)
    result: BundleManifest = Field(description="the manifest of the state that it leads to")
    rows: dict[str, Annotated[int, Field(ge=1)]] = Field(description="how many rows changed, by table; others: none")
    files: dict[str, FileRecord] = Field(description="what the delta holds")
    seal: str = Field("", description="xxh3, 128 bits, of the rest, so that damage to the manifest shows")

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.result.sealed.seal != self.result.seal:
            raise ValueError("result: it does not match its seal")
        for name, file in self.files.items():
            if name != ROWS and self.result.files.get(name) != file:
                raise ValueError(f"files: {name} is not that of the result")
        if TABLES in self.files or (ROWS in self.files) != bool(self.rows):
            raise ValueError(f"files: they do not hold the rows that changed in {ROWS}")
        for name, count in self.rows.items():
            if name not in self.result.tables or count > self.result.tables[name].rows:
                raise ValueError(f"rows: there is no table {name!r} of so many rows")
        return self


class Publication(NamedTuple):
    """A bundle or delta in a folder of publications."""

    number: int
    kind: str
    path: Path


def publications(folder: Path) -> list[Publication]:
    """What was published in a folder, in order."""
    found = [(_PUBLISHED.fullmatch(path.name), path) for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(Publication(int(match[1]), match[2], path) for match, path in found if match is not None)


def places(folder: Path) -> tuple[Path, tuple[Path, ...]]:
    """The bundle and the deltas in a folder: a bundle's own, or one of publications."""
    found = [] if (folder / MANIFEST).exists() else publications(folder)
    last = max((place for place, one in enumerate(found) if one.kind == "bundle"), default=None)
    if last is None:
        return folder, ()
    return found[last].path, tuple(one.path for one in found[last + 1 :])


def is_bundle(folder: Path) -> bool:
    """Whether a folder is that of a bundle, or holds published ones."""
    return (places(folder)[0] / MANIFEST).exists()


@dataclass(frozen=True)
class State:
    """What a bundle and the deltas after it make; by `read_state`.

    Attributes:
        base: the bundle's folder.
        deltas: the deltas' folders and manifests, in order.
        manifest: of what they make.
        files: where its files are; of the tables, those of the bundle.
        records: the checksums of the files of its bundle and of its deltas.
    """

    base: Path
    deltas: tuple[tuple[Path, DeltaManifest], ...]
    manifest: BundleManifest
    files: Mapping[str, Path]
    records: Mapping[Path, FileRecord]

    @property
    def big_files(self) -> set[Path]:
        """Tables and items of its folders, where they have any."""
        folders = (self.base, *(place for place, _ in self.deltas))
        return {folder / name for folder in folders for name in (TABLES, ITEMS)}

    def followed_by(self, place: Path, delta: DeltaManifest) -> State:
        """The state with one more delta.

        Raises:
            UserError: it does not follow this state.
        """
        if delta.parent != self.manifest.seal:
            wanted = label(delta.parent_step, delta.parent)
            last = self.deltas[-1][0] if self.deltas else self.base
            raise UserError(
                f"{place} follows version {wanted}, but {last} is version {self.manifest.label}: what leads from there "
                f"to {wanted} is missing"
            )
        before, after = self.manifest, delta.result
        carried = after.files.keys() - delta.files.keys() - {TABLES}
        if after.tables != before.tables or any(before.files.get(name) != after.files[name] for name in carried):
            raise UserError(f"{place / DELTA} is damaged: it does not follow from what it names; {_AGAIN}")
        files = {name: place / name if name in delta.files else self.files[name] for name in after.files}
        own = {place / name: record for name, record in delta.files.items()}
        return State(self.base, (*self.deltas, (place, delta)), after, files, {**self.records, **own})


def read_state(folder: Path, deltas: Iterable[Path] = ()) -> State:
    """The state of a bundle, or of a folder of publications, with further deltas.

    Raises:
        UserError: one of them is not what it should be, is damaged, or does not follow the one before it.
    """
    base, own = places(folder)
    manifest = read_manifest(base)
    files = {name: base / name for name in manifest.files}
    state = State(base, (), manifest, files, {files[name]: record for name, record in manifest.files.items()})
    for place in (*own, *deltas):
        state = state.followed_by(place, read_delta(place))
    return state


def read_delta(folder: Path) -> DeltaManifest:
    """The manifest of a delta; every file that it names is there at its full size.

    Raises:
        UserError: it is no delta, of a later format, or a file is missing or has another size.
    """
    manifest = read_sealed(folder / DELTA, DeltaManifest, "delta", "export --since")
    check_sizes(folder, manifest.files, _AGAIN)
    return manifest


@dataclass(frozen=True)
class ChangedRows:
    """Rows of a table.

    Attributes:
        ids: int64 [n], ascending.
        table: these rows, n.
    """

    ids: Ints
    table: MappedTable


@dataclass(frozen=True)
class OverlaidTable:
    """A mapped table of which some rows are others."""

    table: MappedTable
    changed: ChangedRows

    def rows(self, ids: Ints) -> Floats:
        """As `MappedTable.rows`."""
        found = self.table.rows(ids)
        place = np.minimum(np.searchsorted(self.changed.ids, ids), len(self.changed.ids) - 1)
        there = self.changed.ids[place] == ids
        found[there] = self.changed.table.rows(place[there])
        return found


def state_tables(state: State) -> dict[str, Table]:
    """The tables of a state: the bundle's, mapped, under the rows of its deltas, which are copied into memory.

    Raises:
        UserError: a file does not hold what its manifest says.
    """
    mapped = open_tables(state.files[TABLES], state.manifest.tables)
    changed: dict[str, list[ChangedRows]] = {}
    for place, delta in state.deltas:
        for name, rows in changed_rows(place, delta).items():
            changed.setdefault(name, []).append(rows)
    return {
        name: OverlaidTable(table, _merged(changed[name])) if name in changed else table
        for name, table in mapped.items()
    }


def changed_rows(place: Path, delta: DeltaManifest) -> dict[str, ChangedRows]:
    """The rows that a delta changes, by table, mapped.

    Raises:
        UserError: its file does not hold what its manifest says.
    """
    if not delta.rows:
        return {}
    tensor = mapped_tensors(place / ROWS)
    records = {name: delta.result.tables[name].model_copy(update={"rows": n}) for name, n in delta.rows.items()}
    found = {}
    for name, table in open_tables(place / ROWS, records).items():
        ids = np.asarray(tensor(name + IDS, "I64", (delta.rows[name],)))
        if ids[0] < 0 or ids[-1] >= delta.result.tables[name].rows or (ids[1:] <= ids[:-1]).any():
            raise UserError(f"{place / ROWS} is damaged: the ids of table {name!r} are not ascending; {_AGAIN}")
        found[name] = ChangedRows(ids, table)
    return found


def stored(table: MappedTable) -> dict[str, NDArray[Any]]:
    """The arrays that a table is stored as, [rows, ...] each, by the name of their attribute."""
    values = {field.name: getattr(table, field.name) for field in fields(table)}
    return {name: value for name, value in values.items() if isinstance(value, np.ndarray)}


def stored_rows(table: Table, first: int, end: int) -> dict[str, NDArray[Any]]:
    """The rows first .. end - 1 of each of these arrays."""
    if not isinstance(table, OverlaidTable):
        assert isinstance(table, MappedTable)
        return {name: array[first:end] for name, array in stored(table).items()}
    rows = {name: np.array(array[first:end]) for name, array in stored(table.table).items()}
    low, high = np.searchsorted(table.changed.ids, [first, end])
    for name, array in stored(table.changed.table).items():
        rows[name][table.changed.ids[low:high] - first] = array[low:high]
    return rows


def _merged(pieces: Sequence[ChangedRows]) -> ChangedRows:
    """What the pieces make in this order: of rows that several have, the last one's."""
    ids = np.concatenate([piece.ids for piece in pieces])
    order = np.argsort(ids, kind="stable")
    last = np.ones(len(order), np.bool_)
    last[:-1] = ids[order][1:] != ids[order][:-1]
    kept = order[last]
    arrays: dict[str, Any] = {
        name: np.concatenate([stored(piece.table)[name] for piece in pieces])[kept] for name in stored(pieces[0].table)
    }
    return ChangedRows(ids[kept], replace(pieces[0].table, **arrays))
