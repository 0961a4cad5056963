"""What a bundle consists of: a folder that scores rows without the packages that trained it.

```
bundle/
  bundle.json             this manifest; written last, so that a folder without it is no bundle
  dataset.yaml            features, derived columns, labels: how a caller's row becomes ids and numbers
  _vocabularies/          the values of ids
  tables.safetensors      embedding tables, memory-mapped when they are read
  score.onnx              the model without its tables; of a recall model user.onnx and item.onnx
```
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, Self, TypeVar

import xxhash
from pydantic import Field, field_validator, model_validator

from rechub_dist.config.section import Section
from rechub_dist.errors import UserError
from rechub_dist.features import MAX_DIM, MAX_ROWS
from rechub_dist.typed import validated

FORMAT: Final = 1
KIND: Final = "bundle"  # of output, as its mark says
MANIFEST: Final = "bundle.json"
TABLES: Final = "tables.safetensors"
SCHEMA: Final = "dataset.yaml"
ITEMS: Final = "items.parquet"
GraphName = Literal["score", "user", "item"]
Precision = Literal["fp32", "fp16", "int8"]
_BLOCK: Final = 16 << 20


def _inside(name: str) -> str:
    parts = Path(name).parts
    if not parts or Path(name).is_absolute() or ".." in parts or "\\" in name:
        raise ValueError(f"{name!r} leads out of the bundle")
    return name


class Sealed(Section):
    """A manifest with a `seal`, the last of its keys: xxh3, 128 bits, of the rest, so that damage to it shows."""

    if TYPE_CHECKING:
        seal: str

    @property
    def sealed(self) -> Self:
        """The manifest with its seal, which keys that a later release adds, with a default, leave as it is."""
        rest = self.model_copy(update={"seal": ""}).model_dump_json(exclude_defaults=True)
        return self.model_copy(update={"seal": xxhash.xxh3_128_hexdigest(rest.encode())})


SealedT = TypeVar("SealedT", bound=Sealed)


class FileRecord(Section):
    """A file of the bundle."""

    size: int = Field(ge=0)
    checksum: str = Field(pattern="^[0-9a-f]{32}$", description="xxh3, 128 bits, of the content")


class TableRecord(Section):
    """A table in tables.safetensors: `NAME`, and with int8 also `NAME.scale` and `NAME.low`, one number a row."""

    rows: int = Field(ge=1, le=MAX_ROWS)
    dim: int = Field(ge=1, le=MAX_DIM)
    precision: Precision = "fp32"


class LookupRecord(Section):
    """What the graphs read of a table, by the lookup's name."""

    name: str
    feature: str
    table: str
    pooling: Literal["sum", "mean"] | None


class GraphRecord(Section):
    """A part of the model as an ONNX graph.

    Its inputs are, in this order: the pooled lookups [B, D]; of each sequence the vectors [B, L, D] and the lengths,
    int64 [B]; the dense features [B, dim].
    """

    file: str
    pooled: tuple[str, ...] = Field(description="names of lookups")
    sequences: tuple[str, ...]
    dense: tuple[str, ...] = Field(description="names of features")
    outputs: tuple[str, ...]
    length: int | None = Field(None, ge=1, description="L, where the graph has it fixed; else that of the longest row")

    @field_validator("file")
    @classmethod
    def _file(cls, name: str) -> str:
        return _inside(name)


class BundleManifest(Sealed):
    """The content of bundle.json."""

    format: Literal[1] = FORMAT
    model: str
    kind: Literal["scores", "recall"]
    step: int = Field(ge=0)
    graphs: dict[GraphName, GraphRecord]
    lookups: tuple[LookupRecord, ...]
    tables: dict[str, TableRecord]
    item: str | None = Field(None, description="of a recall model: the feature of the item's id")
    history: str | None = Field(None, description="of a recall model: the feature of the items that a user has seen")
    exclude_seen: bool = True
    aligned: tuple[tuple[str, ...], ...] = Field((), description="features with equally many ids in each row")
    files: dict[str, FileRecord]
    versions: dict[str, str]
    metrics: dict[str, float] = Field(default_factory=dict)
    checked: dict[str, float] = Field(default_factory=dict, description="differences from the training's own scores")
    seal: str = Field("", description="xxh3, 128 bits, of the rest, so that damage to the manifest shows")

    @field_validator("files")
    @classmethod
    def _files(cls, files: dict[str, FileRecord]) -> dict[str, FileRecord]:
        for name in files:
            _inside(name)
        return files

    @model_validator(mode="after")
    def _whole(self) -> Self:
        for name in (TABLES, SCHEMA, *(graph.file for graph in self.graphs.values())):
            if name not in self.files:
                raise ValueError(f"files: there is no checksum of {name}")
        names = {lookup.name for lookup in self.lookups}
        for graph in self.graphs.values():
            for name in (*graph.pooled, *graph.sequences):
                if name not in names:
                    raise ValueError(f"graphs: {graph.file} reads a lookup {name!r}, which is not there")
        for lookup in self.lookups:
            if lookup.table not in self.tables:
                raise ValueError(f"lookups: {lookup.name!r} reads a table {lookup.table!r}, which is not there")
        if set(self.graphs) not in ({"score"}, {"user", "item"}):
            raise ValueError(f"graphs: {', '.join(self.graphs)} are neither score nor user and item")
        return self

    @property
    def label(self) -> str:
        """How the version is named: its step, and the first digits of its seal."""
        return label(self.step, self.seal)


def label(step: int, seal: str) -> str:
    """How a version is named."""
    return f"{step}-{seal[:12]}"


def record(path: Path) -> FileRecord:
    """A file's size and checksum."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return FileRecord(size=path.stat().st_size, checksum=digest.hexdigest())


def write_manifest(folder: Path, manifest: BundleManifest) -> None:
    """Write bundle.json."""
    (folder / MANIFEST).write_text(manifest.sealed.model_dump_json(indent=1), encoding="utf-8")


def read_manifest(folder: Path) -> BundleManifest:
    """The manifest of a bundle; every file that it names is there at its full size.

    Raises:
        UserError: it is no bundle, of a later format, or a file is missing or has another size.
    """
    path = folder / MANIFEST
    manifest = read_sealed(path, BundleManifest, "bundle", "export")
    check_sizes(folder, manifest.files, "export the bundle again")
    return manifest


def read_sealed(path: Path, kind: type[SealedT], what: str, command: str) -> SealedT:
    """A manifest as it was sealed.

    Args:
        path: of the file.
        kind: of the manifest.
        what: its folder is, for errors.
        command: that makes one.

    Raises:
        UserError: there is none, it is damaged, or of a later format.
    """
    again = f"{command} the {what} again"
    try:
        tree = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path.parent} is no {what}: it has no {path.name}; rechub-dist {command} makes one") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}; {again}") from None
    if isinstance(tree, dict) and isinstance(found := tree.get("format"), int) and found > FORMAT:
        raise UserError(f"{path}: format {found} is of a later release, this one reads {FORMAT}; upgrade rechub_dist")
    manifest = validated(str(path), kind, tree)
    if manifest.sealed.seal != manifest.seal:
        raise UserError(f"{path} is damaged: it does not match its seal; {again}")
    return manifest


def check_sizes(folder: Path, files: Mapping[str, FileRecord], again: str) -> None:
    """Raise UserError, which says what to do, unless all files are there at their full size."""
    for name, file in files.items():
        where = folder / name
        if not where.is_file() or where.is_symlink():
            raise UserError(f"{where} is missing; {again}")
        if (size := where.stat().st_size) != file.size:
            raise UserError(f"{where} is damaged: {size} bytes instead of {file.size}; {again}")


def check_content(path: Path, file: FileRecord) -> None:
    """Raise UserError if a file does not match its checksum."""
    if record(path) != file:
        raise UserError(f"{path} is damaged: it does not match its checksum; export the bundle again")


def versions() -> dict[str, Any]:
    """Versions of what made a bundle."""
    from importlib.metadata import PackageNotFoundError, version  # noqa: PLC0415

    found = {}
    for name in ("rechub-dist", "torch", "onnx", "numpy", "pyarrow"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
