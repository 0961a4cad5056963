"""What a bundle consists of: a folder that scores rows without the packages that trained it.

```
bundle/
  bundle.json             this manifest; written last, so that a folder without it is no bundle
  README.md               the model card
  dataset.yaml            features, derived columns, labels: how a caller's row becomes ids and numbers
  _vocabularies/          the values of ids
  tables.safetensors      embedding tables, memory-mapped when they are read
  score.onnx, score.pt2   the model without its tables, for onnxruntime or torch; of a recall model user.*, item.*
  whole.onnx              the model with its tables; of a recall model whole-user.onnx and whole-item.onnx
  model_repository/       one of them for Triton
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
REPOSITORY: Final = "model_repository"
ITEMS: Final = "items.parquet"
GraphName = Literal["score", "user", "item"]
Precision = Literal["fp32", "fp16", "int8", "int4"]
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
    """A table in tables.safetensors: `NAME`, with int8 and int4 also `NAME.scale` and `NAME.low`, one number a row.

    A table may have another precision than was asked for: where that takes no less room, it is fp16.
    """

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
    """A part of the model as an ONNX graph, a program of torch.export, or both.

    Its inputs are, in this order: the pooled lookups [B, D]; of each sequence the vectors [B, L, D] and the lengths,
    int64 [B]; the dense features [B, dim].
    """

    file: str | None = Field(None, description="the ONNX graph")
    program: str | None = Field(None, description="of torch.export")
    pooled: tuple[str, ...] = Field(description="names of lookups")
    sequences: tuple[str, ...]
    dense: tuple[str, ...] = Field(description="names of features")
    outputs: tuple[str, ...]
    length: int | None = Field(None, ge=1, description="L, where the graph has it fixed; else that of the longest row")

    @field_validator("file", "program")
    @classmethod
    def _file(cls, name: str | None) -> str | None:
        return None if name is None else _inside(name)

    @model_validator(mode="after")
    def _one_at_least(self) -> Self:
        if not self.files:
            raise ValueError("there is neither file nor program")
        return self

    @property
    def files(self) -> list[str]:
        """The files of the graph."""
        return [name for name in (self.file, self.program) if name is not None]

    def file_for(self, engine: str) -> str | None:
        """The file that `onnx` or `torch` computes; None if there is none."""
        return self.file if engine == "onnx" else self.program


class WholeRecord(Section):
    """A part of the model as an ONNX graph with its tables inside.

    Its inputs are, in this order and under these names: of features with one id a row the ids, int64 [B]; of features
    with lists NAME, int64 [B, L], NAME.lengths, int64 [B], and, where ids are weighted, NAME.weights, float32 [B, L];
    the dense features, float32 [B, dim]. L may differ from list to list, but is one for all of `sequences`.
    """

    file: str
    ids: tuple[str, ...]
    lists: tuple[str, ...]
    weighted: tuple[str, ...] = Field((), description="those of `lists` with weights")
    sequences: tuple[str, ...] = Field((), description="those of `lists` that are not pooled")
    dense: tuple[str, ...]
    outputs: tuple[str, ...]
    length: int | None = Field(None, ge=1, description="L of `sequences`, where the graph has it fixed")

    @field_validator("file")
    @classmethod
    def _file(cls, name: str) -> str:
        return _inside(name)

    @property
    def inputs(self) -> list[str]:
        """Their names, in their order."""
        found = list(self.ids)
        for name in self.lists:
            found += [name, f"{name}.lengths", *([f"{name}.weights"] if name in self.weighted else [])]
        return [*found, *self.dense]


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
    whole: dict[GraphName, WholeRecord] = Field(default_factory=dict, description="graphs with their tables inside")
    aligned: tuple[tuple[str, ...], ...] = Field((), description="features with equally many ids in each row")
    files: dict[str, FileRecord]
    versions: dict[str, str]
    metrics: dict[str, float] = Field(default_factory=dict, description="of the weights: `valid.auc`, `test.auc`, ...")
    checked: dict[str, float] = Field(default_factory=dict, description="differences from the training's own scores")
    compared: dict[str, tuple[float, float]] = Field(
        default_factory=dict, description="on the checked rows: those of the training's scores, and of the bundle's"
    )
    seal: str = Field("", description="xxh3, 128 bits, of the rest, so that damage to the manifest shows")

    @field_validator("files")
    @classmethod
    def _files(cls, files: dict[str, FileRecord]) -> dict[str, FileRecord]:
        for name in files:
            _inside(name)
        return files

    @model_validator(mode="after")
    def _whole(self) -> Self:
        for name in (TABLES, SCHEMA, *(name for graph in self.graphs.values() for name in graph.files)):
            if name not in self.files:
                raise ValueError(f"files: there is no checksum of {name}")
        names = {lookup.name for lookup in self.lookups}
        for graph in self.graphs.values():
            for name in (*graph.pooled, *graph.sequences):
                if name not in names:
                    raise ValueError(f"graphs: {graph.files[0]} reads a lookup {name!r}, which is not there")
        for lookup in self.lookups:
            if lookup.table not in self.tables:
                raise ValueError(f"lookups: {lookup.name!r} reads a table {lookup.table!r}, which is not there")
        if set(self.graphs) not in ({"score"}, {"user", "item"}):
            raise ValueError(f"graphs: {', '.join(self.graphs)} are neither score nor user and item")
        return self

    def apart(self, engine: str) -> set[str]:
        """The files that nobody reads who computes with `onnx` or `torch`: what the bundle has for others."""
        graphs = {name for graph in self.graphs.values() for name in graph.files if name != graph.file_for(engine)}
        repository = {name for name in self.files if name.startswith(f"{REPOSITORY}/")}
        return graphs | repository | {whole.file for whole in self.whole.values()}

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


def records_of(folder: Path) -> dict[str, FileRecord]:
    """The files of a bundle that is being written, but for its manifest."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("_rechub"))
    return {str(path.relative_to(folder)): record(path) for path in files if path.name != MANIFEST}


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
