"""Open Parquet files, and row groups out of them."""

from __future__ import annotations

import time
from collections import OrderedDict
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from rechub_dist.data.manifest import DataFile, unreadable
from rechub_dist.errors import UserError

_OPEN_FILES = 64
_ATTEMPTS = 3  # for each row group of an object store; local disks get one


class OpenFiles:
    """The files of one pass over a data set, the least recently used of them closed; for one thread."""

    def __init__(self, filesystem: Any) -> None:
        self._filesystem = filesystem
        self._remote = not isinstance(filesystem, pafs.LocalFileSystem)
        self._files: OrderedDict[str, pq.ParquetFile] = OrderedDict()

    def read(self, file: DataFile, group: int, columns: list[str]) -> pa.Table:
        """The columns of one row group. Object stores get several attempts.

        Raises:
            UserError: where the file cannot be read, or is not what it was when the run began.
        """
        for attempt in range(_ATTEMPTS if self._remote else 1):
            if attempt:
                time.sleep(0.1 * 2**attempt)
            try:
                parquet = self._file(file)
                rows = parquet.metadata.row_group(group).num_rows
                if rows != file.counts[group]:
                    raise UserError(
                        f"{file.path}: row group {group} has {rows} rows, not {file.counts[group]} as when the run "
                        "began; leave the data of a run as it is, or begin a new run"
                    )
                return parquet.read_row_group(group, columns=columns, use_threads=False)
            except (OSError, pa.ArrowException) as caught:
                error = caught
                if file.path in self._files:
                    self._files.pop(file.path).close(force=True)
        raise unreadable(file.path, error, f"row group {group}") from error

    def close(self) -> None:
        """Close all of them."""
        while self._files:
            self._files.popitem()[1].close(force=True)

    def _file(self, file: DataFile) -> pq.ParquetFile:
        if file.path in self._files:
            self._files.move_to_end(file.path)
            return self._files[file.path]
        if len(self._files) >= _OPEN_FILES:
            self._files.popitem(last=False)[1].close(force=True)
        source = self._filesystem.open_input_file(file.path)
        # on an object store, fetch a row group's bytes in few requests
        self._files[file.path] = pq.ParquetFile(source, pre_buffer=self._remote)
        return self._files[file.path]
