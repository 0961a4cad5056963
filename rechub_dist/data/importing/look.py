"""Looks at the files of an import that nobody has described: how they are written, and what their columns are like."""

from __future__ import annotations

import codecs
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import pyarrow as pa

from rechub_dist.data.importing.engine import Engine, as_path, literal, quoted
from rechub_dist.data.importing.plan import TYPES, Source
from rechub_dist.data.importing.rows import FRACTIONS, is_numeric
from rechub_dist.data.importing.sources import ISO_DATE, source_files, source_query
from rechub_dist.errors import UserError

SAMPLE: Final = 1_000_000  # rows that are looked at
_EPOCHS: Final = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
_UNUSUAL: Final = ("::", " ")  # delimiters that DuckDB does not try by itself
_BETWEEN: Final = (631_152_000, 4_102_444_800)  # 1990 to 2100 in seconds
_SEPARATORS: Final = ("|", ";")
_PAIRS: Final = r"[^,:]+:[-0-9.eE]+(,[^,:]+:[-0-9.eE]+)*"
_STRINGS: Final = 10_000  # rows that strings are looked into
_OFTEN: Final = 0.2
_NEARLY_ALL: Final = 0.9


@dataclass
class Column:
    """What a column looks like in the sample."""

    name: str
    kind: str
    distinct: int
    rows: int
    nulls: int
    low: Any
    high: Any
    mean: float | None = None
    length: float | None = None
    separator: str | None = None
    pairs: bool = False
    table: str | None = None

    @property
    def base(self) -> str:
        """DuckDB's type, of lists that of the elements."""
        return self.kind.removesuffix("[]")

    @property
    def is_list(self) -> bool:
        """Whether the column holds lists."""
        return self.kind.endswith("[]")

    @property
    def note(self) -> str:
        """The comment in the plan."""
        what = f"{self.distinct:,} distinct" if not self.is_list else "lists"
        if is_numeric(self.kind) and self.low is not None:
            what += f", {_short(self.low)} to {_short(self.high)}"
        if self.nulls:
            what += f", {self.nulls / self.rows:.1%} missing"
        return what


def look_at(engine: Engine, query: str, table: str | None) -> dict[str, Column]:
    sample = f"(select * from ({query}) limit {SAMPLE})"
    kinds = engine.columns(f"({query})")
    parts = ["count(*)"]
    for name, kind in kinds.items():
        column = quoted(name)
        flat = (
            kind != "VARCHAR"
            and not is_numeric(kind)
            and kind != "BOOLEAN"
            and not kind.startswith(("TIMESTAMP", "DATE"))
        )
        number = is_numeric(kind)
        parts += [
            f"count({column})",
            "null" if flat else f"approx_count_distinct({column})",
            "null" if flat else f"min({column})",
            "null" if flat else f"max({column})",
            f"avg({column}::DOUBLE)" if number else "null",
            f"avg(length({column}))"
            if kind == "VARCHAR"
            else f"case when min(len({column})) = max(len({column})) then max(len({column})) end"
            if kind.endswith("[]")
            else "null",
        ]
    row = engine.run(f"select {', '.join(parts)} from {sample}")[0]
    rows, found = int(row[0]), {}
    wide = 6
    for i, (name, kind) in enumerate(kinds.items()):
        count, distinct, low, high, mean, length = row[1 + i * wide : 1 + (i + 1) * wide]
        if (distinct is not None and distinct < 100_000) or (distinct and distinct > rows * 0.9):
            distinct = engine.value(f"select count(distinct {quoted(name)}) from {sample}")
        found[name] = Column(name, kind, int(distinct or 0), rows, rows - count, low, high, mean, length, table=table)
    _look_into_strings(engine, query, [column for column in found.values() if column.kind == "VARCHAR"])
    return found


def _look_into_strings(engine: Engine, query: str, columns: list[Column]) -> None:
    """Find out which strings are lists: `a|b|c`, or keys with weights, `a:0.5,b:1`; and which are times."""
    if not columns:
        return
    tests = [f"contains({{}}, {literal(by)})" for by in _SEPARATORS] + [f"regexp_full_match({{}}, {literal(_PAIRS)})"]
    tests.append("{} is null or try_cast({} as TIMESTAMPTZ) is not null")
    parts = [f"coalesce(avg(({test.replace('{}', quoted(c.name))})::INT), 0)" for c in columns for test in tests]
    shares = engine.run(f"select {', '.join(parts)} from (select * from ({query}) limit {_STRINGS})")[0]
    for i, column in enumerate(columns):
        *often, pairs, times = shares[i * len(tests) : (i + 1) * len(tests)]
        most, by = max(zip(often, _SEPARATORS, strict=True))
        column.separator = by if most > _OFTEN else None
        column.pairs = pairs > _NEARLY_ALL
        if times == 1 and column.nulls < column.rows:
            column.kind = "TIMESTAMP"


def guess_source(engine: Engine, paths: tuple[str, ...], names: Sequence[str], where: str) -> Source:
    """The source at these paths, with the encoding and the delimiter that it seems to have.

    Without a header its columns get the `names`; without these they are called column0 and so on.
    """
    if engine.given(where) is not None:
        return Source()
    source = Source(path=paths)
    if not _is_unicode(source_files(source, where)[0]):
        source = source.model_copy(update={"encoding": "latin-1"})
    query = source_query(source, engine, where)
    if not is_text(query):
        return source
    if len(engine.columns(f"({query})")) == 1:
        for delimiter in _UNUSUAL:
            tried = source.model_copy(update={"delimiter": delimiter})
            try:
                if len(engine.columns(f"({source_query(tried, engine, where)})")) > 1:
                    source = tried
                    break
            except UserError:
                continue
    dates = sniffed(engine, source)[3]
    if dates is not None:
        source = source.model_copy(update={"times": dates})
    if not names:
        return source
    kinds = engine.columns(f"({source_query(source, engine, where)})")
    if sniffed(engine, source)[2]:
        raise UserError(f"{where}: {paths[0]} has a header, which names its columns; leave --columns out")
    if len(names) != len(kinds):
        raise UserError(f"{where}: --columns gives {len(names)} names, and {paths[0]} has {len(kinds)} columns")
    typed = {name: _type_name(kind) or "string" for name, kind in zip(names, kinds.values(), strict=True)}
    return source.model_copy(update={"header": False, "columns": typed})


def _is_unicode(file: str) -> bool:
    """Whether a text file is UTF-8, by its first megabytes."""
    head = _head(file)
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return b"\0" in head  # then it is no text at all
    return True


def _head(file: str) -> bytes:
    """The first megabytes of a file, decompressed."""
    with pa.input_stream(file) as stream:
        head: bytes = stream.read(4 << 20)
    return head


def sniffed(engine: Engine, source: Source) -> tuple[str, str, bool, str | None]:
    """Delimiter, quote, whether there is a header, and how dates are written, if they are, and not as 2024-05-31."""
    options = "" if source.delimiter is None else f", delim = {literal(source.delimiter)}"
    options += f", encoding = {literal(source.encoding)}, skip = 0, comment = ''"
    file = source_files(source, "SOURCE")[0]
    delimiter, quote, header, dates = engine.run(
        f"select delimiter, quote, hasheader, dateformat from sniff_csv({literal(as_path(file))}{options})"
    )[0]
    if quote in ("", "\0", "(empty)"):  # nothing is quoted in the sample
        quote = "" if b'"' in _head(file) else '"'
    return delimiter, quote, bool(header), None if dates == ISO_DATE else dates


def _type_name(kind: str) -> str | None:
    """A plan's name for a type of DuckDB; None where it has none."""
    base, tail = kind.removesuffix("[]"), kind[len(kind.removesuffix("[]")) :]
    if base in ("UBIGINT", "HUGEINT"):
        return None  # integer has 64 bits, one of them for the sign
    if is_numeric(base):
        base = "DOUBLE" if base in FRACTIONS or base.startswith("DECIMAL") else "BIGINT"
    elif base.startswith("TIMESTAMP"):
        base = "TIMESTAMP"
    return {kind: name for name, kind in TYPES.items()}.get(base + tail)


def format_of(engine: Engine, source: Source, columns: Mapping[str, Column], where: str) -> dict[str, Any]:
    """The types that the files have, so that the next file is read alike; and how delimited text is written."""
    types = {name: kind for name, column in columns.items() if (kind := _type_name(column.kind)) is not None}
    if not is_text(source_query(source, engine, where)):
        return {"columns": types}
    delimiter, quote, header, _ = sniffed(engine, source)
    found: dict[str, Any] = {"format": "csv", "delimiter": delimiter, "header": header and source.header is not False}
    if source.encoding != "utf-8":
        found["encoding"] = source.encoding
    found |= {} if source.times is None else {"times": source.times}
    return found | ({} if quote == '"' else {"quote": quote}) | {"columns": types}


def is_text(query: str) -> bool:
    """Whether a source's query reads delimited text."""
    return "read_csv(" in query


def unit_of(column: Column) -> str | None:
    """The unit of a column of times: `timestamp`, or s, ms, us or ns since 1970; None where it holds none."""
    if column.kind.startswith(("TIMESTAMP", "DATE")):
        return "timestamp"
    if not is_numeric(column.kind) or column.low is None:
        return None
    inside = (u for u, n in _EPOCHS.items() if _BETWEEN[0] * n <= column.low and column.high <= _BETWEEN[1] * n)
    return next(inside, None)


def _short(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{float(value):.6g}"
