"""The files of a plan's sources, as queries of DuckDB."""

from __future__ import annotations

import glob
import re
from pathlib import Path
from typing import Final

import pyarrow as pa

from rechub_dist.data.importing.engine import Engine, literal, literals, quoted
from rechub_dist.data.importing.plan import RESERVED, TYPES, Source
from rechub_dist.data.parquet.pages import open_parquet
from rechub_dist.errors import UserError, nearest, one_line, shown

_FORMATS: Final = {
    "csv": "csv", "tsv": "csv", "psv": "csv", "txt": "csv", "dat": "csv", "data": "csv", "log": "csv",
    "json": "json", "jsonl": "json", "ndjson": "json",
    "parquet": "parquet", "pq": "parquet",
}  # fmt: skip
_PACKED: Final = {".gz": "gzip", ".zst": "zstd"}
_TABS: Final = {".tsv": "\t"}


def source_files(source: Source, where: str) -> list[str]:
    """The files of a source, those of a folder or pattern in the order of the numbers in their names.

    Raises:
        UserError: none is named, or there is none.
    """
    if source.path is None:
        raise UserError(f"{where}.path: no file is named; give the command a SOURCE, or write path")
    found: list[str] = []
    for name in source.path:
        if "://" in name:
            raise UserError(f"{where}.path: {shown(name)} is an address; copy or mount it, and name a path")
        path = Path(name)
        if path.is_dir():
            inside = [str(p) for p in path.iterdir() if p.name[0] not in "._" and _suffix(p.name)[0] in _FORMATS]
            if not inside:
                raise UserError(f"{where}.path: {name} holds no file that ends in .csv, .tsv, .json or .parquet")
        elif path.is_file():
            inside = [name]
        else:
            inside = [p for p in glob.glob(name, recursive=True) if Path(p).is_file()]
            if not inside:
                raise UserError(f"{where}.path: there is no file {name}; check the path")
        found += sorted(inside, key=_natural)
    return found


def source_query(source: Source, engine: Engine, where: str, sample: int | None = None) -> str:
    """A query for the rows of a source, its files after each other, with the types that the plan gives.

    Args:
        source: the source.
        engine: to look at the files with.
        where: the plan's key.
        sample: rows to guess types from, where the plan gives none; -1 for all.

    Raises:
        UserError: a file is missing or unreadable, or a column that the plan names is not there.
    """
    if (given := engine.given(where)) is not None:
        query = f"select * from {given}"
        return _typed(query, _casts(source, engine, where, "the rows given", query))
    files = source_files(source, where)
    query = _READERS[_one_format(source, files, where)](source, files, sample)
    return _typed(query, _casts(source, engine, where, files[0], query))


def piece_queries(source: Source, engine: Engine, where: str, most_bytes: int) -> list[str]:
    """Queries for the rows of a source in pieces: after each other they give what `source_query` gives.

    A piece is a file, or of a large Parquet file some row groups. It is found by its name among all files, so that
    their types are guessed alike in each piece.

    Args:
        source: the source.
        engine: to look at the files with.
        where: the plan's key.
        most_bytes: of a piece of a Parquet file; a row group stays whole.

    Raises:
        UserError: as `source_query`; or a file is named twice.
    """
    files = source_files(source, where)
    twice = next((file for file in files if files.count(file) > 1), None) if len(set(files)) < len(files) else None
    if twice is not None:
        raise UserError(f"{where}.path: {twice} is named twice; name each file once")
    kind = _one_format(source, files, where)
    name = source.file_column or f"{RESERVED}file"
    query = _READERS[kind](source.model_copy(update={"file_column": name}), files, None)
    added = [] if source.file_column else [name]
    conditions = [f"{quoted(name)} = {literal(file)}" for file in files]
    if kind == "parquet":
        query = f"{query.removesuffix(')')}, file_row_number = true)"
        added.append("file_row_number")
        conditions = [
            f"{condition} and file_row_number between {first} and {last}"
            for condition, file in zip(conditions, files, strict=True)
            for first, last in _ranges(file, most_bytes)
        ]
    without = f" exclude ({', '.join(map(quoted, added))})" if added else ""
    casts = _casts(source, engine, where, files[0], f"select *{without} from ({query})")
    return [_typed(f"select *{without} from ({query}) where {condition}", casts) for condition in conditions]


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


def _one_format(source: Source, files: list[str], where: str) -> str:
    kinds = {source.format or _format(file, where) for file in files}
    if len(kinds) > 1:
        raise UserError(f"{where}.path: the files are {' and '.join(sorted(kinds))}; name files of one format")
    return kinds.pop()


def _casts(source: Source, engine: Engine, where: str, what: str, query: str) -> list[str]:
    """Casts of a query's columns to the plan's types; `what` is read, for messages."""
    columns = engine.columns(f"({query})")
    if len(folded := {name.casefold() for name in columns}) < len(columns):
        twice = next(name for name in folded if sum(c.casefold() == name for c in columns) > 1)
        raise UserError(f"{what}: several columns are named {twice!r}, whatever their case; rename all but one")
    cast = []
    for name, kind in (source.columns or {}).items():
        if name not in columns:
            raise UserError(f"{where}.columns: {what} has no column {name!r}; {nearest(name, columns)}")
        if columns[name] != TYPES[kind]:
            cast.append(f"cast({quoted(name)} as {TYPES[kind]}) as {quoted(name)}")
    return cast


def _typed(query: str, casts: list[str]) -> str:
    return f"select * replace ({', '.join(casts)}) from ({query})" if casts else query


def _csv(source: Source, files: list[str], sample: int | None) -> str:
    types = {name: TYPES[kind] for name, kind in (source.columns or {}).items()}
    options = [f"nullstr = {literals(source.nulls)}"]
    delimiter = source.delimiter or _TABS.get(_suffix(files[0])[1])
    if delimiter is not None:
        options.append(f"delim = {literal(delimiter)}")
    options.append(f"quote = {literal(source.quote)}")
    if not source.quote:
        options.append("escape = ''")
    if source.encoding != "utf-8":
        options.append(f"encoding = {literal(source.encoding)}")
    if source.header is not None:
        options.append(f"header = {str(source.header).lower()}")
    if source.times is not None:
        options.append(f"timestampformat = {literal(source.times)}")
    if source.header is False:
        options.append(f"names = {literals(types)}")
    plain = {name: kind for name, kind in types.items() if not kind.endswith("[]")}
    if plain:
        options.append(f"types = {{{', '.join(f'{literal(name)}: {literal(kind)}' for name, kind in plain.items())}}}")
    return _reading("read_csv", source, files, options, sample)


def _json(source: Source, files: list[str], sample: int | None) -> str:
    return _reading("read_json", source, files, ["format = 'auto'", "maximum_depth = 3"], sample)


def _parquet(source: Source, files: list[str], sample: int | None) -> str:  # noqa: ARG001 - as the others
    return _reading("read_parquet", source, files, [], None)


def _reading(function: str, source: Source, files: list[str], options: list[str], sample: int | None) -> str:
    if sample is not None:
        options = [*options, f"sample_size = {sample}"]
    if source.file_column is not None:
        options = [*options, f"filename = {literal(source.file_column)}"]
    return f"select * from {function}({', '.join([literals(files), *options])})"


_READERS: Final = {"csv": _csv, "json": _json, "parquet": _parquet}


def _format(file: str, where: str) -> str:
    """What a file holds, by its name, else by how it begins. Raises UserError."""
    suffix = _suffix(file)[0]
    if suffix in _FORMATS:
        return _FORMATS[suffix]
    try:
        with pa.input_stream(file) as stream:  # unpacked by the name's ending
            head = stream.read(4096)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{where}: {file} cannot be read: {one_line(error)}") from None
    if head.startswith(b"PAR1"):
        return "parquet"
    if b"\0" in head[:64] and not head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"{where}: {file} is neither text nor Parquet; write format: csv, json or parquet if it is")
    return "json" if head.lstrip().startswith(b"{") else "csv"


def _suffix(name: str) -> tuple[str, str]:
    """The ending that tells the format, without and with its dot; .gz and .zst come off first."""
    path = Path(name)
    if path.suffix in _PACKED:
        path = path.with_suffix("")
    return path.suffix[1:].lower(), path.suffix.lower()


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
