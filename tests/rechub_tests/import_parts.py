"""Compares two prepared folders that must hold the same; and an import with nearly all that a plan can say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pcsv
import pyarrow.parquet as pq
import pytest
import yaml


def stored(folder: Path) -> pa.Table:
    """The rows of a split's files, in order."""
    return pa.concat_tables([pq.read_table(file) for file in sorted(folder.glob("*.parquet"))])


def assert_same(left: Path, right: Path) -> None:
    """Assert that splits have the same rows in the same order, and that all else is the same, numbers to 1e-12."""
    folders = [{p.name for p in root.iterdir() if p.is_dir()} for root in (left, right)]
    assert folders[0] == folders[1]
    for name in sorted(folders[0] - {"_vocabularies"}):
        one, other = stored(left / name), stored(right / name)
        assert one.schema.equals(other.schema), (one.schema, other.schema)
        assert one.to_pylist() == other.to_pylist(), name
    for path in sorted((left / "_vocabularies").glob("*")):
        assert pq.read_table(path).equals(pq.read_table(right / "_vocabularies" / path.name)), path.name
    for name, read in (("dataset.yaml", yaml.safe_load), ("import.json", json.loads)):
        one, other = (flat(read((root / name).read_text())) for root in (left, right))
        assert one.keys() == other.keys(), name
        for key, value in one.items():
            same = pytest.approx(other[key], rel=1e-12) if isinstance(value, float) else other[key]
            assert value == same, f"{name}: {key}"
    assert (left / "plan.yaml").read_text() == (right / "plan.yaml").read_text()


def flat(tree: object, where: str = "") -> dict[str, object]:
    """The leaves of a tree by their paths."""
    if isinstance(tree, dict):
        return {k: v for name, one in tree.items() for k, v in flat(one, f"{where}/{name}").items()}
    if isinstance(tree, list):
        return {k: v for i, one in enumerate(tree) for k, v in flat(one, f"{where}/{i}").items()}
    return {where: tree}


def events(folder: Path, rows: int, seed: int = 0) -> dict[str, Any]:
    """Write a log like one of films in three files, and tables of users and items; returns the sources of a plan."""
    rng = np.random.default_rng(seed)
    users, items = max(rows // 30, 4), max(rows // 100, 12)
    log = pa.table(
        {
            "user": pa.array([f"u{n}" for n in rng.integers(0, users, rows)]),
            "item": pa.array([f"i{n}" for n in (items * rng.random(rows) ** 2).astype(int)]),
            "when": np.sort(rng.integers(1_700_000_000, 1_700_000_000 + rows // 3, rows)),
            "rating": rng.integers(1, 11, rows) / 2,
            "tag": pa.array([["new", "old", "", "it's"][n] for n in rng.integers(0, 4, rows)]),
            "words": pa.array([["a|b", "b", "", "c|a|d"][n] for n in rng.integers(0, 4, rows)]),
        }
    )
    (folder / "log").mkdir()
    for i, begin in enumerate(range(0, rows, -(-rows // 3)), 1):
        pcsv.write_csv(log.slice(begin, -(-rows // 3)), folder / "log" / f"part-{i}.csv", _BARE)
    ages = pa.table({"user": [f"u{n}" for n in range(users)], "age": rng.integers(15, 80, users)})
    pq.write_table(ages.slice(1), folder / "users.parquet")
    prices = {"price": rng.random(items) * 50, "kind": [f"kind {n % 7}" for n in range(items)]}
    pcsv.write_csv(pa.table({"item": [f"i{n}" for n in range(items)], **prices}), folder / "items.csv", _BARE)
    types = {"user": "string", "item": "string", "when": "integer", "rating": "float"}
    return {
        "log": {"path": str(folder / "log"), "columns": types},
        "tables": {
            "users": {"path": str(folder / "users.parquet"), "key": "user"},
            "items": {"path": str(folder / "items.csv"), "key": "item"},
        },
    }


_BARE = pcsv.WriteOptions(quoting_style="needed")


def everything(sources: dict[str, Any]) -> dict[str, Any]:
    """A plan for `events` with nearly all that a plan can say."""
    return sources | {
        "name": "films",
        "user": "user",
        "item": "item",
        "time": "when",
        "filter": "rating > 0.5",
        "k_core": {"user": 3, "item": 2},
        "split": {"by": "time", "valid": 0.1, "test": 0.1},
        "labels": {"liked": "rating >= 4"},
        "weight": "1 + coalesce(length(words), 0)",
        "columns": {"half": "length(tag) / 2"},
        "histories": {
            "seen": {"column": "item", "max_length": 10, "also": {"times": "when", "tags": "tag"}},
            "good": {"column": "item", "where": "rating >= 4"},
        },
        "derive": {
            "genres": {"kind": "split", "column": "words", "by": "|"},
            "again": {"kind": "overlap", "left": "item", "right": "seen"},
            "hour": {"kind": "hour", "column": "when"},
        },
        "features": {
            "user": {"kind": "sparse"},
            "item": {"kind": "sparse"},
            "kind": {"kind": "sparse"},
            "genres": {"kind": "sparse", "pooling": "mean"},
            "hour": {"kind": "sparse"},
            "price": {"kind": "dense", "transform": "log"},
            "age": {"kind": "sparse", "quantiles": 5},
            "half": {"kind": "dense"},
            "again": {"kind": "dense"},
            "seen": {"kind": "sequence"},
            "good": {"kind": "sequence"},
            "tags": {"kind": "sequence"},
            "gap": {"kind": "time_gap", "times": "times", "now": "when", "boundaries": [60, 3600], "max_length": 10},
        },
        "keep": ["user", "when"],
        "items": True,
        "now": True,
    }
