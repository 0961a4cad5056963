"""How Parquet is written and opened here: with zstd, and a checksum per page, which is verified where there is one.

A bit flip on disk or in memory often leaves a page decodable, with other values. Its checksum (CRC-32 of the page's
bytes) makes it an error like any other corruption. Page headers, footers and statistics have no checksum.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rechub_dist.data.parquet.footers import UNREADABLE, corrupt
from rechub_dist.data.parquet.lookalikes import HEAD, what_else
from rechub_dist.skips import BadFileError


def parquet_writer(where: Any, schema: pa.Schema) -> pq.ParquetWriter:
    """A writer to a path or an open file; to be used for all Parquet that is written."""
    return pq.ParquetWriter(where, schema, compression="zstd", write_page_checksum=True)


def write_parquet(table: pa.Table, where: Any) -> None:
    """Write a table to a path or an open file."""
    with parquet_writer(where, table.schema) as writer:
        writer.write_table(table)


def open_parquet(source: Any, **options: Any) -> pq.ParquetFile:
    """Open a file; reading a page whose checksum is wrong raises OSError."""
    return pq.ParquetFile(source, page_checksum_verification=True, **options)


def read_parquet(path: Any, columns: Sequence[str] | None = None) -> pa.Table:
    """The columns of a file, or of the files in a folder, as one table.

    Raises:
        BadFileError: it cannot be read.
    """
    try:
        table = pq.read_table(path, columns=columns, page_checksum_verification=True)
        _ = table.column_names  # decodes them, which may fail
        return table
    except UNREADABLE as error:
        raise _instead(str(path)) or corrupt(str(path), error) from None


def read_schema(path: Any) -> pa.Schema:
    """The schema of a local file.

    Raises:
        BadFileError: it cannot be read.
    """
    try:
        return pq.read_schema(path)
    except UNREADABLE as error:
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
