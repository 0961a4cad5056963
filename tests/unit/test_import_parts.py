"""Imports in parts, against the same imports in one database: the same rows in the same order, and the same facts."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rechub_dist.data.importing.in_parts import import_in_parts
from rechub_dist.data.importing.parts import Job
from rechub_dist.data.importing.plan import plan_of
from rechub_dist.errors import UserError
from rechub_tests.import_cases import TYPES, random_log, random_plan, random_tables, run_import, write_rows
from rechub_tests.import_parts import assert_same, events, everything
from rechub_tests.representatives import slow


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
    plan = {key: value for key, value in random_plan(draw, time, len(log)).items() if key != "unique"}
    types = TYPES | {"when": time, "id": "integer"}
    plan["log"] = write_rows(draw, log, folder, "log", types)
    for name, rows in tables.items():
        plan["tables"][name] |= write_rows(draw, rows, folder, name, types)
    return plan


@pytest.mark.parametrize("seed", [*range(4), *map(slow, range(4, 40))])
def test_rows_and_descriptions_are_those_of_one_database(seed: int, tmp_path: Path) -> None:
    plan = random_case(seed, tmp_path)
    run_import(plan, tmp_path / "one")
    in_parts(plan, tmp_path / "many")
    assert_same(tmp_path / "one", tmp_path / "many")


def test_equal_rows_of_different_parts_cannot_be_told(tmp_path: Path) -> None:
    plan = random_case(0, tmp_path) | {"unique": ["user"]}
    with pytest.raises(UserError, match="unique: equal rows may lie in different parts; leave it out, or import on"):
        in_parts(plan, tmp_path / "many")
    assert not (tmp_path / "many").exists()


def negatives(by: str) -> dict[str, Any]:
    """Changes of a plan: what draws negatives."""
    return {
        "negatives": {"per_row": 2, "where": "liked = 1", "by": by, "copied": ["tag"]},
        "columns": {},
        "order": "stored",
        "split": {"by": "leave-last-out"},
    }


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"order": "time", "split": {"by": "time", "rows_from": "1700000100"}},
        {"order": "stored", "split": {"by": "position"}},
        negatives("uniform"),
        negatives("frequency"),
    ],
    ids=["as it is", "by time", "by position", "uniform negatives", "frequent negatives"],
)
def test_nearly_all_that_a_plan_can_say(changes: dict[str, Any], tmp_path: Path) -> None:
    plan = everything(events(tmp_path, 900)) | changes
    if "negatives" in changes:
        del plan["features"]["half"]
    one = run_import(plan, tmp_path / "one")
    many = in_parts(plan, tmp_path / "many", parts=4)
    assert_same(tmp_path / "one", tmp_path / "many")
    assert (one.drawn > 0) == ("negatives" in changes)
    assert many.rows == one.rows
    assert len(list((tmp_path / "many" / "train").iterdir())) > 1


def test_without_users_rows_are_spread_by_their_number(tmp_path: Path) -> None:
    rows = 500
    table = pa.table(
        {
            "n": range(rows),
            "wide": pa.array([10**25 + n for n in range(rows)], pa.decimal128(38, 0)),
            "price": pa.array([None if n % 9 == 0 else n for n in range(rows)], pa.decimal128(9, 2)),
            "at": pa.array([n * 10**9 for n in range(rows)], pa.timestamp("ns")),
            "of_day": pa.array(range(rows), pa.time64("us")),
            "many": pa.array([[n, n + 1] for n in range(rows)], pa.list_(pa.uint64())),
            "part": [("train", "valid", "dev", "test")[n % 4] for n in range(rows)],
        }
    )
    pq.write_table(table, tmp_path / "log.parquet", row_group_size=100)
    plan = {
        "log": {"path": str(tmp_path / "log.parquet"), "file_column": "file"},
        "columns": {"sum": "list_sum(many)"},
        "split": {"by": "column", "column": "part"},
        "features": {"n": {"kind": "sparse"}, "price": {"kind": "dense"}, "many": {"kind": "sparse"}},
        "keep": ["wide", "at", "of_day", "sum", "file"],
    }
    run_import(plan, tmp_path / "one")
    in_parts(plan, tmp_path / "many")
    assert_same(tmp_path / "one", tmp_path / "many")


def test_values_of_an_earlier_import_keep_their_ids(tmp_path: Path) -> None:
    for name, rows in (("first", 300), ("second", 900)):
        (tmp_path / name).mkdir()
        events(tmp_path / name, rows)
    first = everything(events(tmp_path, 300, seed=1))
    run_import(first, tmp_path / "before")
    second = everything({**first, "log": {**first["log"], "path": str(tmp_path / "second" / "log")}})
    run_import(second, tmp_path / "one", grow=tmp_path / "before")
    in_parts(second, tmp_path / "many", grow=tmp_path / "before")
    assert_same(tmp_path / "one", tmp_path / "many")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"k_core": {"user": 10_000}}, r"k_core: no row is left with \{'user': 10000\}"),
        ({"filter": "rating > 9"}, "filter 'rating > 9' leaves no row"),
        ({"labels": {"liked": "nullif(rating, 5) >= 4"}}, r"labels.liked: \d+ rows have no value"),
        ({"split": {"by": "time", "valid_from": "0", "test_from": "1"}}, "split: by time leaves no row for train"),
        ({"min_count": 10_000}, "no value occurs 10000 times in train"),
    ],
)
def test_mistakes_that_all_rows_show(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    plan = everything(events(tmp_path, 300)) | changes
    before = {*tmp_path.iterdir()}
    with pytest.raises(UserError, match=says):
        in_parts(plan, tmp_path / "many")
    with pytest.raises(UserError, match=says):
        run_import(plan, tmp_path / "one")
    assert {*tmp_path.iterdir()} == before


def test_lists_that_become_rows_are_numbered_over_all_files(tmp_path: Path) -> None:
    draw = random.Random(0)
    (tmp_path / "log").mkdir()
    for i in range(3):
        lists = [[draw.randrange(30) for _ in range(draw.randrange(6))] for _ in range(40)]
        pq.write_table(pa.table({"items": lists}), tmp_path / "log" / f"part-{i}.parquet", row_group_size=9)
    plan = {
        "log": {"path": str(tmp_path / "log"), "explode": {"column": "items", "row": "session", "place": "place"}},
        "user": "session",
        "time": "place",
        "columns": {"odd": "session % 7"},
        "split": {"by": "leave-last-out"},
        "histories": {"before": {"column": "items"}},
        "features": {"items": {"kind": "sparse"}, "odd": {"kind": "sparse"}, "before": {"kind": "sequence"}},
        "keep": ["session"],
    }
    run_import(plan, tmp_path / "one")
    in_parts(plan, tmp_path / "many", piece_bytes=100)
    assert_same(tmp_path / "one", tmp_path / "many")


def test_what_sees_other_pieces_is_refused(tmp_path: Path) -> None:
    plan = everything(events(tmp_path, 300)) | {"labels": {"more": 'row_number() over (order by "when") % 2'}}
    with pytest.raises(UserError, match=r"labels.more: .* has a window function, which sees rows of other pieces"):
        in_parts(plan, tmp_path / "many")


def test_a_value_of_another_type_is_told_with_its_file_and_line(tmp_path: Path) -> None:
    plan = everything(events(tmp_path, 300))
    with (tmp_path / "log" / "part-2.csv").open("a") as file:
        file.write("u1,i1,1700000000,great,tag,a|b\n")
    with pytest.raises(UserError, match=r"part-2.csv: line 102: column 'rating' is 'great', not of type float"):
        in_parts(plan, tmp_path / "many")


def test_mistakes_in_the_plan_are_told_before_anything_is_read(tmp_path: Path) -> None:
    plan = everything(events(tmp_path, 300))
    plan["features"]["half"] = {"kind": "sequence"}

    def never(what: str, *_: Any) -> list[Any]:
        raise AssertionError(what)

    with pytest.raises(UserError, match=r"features.half|column 'half' is DOUBLE"):
        import_in_parts(plan_of(plan), tmp_path / "many", never, memory=1 << 28, task_memory=1 << 28)


def test_what_tasks_exchange_lies_where_it_is_wanted_and_is_removed(tmp_path: Path) -> None:
    plan = everything(events(tmp_path, 300))
    seen = set()

    def looking(what: str, task: Any, job: Job, count: int) -> list[Any]:
        found = one_by_one(what, task, job, count)
        seen.update(path.parts[len(tmp_path.parts)] for path in tmp_path.rglob("*.parquet"))
        return found

    import_in_parts(
        plan_of(plan), tmp_path / "many", looking, memory=1 << 28, task_memory=1 << 28, work=tmp_path / "work"
    )
    assert "work" in seen
    assert [*(tmp_path / "work").iterdir()] == []
