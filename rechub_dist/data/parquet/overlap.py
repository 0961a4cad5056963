"""Keeps outputs and inputs apart."""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from urllib.parse import urlsplit

from rechub_dist.data.parquet.storage import is_remote
from rechub_dist.errors import UserError

_GLOB = re.compile(r"[*?\[]")
_SAME = {"s3a": "s3", "s3n": "s3", "gcs": "gs", "abfss": "abfs"}  # different schemes of the same store


def refuse_overlap(out: str, inputs: Iterable[str], *, option: str = "--out") -> None:
    """Check that an output is not an input, does not contain one, and would not be read as part of one.

    Links, bind mounts and different spellings of an address are resolved. Within an input, names that begin with `_` or
    `.` are allowed, as they are not data.

    Args:
        out: file, folder or address.
        inputs: files, folders, patterns or addresses. Pass the files that were found as well as the pattern or folder,
            as each may be a link to somewhere else.
        option: the option that names the output, for the error.

    Raises:
        UserError: they overlap.
    """
    target = _Place.of(out)
    for source in dict.fromkeys(inputs):
        if (how := _overlap(target, source)) is not None:
            raise UserError(
                f"{option}: {out} {how} the input {source}: inputs are never overwritten; name another "
                "place for the output"
            )


class _Place:
    """What a path or address refers to, comparable with others.

    Attributes:
        store: '' for local disks, else the kind of the store.
        path: without links, `.` and `..`.
        lineage: identities of the path itself, `[0]`, and of each folder above it.
    """

    def __init__(self, store: str, path: str) -> None:
        self.store, self.path = store, path
        folders = [path]
        while (above := posixpath.dirname(folders[-1])) != folders[-1]:
            folders.append(above)
        self.lineage = [_identity(folder) if not store else folder for folder in folders]

    @classmethod
    def of(cls, where: str) -> _Place:
        if is_remote(where):
            parts = urlsplit(where.partition("?")[0])
            container = parts.username or parts.netloc
            path = posixpath.normpath(f"/{container}/{parts.path}")
            return cls(_SAME.get(parts.scheme, parts.scheme), path)
        return cls("", os.path.realpath(where.removeprefix("file://").partition("?")[0] if "://" in where else where))

    def holds(self, other: _Place) -> bool:
        """Whether `other` is the same place, or below it."""
        return self.store == other.store and self.lineage[0] in other.lineage

    def below(self, other: _Place) -> list[str]:
        """The path components from this place to one that it holds."""
        steps = other.lineage.index(self.lineage[0])
        return other.path.split("/")[-steps:] if steps else []


def _identity(path: str) -> object:
    """The same for all names of a folder or file."""
    try:
        found = os.stat(path)
    except OSError:
        return path
    return found.st_dev, found.st_ino


def _overlap(out: _Place, source: str) -> str | None:
    """How an output and an input overlap, as a verb; None if they do not."""
    pattern: list[str] = []
    if _GLOB.search(source) and not (not is_remote(source) and os.path.exists(source)):
        parts = (source.partition("?")[0] if is_remote(source) else source).split("/")
        fixed = next((i for i, part in enumerate(parts) if _GLOB.search(part)), len(parts))
        source, pattern = "/".join(parts[:fixed]) or ("/" if source.startswith("/") else "."), parts[fixed:]
    place = _Place.of(source)
    if place.holds(out):
        names = place.below(out)
        if not names and not pattern:
            return "is"
        if any(name.startswith(("_", ".")) for name in names):
            return None
        matched = all(part == "**" or fnmatchcase(name, part) for name, part in zip(names, pattern, strict=False))
        return ("lies in" if len(names) >= len(pattern) else "may hold") if "**" in pattern or matched else None
    return "holds" if out.holds(place) else None
