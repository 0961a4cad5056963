"""The manifest of a checkpoint: its files with checksums, and the location of each tensor's pieces in them."""

from __future__ import annotations

import json
import re
from dataclasses import field
from typing import Any, Literal

import xxhash
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass

from rechub_dist.errors import UserError, one_line

BLOCK = 64 << 20  # bytes of a file that share a checksum
MANIFEST = "manifest.json"


class DamagedError(UserError):
    """A damaged checkpoint: it differs from what was saved. A failing store raises a plain `UserError` instead."""


class NewerError(UserError):
    """An intact checkpoint written by a newer version, not readable here. No older one is loaded instead."""


_CONFIG = ConfigDict(extra="forbid", ser_json_inf_nan="constants")  # metrics may be NaN


@pydantic_dataclass(frozen=True, config=_CONFIG)
class FileRecord:
    """A file's size in bytes, and the XXH3-128 checksums of its 64 MiB blocks."""

    size: int
    checksums: list[str]


@pydantic_dataclass(frozen=True, config=_CONFIG)
class SavedPiece:
    """A rectangle of a tensor, viewed as a matrix, stored row by row from byte `offset` of a file."""

    file: str
    offset: int
    row: int
    column: int
    rows: int
    columns: int


@pydantic_dataclass(frozen=True, config=_CONFIG)
class SavedTensor:
    """A whole tensor: its element type by safetensors name (`F32`), its shape, and its pieces."""

    dtype: str
    shape: tuple[int, ...]
    pieces: list[SavedPiece]


FORMAT = 1  # of the manifest; described in docs/checkpoints.md
# The keys of `CheckpointManifest.run`. Adding one needs a new format: older versions would silently ignore it.
RUN_KEYS = frozenset({"id", "position", "identity", "config", "tables", "world_size", "saved_at", "versions"})


@pydantic_dataclass(frozen=True, config=_CONFIG)
class CheckpointManifest:
    """The content of one step's checkpoint.

    Attributes:
        step: the step.
        run: id (random), position, identity, config (YAML), tables, world_size, saved_at, versions.
        files: by name in the step's folder.
        tensors: by canonical name.
        format: version of the manifest format.
    """

    step: int
    run: dict[str, Any]
    files: dict[str, FileRecord]
    tensors: dict[str, SavedTensor]
    format: Literal[1] = field(default=1)

    @property
    def bytes(self) -> int:
        """The total size of all files."""
        return sum(record.size for record in self.files.values())


_MANIFEST = TypeAdapter(CheckpointManifest)
# The same in every format, so that any version can distinguish a damaged file from an unknown format.
_SEALED = re.compile(rb'\{"checksum":"([0-9a-f]{32})","manifest":(.*)\}', re.DOTALL)


def render(manifest: CheckpointManifest) -> bytes:
    """Serialise the manifest as JSON, preceded by a checksum of its bytes."""
    return seal(_MANIFEST.dump_json(manifest))


def seal(body: bytes) -> bytes:
    """Prepend the checksum of exactly these bytes to a manifest's JSON."""
    return b'{"checksum":"%s","manifest":%s}' % (checksum(body).encode(), body)


def parse(text: bytes, path: str) -> CheckpointManifest:
    """Parse what `render` of this or an older version wrote; `path` is for errors.

    The checksum is verified on the bytes as they are, since other library versions may serialise the same values
    differently.

    Raises:
        DamagedError: it differs from what was written.
        NewerError: it was written by a newer version.
    """
    sealed = _SEALED.fullmatch(text)
    if sealed is None or checksum(sealed[2]).encode() != sealed[1]:
        raise DamagedError(f"{path} is damaged: its bytes do not match its checksum")
    try:
        tree = json.loads(sealed[2])
    except ValueError as error:
        raise DamagedError(f"{path} is not a manifest: {one_line(error)}") from error
    number = tree.get("format", FORMAT) if isinstance(tree, dict) else FORMAT
    if isinstance(number, int) and number > FORMAT:
        raise _newer(path, number, f"this one reads formats up to {FORMAT}")
    try:
        manifest = _MANIFEST.validate_json(sealed[2])
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
            raise _newer(path, number, f"this one does not know the key {where!r}") from error
        raise DamagedError(f"{path} is not a manifest: {where}{': ' if where else ''}{first['msg']}") from error
    for key in manifest.run:
        if key not in RUN_KEYS:
            raise _newer(path, number, f"this one does not know the key {f'run.{key}'!r}")
    return manifest


def _newer(path: str, number: int, why: str) -> NewerError:
    return NewerError(f"{path}: written by a newer rechub_dist (format {number}); {why}: upgrade rechub_dist")


def checksum(data: bytes | memoryview) -> str:
    """The XXH3-128 checksum, in hexadecimal digits."""
    return xxhash.xxh3_128_hexdigest(data)


class BlockChecksums:
    """Computes the block checksums of a file that is written sequentially."""

    def __init__(self) -> None:
        self.size = 0
        self._done: list[str] = []
        self._current = xxhash.xxh3_128()

    def update(self, data: memoryview) -> None:
        """Add the next bytes."""
        while len(data):
            part = data[: BLOCK - self.size % BLOCK]
            self._current.update(part)
            self.size += len(part)
            if self.size % BLOCK == 0:
                self._done.append(self._current.hexdigest())
                self._current = xxhash.xxh3_128()
            data = data[len(part) :]

    def record(self) -> FileRecord:
        """Return the record of the file, which ends here."""
        rest = [self._current.hexdigest()] if self.size % BLOCK else []
        return FileRecord(self.size, [*self._done, *rest])
