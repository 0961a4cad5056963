"""Footers of Parquet files: fetched with retries, parsed, and cached in the user's cache folder."""

from __future__ import annotations

import contextlib
import hashlib
import os
import struct
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rechub_dist.data.parquet.kinds import plain_schema
from rechub_dist.data.parquet.lookalikes import HEAD, what_else
from rechub_dist.data.parquet.storage import Store
from rechub_dist.skips import BadFileError

# What pyarrow raises of a damaged file; the name of a column in it may be any bytes.
UNREADABLE = (OSError, UnicodeDecodeError, pa.ArrowException)
_TAIL = 65_536  # bytes, enough for most footers
_SETTLED = 2.0  # seconds after which a further change gives another modification time on any file system
_DIGEST = 16


@dataclass(frozen=True)
class Footer:
    """What a manifest needs of a file.

    Attributes:
        counts: rows of each row group.
        schema: Arrow's, with the types of `plain_type`, without metadata.
        etag: the object's version; None if the store does not report it.
    """

    counts: tuple[int, ...]
    schema: pa.Schema
    etag: str | None = None


def read_footer(store: Store, path: str) -> Footer:
    """The footer of the file at an address.

    Raises:
        BadFileError: the file is missing, or has no readable footer.
        UserError: the store has failed until its deadline.
    """

    def fetch(_attempt: int) -> tuple[bytes, bytes, str | None]:
        with store.open(store.inside(path)) as source:
            tail = footer_bytes(source)
            head = b"" if tail[-4:] == b"PAR1" else read_exactly(source, 0, min(source.size(), HEAD))
            return tail, head, etag(source)

    tail, head, version = store.with_retries(fetch, f"{path}: it")
    if tail[-4:] != b"PAR1" and (other := what_else(head, tail, path)) is not None:
        raise BadFileError(f"{path}: it {other}", "corrupt")
    metadata = parse_footer(tail, path)
    counts = tuple(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))
    try:
        return Footer(counts, plain_schema(metadata.schema.to_arrow_schema()), version)
    except UNREADABLE as error:
        raise corrupt(path, error) from None


def footer_bytes(source: Any) -> bytes:
    """The end of an open file, footer included, in one or two requests. Raises OSError if the store fails."""
    size = source.size()
    tail = read_exactly(source, max(0, size - _TAIL), min(size, _TAIL))
    if tail[-4:] == b"PAR1" and len(tail) >= 8:
        length = struct.unpack("<I", tail[-8:-4])[0] + 8
        if len(tail) < length <= size:
            tail = read_exactly(source, size - length, length)
    return tail


def parse_footer(tail: bytes, path: str) -> pq.FileMetaData:
    """The metadata in a file's last bytes. Raises BadFileError if there is none."""
    try:
        return pq.read_metadata(pa.BufferReader(tail))
    except UNREADABLE as error:
        raise corrupt(path, error) from None


def read_exactly(source: Any, offset: int, size: int) -> bytes:
    """`size` bytes of an open file from `offset` on. Raises OSError if fewer arrive."""
    found = source.read_at(size, offset) if size else b""
    if len(found) != size:
        raise OSError(f"got {len(found)} bytes instead of {size}")
    return found


def etag(source: Any) -> str | None:
    """The version of an open object; None if its store does not report it."""
    try:
        value = (source.metadata() or {}).get("ETag")
    except (AttributeError, NotImplementedError, pa.ArrowException):
        return None
    return None if value is None else value.decode()


def corrupt(path: str, error: Exception, what: str = "it") -> BadFileError:
    """The error for a file (or `what` in it) that can be read, but not decoded."""
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return BadFileError(
        f"{path}: {what} is truncated or corrupt ({reason}); write the file again or remove it", "corrupt"
    )


class FooterCache:
    """A cache of the footers of one data set, by path, size and modification time.

    One file below `$XDG_CACHE_HOME/rechub-dist` (else `~/.cache/rechub-dist`), named by a hash of `dataset`.
    Any number of processes may share it, as it is replaced atomically. It is ignored if damaged or not writable.
    """

    def __init__(self, dataset: str) -> None:
        base = _cache_folder()
        name = hashlib.blake2b(dataset.encode(), digest_size=_DIGEST).hexdigest()
        self._path = base / "rechub-dist" / "manifests" / f"{name}.arrow"

    def load(self) -> dict[tuple[str, int, int], Footer]:
        """The cached footers by (path, size, modified); empty if the file is absent or damaged."""
        try:
            content = self._path.read_bytes()
            digest, body = content[:_DIGEST], content[_DIGEST:]
            if hashlib.blake2b(body, digest_size=_DIGEST).digest() != digest:
                return {}
            table = pa.ipc.open_file(body).read_all()
            stored = [plain_schema(pa.ipc.read_schema(pa.py_buffer(value))) for value in _schemas(table)]
            columns = [
                table.column(name).to_pylist() for name in ("path", "size", "modified", "etag", "schema", "counts")
            ]
        except (OSError, ValueError, KeyError, pa.ArrowException):
            return {}
        return {
            (path, size, modified): Footer(tuple(counts), stored[schema], version)
            for path, size, modified, version, schema, counts in zip(*columns, strict=True)
        }

    def store(self, footers: Iterable[tuple[tuple[str, int, int], Footer]], began: float) -> None:
        """Cache footers read since `began` (`time.time`), except of files that were changed shortly before."""
        settled = [(key, footer) for key, footer in footers if key[2] < (began - _SETTLED) * 1e9]
        schemas: dict[bytes, int] = {}
        index = [schemas.setdefault(footer.schema.serialize().to_pybytes(), len(schemas)) for _, footer in settled]
        table = pa.table(
            {
                "path": pa.array([key[0] for key, _ in settled], pa.string()),
                "size": pa.array([key[1] for key, _ in settled], pa.int64()),
                "modified": pa.array([key[2] for key, _ in settled], pa.int64()),
                "etag": pa.array([footer.etag for _, footer in settled], pa.string()),
                "schema": pa.array(index, pa.int32()),
                "counts": pa.array([footer.counts for _, footer in settled], pa.list_(pa.int64())),
            }
        ).replace_schema_metadata({str(place): schema for schema, place in schemas.items()})
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        body = sink.getvalue().to_pybytes()
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self._path.parent, delete=False) as temporary:
                temporary.write(hashlib.blake2b(body, digest_size=_DIGEST).digest() + body)
            Path(temporary.name).replace(self._path)


def _schemas(table: pa.Table) -> list[bytes]:
    """The serialised schemas, which are in the table's metadata under their numbers."""
    stored = table.schema.metadata or {}
    return [stored[str(place).encode()] for place in range(len(stored))]


def _cache_folder() -> Path:
    given = os.environ.get("XDG_CACHE_HOME")
    try:
        return Path(given) if given else Path("~/.cache").expanduser()
    except RuntimeError:  # a container's user may have neither HOME nor an entry in the passwd file
        return Path(tempfile.gettempdir()) / f"cache-of-user-{os.getuid()}"
