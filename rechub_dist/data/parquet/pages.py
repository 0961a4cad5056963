"""Parquet as we write and open it: compressed by zstd, with a checksum a page, which is verified where there is one.

A bit that flips on a disk or in memory changes values and nothing else: a page often still decodes. With its checksum
(CRC-32 of the page's bytes) it is corrupt like any other. Page headers, footers and statistics have none.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rechub_dist.data.parquet.footers import corrupt
from rechub_dist.data.parquet.lookalikes import HEAD, what_else
from rechub_dist.skips import BadFileError


def parquet_writer(where: Any, schema: pa.Schema) -> pq.ParquetWriter:
    """A writer to a path or an open file; whoever writes Parquet for others to read takes this one."""
    return pq.ParquetWriter(where, schema, compression="zstd", write_page_checksum=True)


def write_parquet(table: pa.Table, where: Any) -> None:
    """Write a table that is at hand as a whole."""
    with parquet_writer(where, table.schema) as writer:
        writer.write_table(table)


def open_parquet(source: Any, **options: Any) -> pq.ParquetFile:
    """Open a file; a page whose checksum does not fit raises OSError when it is read."""
    return pq.ParquetFile(source, page_checksum_verification=True, **options)


def read_parquet(path: Any, columns: Sequence[str] | None = None) -> pa.Table:
    """The columns of a file, or of the files in a folder, as a whole.

    Raises:
        BadFileError: it cannot be read.
    """
    try:
        return pq.read_table(path, columns=columns, page_checksum_verification=True)
    except (OSError, pa.ArrowException) as error:
        raise _instead(str(path)) or corrupt(str(path), error) from None


def read_schema(path: Any) -> pa.Schema:
    """The schema of a local file.

    Raises:
        BadFileError: it cannot be read.
    """
    try:
        return pq.read_schema(path)
    except (OSError, pa.ArrowException) as error:
        raise _instead(str(path)) or corrupt(str(path), error) from None


def _instead(path: str) -> BadFileError | None:
    """The error for a local file that is something else than Parquet."""
    if not os.path.isfile(path):
        return None
    with open(path, "rb") as file:
        head = file.read(HEAD)
        file.seek(max(0, os.path.getsize(path) - 4))
        other = what_else(head, file.read(), path)
    return None if other is None else BadFileError(f"{path}: it {other}", "corrupt")
