"""Ways in which files go bad."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq


def spoil_pages(path: Path, group: int, column: int | None = None) -> int:
    """Overwrite the pages of a row group, or of one column of it, and leave the footer; returns its rows."""
    row_group = pq.read_metadata(path).row_group(group)
    content = bytearray(path.read_bytes())
    for index in range(row_group.num_columns) if column is None else [column]:
        chunk = row_group.column(index)
        start = chunk.dictionary_page_offset or chunk.data_page_offset
        content[start : start + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
    path.write_bytes(content)
    return row_group.num_rows


def spoil_footer(path: Path) -> None:
    """Cut off the end of a file."""
    path.write_bytes(path.read_bytes()[:-100])
