"""Imports from Python: the log and its tables as paths, or as tables in memory."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from rechub_dist.config.strict_yaml import parse_yaml
from rechub_dist.data.given import all_of
from rechub_dist.data.importing.guess import guess_plan
from rechub_dist.data.importing.plan import Plan, plan_of, read_plan
from rechub_dist.data.importing.run import Imported, import_data
from rechub_dist.distributed.host import host_memory
from rechub_dist.errors import UserError

_MEMORY = "<memory>"


def prepare(
    out: str | Path,
    *,
    log: Any,
    users: Any = None,
    items: Any = None,
    tables: Mapping[str, Any] | None = None,
    plan: Plan | Mapping[str, Any] | str | Path | None = None,
    user: str | None = None,
    item: str | None = None,
    time: str | None = None,
    labels: tuple[str, ...] = (),
    grow: str | Path | None = None,
    memory: int | None = None,
) -> Imported:
    """Make a data set of tables of your own, as `rechub-dist data import` does.

    Args:
        out: the folder to write; an earlier, unchanged import of the same name is replaced.
        log: the rows of training: a pandas or polars DataFrame, an Arrow table, a dict of columns, or a path.
        users, items: tables to join, of the same kinds; the same as `tables` of these names.
        tables: further tables by name. Each is joined by a key that the plan names, or that its guess finds.
        plan: a plan, its file, or its content as a dict; default: the plan that `data import --guess` would write.
        user, item, time, labels: for the guess: columns of the log; labels are columns or SQL expressions.
        grow: an earlier import, whose values keep their ids.
        memory: bytes for the database; default: half of the machine's.

    Returns:
        What was imported, with `plan`, and the folder as `root`.

    Raises:
        UserError: a mistake in the plan or the tables; one line that names it and the fix.
    """
    given = {"users": users, "items": items, **(tables or {})}
    given = {name: rows for name, rows in given.items() if rows is not None}
    frames, paths = {}, {}
    for where, rows in {"log": log, **{f"tables.{name}": rows for name, rows in given.items()}}.items():
        if isinstance(rows, str | os.PathLike):
            paths[where] = os.fspath(rows)
        else:
            frames[where] = all_of(rows, where)
    limit = host_memory() // 2 if memory is None else memory
    if plan is None:
        text = guess_plan(
            [paths.get("log", _MEMORY)], {name: paths.get(f"tables.{name}", _MEMORY) for name in given},
            user=user, item=item, time=time, labels=labels, frames=frames, memory=limit,
        )  # fmt: skip
        chosen = _with_paths(plan_of(parse_yaml(text, "the guessed plan")), {}, frames)
    elif user or item or time or labels:
        raise UserError("user, item, time and labels are for a guessed plan; write them into the plan")
    else:
        chosen = _with_paths(plan, paths, frames)
    return import_data(chosen, Path(out), memory=limit, grow=None if grow is None else Path(grow), frames=frames)


def _with_paths(
    plan: Plan | Mapping[str, Any] | str | Path, paths: Mapping[str, str], frames: Mapping[str, pa.Table]
) -> Plan:
    """The plan with the paths that are given, and a table for each that is given beside it."""
    if isinstance(plan, str | os.PathLike):
        plan = read_plan(Path(plan))
    elif not isinstance(plan, Plan):
        plan = plan_of(dict(plan))
    for where in (*paths, *frames):
        name = where.partition(".")[2]
        if name and name not in plan.tables:
            raise UserError(f"{name}: the plan has no such table; write tables: {{{name}: {{key: COLUMN}}}}")
    new: dict[str, Any] = {where: {"path": (path,)} for where, path in paths.items()}
    new |= {where: {"path": None} for where in frames}
    tables = {name: table.model_copy(update=new.get(f"tables.{name}", {})) for name, table in plan.tables.items()}
    log = plan.log.model_copy(update=new.get("log", {}))
    return plan.model_copy(update={"log": log, "tables": tables})
