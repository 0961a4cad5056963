"""Partitions in sequence: the sub-folders of a folder, in the order of their names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow.fs as pafs

from rechub_dist.config import StorageConfig
from rechub_dist.data.parquet.storage import exists, join, locate
from rechub_dist.errors import UserError

_DEFAULTS = StorageConfig()
COMPLETE = "_SUCCESS"  # the file that writers put into a folder once it is complete


def new_partitions(
    path: str, known: Sequence[str], *, complete: bool, settings: StorageConfig = _DEFAULTS
) -> list[str]:
    """The names of the partitions of `path` that come after the known ones, sorted.

    Args:
        path: a folder, or the address of one. Names in it that begin with `.` or `_` are ignored.
        known: the partitions that were found before, sorted.
        complete: stop before the first one without a `_SUCCESS` file, so that a partition which is still being written
            is waited for even if the next one is there.
        settings: of the store.

    Raises:
        UserError: no such folder, files beside the partitions, or a new partition that sorts before a known one.
    """
    store, root = locate(path, settings)
    listing = store.with_retries(lambda _: store.filesystem.get_file_info(pafs.FileSelector(root)), path)
    seen = [info for info in listing if not info.base_name.startswith((".", "_"))]
    _check_folders(path, seen)
    names = sorted({info.base_name for info in seen} - set(known))
    if names and known and names[0] < known[-1]:
        raise UserError(
            f"{path}: partition {names[0]!r} has appeared after {known[-1]!r}, but sorts before it; partitions are "
            "trained in the order of their names: give it a name that sorts last"
        )
    if not complete:
        return names
    found = []
    for name in names:
        if not exists(join(join(path, name), COMPLETE), settings):
            break
        found.append(name)
    return found


def _check_folders(path: str, seen: Sequence[Any]) -> None:
    files = sorted(info.base_name for info in seen if info.type != pafs.FileType.Directory)
    if files:
        raise UserError(
            f"{path}: {files[0]!r} is a file beside the partitions; with data.order: sequential-partitions all files "
            f"must be in sub-folders (date=2022-04-25/..., for example), so move it into one"
        )
