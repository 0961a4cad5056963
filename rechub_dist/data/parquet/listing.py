"""Finds files by path, pattern, address and hive partition."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs

from rechub_dist.config import Selection, StorageConfig
from rechub_dist.data.parquet.conditions import Conditions
from rechub_dist.data.parquet.storage import Store, locate
from rechub_dist.errors import UserError, nearest

_GLOB = re.compile(r"[*?\[]")
_URI_GLOB = re.compile(r"[*\[]")  # in an address, `?` begins the options
_BELOW = r"(?:[^._/][^/]*/)*[^._/][^/]*\.parquet"  # the files that count below a folder


_OTHER = re.compile(r"(\.(?:csv|tsv|txt|jsonl?|ndjson|orc|avro|feather|arrow|parq|pq|parquet)(?:\.[a-z0-9]+)?)$", re.I)


class Found(NamedTuple):
    """A file: its path or address, name relative to the root, size in bytes, and modification time in ns, if known.

    `where` has the conditions on its rows.
    """

    path: str
    name: str
    size: int
    modified: int | None
    store: Store
    where: Conditions = Conditions(())


def find(source: str | Selection, settings: StorageConfig) -> list[Found]:
    """The files of a path (see `Manifest.read`) whose partitions are selected, sorted by name; at least one.

    Raises:
        UserError: there is no file, the listing fails, or the conditions do not fit the partitions.
    """
    if isinstance(source, str):
        return _find(source, settings)
    found = _find(source.path, settings)
    wanted = _matching(source, found)
    if not wanted:
        raise UserError(
            f"{source.path}: none of its {len(found)} file(s) meets {Conditions(source.where)}; check 'where'"
        )
    return wanted


def _find(path: str, settings: StorageConfig) -> list[Found]:
    base, mark, options = path.partition("?") if "://" in path else (path, "", "")
    glob = _URI_GLOB if "://" in path else _GLOB
    parts = base.split("/")
    fixed = next((i for i, part in enumerate(parts) if glob.search(part)), len(parts))
    root = "/".join(parts[:fixed]) or ("/" if base.startswith("/") else ".")
    store, inside = locate(root + mark + options, settings)
    # a name that exists literally is not a pattern, whatever characters it has: `set [v2]`
    for part in parts[fixed:]:
        further = f"{inside.rstrip('/')}/{part}"
        if glob.search(part) and not _is_there(store, further):
            break
        inside, fixed = further, fixed + 1
    pattern = "/".join(parts[fixed:]).rstrip("/")
    listed = store.with_retries(lambda _: _listing(store, inside, alone=not pattern), f"{path}: it")
    if listed is None:
        raise UserError(f"{path}: there is no such file or folder; check the path of the data")
    if not pattern and len(listed) == 1 and listed[0].path == inside:
        return [_found(store, listed[0], PurePosixPath(inside).name)]
    # a pattern may match files, or folders
    wanted = re.compile(f"{_translate(pattern)}(?:/{_BELOW})?" if pattern else _BELOW)
    named = sorted(((info, _below(info.path, inside)) for info in listed), key=lambda item: item[1])
    matching = [(info, name) for info, name in named if wanted.fullmatch(name)]
    files = [(info, name) for info, name in matching if info.type == pafs.FileType.File]
    for info, name in matching:
        if info.type != pafs.FileType.File and name.endswith(".parquet"):
            _check_odd(store, info, any(other.startswith(f"{name}/") for _, other in files))
    if not store.remote:
        _check_links(store, [info.path for info, _ in files])
    if not files and pattern:
        raise UserError(f"{path}: no file matches; check the pattern")
    if not files:
        raise UserError(f"{path}: there is no *.parquet file in this folder; {_others(name for _, name in named)}")
    return [_found(store, info, name) for info, name in files]


def _others(names: Iterable[str]) -> str:
    """What to do in a folder without Parquet files, given the names of all that is below it."""
    seen = [name for name in names if not re.search(r"(^|/)[._]", name)]
    endings = Counter(match[1].lower() for name in seen if (match := _OTHER.search(name)))
    if not endings:
        return "name the folder that holds the data"
    [(ending, count)] = endings.most_common(1)
    return (
        f"there are {count} file(s) *{ending}, but Parquet alone is read: convert them by duckdb, pandas or pyarrow, "
        f"such as duckdb -c \"COPY (FROM '*{ending}') TO 'part.parquet'\", or rename what is Parquet already"
    )


def _is_there(store: Store, path: str) -> bool:
    """Whether a file or folder has this path in the store's file system."""
    kind = store.with_retries(lambda _: store.filesystem.get_file_info(path).type, f"{store.address(path)}: it")
    return kind != pafs.FileType.NotFound


def _listing(store: Store, root: str, *, alone: bool) -> list[Any] | None:
    """Everything below a folder, or the file `root` itself if `alone` allows it; None if there is nothing."""
    filesystem = store.filesystem
    info = filesystem.get_file_info(root)
    if info.type == pafs.FileType.File and alone:
        return [info]
    if info.type == pafs.FileType.Unknown and alone:
        _check_odd(store, info, False)
    if info.type != pafs.FileType.Directory:
        return None
    if store.remote:
        return list(filesystem.get_file_info(pafs.FileSelector(root, recursive=True)))
    whole: list[str] = []
    broken: list[str] = []
    for path in _walk(root, (os.path.realpath(root),)):
        (whole if os.path.exists(path) else broken).append(path)
    return [*filesystem.get_file_info(whole), *(pafs.FileInfo(path, pafs.FileType.NotFound) for path in broken)]


def _walk(folder: str, above: tuple[str, ...]) -> Iterator[str]:
    """The paths of everything below a local folder, through links as well.

    Links to a folder in `above` (the real paths from the root down to this one) are not followed, as they are cycles.
    """
    with os.scandir(folder) as entries:
        for entry in entries:
            yield entry.path
            link = entry.is_symlink()
            if os.path.isdir(entry.path) if link else entry.is_dir():
                real = os.path.realpath(entry.path) if link else f"{above[-1]}/{entry.name}"
                if real not in above:
                    yield from _walk(entry.path, (*above, real))


def _check_odd(store: Store, info: Any, holds_files: bool) -> None:
    """Raise UserError for what has the name of a data file, but is something else."""
    what = "is neither a file nor a folder, but a pipe, a socket or a device"
    if info.type == pafs.FileType.Directory:
        if holds_files:
            return
        what = "is a folder without a *.parquet file in it"
    elif info.type == pafs.FileType.NotFound:
        what = "is a link that leads nowhere"
    raise UserError(
        f"{store.address(info.path)}: it {what}; remove it, or name the data by a pattern that leaves it out"
    )


def _check_links(store: Store, paths: list[str]) -> None:
    """Raise UserError for a local file that is found twice, because of a link."""
    folders: dict[str, str] = {}  # many files are in one
    seen: dict[str, str] = {}
    for path in paths:
        folder, name = os.path.split(path)
        if folder not in folders:
            folders[folder] = os.path.realpath(folder)
        real = os.path.realpath(path) if os.path.islink(path) else f"{folders[folder]}/{name}"
        first = seen.setdefault(real, path)
        if first != path:
            raise UserError(
                f"{store.address(path)}: it is the same file as {store.address(first)}, by a link; remove one, or name "
                "the data by a pattern that leaves it out"
            )


def _found(store: Store, info: Any, name: str) -> Found:
    modified = None if info.mtime is None else int(info.mtime_ns)
    return Found(store.address(info.path), name, int(info.size), modified, store)


def _matching(source: Selection, found: list[Found]) -> list[Found]:
    """The files whose partitions meet the conditions on partition keys; with the other conditions, on their rows."""
    keys = [partition_keys(file.path) for file in found]
    on_keys = [condition for condition in source.where if any(condition[0] in held for held in keys)]
    columns: dict[str, pa.Array] = {}
    for name, _, _ in on_keys:
        for file, held in zip(found, keys, strict=True):
            if name not in held:
                raise UserError(
                    f"{file.path}: its path has no partition {name!r}, unlike others, which "
                    f"{Conditions(source.where)} needs; {nearest(name, held)}"
                )
        columns[name] = _typed([held[name] for held in keys])
    on_rows = Conditions(tuple(condition for condition in source.where if condition not in on_keys))
    places = range(len(found))
    if on_keys:
        places = Conditions(tuple(on_keys)).rows(pa.table(columns), source.path).tolist()
    return [found[place]._replace(where=on_rows) for place in places]


def partition_keys(path: str) -> dict[str, str]:
    """The partition keys in a path, with their values: `date=2022-04-25/part-0.parquet`."""
    pairs = (folder.split("=", 1) for folder in path.partition("?")[0].split("/")[:-1] if "=" in folder)
    return {name: unquote(value) for name, value in pairs}


def _typed(values: list[str]) -> pa.Array:
    """Integers if all values are, else strings; ISO dates compare correctly as strings."""
    array = pa.array(values)
    try:
        return pc.cast(array, pa.int64())
    except pa.ArrowInvalid:
        return array


def _below(path: str, root: str) -> str:
    """`path`, from the listing of `root`, relative to it."""
    root = root.rstrip("/")
    return path[len(root) + 1 :] if path.startswith(root + "/") else path.removeprefix("/")


def _translate(pattern: str) -> str:
    """A glob as a regular expression: `**` matches any folders, the other wildcards within one name.

    As in a shell, a leading dot is matched only by a dot in the pattern.
    """
    text = ""
    for match in re.finditer(r"\*\*/|\*\*|\*|\?|\[!?\]?[^\]]*\]|.", pattern):
        token = match.group()
        if len(token) > 1 or token in "*?":
            text += r"(?!\.)" if match.start() == 0 or pattern[match.start() - 1] == "/" else ""
        if token == "**/":
            text += r"(?:(?!\.)[^/]+/)*"
        elif token == "**":
            text += ".*"
        elif token == "*":
            text += "[^/]*"
        elif token == "?":
            text += "[^/]"
        elif len(token) > 1:
            text += (
                "[" + ("^" if token[1] == "!" else "") + re.escape(token[1:-1].lstrip("!")).replace(r"\-", "-") + "]"
            )
        else:
            text += re.escape(token)
    return text
