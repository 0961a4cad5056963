"""DuckDB, as imports use it: bounded in memory, on disk beyond that, and with errors of one line."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from rechub_dist.data.importing.expressions import columns_of, why_not
from rechub_dist.data.importing.plan import RESERVED, TYPES
from rechub_dist.errors import UserError, nearest, one_line, shown

BATCH_ROWS = 65_536


class Engine:
    """A DuckDB database in a folder, which is removed with the folder.

    Args:
        folder: where the database and what does not fit memory lie.
        memory: bytes that DuckDB may use.
        threads: default: as many as there are cores.
    """

    def __init__(self, folder: Path, memory: int, threads: int | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        # a name of its own: DuckDB would share a database of this name that is still open, with its settings
        self._connection = duckdb.connect(str(folder / f"import-{secrets.token_hex(4)}.duckdb"))
        self._cursors: list[duckdb.DuckDBPyConnection] = []
        self._readers = 0
        self._given: dict[str, str] = {}
        self._standing_in: dict[str, str] = {}
        for setting in (
            f"memory_limit = '{max(memory, 64 << 20)}B'",
            f"temp_directory = {literal(str(folder / 'spilled'))}",
            "preserve_insertion_order = true",
            "TimeZone = 'UTC'",
            "autoinstall_known_extensions = false",  # nothing comes from the network unasked
            "autoload_known_extensions = false",
            "python_enable_replacements = false",  # a name is never a variable of this process
            *([] if threads is None else [f"threads = {threads}"]),
        ):
            self._connection.execute(f"set global {setting}")  # for all cursors
        self._connection.execute("set enable_progress_bar = false")

    def confine(self, files: Iterable[str], folders: Iterable[Path] = ()) -> None:
        """From now on read these files alone, write none but those below the folders, and change no setting."""
        names = [name for file in files for name in (file, as_path(file))]
        self._connection.execute(f"set global allowed_paths = {literals(names)}")
        self._connection.execute(f"set global allowed_directories = {literals(f'{folder}/' for folder in folders)}")
        self._connection.execute("set global enable_external_access = false")
        self._connection.execute("set global lock_configuration = true")

    def run(self, query: str, what: str = "") -> list[tuple[Any, ...]]:
        """The rows of a query's result; `what` begins the message of an error. Raises UserError."""
        with explained(what):
            return self._connection.execute(query).fetchall()

    def value(self, query: str) -> Any:
        """The only value of a query's result."""
        return self.run(query)[0][0]

    def table(self, query: str) -> pa.Table:
        """A query's result."""
        with explained(""):
            return self._connection.sql(query).to_arrow_table()

    def stream(self, query: str, rows: int = BATCH_ROWS) -> pa.RecordBatchReader:
        """A query's result in batches, while other queries run. Errors come out as `explained` has them."""
        with explained(""):
            self._cursors.append(cursor := self._connection.cursor())
            reader = cursor.sql(query).to_arrow_reader(rows)

        def batches() -> Iterator[pa.RecordBatch]:
            try:
                yield from reader
            except OSError as error:  # in which Arrow wraps those of DuckDB
                raise _of_text(str(error), "") from None

        return pa.RecordBatchReader.from_batches(reader.schema, batches())

    def create(self, table: str, batches: pa.RecordBatchReader) -> None:
        """A table of the rows of a reader."""
        self._readers += 1
        name = f"{RESERVED}reader_{self._readers}"
        with explained(""):
            self._connection.register(name, batches)
            self._connection.execute(f"create or replace table {table} as select * from {name}")
            self._connection.unregister(name)

    def save(self, query: str, file: Path, group_rows: int = BATCH_ROWS) -> None:
        """Write a query's rows as Parquet, which is whole or not there; types that Parquet lacks become texts."""
        wide = [c for c, kind in self.columns(f"({query})").items() if "HUGEINT" in kind]
        texts = ", ".join(f"{quoted(c)}::VARCHAR as {quoted(c)}" for c in wide)
        with whole(file) as path:
            self.run(
                f"copy (select *{f' replace ({texts})' if wide else ''} from ({query})) to {literal(str(path))} "
                f"(format parquet, compression zstd, row_group_size {group_rows})"
            )

    def saved(self, files: Sequence[Path], kinds: Mapping[str, str] | None = None) -> str:
        """A query for the rows that were saved to files, with their former types if these are given."""
        columns = (
            "*" if kinds is None else ", ".join(f"{quoted(c)}::{kind} as {quoted(c)}" for c, kind in kinds.items())
        )
        return f"select {columns} from read_parquet({literals(as_path(str(file)) for file in files)})"

    def give(self, where: str, rows: pa.Table) -> None:
        """Let the source at this key of the plan be a table in memory rather than files."""
        self._given[where] = f"{RESERVED}given_{len(self._given)}"
        self._connection.register(self._given[where], rows)

    def given(self, where: str) -> str | None:
        """The name of the table in memory that stands for a source; None for one of files."""
        return self._given.get(where)

    def stand_in(self, where: str, query: str) -> None:
        """Let the source at this key of the plan be the rows of a query, which have the types of the plan."""
        self._standing_in[where] = f"{RESERVED}source_{len(self._standing_in)}"
        self.run(f"create or replace view {self._standing_in[where]} as {query}")

    def standing_in(self, where: str) -> str | None:
        """The name of the view that stands for a source; None where there is none."""
        return self._standing_in.get(where)

    def columns(self, table: str) -> dict[str, str]:
        """The columns of a table or of a query in parentheses, with their types."""
        return {name: kind for name, kind, *_ in self.run(f"describe select * from {table}")}

    def expression_type(self, expression: str, table: str, where: str, *, windows: bool = False) -> str:
        """The type of an expression over the columns of a row of a table.

        Args:
            expression: the SQL.
            table: its name.
            where: the plan's key.
            windows: whether window functions, which see other rows, may occur.

        Raises:
            UserError: it is none.
        """
        text, columns = f"{where}: {shown(expression)}", self._own_columns(table)
        keyword = f"{text}: it is a word of SQL; write {quoted(expression.strip())}"
        parsed = self._connection.execute("select json_serialize_sql(?::varchar)", [f"select (\n{expression}\n)"])
        if (reason := why_not(parsed.fetchall()[0][0], windows=windows)) is not None:
            raise UserError(keyword if expression.strip() in columns else f"{text}: {one_line(reason)}")
        try:
            # beside the table's columns: an aggregate over all rows is none of a row
            return str(self._connection.execute(f"describe select *, ({expression}\n) from {table}").fetchall()[-1][1])
        except duckdb.Error as error:
            if expression.strip() in columns:
                raise UserError(keyword) from None
            missing = re.search(r'column "([^"]+)" not found', str(error))
            if missing:
                reason = f"there is no column {missing[1]!r}; {nearest(missing[1], columns)}"
            elif "GROUP BY" in str(error):
                reason = "it is an aggregate over many rows; an expression is computed from one row"
            else:
                reason = reason_of(error)
            raise UserError(f"{text}: {reason}") from None

    def columns_in(self, expression: str, where: str) -> set[str]:
        """The names of columns that an expression reads, as it writes them. Raises UserError if it is none."""
        query = "select json_serialize_sql(?::varchar)"
        parsed = self._connection.execute(query, [f"select (\n{expression}\n)"]).fetchall()[0][0]
        if (reason := why_not(parsed, windows=True)) is not None:
            raise UserError(f"{where}: {shown(expression)}: {one_line(reason)}")
        return columns_of(parsed)

    def has_windows(self, expression: str) -> bool:
        """Whether an expression that may have window functions has one."""
        parsed = self._connection.execute("select json_serialize_sql(?::varchar)", [f"select (\n{expression}\n)"])
        return why_not(parsed.fetchall()[0][0], windows=False) is not None

    def _own_columns(self, table: str) -> list[str]:
        return [name for name in self.columns(table) if not name.startswith(RESERVED)]

    def close(self) -> None:
        """Close the database."""
        for cursor in self._cursors:
            cursor.close()
        self._connection.close()


@contextmanager
def whole(file: Path) -> Iterator[Path]:
    """A path beside a file, to write what becomes that file when the block succeeds: again and again, if need be."""
    file.parent.mkdir(parents=True, exist_ok=True)
    path = file.with_name(f".{file.name}.{secrets.token_hex(8)}")
    try:
        yield path
        path.replace(file)
    finally:
        path.unlink(missing_ok=True)


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Errors of DuckDB as a user's; `what` begins the message."""
    try:
        yield
    except duckdb.InternalException:
        raise
    except duckdb.Error as error:
        raise _of_text(str(error), what) from None


def _of_text(text: str, what: str) -> UserError:
    """The error that DuckDB's text says."""
    begin = f"{what}: " if what else ""
    if text.startswith("Out of Memory Error"):
        return UserError(f"{begin}DuckDB's memory does not suffice: {reason_of(text)}; raise --memory")
    return UserError(f"{begin}{_of_csv(text) or reason_of(text)}")


def reason_of(error: Exception | str) -> str:
    """What an error of DuckDB says, without its kind, the query and the advice that speaks of DuckDB's options."""
    text = re.split(r"\n\s*\nLINE \d+:|\nPossible solutions|\nPossible fixes|\n\n", str(error))[0]
    return one_line(re.sub(r"^[A-Z][A-Za-z ]+ Error: ", "", text)).rstrip(".!")


def _of_csv(text: str) -> str | None:
    """An error in a delimited file, as this project says it."""
    if found := re.match(r'Invalid Input Error: Error when sniffing file "(.*?)"', text):
        return (
            f"{found[1]}: its delimiter, quotes and header cannot be told; write delimiter, quote, header and encoding "
            "into the plan"
        )
    line, file = re.search(r"CSV Error on Line: (\d+)", text), re.search(r"\n\s*file = (.*)", text)
    if line is None or file is None:
        return None
    where = f"{file[1]}: line {line[1]}"
    if found := re.search(r'converting column "(.*?)"\. Could not convert string "(.*?)" to \'(.*?)\'', text, re.S):
        kind = next((name for name, known in TYPES.items() if found[3].startswith(known)), found[3])
        fix = "say how times are written (times)" if kind in ("timestamp", "date") else "give the column another type"
        return (
            f"{where}: column {found[1]!r} is {shown(found[2])}, not of type {kind}; {fix} in the plan (string takes "
            "everything), or add the text to the source's nulls"
        )
    body = text.split("\n")
    reason = next((part for part in body[1:] if part and not part.startswith(("Original Line", "CSV Error"))), body[0])
    return f"{where}: {one_line(reason).rstrip('.!')}; check delimiter, quote, header and encoding in the plan"


@cache
def reserved_words() -> frozenset[str]:
    """The words that are no column's name in an SQL expression, unless they are quoted."""
    found = duckdb.execute("select keyword_name from duckdb_keywords() where keyword_category <> 'unreserved'")
    return frozenset(name for (name,) in found.fetchall())


def quoted(name: str) -> str:
    """A name as an SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


def literal(text: str) -> str:
    """A text as an SQL literal."""
    return "'" + text.replace("'", "''") + "'"


def as_path(name: str) -> str:
    """The path of a file as DuckDB takes it, whose paths are patterns."""
    return re.sub(r"[\[*?]", r"[\g<0>]", name)


def literals(texts: Iterable[str]) -> str:
    """Texts as an SQL list."""
    return f"[{', '.join(literal(text) for text in texts)}]"
