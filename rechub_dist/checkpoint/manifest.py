"""What is in a checkpoint: files with checksums, and where in them each tensor's pieces lie."""

from __future__ import annotations

import json
import re
from dataclasses import field
from typing import Annotated, Any, Literal

import xxhash
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass

from rechub_dist.errors import UserError, one_line
from rechub_dist.typed import complaint

BLOCK = 64 << 20  # bytes of a file that share a checksum
MANIFEST = "manifest.json"


class DamagedError(UserError):
    """A checkpoint that is not what was saved; a store that fails is not meant."""


class NewerError(UserError):
    """A checkpoint that a newer version has written: whole, but not to be understood here. No older one replaces it."""


DType = Literal["F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL"]
Size = Annotated[int, Field(ge=0, lt=1 << 62)]
_CONFIG = ConfigDict(extra="forbid", ser_json_inf_nan="constants")  # metrics may be NaN


@pydantic_dataclass(frozen=True, config=_CONFIG)
class FileRecord:
    """A file's size in bytes and the XXH3-128 checksums of its blocks of 64 MiB."""

    size: Size
    checksums: list[str]


@pydantic_dataclass(frozen=True, config=_CONFIG)
class SavedPiece:
    """A rectangle of a tensor, seen as a matrix, row after row from byte `offset` of a file."""

    file: str
    offset: Size
    row: Size
    column: Size
    rows: Size
    columns: Size


@pydantic_dataclass(frozen=True, config=_CONFIG)
class SavedTensor:
    """A whole tensor: its element type by safetensors' name, its shape, and its pieces."""

    dtype: DType
    shape: tuple[Size, ...]
    pieces: list[SavedPiece]


FORMAT = 1  # of the manifest; what it is written in stands with docs/checkpoints.md
# What `CheckpointManifest.run` may hold. A key more is a new format: who does not know it would go on as if it were
# not there.
RUN_KEYS = frozenset({"id", "position", "identity", "config", "tables", "world_size", "saved_at", "versions"})


@pydantic_dataclass(frozen=True, config=_CONFIG)
class CheckpointManifest:
    """Everything that a checkpoint of one step consists of, besides the manifest itself.

    Attributes:
        run: id (drawn), position, identity, config (YAML), tables, world_size, saved_at, versions.
    """

    step: Size
    run: dict[str, Any]
    files: dict[str, FileRecord]
    tensors: dict[str, SavedTensor]
    format: Literal[1] = field(default=1)

    @property
    def bytes(self) -> int:
        """The size of all files."""
        return sum(record.size for record in self.files.values())


_MANIFEST = TypeAdapter(CheckpointManifest)


# Of what `CheckpointManifest.run` holds, the types of what is read from it; more may be there.
@pydantic_dataclass(frozen=True)
class _Position:
    step: Size
    best_step: Size | None
    best_metrics: dict[str, float | None]


@pydantic_dataclass(frozen=True)
class _Placed:
    rows: Size
    optimizer: str


@pydantic_dataclass(frozen=True)
class _Identity:
    data: dict[str, Any]
    model: dict[str, Any]
    seed: int


@pydantic_dataclass(frozen=True)
class _Run:
    position: _Position
    tables: dict[str, _Placed]
    identity: _Identity
    world_size: Size
    saved_at: str
    versions: dict[str, str]
    config: str | None = None
    id: str | None = None


_RUN = TypeAdapter(_Run)
# The same in every format, so that any version can tell a file that is damaged from one that it does not know.
_SEALED = re.compile(rb'\{"checksum":"([0-9a-f]{32})","manifest":(.*)\}', re.DOTALL)


def render(manifest: CheckpointManifest) -> bytes:
    """The manifest as JSON, with a checksum of its bytes before it."""
    return seal(_MANIFEST.dump_json(manifest))


def seal(body: bytes) -> bytes:
    """A manifest's JSON with the checksum of exactly these bytes."""
    return b'{"checksum":"%s","manifest":%s}' % (checksum(body).encode(), body)


def parse(text: bytes, path: str) -> CheckpointManifest:
    """The manifest that `render` made, of this version or an older one.

    Its bytes are compared with the checksum as they are: other versions of the libraries may write the same values in
    another way.

    Raises:
        DamagedError: it is not what was written.
        NewerError: it was written by a newer version.
    """
    sealed = _SEALED.fullmatch(text)
    if sealed is None or checksum(sealed[2]).encode() != sealed[1]:
        raise DamagedError(f"{path} is damaged: its bytes do not have its checksum")
    try:
        tree = json.loads(sealed[2])
    except ValueError as error:
        raise DamagedError(f"{path} is no manifest: {one_line(error)}") from error
    number = tree.get("format", FORMAT) if isinstance(tree, dict) else FORMAT
    if isinstance(number, int) and not isinstance(number, bool) and number > FORMAT:
        raise _newer(path, number, f"this one reads formats up to {FORMAT}")
    try:
        manifest = _MANIFEST.validate_json(sealed[2])
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
            raise _newer(path, number, f"this one does not know the key {where!r}") from error
        raise DamagedError(f"{path} is no manifest: {complaint(where or 'all of it', first)}") from error
    for key in manifest.run:
        if key not in RUN_KEYS:
            raise _newer(path, number, f"this one does not know the key {f'run.{key}'!r}")
    try:
        _RUN.validate_python(manifest.run)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(["run", *map(str, first["loc"])])
        raise DamagedError(f"{path} is no manifest: {complaint(where, first)}") from error
    return manifest


def _newer(path: str, number: int, why: str) -> NewerError:
    return NewerError(f"{path}: written by a newer rechub_dist (format {number}); {why}: upgrade rechub_dist")


def checksum(data: bytes | memoryview) -> str:
    """XXH3-128, in hexadecimal digits."""
    return xxhash.xxh3_128_hexdigest(data)


class BlockChecksums:
    """The checksums of a stream's blocks, bytes being given in order."""

    def __init__(self) -> None:
        self.size = 0
        self._done: list[str] = []
        self._current = xxhash.xxh3_128()

    def update(self, data: memoryview) -> None:
        """The next bytes."""
        while len(data):
            part = data[: BLOCK - self.size % BLOCK]
            self._current.update(part)
            self.size += len(part)
            if self.size % BLOCK == 0:
                self._done.append(self._current.hexdigest())
                self._current = xxhash.xxh3_128()
            data = data[len(part) :]

    def record(self) -> FileRecord:
        """What is known of the file that ends here."""
        rest = [self._current.hexdigest()] if self.size % BLOCK else []
        return FileRecord(self.size, [*self._done, *rest])
