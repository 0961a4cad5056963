"""Drawn negatives: rows of the same user and time with an item of train that the user has no row with.

What is drawn depends on the plan's seed and the row alone. The item's attributes come from the tables that are joined
by the item; those of the log itself cannot be known for an item that was not shown, and are null unless they are
copied.
"""

from __future__ import annotations

from typing import Final

from rechub_dist.data.importing.engine import Engine, quoted
from rechub_dist.data.importing.plan import RESERVED, SPLITS, Plan
from rechub_dist.data.importing.rows import DRAWN, ROW, ROWS, SPLIT, WEIGHT, Shape, expression_of, flag
from rechub_dist.data.importing.sources import source_query
from rechub_dist.errors import UserError

_TRIES: Final = 4  # candidates for each negative; those that the user has are left out
_ITEMS: Final = f"{RESERVED}train_items"
_PAIRS: Final = f"{RESERVED}pairs"
_DRAWN_ITEMS: Final = f"{RESERVED}drawn_items"


def needed_for_negatives(plan: Plan) -> tuple[str, ...]:
    """The columns of ROWS that drawing needs."""
    if plan.negatives is None:
        return ()
    return tuple(name for name in (plan.user, plan.item, plan.time, *plan.negatives.copied) if name is not None)


def pool_query(plan: Plan) -> str:
    """A query for train's items, `value`, and how much room each has among the draws, `count`."""
    assert plan.negatives is not None
    count = "1" if plan.negatives.by == "uniform" else "count(*)"
    item = quoted(plan.item or "")
    return (
        f"select {item} as value, {count} as count from {ROWS} where {SPLIT} = 0 and {item} is not null group by value"
    )


def add_negatives(plan: Plan, engine: Engine, shape: Shape, pool: str | None = None, first: int | None = None) -> int:
    """Add the drawn rows to ROWS, with 0 for every label; returns how many there are.

    Args:
        plan: the plan.
        engine: with the table ROWS, which holds all rows of its users.
        shape: what the plan's columns are.
        pool: a query for the items of all databases, each once, as `pool_query` gives; default: those of this one.
        first: the number of the first drawn row; default: the one after the last.

    Raises:
        UserError: `where` is no condition over the columns of a row, or a label is not 0 or 1.
    """
    drawn = plan.negatives
    if drawn is None:
        return 0
    user, item = quoted(plan.user or ""), quoted(plan.item or "")
    engine.run(
        f"create or replace table {_ITEMS} as select value, (sum(count) over (order by value) - count)::BIGINT as "
        f"place, (sum(count) over ())::BIGINT as draws from ({pool or pool_query(plan)})"
    )
    draws = engine.value(f"select coalesce(max(draws), 0) from {_ITEMS}")
    first = engine.value(f"select max({ROW}) + 1 from {ROWS}") if first is None else first
    engine.run(f"create or replace table {_PAIRS} as select distinct {user} as u, {item} as i from {ROWS}")
    condition = "true" if drawn.where is None else f"({drawn.where}\n)"
    if drawn.where is not None:
        engine.expression_type(drawn.where, ROWS, "negatives.where")
    splits = ", ".join(str(SPLITS.index(name)) for name in drawn.splits)
    place = f"md5_number_lower(concat_ws(chr(31), 'negatives', '{plan.seed}', r.row::VARCHAR, r.n::VARCHAR)) % {draws}"
    candidates = (
        f"select r.row, r.u, v.value as i, min(r.n) as n from (select {ROW} as row, {user} as u, "
        f"unnest(range({drawn.per_row * _TRIES})) as n from {ROWS} where {condition} and {SPLIT} in ({splits})) as r "
        f"asof join {_ITEMS} as v on {place} >= v.place group by all"
    )
    fresh = f"select c.* from ({candidates}) as c anti join {_PAIRS} as p on p.u = c.u and p.i = c.i"
    engine.run(
        f"create or replace table {_DRAWN_ITEMS} as select row, i, "
        f"row_number() over (partition by row order by n) as k from ({fresh}) qualify k <= {drawn.per_row}"
    )
    count: int = engine.value(f"select count(*) from {_DRAWN_ITEMS}")
    parts, joins = _columns(plan, engine, shape, first)
    engine.run(
        f"insert into {ROWS} by name select {', '.join(parts)} from {_DRAWN_ITEMS} as d "
        f"join {ROWS} as r on r.{ROW} = d.row {' '.join(joins)}"
    )
    for table in (_ITEMS, _PAIRS, _DRAWN_ITEMS):
        engine.run(f"drop table {table}")
    return count


def _columns(plan: Plan, engine: Engine, shape: Shape, first: int) -> tuple[list[str], list[str]]:
    """What a drawn row has in each column, and the tables of the item's attributes."""
    assert plan.negatives is not None
    of_item = {name for name, table in plan.tables.items() if (table.log_key or table.key) == plan.item}
    joins = []
    for name in sorted(of_item):
        query, alias = source_query(plan.tables[name], engine, f"tables.{name}"), quoted(f"t {name}")
        joins.append(f"left join ({query}) as {alias} on {alias}.{quoted(plan.tables[name].key)} = d.i")
    copied = {plan.user, plan.time, *plan.negatives.copied}
    parts = []
    for name in engine.columns(ROWS):
        column = quoted(name)
        if name == plan.item:
            value = "d.i"
        elif name == ROW:
            value = f"{first} + d.row * {plan.negatives.per_row} + d.k - 1"
        elif name == SPLIT:
            value = f"r.{SPLIT}"
        elif name == DRAWN:
            value = "true"
        elif name in plan.labels:
            value = "0"
        elif shape.origin.get(name) in of_item:
            value = f"{quoted(f't {shape.origin[name]}')}.{column}"
        elif name in copied or name in shape.origin or name == WEIGHT:
            value = f"r.{column}"
        elif name in plan.columns:
            raise UserError(
                f"negatives: columns.{name} cannot be computed for a drawn item; use derive, or write it into a table"
            )
        elif name in {flag(history) for history in plan.histories}:
            value = "false"
        else:
            value = "null"
        parts.append(f"{value} as {column}")
    return parts, joins


def check_negatives(plan: Plan) -> None:
    """Raise UserError for labels that a drawn row cannot have."""
    for name, label in plan.labels.items() if plan.negatives is not None else ():
        if not isinstance(label, str) and label.type in ("regression", "multiclass"):
            what = "a regression" if label.type == "regression" else "of several classes"
            raise UserError(
                f"negatives: labels.{name} is {what}: {expression_of(label)} has no value for an item "
                "that was not shown; leave negatives or the label out"
            )
