"""The files of a plan's sources, as queries of DuckDB."""

from __future__ import annotations

import csv
import glob
import io
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pyarrow as pa

from rechub_dist.data.importing.engine import Engine, as_path, literal, literals, quoted
from rechub_dist.data.importing.plan import NUMBERS, RESERVED, TYPES, ExplodePlan, Source
from rechub_dist.data.parquet.lookalikes import HEAD, looks_like
from rechub_dist.data.parquet.pages import open_parquet
from rechub_dist.errors import UserError, nearest, one_line, shown

_FORMATS: Final = {
    "csv": "csv", "tsv": "csv", "psv": "csv", "txt": "csv", "dat": "csv", "data": "csv", "log": "csv",
    "json": "json", "jsonl": "json", "ndjson": "json",
    "parquet": "parquet", "pq": "parquet",
}  # fmt: skip
_PACKED: Final = {".gz": "gzip", ".zst": "zstd"}
_TEXTS: Final = ("JSON", "TSV", "CSV", "text")  # as `looks_like` calls what can be read
_AS_READ: Final = {**TYPES, "integer": "VARCHAR", "timestamp": "TIMESTAMPTZ"}  # by the type in the plan
_AS_TEXT: Final = ("string", "integer", "timestamp", "date")
_NO_INTEGER: Final = ", not of type integer; give it the type float in the source's columns, or mend the file"
_ZONED: Final = "TIMESTAMP WITH TIME ZONE"
_HOURS: Final = "%[HIMSTXcfgnpr]"  # in a format of times: more than a date
ISO_DATE: Final = "%Y-%m-%d"
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
    if (view := engine.standing_in(where)) is not None:
        return f"select * from {view}"
    if (given := engine.given(where)) is not None:
        return _typed(source, engine, where, "the rows given", f"select * from {given}")
    files = source_files(source, where)
    query = _as_written(source, engine, where, files, sample)
    return _typed(source, engine, where, files[0], query)


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
    query = _as_written(named, engine, where, files, None)
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
    casts = _casts(source, engine, where, files[0], parts[0][1])  # the columns are those of all pieces
    found = []
    for i, (file, part) in enumerate(parts):
        rows = _changed(part, casts)
        exploded = rows
        if source.explode is not None:
            first = 0 if firsts is None else firsts[i]
            exploded = _exploded(source.explode, engine.columns(f"({rows})"), where, rows, first)
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


def _as_written(source: Source, engine: Engine, where: str, files: list[str], sample: int | None) -> str:
    """A query for the rows of files, with the types that they are read as."""
    kinds = {source.format or _format(file, where) for file in files}
    if len(kinds) > 1:
        raise UserError(f"{where}.path: the files are {' and '.join(sorted(kinds))}; name files of one format")
    kind = kinds.pop()
    for file in files if kind != "parquet" else ():
        _check_text(file, where)
    if kind == "csv":
        _check_columns(source, engine, where, files, sample)
        return _csv(source, files, sample, _AS_READ)
    if kind == "json":
        return _json(source, engine, files, sample)
    return _reading("read_parquet", source, files, [], None)


def check_values(source: Source, engine: Engine, where: str) -> None:
    """Read a source once more to find a value that is not of its type, after something failed because of one.

    Raises:
        UserError: the first such value, with its file, line and column; nothing if there is none.
    """
    in_files = engine.given(where) is None and engine.standing_in(where) is None
    if in_files and source_query(source, engine, where).count("read_csv("):
        query = _csv(source, source_files(source, where), None, TYPES)
        counted = ", ".join(f"count({quoted(name)})" for name in source.columns or {})
        if counted:
            engine.run(f"select {counted} from ({query})", where)


def _typed(source: Source, engine: Engine, where: str, what: str, query: str) -> str:
    """The query with its columns cast to the plan's types, and lists exploded; `what` is read, for messages."""
    query = _changed(query, _casts(source, engine, where, what, query))
    return query if source.explode is None else _exploded(source.explode, engine.columns(f"({query})"), where, query)


def _changed(query: str, casts: Mapping[str, str]) -> str:
    """The query with some columns replaced by expressions."""
    changed = ", ".join(f"{expression} as {quoted(name)}" for name, expression in casts.items())
    return f"select * replace ({changed}) from ({query})" if casts else query


def _casts(source: Source, engine: Engine, where: str, what: str, query: str) -> dict[str, str]:
    """Casts of the columns that have other types than the plan says, or that need another one."""
    columns = engine.columns(f"({query})")
    if len(folded := {name.casefold() for name in columns}) < len(columns):
        twice = next(name for name in folded if sum(c.casefold() == name for c in columns) > 1)
        raise UserError(f"{what}: several columns are named {twice!r}, whatever their case; rename all but one")
    ours = next((name for name in columns if name.casefold().startswith(RESERVED)), None)
    if ours is not None:
        raise UserError(f"{what}: column {ours!r}: names that begin with {RESERVED} are ours; rename it")
    cast = {name: f"{quoted(name)}::VARCHAR" for name, kind in columns.items() if kind == "UUID"}
    for name, kind in (source.columns or {}).items():
        if name not in columns:
            raise UserError(f"{where}.columns: {what} has no column {name!r}; {nearest(name, columns)}")
        if columns[name] != TYPES[kind]:
            cast[name] = _cast(name, columns[name], kind)
    return cast


def _exploded(explode: ExplodePlan, columns: Mapping[str, str], where: str, query: str, first: int = 0) -> str:
    """The query with a row for each element of a column of lists; `first` is the number of its first row."""
    name = explode.column
    if name not in columns:
        raise UserError(f"{where}.explode: there is no column {name!r}; {nearest(name, columns)}")
    if not columns[name].endswith("[]"):
        raise UserError(f"{where}.explode: column {name!r} is {columns[name]}; lists are exploded, one element a row")
    folded = [known.casefold() for known in (*columns, explode.row, explode.place)]
    if len(set(folded)) < len(folded):
        raise UserError(f"{where}.explode: row and place need names that no other column has")
    added = f"generate_subscripts({quoted(name)}, 1) - 1 as {quoted(explode.place)}"
    numbered = f"select row_number() over () - 1 + {first} as {quoted(explode.row)}, * from ({query})"
    return f"select * replace (unnest({quoted(name)}) as {quoted(name)}), {added} from ({numbered})"


def _cast(name: str, kind: str, to: str) -> str:
    """An expression for a column of DuckDB's type `kind` as the plan's type `to`; nothing is rounded or shifted."""
    column = quoted(name)
    if to == "timestamp" and kind in ("VARCHAR", _ZONED):  # not by a cast, which DuckDB moves into the reader
        return f"timezone('UTC', {column}::TIMESTAMPTZ)"
    if to != "integer" or kind.startswith(("TIMESTAMP", "DATE", "BOOL")) or kind in NUMBERS:
        return f"{column}::{TYPES[to]}"
    what = literal(f"column {name!r} is ")
    wrong = f"error({what} || {column}::VARCHAR || {literal(_NO_INTEGER)})"
    if kind != "VARCHAR":
        return f"case when {column}::DOUBLE = trunc({column}::DOUBLE) then {column}::BIGINT else {wrong} end"
    whole = f"regexp_full_match({column}, '\\s*[-+]?[0-9]+[.]0*\\s*')"
    return (
        f"case when not regexp_matches({column}, '[.eE]') then {column}::BIGINT "
        f"when {whole} then split_part({column}, '.', 1)::BIGINT else {wrong} end"
    )


def _check_columns(source: Source, engine: Engine, where: str, files: list[str], sample: int | None) -> None:
    """Check a delimited file's header against the plan.

    Raises:
        UserError: a column that the plan names is not there, or the columns cannot be told apart.
    """
    plain = source.model_copy(update={"columns": None, "empty": ()})
    try:
        known = engine.columns(f"({_csv(plain, files, sample, _AS_READ)})")
    except UserError:
        _check_lengths(source, engine, where, files)
        raise
    for name in source.empty:
        if name not in (names := known if source.header is not False else source.columns or {}):
            raise UserError(f"{where}.empty: {files[0]} has no column {name!r}; {nearest(name, names)}")
    if source.header is False:
        if len(known) - (source.file_column is not None) != len(source.columns or {}):
            raise UserError(
                f"{where}.columns: {files[0]} has {len(known)} columns, and {len(source.columns or {})} are named"
            )
        return
    for name in source.columns or {}:
        if name not in known:
            raise UserError(f"{where}.columns: {files[0]} has no column {name!r}; {nearest(name, known)}")
    if len(known) == 1 and source.delimiter is None and re.search(r"[,;\t|]", name := next(iter(known))):
        raise UserError(
            f"{where}: {files[0]}: the columns of {shown(name)} cannot be told apart; write the delimiter and header "
            "into the plan: then the line at fault is named"
        )


def _check_lengths(source: Source, engine: Engine, where: str, files: list[str]) -> None:
    """Raise UserError for the first line that has more or fewer values than the first one of all, if one has."""
    delimiter = source.delimiter or _TABS.get(_suffix(files[0])[1])
    if delimiter is None or len(delimiter) > 1:
        return
    try:
        with pa.input_stream(files[0]) as stream:
            head = stream.read(1 << 20).decode(source.encoding, errors="replace")
    except (OSError, pa.ArrowException):
        return
    quote = {"quotechar": source.quote} if source.quote else {"quoting": csv.QUOTE_NONE}
    first = next(csv.reader(io.StringIO(head), delimiter=delimiter, **quote), [])
    texts = ", ".join(f"'c{i}': 'VARCHAR'" for i in range(len(first)))
    options = f"auto_detect = false, delim = {literal(delimiter)}, quote = {literal(source.quote)}, skip = 0"
    if source.encoding != "utf-8":
        options += f", encoding = {literal(source.encoding)}"
    engine.run(
        f"select count(*) from read_csv({literals(map(as_path, files))}, {options}, columns = {{{texts}}})", where
    )


def _check_text(file: str, where: str) -> None:
    """Raise UserError for a file that is another format than its name says."""
    try:
        with open(file, "rb") as stream:
            head = stream.read(HEAD)
    except OSError as error:
        raise UserError(f"{where}: {file} cannot be read: {error.strerror}") from None
    if head.startswith(b"PAR1"):
        raise UserError(f"{where}: {file} is Parquet, whatever its name; write format: parquet")
    what, fix = (head and looks_like(head)) or ("", "")
    readable = Path(file).suffix in _PACKED if "compressed" in what else what.startswith(_TEXTS)
    if what and not readable:
        raise UserError(f"{where}: {file} is {what}; {fix}")


def _csv(source: Source, files: list[str], sample: int | None, as_read: Mapping[str, str]) -> str:
    """A query for delimited files; `as_read` are the types to give DuckDB for those of the plan.

    What is not given is found out by DuckDB: the delimiter, whether there is a header, the types. It must not take
    lines for comments, or skip lines until it finds a table, as it does if it is not told.
    """
    types = {name: as_read[kind] for name, kind in (source.columns or {}).items()}
    options = [f"nullstr = {literals(source.nulls)}", "skip = 0", "comment = ''"]
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
    times = source.times or ""
    options.append(f"dateformat = {literal(times if times and not re.search(_HOURS, times) else ISO_DATE)}")
    if times:
        options.append(f"timestampformat = {literal(times)}")
        types = {name: "TIMESTAMP" if kind == "TIMESTAMPTZ" else kind for name, kind in types.items()}
    if source.empty:
        options.append(f"force_not_null = {literals(source.empty)}")
    if source.header is False and types:
        options.append(f"names = {literals(types)}")
    plain = {name: kind for name, kind in types.items() if not kind.endswith("[]")}
    if plain:
        options.append(f"types = {{{', '.join(f'{literal(name)}: {literal(kind)}' for name, kind in plain.items())}}}")
    return _reading("read_csv", source, files, options, sample)


def _json(source: Source, engine: Engine, files: list[str], sample: int | None) -> str:
    """A query for JSON. What the plan types is read as it is written: DuckDB would make times of some texts."""
    options = ["format = 'auto'", "maximum_depth = 3"]
    found = engine.columns(f"({_reading('read_json', source, files, options, sample)})")
    named = source.columns or {}
    kinds = {n: "VARCHAR" if named.get(n) in _AS_TEXT or k == "UUID" else k for n, k in found.items()}
    if kinds == found:
        return _reading("read_json", source, files, options, sample)
    kinds.pop(source.file_column or "", None)
    listed = ", ".join(f"{literal(name)}: {literal(kind)}" for name, kind in kinds.items())
    return _reading("read_json", source, files, ["format = 'auto'", f"columns = {{{listed}}}"], None)


def _reading(function: str, source: Source, files: list[str], options: list[str], sample: int | None) -> str:
    if sample is not None:
        options = [*options, f"sample_size = {sample}"]
    if source.file_column is not None:
        options = [*options, f"filename = {literal(source.file_column)}"]
    return f"select * from {function}({', '.join([literals(map(as_path, files)), *options])})"


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
