"""Passes over a data set outside training: over its footers, or over columns of its row groups, in threads."""

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
    """The footer of each file, in their order.

    Raises:
        UserError: one cannot be read.
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
    """(rows, result of `work`) for each row group, in order of completion.

    `work` gets the row group's `columns`, in a thread; at most two row groups per thread are in memory.

    Raises:
        UserError: a row group cannot be read. Whatever `work` raises is raised, too.
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
