"""A pass over a data set outside training: its footers, or columns of its row groups, several at a time."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from rechub_dist.data.parquet.files import DataFile, OpenFiles, open_file
from rechub_dist.data.parquet.manifest import Manifest

T = TypeVar("T")
THREADS = min(8, os.cpu_count() or 1)


def footers(manifest: Manifest, threads: int = THREADS) -> Iterator[pq.FileMetaData]:
    """The footer of each file.

    Raises:
        UserError: where one cannot be read.
    """

    def one(file: DataFile) -> pq.FileMetaData:
        def read(_attempt: int) -> pq.FileMetaData:
            with open_file(file) as parquet:
                return parquet.metadata

        return file.store.with_retries(read, file.path)

    with ThreadPoolExecutor(threads) as pool:
        yield from pool.map(one, manifest.files)


def scan(
    manifest: Manifest, columns: list[str], work: Callable[[pa.Table], T], threads: int = THREADS
) -> Iterator[tuple[int, T]]:
    """What `work` makes of each row group, in the order in which they get ready, with the group's rows.

    At most two row groups a thread are in memory.

    Raises:
        UserError: where a row group cannot be read, and whatever `work` raises.
    """
    local = threading.local()
    opened: list[OpenFiles] = []

    def one(file: DataFile, group: int) -> tuple[int, T]:
        if not hasattr(local, "files"):
            local.files = OpenFiles()
            opened.append(local.files)
        table = local.files.read(file, group, columns)
        return table.num_rows, work(table)

    waiting: set[Future[tuple[int, T]]] = set()
    try:
        with ThreadPoolExecutor(threads) as pool:
            for file, group in manifest.groups:
                while len(waiting) >= 2 * threads:
                    done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                    yield from (future.result() for future in done)
                waiting.add(pool.submit(one, file, group))
            while waiting:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
    finally:
        for future in waiting:
            future.cancel()
        for files in opened:
            files.close()
