"""What is in a checkpoint: files with checksums, and where in them each tensor's pieces lie."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import xxhash
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass

from rechub_dist.errors import UserError

BLOCK = 64 << 20  # bytes of a file that share a checksum
MANIFEST = "manifest.json"


class DamagedError(UserError):
    """A checkpoint that is not what was saved; a store that fails is not meant."""


@dataclass(frozen=True)
class FileRecord:
    """A file's size in bytes and the XXH3-128 checksums of its blocks of 64 MiB."""

    size: int
    checksums: list[str]


@dataclass(frozen=True)
class SavedPiece:
    """A rectangle of a tensor, seen as a matrix, row after row from byte `offset` of a file."""

    file: str
    offset: int
    row: int
    column: int
    rows: int
    columns: int


@dataclass(frozen=True)
class SavedTensor:
    """A whole tensor: its element type by safetensors' name, its shape, and its pieces."""

    dtype: str
    shape: tuple[int, ...]
    pieces: list[SavedPiece]


_NAN = ConfigDict(ser_json_inf_nan="constants")  # as metrics may be


@pydantic_dataclass(frozen=True, config=_NAN)
class Manifest:
    """Everything that a checkpoint of one step consists of, besides the manifest itself.

    Attributes:
        run: position, identity, config (YAML), tables, world_size, saved_at, versions.
    """

    step: int
    run: dict[str, Any]
    files: dict[str, FileRecord]
    tensors: dict[str, SavedTensor]
    format: Literal[1] = field(default=1)

    @property
    def bytes(self) -> int:
        """The size of all files."""
        return sum(record.size for record in self.files.values())


@pydantic_dataclass(frozen=True, config=_NAN)
class _Sealed:
    checksum: str
    manifest: Manifest


_MANIFEST, _SEALED = TypeAdapter(Manifest), TypeAdapter(_Sealed)


def render(manifest: Manifest) -> bytes:
    """The manifest as JSON, with a checksum of its own."""
    return _SEALED.dump_json(_Sealed(checksum(_MANIFEST.dump_json(manifest)), manifest))


def parse(text: bytes, path: str) -> Manifest:
    """The manifest that `render` made.

    Raises:
        DamagedError: it is not what was written, or of another version.
    """
    try:
        manifest = _SEALED.validate_json(text).manifest
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise DamagedError(f"{path} is damaged: {where}{': ' if where else ''}{first['msg']}") from error
    if render(manifest) != text:
        raise DamagedError(f"{path} is damaged: its bytes do not have its checksum")
    return manifest


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
