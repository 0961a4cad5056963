"""The rows of a source in pieces, for tasks that read one each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from rechub_dist.data.importing.engine import Engine, literal, quoted
from rechub_dist.data.importing.plan import RESERVED, Source
from rechub_dist.data.importing.sources import as_written, casts_of, exploded_query, replaced, source_files
from rechub_dist.data.parquet.pages import open_parquet
from rechub_dist.errors import UserError


@dataclass(frozen=True)
class Piece:
    """A part of a source.

    Attributes:
        file: the file that it is of.
        query: for its rows.
        whole_rows: for its rows before lists are exploded.
    """

    file: str
    query: str
    whole_rows: str


def source_pieces(
    source: Source, engine: Engine, where: str, most_bytes: int, firsts: Sequence[int] | None = None
) -> list[Piece]:
    """The rows of a source in pieces, which after each other give what `source_query` gives.

    A piece is a file, or of a large Parquet file some row groups. It is found by its name among all files, so that
    their types are guessed alike for each piece.

    Args:
        source: the source.
        engine: to look at the files with.
        where: the plan's key.
        most_bytes: of a piece of a Parquet file; a row group stays whole.
        firsts: by piece, the number of its first row before lists are exploded.

    Raises:
        UserError: as `source_query`; or a file is named twice.
    """
    files = source_files(source, where)
    if (twice := next((file for file, count in Counter(files).items() if count > 1), None)) is not None:
        raise UserError(f"{where}.path: {twice} is named twice; name each file once")
    name = source.file_column or f"{RESERVED}file"
    named = source.model_copy(update={"file_column": name})
    query = as_written(named, engine, where, files, None)
    added = [] if source.file_column else [name]
    pieces = [(file, f"{quoted(name)} = {literal(file)}") for file in files]
    if query.startswith("select * from read_parquet("):
        query = f"{query.removesuffix(')')}, file_row_number = true)"
        added.append("file_row_number")
        pieces = [
            (file, f"{condition} and file_row_number between {first} and {last}")
            for file, condition in pieces
            for first, last in _ranges(file, most_bytes)
        ]
    without = f" exclude ({', '.join(map(quoted, added))})" if added else ""
    parts = [(file, f"select *{without} from ({query}) where {condition}") for file, condition in pieces]
    casts = casts_of(source, engine, where, files[0], parts[0][1])  # the columns are those of all pieces
    found = []
    for i, (file, part) in enumerate(parts):
        rows = replaced(part, casts)
        exploded = rows
        if source.explode is not None:
            first = 0 if firsts is None else firsts[i]
            exploded = exploded_query(source.explode, engine.columns(f"({rows})"), where, rows, first)
        found.append(Piece(file, exploded, rows))
    return found


def _ranges(file: str, most_bytes: int) -> list[tuple[int, int]]:
    """The first and the last rows of pieces of a Parquet file."""
    with open_parquet(file) as parquet:
        groups = [parquet.metadata.row_group(i) for i in range(parquet.num_row_groups)]
        sizes = [(group.num_rows, group.total_byte_size) for group in groups]
    found, first, rows, held = [], 0, 0, 0
    for count, size in sizes:
        if rows > first and held + size > most_bytes:
            found.append((first, rows - 1))
            first, held = rows, 0
        rows, held = rows + count, held + size
    return [*found, (first, rows - 1)]
