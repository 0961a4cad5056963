"""A run's checkpoint folder, on a local disk, NFS or an object store."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.fs as pafs

from rechub_dist.checkpoint.manifest import MANIFEST, BlockChecksums, DamagedError, FileRecord
from rechub_dist.config import StorageConfig
from rechub_dist.data.parquet.storage import join, locate
from rechub_dist.skips import BadFileError

_STEP = re.compile(r"step-(\d{10})")


class Folder:
    """Access to files by names relative to one folder, such as `step-0000000012/manifest.json`.

    Raises:
        UserError: the address is invalid; from any method: the store fails until the deadline.
    """

    def __init__(self, address: str, settings: StorageConfig) -> None:
        if "://" not in address:
            address = os.path.abspath(address)
        elif address.startswith("s3://"):
            # Background uploads would buffer a whole file in memory if the network is slower than the writer.
            options = {"background_writes": False, **settings.options}
            settings = settings.model_copy(update={"options": options})
        self.address = address
        self.settings = settings
        self._store, self._root = locate(address, settings)

    @property
    def local(self) -> bool:
        """Whether the folder is on a mounted file system."""
        return not self._store.remote

    def path(self, name: str) -> str:
        """A file's path or address, for messages."""
        return join(self.address, name)

    def files(self) -> dict[str, int]:
        """All files below the folder: name to size in bytes."""
        root = self._root.rstrip("/")
        selector = pafs.FileSelector(root, recursive=True, allow_not_found=True)
        found = self._store.with_retries(lambda _: self._filesystem.get_file_info(selector), self.address)
        return {info.path[len(root) + 1 :]: info.size for info in found if info.type == pafs.FileType.File}

    def size(self, name: str) -> int | None:
        """A file's size in bytes; None if it does not exist."""
        info = self._store.with_retries(lambda _: self._filesystem.get_file_info(self._inside(name)), self.path(name))
        return info.size if info.type == pafs.FileType.File else None

    def leads_out(self, folder: str, name: str) -> bool:
        """Whether a file of a folder in this one is, by a link, one of another folder; object stores have no links."""
        within = os.path.realpath(self._inside(folder))
        return self.local and os.path.dirname(os.path.realpath(self._inside(f"{folder}/{name}"))) != within

    def read(self, name: str, offset: int = 0, length: int | None = None) -> memoryview:
        """Read a file from `offset`, to its end or `length` bytes; the returned memory is writable.

        Raises:
            DamagedError: the file is missing, unreadable or too short.
        """
        path = self._inside(name)

        def fetch(_attempt: int) -> memoryview:
            # Memory of this attempt's own: one that hangs may still write into it.
            with self._store.open(path) as source:
                data = np.empty(source.size() - offset if length is None else length, dtype=np.uint8)
                source.seek(offset)
                done = 0
                while done < len(data) and (more := source.readinto(data[done:])):
                    done += more
                return data[:done].data

        try:
            found = self._store.with_retries(fetch, self.path(name))
        except BadFileError as error:
            raise DamagedError(str(error)) from error
        if length is not None and len(found) < length:
            raise DamagedError(f"{self.path(name)} ends before byte {offset + length}")
        return found

    def check_room(self, size: int) -> None:
        """Check for room before writing `size` bytes: filling the disk would leave no room for logs.

        Raises:
            OSError: a local disk has less free space.
        """
        if self.local:
            Path(self._root).mkdir(parents=True, exist_ok=True)
            disk = shutil.disk_usage(self._root)
            if disk.total and disk.free < size:  # some other mounts report neither
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def write(self, name: str, chunks: Iterable[memoryview]) -> FileRecord:
        """Write a new file (on a local disk, with fsync); returns its size and checksums."""
        checksums = BlockChecksums()
        path = self._inside(name)
        with self._create(path) as sink:
            for chunk in chunks:
                checksums.update(chunk)
                sink.write(chunk)
                if self.local:
                    # The disk starts writing now rather than at fsync, and the page cache stays free for the data.
                    os.posix_fadvise(sink.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            if self.local:
                sink.flush()
                os.fsync(sink.fileno())
        if self.local:
            _sync(os.path.dirname(path))
        return checksums.record()

    def replace(self, name: str, data: bytes) -> FileRecord:
        """Replace a file atomically (which object stores always do); returns its size and checksums."""
        if not self.local:
            return self.write(name, [memoryview(data)])
        record = self.write(f"{name}.tmp", [memoryview(data)])
        path = self._inside(name)
        os.replace(f"{path}.tmp", path)
        _sync(os.path.dirname(path))
        return record

    def create(self, name: str, data: bytes) -> bool:
        """Create a small file; False if it already exists, which object stores cannot detect."""
        if not self.local:
            self.write(name, [memoryview(data)])
            return True
        path = self._inside(name)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            if os.path.lexists(path) and not os.path.isfile(path):
                raise  # a folder or a pipe, which will never be another's file
            return False
        with os.fdopen(handle, "wb") as sink:
            sink.write(data)
        return True

    def overwrite(self, name: str, data: bytes) -> None:
        """Overwrite a small file of the same length in a single write.

        Raises:
            FileNotFoundError: on a local disk, the file does not exist.
        """
        if not self.local:
            self.write(name, [memoryview(data)])
            return
        handle = os.open(self._inside(name), os.O_WRONLY)
        try:
            os.write(handle, data)
        finally:
            os.close(handle)

    def is_open_to_read(self, name: str) -> bool:
        """Whether a file on a mounted file system exists, tested by opening it."""
        try:
            os.close(os.open(self._inside(name), os.O_RDONLY))
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    def delete(self, name: str) -> None:
        """Delete a file, if it exists."""
        with contextlib.suppress(FileNotFoundError):
            self._filesystem.delete_file(self._inside(name))

    def remove(self, folder: str, names: Iterable[str]) -> None:
        """Delete the named files of a folder, then the folder itself if it is empty.

        The manifest is deleted first, so that a partly deleted checkpoint does not look complete.
        """
        for name in sorted(names, key=lambda name: name != MANIFEST):
            self.delete(f"{folder}/{name}")
        inside = self._inside(folder)
        if self.local:
            with contextlib.suppress(OSError):
                os.rmdir(inside)
        elif not self._filesystem.get_file_info(pafs.FileSelector(inside, allow_not_found=True)):
            with contextlib.suppress(FileNotFoundError):
                self._filesystem.delete_dir(inside)

    @property
    def _filesystem(self) -> Any:
        return self._store.filesystem

    def _inside(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"

    def _create(self, path: str) -> Any:
        parent = path.rpartition("/")[0]
        if self.local:
            Path(parent).mkdir(parents=True, exist_ok=True)
            return open(path, "wb")
        self._filesystem.create_dir(parent)
        return self._filesystem.open_output_stream(path)


def steps_in(files: Iterable[str]) -> list[int]:
    """The steps with a complete checkpoint among these file names, oldest first."""
    found = (step_of(name.removesuffix(f"/{MANIFEST}")) for name in files if name.endswith(f"/{MANIFEST}"))
    return sorted(step for step in found if step is not None)


def saved_steps(address: str | Path, settings: StorageConfig | None = None) -> list[int]:
    """The steps with a complete checkpoint in a folder, oldest first.

    Raises:
        UserError: the folder cannot be reached.
    """
    return steps_in(Folder(str(address), settings or StorageConfig()).files())


def step_folder(step: int) -> str:
    """The name of a step's folder: `step-0000000012`."""
    return f"step-{step:010d}"


def step_of(name: str) -> int | None:
    """The step of a folder name; None for any other name."""
    match = _STEP.fullmatch(name)
    return int(match.group(1)) if match else None


def _sync(folder: str) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
