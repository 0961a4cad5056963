"""Strings as ids on several ranks: by a vocabulary, and hashed; and what a vocabulary that was changed leads to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rechub_dist.data.run_file import load_run
from rechub_dist.errors import UserError
from rechub_dist.evaluation.evaluate import evaluate_run
from rechub_tests.ranks import RankPool
from rechub_tests.runs import losses, run_file, train, write_data

ITEMS = 61


def with_words(root: Path, *, dictionary: bool = False) -> Path:
    """The data with strings for items, alone and in lists."""
    write_data(root)
    for part in root.glob("*/*.parquet"):
        table = pq.read_table(part)
        words = pa.array([f"item {i}" for i in table["item"].to_pylist()])
        lists = [row and [f"item {i}" for i in row] for row in table["history"].to_pylist()]
        columns = {"item": words.dictionary_encode() if dictionary else words, "history": pa.array(lists)}
        for name, column in columns.items():
            table = table.set_column(table.column_names.index(name), name, column)
        pq.write_table(table, part, row_group_size=70)
    return root


def vocabulary(path: Path, ids: Any) -> str:
    pq.write_table(pa.table({"value": [f"item {i}" for i in range(ITEMS)], "id": ids}), path)
    return str(path)


def features(**how: Any) -> dict[str, Any]:
    return {
        "item": {"kind": "sparse", "table": "item", **how},
        "history": {"kind": "sequence", "table": "item", "max_length": 6, **how},
    }


def evaluated(path: Path, overrides: list[str]) -> dict[str, float]:
    config = load_run(path, overrides)
    return evaluate_run(config, f"{config.data.root}/test")[1].metrics


def test_words_are_the_ids_that_their_vocabulary_gives(pool: RankPool, data_root: Path, tmp_path: Path) -> None:
    numbers = run_file(tmp_path / "numbers", data_root, "DeepFM")
    pool.run(2, train, numbers)
    root = with_words(tmp_path / "data")
    words = vocabulary(tmp_path / "words.parquet", np.arange(ITEMS))
    path = run_file(tmp_path / "words", root, "DeepFM", data={"features": features(vocabulary=words)})
    pool.run(2, train, path)
    assert losses(path) == losses(numbers)

    assert pool.run(2, evaluated, path, []) == pool.run(2, evaluated, numbers, [])
    other = vocabulary(tmp_path / "other.parquet", np.roll(np.arange(ITEMS), 1))
    changes = [f"data.features.{name}.vocabulary={other}" for name in ("item", "history")]
    with pytest.raises(UserError, match=r"vocabulary of feature '(item|history)' is not the one .* trained with"):
        pool.run(2, evaluated, path, changes)


def test_hashed_words(pool: RankPool, tmp_path: Path) -> None:
    """Whether a column is dictionary-encoded, and how many ranks there are, is of no matter."""
    found = []
    for ranks, dictionary in ((1, True), (3, False)):
        root = with_words(tmp_path / f"data-{dictionary}", dictionary=dictionary)
        data = {"root": str(root), "features": features(hash=True)}
        path = run_file(tmp_path / f"run-{dictionary}", root, "DeepFM", data=data)
        pool.run(ranks, train, path)
        found.append(losses(path))
    np.testing.assert_allclose(found[0], found[1], rtol=0, atol=1e-4)
