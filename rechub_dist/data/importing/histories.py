"""Histories: what a row's user did strictly before the row, in time order, from the rows of the log.

For each event there is the list of the user's newest events up to it; a row takes the list of the last event that is
earlier than itself (an as-of join). So no list is ever longer than its bound, and everything is sorted by user and
time, which DuckDB does out of core.
"""

from __future__ import annotations

from typing import Final

from rechub_dist.data.importing.engine import Engine, quoted
from rechub_dist.data.importing.plan import NOW, RESERVED, HistoryPlan, Plan
from rechub_dist.data.importing.rows import DRAWN, ROW, ROWS, SPLIT, flag

LISTS: Final = f"{RESERVED}lists"
LAST: Final = 3  # the split of rows of `now`


def list_columns(name: str, history: HistoryPlan) -> dict[str, str]:
    """The columns of lists that a history has, each with the log's column that it is made of."""
    return {name: history.column, **history.also}


def add_histories(plan: Plan, engine: Engine) -> None:
    """Add the columns of all histories to ROWS; rows without an earlier event get empty lists."""
    user, time = quoted(plan.user or ""), quoted(plan.time or "")
    for name, history in plan.histories.items():
        lists = list_columns(name, history)
        kinds = engine.columns(ROWS)
        window = (
            f"over (partition by {user} order by {time}, {ROW} "
            f"rows between {history.max_length - 1} preceding and current row)"
        )
        made = ", ".join(f"list({quoted(column)}) {window} as {quoted(out)}" for out, column in lists.items())
        outs = ", ".join(quoted(out) for out in lists)
        # of events of one time, the list of the last holds all of them
        last = f"qualify row_number() over (partition by {user}, {time} order by {ROW} desc) = 1"
        events = f"{quoted(flag(name))} and not {DRAWN} and {SPLIT} is distinct from {LAST}"
        upto = f"select {user}, {time}, {ROW}, {made} from {ROWS} where {events} {last}"
        engine.run(f"create or replace table {LISTS} as select {user}, {time}, {outs} from ({upto})")
        empty = ", ".join(
            f"coalesce(e.{quoted(out)}, []::{kinds[column]}[]) as {quoted(out)}" for out, column in lists.items()
        )
        both = f"r.{user} = e.{user}"
        engine.run(
            f"create or replace table {ROWS} as "
            f"select r.*, {empty} from (from {ROWS} where {SPLIT} is distinct from {LAST}) as r "
            f"asof left join {LISTS} as e on {both} and r.{time} > e.{time} "
            f"union all "
            f"select r.*, {empty} from (from {ROWS} where {SPLIT} = {LAST}) as r "
            f"asof left join {LISTS} as e on {both} and r.{time} >= e.{time}"
        )
    engine.run(f"drop table if exists {LISTS}")


def add_now(plan: Plan, engine: Engine) -> None:
    """Add the rows of the split `now`: each user's last row, whose history will hold that row's event too."""
    assert NOW
    user, time = quoted(plan.user or ""), quoted(plan.time or "")
    engine.run(
        f"insert into {ROWS} select * replace ({LAST}::TINYINT as {SPLIT}) from {ROWS} where not {DRAWN} "
        f"qualify row_number() over (partition by {user} order by {time} desc, {ROW} desc) = 1"
    )
