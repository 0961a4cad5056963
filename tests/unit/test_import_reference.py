"""Imports of random tables by random plans, against the same in plain Python, row by row."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from rechub_dist.errors import UserError
from rechub_tests.import_cases import (
    SQL,
    TYPES,
    random_log,
    random_plan,
    random_tables,
    run_import,
    split_of,
    write_rows,
)
from rechub_tests.importing import NothingLeftError, Reference, imported
from rechub_tests.representatives import slow

SEEDS = [*range(8), *map(slow, (*range(8, 70), 116, 125, 129))]


@pytest.mark.parametrize("seed", SEEDS)
def test_every_row_is_as_in_plain_python(seed: int, tmp_path: Path) -> None:
    draw = random.Random(seed)
    time = draw.choice(["integer", "float", "timestamp", "date"])
    log, tables = random_log(draw, draw.choice([30, 200]), time), random_tables(draw)
    plan = random_plan(draw, time, len(log))
    types = TYPES | {"when": time, "id": "integer"}
    plan["log"] = write_rows(draw, log, tmp_path, "log", types)
    for name, rows in tables.items():
        plan["tables"][name] |= write_rows(draw, rows, tmp_path, name, types)
    try:
        expected = imported(plan, log, tables, SQL)
    except NothingLeftError:
        with pytest.raises(UserError):
            run_import(plan, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return
    found = run_import(plan, tmp_path / "out")
    compare(tmp_path / "out", plan, expected)
    assert found.rows == {split: len(rows) for split, rows in expected.rows.items()}
    assert found.read == len(log)


def compare(out: Path, plan: dict[str, Any], expected: Reference) -> None:
    for split, rows in expected.rows.items():
        stored = split_of(out, split)
        assert len(stored) == len(rows), split
        for number, (left, right) in enumerate(zip(stored, rows, strict=True)):
            assert left == right, f"{split} {number}"
    assert {path.name for path in out.iterdir() if path.is_dir()} == {*expected.rows, "_vocabularies"}
    for table, entries in expected.vocabularies.items():
        read = pq.read_table(out / "_vocabularies" / f"{table}.parquet").to_pylist()
        assert [(row["value"], row["id"], row["count"]) for row in read] == entries, table
    schema = yaml.safe_load((out / "dataset.yaml").read_text())
    for name, label in plan["labels"].items():
        if isinstance(label, dict):
            assert {key: schema["labels"][name].get(key) for key in ("type", "classes")} == {
                "type": label["type"],
                "classes": label.get("classes"),
            }
    for name, (mean, deviation) in expected.moments.items():
        feature = schema["features"][name]
        if plan["features"][name].get("standardize", True):
            assert feature.get("mean", 0.0) == pytest.approx(mean, rel=1e-9, abs=1e-12), name
            assert feature.get("std", 1.0) == pytest.approx(deviation, rel=1e-9), name
    for name, boundaries in expected.boundaries.items():
        column = schema["features"][name].get("column", name)
        assert schema["derive"][column]["boundaries"] == boundaries, name
