"""The manifest of a checkpoint: its files with checksums, and the location of each tensor's pieces in them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import field
from typing import Annotated, Any, Literal, NotRequired, Self

import xxhash
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass as pydantic_dataclass
from typing_extensions import TypedDict

from rechub_dist.config.optimization import TABLE_OPTIMIZERS
from rechub_dist.errors import UserError, one_line
from rechub_dist.metrics.direction import Direction

BLOCK = 64 << 20  # bytes of a file that share a checksum
MANIFEST = "manifest.json"


class DamagedError(UserError):
    """A damaged checkpoint: it differs from what was saved. A failing store raises a plain `UserError` instead."""


@contextmanager
def no_other() -> Iterator[None]:
    """Say what to do about damage in the block, where no other checkpoint is tried."""
    try:
        yield
    except DamagedError as error:
        raise DamagedError(f"{error}; put back a copy of it, or name another checkpoint") from error


class NewerError(UserError):
    """An intact checkpoint written by a newer version, not readable here. No older one is loaded instead."""


_CONFIG = ConfigDict(extra="forbid", ser_json_inf_nan="constants")  # metrics may be NaN
_LARGEST = 2**63 - 1  # what NumPy and torch count with

Count = Annotated[int, Field(ge=0, le=_LARGEST)]
Extent = Annotated[int, Field(ge=0, le=_LARGEST // 2)]  # where a piece begins and how long it is: their sum is a count
# One name in the checkpoint's own folder: with neither a slash nor a dot before it, it leads nowhere else.
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$", max_length=255)]
Checksum = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
Dtype = Literal["F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL"]  # safetensors' names


@pydantic_dataclass(frozen=True, config=_CONFIG)
class FileRecord:
    """A file's size in bytes, and the XXH3-128 checksums of its 64 MiB blocks."""

    size: Count
    checksums: list[Checksum]

    @model_validator(mode="after")
    def _is_covered(self) -> Self:
        if len(self.checksums) != (blocks := -(-self.size // BLOCK)):
            raise ValueError(f"{len(self.checksums)} checksums, but {self.size} bytes are {blocks} blocks")
        return self


@pydantic_dataclass(frozen=True, config=_CONFIG)
class SavedPiece:
    """A rectangle of a tensor, viewed as a matrix, stored row by row from byte `offset` of a file."""

    file: FileName
    offset: Count
    row: Extent
    column: Extent
    rows: Extent
    columns: Extent


@pydantic_dataclass(frozen=True, config=_CONFIG)
class SavedTensor:
    """A whole tensor: its element type by safetensors name (`F32`), its shape, and its pieces."""

    dtype: Dtype
    shape: tuple[Count, ...]
    pieces: list[SavedPiece]

    @model_validator(mode="after")
    def _can_be_counted(self) -> Self:
        if math.prod(self.shape) > _LARGEST:
            raise ValueError(f"shape {list(self.shape)} has more elements than any tensor")
        return self


class SavedPlateau(TypedDict):
    """The state of a plateau schedule."""

    __pydantic_config__ = _CONFIG  # type: ignore[misc]
    reductions: Count
    waited: Count


class SavedPosition(TypedDict):
    """A `Position`, as it is written."""

    __pydantic_config__ = _CONFIG  # type: ignore[misc]
    step: Count
    best_step: Count | None
    best_metrics: dict[str, float]
    best_mode: NotRequired[Direction]  # from before metrics knew their direction there is none
    evaluations_since_best: Count
    stopped_early: bool
    unevaluated: bool
    plateaus: NotRequired[dict[str, SavedPlateau]]  # of runs with such schedules alone


_OPTIMIZER = rf"^({'|'.join(TABLE_OPTIMIZERS)}|[\w.]+:\w+)$"


class SavedTable(TypedDict):
    """How a table lay: `optimizer` says which states it has."""

    __pydantic_config__ = _CONFIG  # type: ignore[misc]
    rows: Count
    dim: Count | None
    sharding: str
    optimizer: Annotated[str, Field(pattern=_OPTIMIZER)]


class SavedPlaces(TypedDict):
    """Where a table lay: `shards` are rank, rows, columns, and the planned bytes of device and host memory."""

    __pydantic_config__ = _CONFIG  # type: ignore[misc]
    rows: Count
    dim: Count
    sharding: str
    kernel: str
    shards: list[Annotated[list[Count], Field(min_length=5, max_length=5)]]


class SavedPlan(TypedDict):
    """The plan that the run had, as `rechub-dist plan --save` writes one."""

    __pydantic_config__ = _CONFIG  # type: ignore[misc]
    world_size: Annotated[int, Field(ge=1, le=_LARGEST)]
    local_world_size: Annotated[int, Field(ge=1, le=_LARGEST)] | None
    device: Literal["cpu", "cuda"]
    tables: dict[str, SavedPlaces]


class _NamedModel(TypedDict):
    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]
    name: str


class SavedIdentity(TypedDict):
    """What the run was, in the form of the version that wrote it; only what every form has is described here."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]
    seed: Count
    model: _NamedModel
    data: dict[str, Any]


class SavedRun(TypedDict):
    """What is recorded of a run. A key more is a new format: who does not know it would go on as if it were not there.

    `id` is drawn once a run; checkpoints from before it was recorded have none, nor a `plan`. `config` is YAML.
    """

    __pydantic_config__ = _CONFIG  # type: ignore[misc]
    id: NotRequired[str]
    position: SavedPosition
    identity: SavedIdentity
    config: str
    tables: dict[str, SavedTable]
    plan: NotRequired[SavedPlan]
    world_size: Annotated[int, Field(ge=1, le=_LARGEST)]
    saved_at: str
    versions: dict[str, str]


FORMAT = 1  # of the manifest; what it is written in stands with docs/checkpoints.md


@pydantic_dataclass(frozen=True, config=_CONFIG)
class CheckpointManifest:
    """The content of one step's checkpoint.

    Checkpoints come from elsewhere, too: whatever is read is as these types say, or refused by name.
    """

    step: Count
    run: SavedRun
    files: dict[FileName, FileRecord]
    tensors: dict[str, SavedTensor]
    format: Literal[1] = field(default=1)

    @model_validator(mode="after")
    def _is_of_one_step(self) -> Self:
        if self.run["position"]["step"] != self.step:
            raise ValueError(f"it is of step {self.step}, but run.position.step is {self.run['position']['step']}")
        return self

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
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{path} is not a manifest: {one_line(error)}") from error
    number = tree.get("format", FORMAT) if isinstance(tree, dict) else FORMAT
    if isinstance(number, int) and not isinstance(number, bool) and number > FORMAT:
        raise _newer(path, number, f"this one reads formats up to {FORMAT}")
    try:
        return _MANIFEST.validate_json(sealed[2], strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])[:200]
        if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
            raise _newer(path, number, f"this one does not know the key {where!r}") from error
        what = first["msg"].removeprefix("Value error, ")
        raise DamagedError(f"{path} is not a manifest: {where}{': ' if where else ''}{what}") from error


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
