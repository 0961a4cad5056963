"""The rows of an import: the log with its joined tables, columns, labels and split, in one table of the database.

Besides the columns that are needed later, the table has ours: `ROW`, a row's number in the log, which is its identity
whatever becomes of the order; `SPLIT`, the index in SPLITS, null for what is only a part of histories; `DRAWN`, whether
it is a drawn negative; and for each history whether the row is an event of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from rechub_dist.data.importing.engine import Engine, quoted
from rechub_dist.data.importing.plan import NUMBERS, RESERVED, LabelPlan, Plan
from rechub_dist.data.importing.sources import check_values, source_query
from rechub_dist.errors import UserError, nearest, shown
from rechub_dist.features import Label

ROWS: Final = f"{RESERVED}rows"
JOINED: Final = f"{RESERVED}joined"
_SHAPE: Final = f"{RESERVED}shape"  # a table of the same columns without rows: expressions are checked against it
ROW: Final = f"{RESERVED}row"
SPLIT: Final = f"{RESERVED}split"
DRAWN: Final = f"{RESERVED}drawn"
WEIGHT: Final = "row_weight"

FRACTIONS: Final = ("FLOAT", "DOUBLE")


@dataclass(frozen=True)
class Shape:
    """What the plan's expressions and columns turned out to be.

    Attributes:
        types: of all columns that a row may have: the log's, the tables', the plan's.
        origin: by column of a table, the table's name.
        labels: as the schema has them; None where the values decide.
    """

    types: dict[str, str]
    origin: dict[str, str]
    labels: dict[str, Label | None]


def flag(history: str) -> str:
    """The column that says whether a row is an event of a history."""
    return f"{RESERVED}of_{history}"


def join_sources(plan: Plan, engine: Engine, *, empty: bool = False) -> Shape:
    """Make the view JOINED of the log and its tables, with the plan's columns; check all expressions against it.

    Raises:
        UserError: a source, key or expression is wrong; names the plan's key.
    """
    log = source_query(plan.log, engine, "log")
    types = engine.columns(f"({log})")
    if not types or not (empty or engine.run(f"select 1 from ({log}) limit 1", "log")):
        raise UserError(f"{', '.join(plan.log.path or ['log'])}: there is no row")
    origin: dict[str, str] = {}
    parts, joins = ["l.*"], []
    for name, table in plan.tables.items():
        where = f"tables.{name}"
        query = source_query(table, engine, where)
        columns = engine.columns(f"({query})")
        on = table.log_key or table.key
        for key, known, what in (
            (table.key, columns, f"{where}.key: the table"),
            (on, types, f"{where}.log_key: the log"),
        ):
            if key not in known:
                raise UserError(f"{what} has no column {key!r}; {nearest(key, known)}")
        if _family(columns[table.key]) != _family(types[on]):
            raise UserError(
                f"{where}.key: {table.key!r} is {columns[table.key]}, but {on!r} of the log is {types[on]}; give both "
                "the same type in columns"
            )
        with values_named(plan, engine):
            _check_unique(engine, query, table.key, where)
        added = list(table.take or (column for column in columns if column != table.key))
        for column in added:
            if column not in columns:
                raise UserError(f"{where}.take: the table has no column {column!r}; {nearest(column, columns)}")
        for column in added:
            if (same := alike(column, types)) is not None:
                raise UserError(
                    f"{where}: there is a column {same!r} in {origin.get(same, 'the log')} too; name the columns "
                    f"to join in {where}.take"
                )
            types[column], origin[column] = columns[column], name
        alias = quoted(f"t {name}")
        parts += [f"{alias}.{quoted(column)}" for column in added]
        joins.append(f"left join ({query}) as {alias} on l.{quoted(on)} = {alias}.{quoted(table.key)}")
    numbered = f"(select row_number() over () - 1 as {ROW}, * from ({log}))"
    engine.run(f"create or replace view {JOINED} as select {', '.join(parts)} from {numbered} as l {' '.join(joins)}")
    engine.run(f"create or replace table {_SHAPE} as from {JOINED} limit 0")
    return _with_expressions(plan, engine, types, origin)


def _with_expressions(plan: Plan, engine: Engine, types: dict[str, str], origin: dict[str, str]) -> Shape:
    for name, expression in plan.columns.items():
        if (known := alike(name, types)) is not None:
            raise UserError(f"columns.{name}: there is a column {known!r} already; choose another name")
        types[name] = engine.expression_type(expression, _SHAPE, f"columns.{name}")
    if plan.columns:
        added = ", ".join(f"({expression}\n) as {quoted(name)}" for name, expression in plan.columns.items())
        engine.run(f"create or replace view {JOINED}_2 as select *, {added} from {JOINED}")
        engine.run(f"create or replace table {_SHAPE} as select *, {added} from {_SHAPE}")
    labels: dict[str, Label | None] = {}
    for name, label in plan.labels.items():
        kind = engine.expression_type(expression_of(label), _SHAPE, f"labels.{name}", windows=True)
        if kind != "BOOLEAN" and not is_numeric(kind):
            raise UserError(
                f"labels.{name}: {shown(expression_of(label))} is {kind}; a label is a number, or true or false"
                + ("; number its classes: case ... when 'a' then 0 when 'b' then 1 end" if kind == "VARCHAR" else "")
            )
        wanted = label.type if isinstance(label, LabelPlan) else None
        wanted = wanted or ("classification" if kind == "BOOLEAN" else None)
        classes = label.classes if isinstance(label, LabelPlan) else None
        labels[name] = Label(name, type=wanted, classes=classes) if wanted is not None else None
    booleans = {"filter": plan.filter, **{f"histories.{k}.where": h.where for k, h in plan.histories.items()}}
    for where, condition in booleans.items():
        if condition is not None and (kind := engine.expression_type(condition, _SHAPE, where)) != "BOOLEAN":
            raise UserError(f"{where}: {shown(condition)} is {kind}, not true or false")
    if plan.weight is not None and not is_numeric(
        kind := engine.expression_type(plan.weight, _SHAPE, "weight", windows=True)
    ):
        raise UserError(f"weight: {shown(plan.weight)} is {kind}; a weight is a number")
    for key in ("user", "item", "time"):
        _check_column(getattr(plan, key), types, key)
    copied = () if plan.negatives is None else plan.negatives.copied
    for key, names in (
        ("k_core", plan.k_core),
        ("split.key", plan.split.key),
        ("keep", plan.keep),
        ("negatives.copied", copied),
    ):
        for name in names:
            _check_column(name, types, key)
    _check_column(plan.split.column, types, "split.column")
    if plan.time is not None and not (
        is_numeric(types[plan.time]) or types[plan.time].startswith(("TIMESTAMP", "DATE"))
    ):
        raise UserError(f"time: column {plan.time!r} is {types[plan.time]}; a time is a number, a date or a timestamp")
    return Shape(types, origin, labels)


def make_rows(plan: Plan, engine: Engine, needed: Iterable[str]) -> int:
    """Fill the table ROWS with the columns `needed`, and drop what the k-core drops; returns the rows of the log.

    Raises:
        UserError: an unreadable value, or nothing is left.
    """
    read = fill_rows(plan, engine, needed)
    check_rows(plan, read, count_rows(engine, "true"))
    drop_by_k_core(plan, engine)
    return read


def fill_rows(plan: Plan, engine: Engine, needed: Iterable[str]) -> int:
    """Fill the table ROWS with the columns `needed` of the rows that pass the filter; returns the rows of the log.

    Raises:
        UserError: an unreadable value, or a name that occurs twice.
    """
    view = f"{JOINED}_2" if plan.columns else JOINED
    chosen = dict.fromkeys(needed)
    for place, name in enumerate(plan.labels):
        if (known := alike(name, list(plan.labels)[:place])) is not None:
            raise UserError(f"labels.{name}: label {known!r} has the same name; rename one")
        if alike(name, chosen) is not None:
            raise UserError(f"labels.{name}: a feature, key or history reads a column of that name; rename the label")
    if plan.weight is not None and (known := alike(WEIGHT, [*chosen, *plan.labels])) is not None:
        raise UserError(
            f"weight: it is written as column {WEIGHT}, but there is a column {known!r} already; rename that"
        )
    parts = [ROW, *(quoted(name) for name in chosen)]
    for name, label in plan.labels.items():
        boolean = engine.expression_type(expression_of(label), _SHAPE, name, windows=True) == "BOOLEAN"
        parts.append(f"({expression_of(label)}\n){'::TINYINT' if boolean else ''} as {quoted(name)}")
    if plan.weight is not None:
        parts.append(f"({plan.weight}\n)::DOUBLE as {WEIGHT}")
    for name, history in plan.histories.items():
        condition = "true" if history.where is None else f"coalesce(({history.where}\n), false)"
        parts.append(f"{condition} as {quoted(flag(name))}")
    where = "true" if plan.filter is None else f"({plan.filter}\n)"
    if plan.unique:
        where += f" qualify row_number() over (partition by {', '.join(map(quoted, plan.unique))} order by {ROW}) = 1"
    with values_named(plan, engine):
        engine.run(
            f"create or replace table {ROWS} as select {', '.join(parts)}, false as {DRAWN}, 0::TINYINT as {SPLIT} "
            f"from {view} where {where}",
            "log",
        )
    whole = plan.filter is None and not plan.unique
    read: int = 0 if whole else engine.value(f"select count(*) from ({source_query(plan.log, engine, 'log')})")
    return read or count_rows(engine, "true")


def check_rows(plan: Plan, read: int, left: int) -> None:
    """Raise UserError if the filter has left none of the rows that were read."""
    if not left:
        what = f"filter {shown(plan.filter)} leaves no row" if plan.filter and read else "there is no row"
        raise UserError(f"{', '.join(plan.log.path or ['log'])}: {what}")


@contextmanager
def values_named(plan: Plan, engine: Engine) -> Iterator[None]:
    """Where a value of the files is not of its type, the error names its line."""
    try:
        yield
    except UserError:
        for where, source in {
            "log": plan.log,
            **{f"tables.{name}": table for name, table in plan.tables.items()},
        }.items():
            check_values(source, engine, where)
        raise


def drop_by_k_core(plan: Plan, engine: Engine) -> None:
    """Drop rows of ROWS until each value has the rows that k_core asks for. Raises UserError: none is left."""
    before = -1
    while plan.k_core and (left := engine.value(f"select count(*) from {ROWS}")) != before:
        before = left
        for name, least in plan.k_core.items():
            column = quoted(name)
            engine.run(
                f"delete from {ROWS} where {column} is null or {column} in "
                f"(select {column} from {ROWS} group by {column} having count(*) < {least})"
            )
    if plan.k_core and not before:
        raise UserError(f"k_core: no row is left with {dict(plan.k_core)}; lower the numbers")


def expression_of(label: str | LabelPlan) -> str:
    """The SQL of a label."""
    return label if isinstance(label, str) else label.expression


def alike(name: str, names: Iterable[str]) -> str | None:
    """The one of the names that is the same whatever its case, as for DuckDB; None if there is none."""
    return next((known for known in names if known.casefold() == name.casefold()), None)


def is_numeric(kind: str) -> bool:
    """Whether DuckDB's type is one of numbers."""
    return kind in NUMBERS or kind in FRACTIONS or kind.startswith("DECIMAL")


def count_rows(engine: Engine, condition: str) -> int:
    """The number of rows of ROWS for which a condition in SQL is true."""
    return int(engine.value(f"select count(*) from {ROWS} where {condition}"))


def _family(kind: str) -> str:
    return "number" if is_numeric(kind) else kind


def _check_unique(engine: Engine, query: str, key: str, where: str) -> None:
    twice = engine.run(
        f"select {quoted(key)}, count(*) as n from ({query}) where {quoted(key)} is not null group by 1 having n > 1 "
        "order by 1 limit 1",
        where,
    )
    if twice:
        raise UserError(
            f"{where}.key: {twice[0][1]:,} rows have the {key} {shown(twice[0][0])}, which would multiply the log's; "
            "keep one row per key"
        )


def _check_column(name: str | None, types: dict[str, str], where: str) -> None:
    if name is not None and name not in types:
        raise UserError(f"{where}: there is no column {name!r}; {nearest(name, types)}")
