"""Which rows are train, valid and test."""

from __future__ import annotations

import math
from typing import Final

from rechub_dist.data.importing.engine import Engine, literal, quoted
from rechub_dist.data.importing.plan import RESERVED, SPLITS, Plan, SplitPlan
from rechub_dist.data.importing.rows import FRACTIONS, ROW, ROWS, SPLIT, Shape, count_rows, is_numeric
from rechub_dist.errors import UserError, shown

COUNTS: Final = f"{SPLIT} is not null"  # of a row that is more than a part of histories
_ID, _PLACE, _OF = (f"{RESERVED}{name}" for name in ("id", "place", "of"))
_ALIASES: Final = {"validation": "valid", "val": "valid", "dev": "valid", "eval": "valid"}


def make_splits(plan: Plan, engine: Engine, shape: Shape) -> None:
    """Write each row's split.

    Raises:
        UserError: times or users are missing, a time in the plan is none of the column's, or train would be empty.
    """
    check_present(plan, engine, shape)
    begin = rows_begin(plan, engine, shape)
    if begin is not None:
        engine.run(f"update {ROWS} set {SPLIT} = null where {quoted(plan.time or '')} < {begin}")
    write_splits(plan, engine, split_rule(plan, engine, shape))
    check_train(plan, count_rows(engine, f"{SPLIT} = 0"))


def check_train(plan: Plan, rows: int) -> None:
    """Raise UserError if train has no rows."""
    if not rows:
        raise UserError(f"split: by {plan.split.by} leaves no row for train; change its shares, times or column")


def rows_begin(plan: Plan, engine: Engine, shape: Shape) -> str | None:
    """The time, in SQL, before which rows are only parts of histories. Raises UserError."""
    begin = plan.split.rows_from
    return None if begin is None else _time_literal(begin, "split.rows_from", plan, engine, shape)


def split_rule(plan: Plan, engine: Engine, shape: Shape) -> str | None:
    """An expression for a row's split, which needs to see all rows; None where it depends on the user's other rows.

    Raises:
        UserError: a time in the plan is none of the column's, or a split in the column is none.
    """
    split = plan.split
    if split.by == "leave-last-out":
        return None
    if split.by == "position":
        rows = count_rows(engine, COUNTS)
        tested = rows - math.floor(rows * split.test + 1e-9)
        valid, test = (_value_at(engine, ROW, at) for at in (tested - math.floor(rows * split.valid + 1e-9), tested))
        return f"case when {ROW} >= {test} then 2 when {ROW} >= {valid} then 1 else 0 end"
    return _by_column(engine, split) if split.by == "column" else _rule(plan, engine, shape)


def write_splits(plan: Plan, engine: Engine, rule: str | None) -> None:
    """Write the split of each row that is more than a part of histories; users' rows must be together in ROWS."""
    if rule is not None:
        engine.run(f"update {ROWS} set {SPLIT} = {rule} where {COUNTS}")
        return
    user, time = quoted(plan.user or ""), quoted(plan.time or "")
    ranked = (
        f"select {ROW} as {_ID}, row_number() over (partition by {user} order by {time} desc, {ROW} desc) as "
        f"{_PLACE}, count(*) over (partition by {user}) as {_OF} from {ROWS}"
    )
    engine.run(
        f"update {ROWS} set {SPLIT} = case {_PLACE} when 1 then 2 when 2 then 1 else 0 end "
        f"from ({ranked}) as ranked where {ROW} = {_ID} and {_OF} >= 3 and {COUNTS}"
    )


def check_present(plan: Plan, engine: Engine, shape: Shape) -> None:
    """Raise UserError if a user or time is missing where a row without one would have no place."""
    by = plan.split.by
    ordered = bool(plan.histories) or plan.now or by == "leave-last-out"
    of_user = ordered or by == "user" or plan.negatives is not None
    for key, why in (("time", ordered or by == "time" or plan.split.rows_from), ("user", of_user)):
        name = getattr(plan, key)
        if not why or name is None:
            continue
        column, kind = quoted(name), shape.types[name]
        endless = f" or not isfinite({column})" if kind in FRACTIONS or kind.startswith(("TIMESTAMP", "DATE")) else ""
        if nulls := count_rows(engine, f"{column} is null{endless}"):
            raise UserError(f"{key}: {nulls:,} rows have no {name!r}; leave them out: filter: {name} is not null")


def _rule(plan: Plan, engine: Engine, shape: Shape) -> str:
    """An expression for a row's split."""
    split = plan.split
    if split.by == "time":
        time = quoted(plan.time or "")
        if split.valid_from is not None and split.test_from is not None:
            valid, test = (
                _time_literal(text, f"split.{key}", plan, engine, shape)
                for key, text in (("valid_from", split.valid_from), ("test_from", split.test_from))
            )
        else:
            valid, test = (_cut(engine, time, share) for share in (split.valid + split.test, split.test))
        return f"case when {time} >= {test} then 2 when {time} >= {valid} then 1 else 0 end"
    keys = [plan.user or ""] if split.by == "user" else [*split.key] or [ROW]
    text = ", ".join(f"coalesce({quoted(key)}::VARCHAR, chr(30))" for key in keys)
    drawn = f"md5_number_lower(concat_ws(chr(31), '{plan.seed}', {text}))::DOUBLE / 18446744073709551616.0"
    parts = (1 - split.test, 1 - split.test - split.valid)
    return f"case when {drawn} >= {parts[0]!r} then 2 when {drawn} >= {parts[1]!r} then 1 else 0 end"


def _cut(engine: Engine, time: str, share: float) -> str:
    """The time from which on the newest `share` of the rows are; rows of one time stay together."""
    rows = count_rows(engine, COUNTS)
    return _value_at(engine, time, rows - round(rows * share))


def _value_at(engine: Engine, column: str, place: int) -> str:
    """The value, in SQL, that so many rows come before when they are sorted by it; null if there are no more."""
    found = engine.run(
        f"select {column}::VARCHAR, typeof({column}) from {ROWS} where {COUNTS} order by {column} limit 1 "
        f"offset {place}"
    )
    return f"{literal(found[0][0])}::{found[0][1]}" if found else "null"  # which no time reaches


def _by_column(engine: Engine, split: SplitPlan) -> str:
    column = f"lower({quoted(split.column or '')}::VARCHAR)"
    known = {**{name: i for i, name in enumerate(SPLITS)}, **{k: SPLITS.index(v) for k, v in _ALIASES.items()}}
    cases = " ".join(f"when {literal(name)} then {index}" for name, index in known.items())
    names = ", ".join(literal(name) for name in known)
    wrong = engine.run(
        f"select {column}, count(*) from {ROWS} where coalesce({column} not in ({names}), true) "
        "group by 1 order by 1 limit 1"
    )
    if wrong:
        raise UserError(
            f"split.column: {wrong[0][1]:,} rows have {shown(wrong[0][0])} in column {split.column!r}; it must be "
            "train, valid or test"
        )
    return f"case {column} {cases} end"


def _time_literal(text: str, where: str, plan: Plan, engine: Engine, shape: Shape) -> str:
    kind = shape.types[plan.time or ""]
    try:
        engine.run(f"select {literal(text)}::{kind}")
    except UserError:
        how = "a number in the column's unit" if is_numeric(kind) else "such as 2024-05-01 or 2024-05-01 12:00:00"
        raise UserError(f"{where}: {shown(text)} is no {kind}, which column {plan.time!r} is; write {how}") from None
    return f"{literal(text)}::{kind}"
