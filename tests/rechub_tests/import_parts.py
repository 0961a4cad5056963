"""Compares two prepared folders that must hold the same."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
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
