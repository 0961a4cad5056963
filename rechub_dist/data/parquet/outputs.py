"""Writes outputs without ever destroying a user's files: marks, and replacement of earlier outputs.

Every output folder has a mark, `_rechub_dist.json`: the kind of output, and the files that it consists of. Only these
are ever removed, and only for an output of the same kind; a folder with anything else in it is refused. Names that
begin with `_` are not data, so the mark is never read as such.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import posixpath
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TextIO

import pyarrow.fs as pafs
from pydantic import BaseModel, ConfigDict, ValidationError

from rechub_dist.config import StorageConfig
from rechub_dist.data.parquet.storage import locate
from rechub_dist.errors import UserError

MARK = "_rechub_dist.json"
_WRITER = "rechub_dist"
_HIDDEN = (".writing", ".replaced")  # ends of names, after a dot and a name of ours
_HEAD = 1 << 20  # bytes of a file that are hashed to notice a change


@dataclass(frozen=True)
class Mark:
    """The content of `_rechub_dist.json`.

    Attributes:
        kind: what the folder holds: `predictions`, for example.
        files: by relative path (with `/`), the size and a digest of each file in it; None where that was not yet known
            when the mark was written.
    """

    kind: str
    files: dict[str, str | None]

    def text(self) -> str:
        """As JSON."""
        return json.dumps({"writer": _WRITER, "kind": self.kind, "files": self.files}, indent=1) + "\n"

    @classmethod
    def of(cls, text: bytes) -> Mark | None:
        """The mark in a file's content; None if it is not a mark of ours."""
        try:
            found = _Written.model_validate_json(text)
        except ValidationError:
            return None
        return cls(found.kind, found.files)


class _Written(BaseModel):
    """A mark as it is written."""

    model_config = ConfigDict(strict=True)
    writer: Literal["rechub_dist"]
    kind: str
    files: dict[str, str | None]


def claim(
    folder: str, kind: str, files: Iterable[str], settings: StorageConfig | None = None, *, option: str = "--out"
) -> None:
    """Mark a folder, local or an address, as ours before files are written into it; called by one process for all.

    It may be new, empty, or hold an earlier output of the same kind whose files are all known to its mark: these are
    removed, and nothing else ever is.

    Args:
        folder: path or address.
        kind: what it will hold, for people to read: `predictions`.
        files: the names (without folders) of all files that may be written, and so removed by the next `claim`. Leave
            out a file that shows that the output is complete (`_SUCCESS`): then a finished output is refused.
        settings: of the store.
        option: the option that names the folder, for the error.

    Raises:
        UserError: the folder holds something else, is a file, or cannot be written.
    """
    store, inside = locate(folder, settings or StorageConfig())
    filesystem, inside = store.filesystem, inside.rstrip("/") or "/"
    try:
        info = filesystem.get_file_info(inside)
        if info.type not in (pafs.FileType.NotFound, pafs.FileType.Directory):
            raise UserError(f"{option}: {folder} is a file: name a folder")
        there = filesystem.get_file_info(pafs.FileSelector(inside, allow_not_found=True))
        mark = None
        if any(entry.base_name == MARK and entry.type == pafs.FileType.File for entry in there):
            with filesystem.open_input_file(posixpath.join(inside, MARK)) as source:
                mark = Mark.of(source.read())
        for entry in there:
            name = entry.base_name
            known = mark is not None and mark.kind == kind and (name == MARK or name in mark.files)
            if not known or entry.type != pafs.FileType.File:
                raise _foreign(folder, name, kind, option)
        for entry in there:
            if entry.base_name != MARK:  # the mark stays until it is replaced, or the rest would be nobody's
                filesystem.delete_file(entry.path)
        filesystem.create_dir(inside, recursive=True)
        with filesystem.open_output_stream(posixpath.join(inside, MARK)) as sink:
            sink.write(Mark(kind, dict.fromkeys(files)).text().encode())
    except OSError as error:
        raise UserError(
            f"{option}: {folder} cannot be written: {error.strerror or error}; name another place"
        ) from error


@contextmanager
def whole_folder(out: Path, kind: str, *, replace: bool = False, option: str = "--out") -> Iterator[Path]:
    """A folder to write into, which becomes `out` when the block succeeds, and is removed when it fails.

    Until then it is hidden beside `out`, so that a killed process leaves nothing that looks complete.

    Args:
        out: a local folder: new, empty, or (with `replace`) an earlier output of the same kind in which no file was
            changed or added; that is replaced only at the end.
        kind: what it will hold; outputs of another kind are not replaced.
        replace: whether an earlier output may be replaced.
        option: the option that names the folder, for the error.

    Raises:
        UserError: `out` is a file, holds anything else, or cannot be written.
    """
    out = _real(out, option)
    work, old = out.with_name(f".{out.name}.writing"), out.with_name(f".{out.name}.replaced")
    with ExitStack() as stack:
        try:
            _remove_marked(work, option)  # left by a killed process
            if not out.exists() and _marked(old):  # left by one that was killed between the two renames below
                os.rename(old, out)
            _remove_marked(old, option)
            check_replaceable(out, kind, replace=replace, option=option)
            work.mkdir(parents=True)
            mark = stack.enter_context((work / MARK).open("x"))
            undo = stack.enter_context(ExitStack())
            undo.callback(shutil.rmtree, work, ignore_errors=True)
            _lock(mark, work, option)
            _rewrite(mark, Mark(kind, {}))
            yield work
            check_replaceable(out, kind, replace=replace, option=option)
            _rewrite(mark, Mark(kind, _contents(work)))
            if out.exists() and any(out.iterdir()):
                os.rename(out, old)
            os.rename(work, out)  # also onto an empty folder
            undo.pop_all()
            _remove_marked(old, option)
        except OSError as error:
            raise _failed(out, error, option) from error


@contextmanager
def held_folder(folder: Path, kind: str, *, option: str = "--out") -> Iterator[Path]:
    """A local folder that outputs are added to, by this process alone until the block ends.

    What killed writers have left hidden in it is removed.

    Args:
        folder: new, empty, or one that was held for the same kind.
        kind: what it holds.
        option: the option that names the folder, for the error.

    Raises:
        UserError: it is a file, holds anything else, cannot be written, or another process holds it.
    """
    folder = _real(folder, option)
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            foreign = next((path.name for path in folder.iterdir() if path.name != MARK), MARK)
            if foreign != MARK and not (folder / MARK).is_file():
                raise _foreign(folder, foreign, kind, option)
            mark = stack.enter_context(os.fdopen(os.open(folder / MARK, os.O_RDWR | os.O_CREAT, 0o666), "r+"))
            _lock(mark, folder, option)
            text = (folder / MARK).read_bytes()
            found = Mark.of(text)
            if found is None and foreign == MARK and _begun(text):
                found = Mark(kind, {})
                _rewrite(mark, found)
            if found is None or found.kind != kind:
                raise _foreign(folder, foreign, kind, option)
            for path in folder.iterdir():
                if path.name.startswith(".") and path.name.endswith(_HIDDEN) and _marked(path):
                    _remove_marked(path, option)
        except OSError as error:
            raise _failed(folder, error, option) from error
        yield folder


@contextmanager
def scratch_folder(folder: Path, *, option: str = "--out") -> Iterator[Path]:
    """A hidden folder in a held one, removed when the block ends; of what is in it, what is whole may be moved out.

    Raises:
        UserError: it cannot be written.
    """
    work = folder / ".scratch.writing"
    try:
        _remove_marked(work, option)
        work.mkdir()
        (work / MARK).write_text(Mark("scratch", {}).text(), encoding="utf-8")
        yield work
    except OSError as error:
        raise _failed(work, error, option) from error
    finally:
        try:
            _remove_marked(work, option)
        except (SystemExit, KeyboardInterrupt):  # of a signal, in the middle of that: what it has left goes, too
            _remove_marked(work, option)
            raise


def remove_output(folder: Path, kind: str, *, option: str = "--out") -> None:
    """Remove an output in which no file was changed or added. It is hidden first, so that no part of it looks whole.

    Raises:
        UserError: it is not of the kind, holds something else, or cannot be removed.
    """
    check_replaceable(folder, kind, replace=True, option=option)
    hidden = folder.with_name(f".{folder.name}.replaced")
    try:
        _remove_marked(hidden, option)
        os.rename(folder, hidden)
        _remove_marked(hidden, option)
    except OSError as error:
        raise _failed(folder, error, option) from error


@contextmanager
def whole_file(
    path: Path, ours: Callable[[Path], bool], what: str = "one of ours", *, option: str = "--out"
) -> Iterator[Path]:
    """A file to write, which becomes `path` when the block succeeds, and is removed when it fails.

    Args:
        path: a new file, or one that is `ours`; its folder is created.
        ours: whether an existing file carries our mark, wherever its format has room for one.
        what: what an existing file has to be, for the error: `a vocabulary of rechub-dist`.
        option: the option that names the file, for the error.

    Raises:
        UserError: `path` is a folder or not `ours`, or cannot be written.
    """
    path = _real(path, option)
    check_file(path, ours, what, option=option)
    # a name that nobody else has
    work = path.with_name(f".{path.name}.{secrets.token_hex(4)}.writing")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        work.open("xb").close()
        yield work
        check_file(path, ours, what, option=option)
        os.replace(work, path)
    except OSError as error:
        raise _failed(path, error, option) from error
    finally:
        with suppress(OSError):
            work.unlink(missing_ok=True)


def check_file(path: Path, ours: Callable[[Path], bool], what: str = "one of ours", *, option: str = "--out") -> None:
    """Raise UserError if `whole_file` may not write a file; to find out before the work, which may be long."""
    if path.is_dir():
        raise UserError(f"{option}: {path} is a folder: name a file")
    if path.exists() and not ours(path):
        raise UserError(f"{option}: {path} exists and is not {what}: name another file, or remove it yourself")


def check_replaceable(out: Path, kind: str, *, replace: bool, option: str = "--out") -> None:
    """Raise UserError if `whole_folder` may not write a folder; to find out before the work, which may be long."""
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"{option}: {out} is a file: name a folder")
    try:
        names = sorted(entry.name for entry in out.iterdir())
        if not names:
            return
        mark = Mark.of((out / MARK).read_bytes()) if (out / MARK).is_file() else None
        if not replace or mark is None or mark.kind != kind:
            raise _foreign(out, next((name for name in names if name != MARK), MARK), kind if replace else None, option)
        for name, stamp in _contents(out).items():
            if mark.files.get(name) != stamp:
                how = "has changed" if name in mark.files else "was added"
                raise UserError(
                    f"{option}: {out} is an earlier output, but {name} {how} since: name a new folder, or remove this "
                    "one yourself"
                )
    except OSError as error:
        raise _failed(out, error, option) from error


def _real(path: Path, option: str) -> Path:
    """The path with links resolved. Raises UserError for an address."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(path)):
        raise UserError(f"{option}: {path} is an address, but this is written to local disks only: name a local path")
    return Path(os.path.realpath(path))


def _contents(folder: Path) -> dict[str, str | None]:
    """The files below a folder, except its mark, each with its size and a digest of its first megabyte."""
    found: dict[str, str | None] = {}
    for above, folders, names in os.walk(folder):
        for name in [*names, *(name for name in folders if os.path.islink(os.path.join(above, name)))]:
            path = Path(above, name)
            relative = path.relative_to(folder).as_posix()
            if relative != MARK:
                found[relative] = _stamp(path)
    return dict(sorted(found.items()))


def _stamp(path: Path) -> str:
    if path.is_symlink() or not path.is_file():
        return "no file"  # which we never write
    with path.open("rb") as file:
        digest = hashlib.blake2b(file.read(_HEAD), digest_size=8).hexdigest()
    return f"{path.stat().st_size} {digest}"


def _remove_marked(folder: Path, option: str) -> None:
    """Remove a folder with a name that only we use. Raises UserError if it is not ours, or in use."""
    if not os.path.lexists(folder):
        return
    if not _marked(folder):
        raise UserError(f"{option}: {folder} is in the way and is not ours: remove it yourself")
    if (folder / MARK).exists():
        with (folder / MARK).open() as file:
            _lock(file, folder, option)
            for path in folder.iterdir():
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                elif path.name != MARK:  # the mark stays to the last, or the rest would be nobody's
                    path.unlink()
            (folder / MARK).unlink()
    folder.rmdir()


def _marked(folder: Path) -> bool:
    """Whether a folder with a name that only we use is ours, wherever its writer was killed."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    mark = folder / MARK
    if not mark.exists():
        return not any(folder.iterdir())
    return mark.is_file() and _begun(mark.read_bytes())


def _begun(text: bytes) -> bool:
    """Whether this is a mark of ours, as far as it was written."""
    ours = Mark("", {}).text().encode()
    ours = ours[: ours.index(b"kind")]
    return text.startswith(ours) or ours.startswith(text)


def _lock(mark: TextIO, folder: Path, option: str) -> None:
    """Lock a mark until it is closed or the process ends. Raises UserError if another process has locked it."""
    try:
        fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{option}: another process is writing to {folder}: wait until it has ended") from None
    except OSError:  # a file system without locks
        pass


def _rewrite(file: TextIO, mark: Mark) -> None:
    text = mark.text().encode()
    os.pwrite(file.fileno(), text, 0)  # over what is there: it is never empty again
    os.ftruncate(file.fileno(), len(text))


def _foreign(folder: object, name: str, kind: str | None, option: str) -> UserError:
    what = f", and is not an output ({kind}) that may be replaced" if kind else ""
    return UserError(f"{option}: {folder} already holds {name}{what}: name a new folder, or empty this one yourself")


def _failed(where: Path, error: OSError, option: str) -> UserError:
    return UserError(f"{option}: {error.filename or where}: {error.strerror or error}; fix that and try again")
