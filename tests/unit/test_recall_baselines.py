"""benchmarks/recall_baselines.py against plain loops, and its ranks against those of our evaluation."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rechub_dist.data.prepare.sequences import Sequences, leave_one_out, write_sequences
from rechub_dist.embedded import Jagged
from rechub_dist.errors import UserError
from rechub_dist.metrics.ranking import Catalogue, ranking_metrics
from rechub_dist.metrics.ranking import target_ranks as evaluation_ranks

PATH = Path(__file__).parents[2] / "benchmarks" / "recall_baselines.py"
ITEMS = 6


@pytest.fixture(scope="module")
def bench() -> Any:
    spec = importlib.util.spec_from_file_location("recall_baselines", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def rows_of(bench: Any, histories: list[list[int]], items: list[int]) -> Any:
    flat = np.array([item for history in histories for item in history], np.int32)
    return bench.Rows(flat, np.array([len(history) for history in histories]), np.array(items, np.int32))


lists = st.lists(st.lists(st.integers(0, ITEMS - 1), min_size=1, max_size=6), min_size=1, max_size=8)


def cosines(rows: list[list[int]], neighbours: int) -> list[list[float]]:
    """sim(i, j), 0 for an item with itself and with those that are not among the nearest of i."""
    sets = [{row for row, items in enumerate(rows) if item in items} for item in range(ITEMS)]
    similar = [[0.0] * ITEMS for _ in range(ITEMS)]
    for i in range(ITEMS):
        for j in range(ITEMS):
            both = len(sets[i] & sets[j])
            if i != j and both:
                similar[i][j] = both / math.sqrt(len(sets[i]) * len(sets[j]))
        if neighbours:
            least = sorted(similar[i], reverse=True)[neighbours - 1] - 1e-8
            similar[i] = [value if value >= least else 0.0 for value in similar[i]]
    return similar


@given(lists, lists, st.integers(0, 3), st.integers(1, 4))
@settings(max_examples=100, deadline=None)
def test_item_knn(bench: Any, train: list[list[int]], asked: list[list[int]], neighbours: int, last: int) -> None:
    train = [[*items, 0] for items in train]  # the last one is the row's item
    learned = rows_of(bench, [items[:-1] for items in train], [items[-1] for items in train])
    model = bench.ItemKNN(learned.sets(ITEMS, with_item=True), neighbours, last)
    found = model.scores(rows_of(bench, asked, [0] * len(asked)))
    similar = cosines(train, neighbours)
    expected = [[sum(similar[j][i] for j in set(history[-last:])) for i in range(ITEMS)] for history in asked]
    np.testing.assert_allclose(found, expected, atol=1e-8)


def test_item_knn_in_small_blocks_is_the_same(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    train = rows_of(bench, random.integers(0, ITEMS, (20, 3)).tolist(), random.integers(0, ITEMS, 20).tolist())
    whole = bench.ItemKNN(train.sets(ITEMS), 2, 3).similar.toarray()
    assert (np.diag(whole) == 0).all()
    assert (whole > 0).any(axis=1).all()
    monkeypatch.setattr(bench, "SCORES_AT_ONCE", 1)
    np.testing.assert_array_equal(bench.ItemKNN(train.sets(ITEMS), 2, 3).similar.toarray(), whole)


def test_equal_sums_tie(bench: Any) -> None:
    """0 and 1 gather the same three similarities, which added in another order would differ in the last digit."""
    similar = np.zeros((ITEMS, ITEMS))
    similar[2:5, 0] = (0.1, 0.2, 0.3)
    similar[2:5, 1] = (0.3, 0.2, 0.1)
    assert (0.1 + 0.2) + 0.3 != (0.3 + 0.2) + 0.1
    model = bench.ItemKNN.__new__(bench.ItemKNN)
    model.last, model.similar = 5, bench.sparse.csr_matrix(similar)
    asked = rows_of(bench, [[2, 3, 4]], [0])
    assert bench.target_ranks(model.scores(asked), asked, exclude_seen=True).tolist() == [0.5]


@given(st.lists(st.integers(0, 3), min_size=ITEMS, max_size=ITEMS), lists, st.booleans(), st.integers(0, ITEMS - 1))
@settings(max_examples=100, deadline=None)
def test_ranks_are_those_of_our_evaluation(
    bench: Any, counts: list[int], histories: list[list[int]], exclude_seen: bool, target: int
) -> None:
    targets = [(target + row) % ITEMS for row in range(len(histories))]
    rows = rows_of(bench, histories, targets)
    scores = bench.Popularity(np.array(counts)).scores(rows)
    found = bench.target_ranks(scores, rows, exclude_seen=exclude_seen)
    n = len(histories)
    expected = evaluation_ranks(
        torch.ones(n, 1, 1),
        torch.ones(n, 1, dtype=torch.bool),
        Catalogue.whole(torch.tensor(counts, dtype=torch.float32)[:, None]),
        torch.tensor(targets),
        Jagged(torch.from_numpy(rows.history).long(), torch.from_numpy(rows.lengths)) if exclude_seen else None,
    )
    assert found.tolist() == expected.tolist()


def prepared(folder: Path, users: list[list[int]], max_length: int = 3) -> Path:
    folder.mkdir()
    flat = np.array([item for items in users for item in items], np.int32)
    sequences = Sequences(flat, np.array([len(items) for items in users], np.int64))
    write_sequences(folder, "small", sequences, leave_one_out(sequences), items=ITEMS, max_length=max_length)
    return folder


USERS = [[0, 1, 2, 3, 4, 5], [0, 1, 5, 2, 0], [1, 1, 2, 4], [5, 4, 3]]


@pytest.mark.parametrize("exclude_seen", [True, False])
@pytest.mark.parametrize("at_once", [1, 1 << 22])
def test_from_a_prepared_folder(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exclude_seen: bool, at_once: int
) -> None:
    """Popularity counts train rows alone, whole; histories of the ranked rows are cut to the schema's length."""
    folder = prepared(tmp_path / "data", USERS)
    monkeypatch.setattr(bench, "SCORES_AT_ONCE", at_once)
    monkeypatch.setattr(bench, "READ_ROWS", 2)
    models = bench.learn(folder / "train", ITEMS, 0, 20)
    counts = [2, 4, 1, 1, 0, 1]  # of 0 1 2 3, 0 1 5 and 1 1: test and valid items are not among them
    assert models["popularity"].counts.tolist() == counts
    found = bench.evaluate(models["popularity"], bench.read(folder / "test", 3), ITEMS, exclude_seen=exclude_seen)
    expected = []
    for user in USERS:
        history, target = user[:-1][-3:], user[-1]
        rivals = [i for i in range(ITEMS) if i != target and not (exclude_seen and i in history)]
        ahead = sum(counts[i] > counts[target] for i in rivals)
        expected.append(ahead + 0.5 * sum(counts[i] == counts[target] for i in rivals))
    assert found.tolist() == expected


def test_command(bench: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = prepared(tmp_path / "data", USERS)
    bench.main(folder, "valid", exclude_seen=False, neighbours=0, last=2, top_k=[4])
    printed = capsys.readouterr().out
    models = bench.learn(folder / "train", ITEMS, 0, 2)
    assert "data, valid, 6 items, seen items kept" in printed
    assert "4 rows" in printed
    shown = [line.strip("│ ").split("│") for line in printed.splitlines() if line.startswith("│")]
    assert len(shown) == len(models) == 2
    for (name, model), cells in zip(models.items(), shown, strict=True):
        ranks = bench.evaluate(model, bench.read(folder / "valid", 3), ITEMS, exclude_seen=False)
        found = ranking_metrics(torch.from_numpy(ranks), [4])
        assert 0 < found["ndcg@4"] < 1
        expected = [name, *(f"{found[metric]:.4f}" for metric in ("hit_rate@4", "ndcg@4", "mrr@4"))]
        assert [cell.strip() for cell in cells] == expected


def test_folder_of_something_else_is_refused(bench: Any, tmp_path: Path) -> None:
    text = "name: x\nfeatures:\n  history: {kind: dense}\n  item: {kind: sparse, rows: 2}\n"
    (tmp_path / "dataset.yaml").write_text(text)
    pq.write_table(pa.table({"x": [1]}), tmp_path / "x.parquet")
    with pytest.raises(UserError, match="history must be a sequence"):
        bench.main(tmp_path)
