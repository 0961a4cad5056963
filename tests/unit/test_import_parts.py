"""Imports in parts, against the same imports in one database: the same rows in the same order, the same descriptions."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from rechub_dist.data.importing.in_parts import import_in_parts
from rechub_dist.data.importing.parts import Job
from rechub_dist.data.importing.plan import plan_of
from rechub_tests.import_cases import TYPES, random_log, random_plan, random_tables, run_import, write_rows
from rechub_tests.import_parts import assert_same


def one_by_one(_what: str, task: Any, job: Job, count: int) -> list[Any]:
    """Run tasks here, the last one first, and it twice, as a cluster may."""
    found = [task(job, number) for number in reversed(range(count))]
    task(job, count - 1)
    return found[::-1]


def in_parts(plan: dict[str, Any], out: Path, **options: Any) -> Any:
    """Import by a plan's tree in three parts."""
    chosen = {"memory": 1 << 28, "task_memory": 1 << 28, "parts": 3, "piece_bytes": 4000} | options
    return import_in_parts(plan_of(plan), out, one_by_one, **chosen)


def random_case(seed: int, folder: Path) -> dict[str, Any]:
    """A plan, whose tables are written."""
    draw = random.Random(seed)
    time = draw.choice(["integer", "float", "timestamp", "date"])
    log, tables = random_log(draw, draw.choice([30, 200]), time), random_tables(draw)
    plan = random_plan(draw, time, len(log))
    types = TYPES | {"when": time, "id": "integer"}
    plan["log"] = write_rows(draw, log, folder, "log", types)
    for name, rows in tables.items():
        plan["tables"][name] |= write_rows(draw, rows, folder, name, types)
    return plan


@pytest.mark.parametrize("seed", [*range(8), *(pytest.param(n, marks=pytest.mark.slow) for n in range(8, 40))])
def test_rows_and_descriptions_are_those_of_one_database(seed: int, tmp_path: Path) -> None:
    plan = random_case(seed, tmp_path)
    run_import(plan, tmp_path / "one")
    in_parts(plan, tmp_path / "many")
    assert_same(tmp_path / "one", tmp_path / "many")
