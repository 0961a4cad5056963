"""Partitions in sequence: the sub-folders of a folder, in the order of their names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow.fs as pafs

from rechub_dist.config import StorageConfig
from rechub_dist.data.parquet.storage import exists, join, locate
from rechub_dist.errors import UserError

_DEFAULTS = StorageConfig()
COMPLETE = "_SUCCESS"  # the file that writers put into a folder when all of it is there


def new_partitions(
    path: str, known: Sequence[str], *, complete: bool, settings: StorageConfig = _DEFAULTS
) -> list[str]:
    """The names of the partitions of `path` that come after those known, sorted.

    Args:
        path: a folder, or an address of one. What begins with `.` or `_` in it is not looked at.
        known: the partitions that were found before, sorted.
        complete: stop at the first one without a `_SUCCESS` file in it. So a day that is still being written is waited
            for, even if the next one is there.
        settings: of the store.

    Raises:
        UserError: no such folder, files beside the partitions, or a partition that comes before a known one.
    """
    store, root = locate(path, settings)
    listing = store.with_retries(lambda _: store.filesystem.get_file_info(pafs.FileSelector(root)), path)
    seen = [info for info in listing if not info.base_name.startswith((".", "_"))]
    _check_folders(path, seen)
    names = sorted({info.base_name for info in seen} - set(known))
    if names and known and names[0] < known[-1]:
        raise UserError(
            f"{path}: partition {names[0]!r} has come after {known[-1]!r}, which it sorts before; partitions are "
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
            f"{path}: {files[0]!r} lies beside the partitions; with data.order: sequential-partitions all files are in "
            f"its sub-folders (date=2022-04-25/..., for one), so move it into one"
        )
