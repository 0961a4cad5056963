"""The generated data set, and the truth that it knows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import log_loss, roc_auc_score

from rechub_dist.data.prepare.synthetic import _World, synthesize
from rechub_dist.data.prepare.writer import (
    ROW_GROUP,
    SPLITS,
)
from rechub_dist.errors import UserError
from rechub_tests.prepared import ROOT, check_prepared, column, digest, rows


def test_synthetic_schema_is_the_committed_one(tmp_path: Path) -> None:
    synthesize(tmp_path / "out", 10)
    committed = ROOT / "configs" / "datasets" / "synthetic.yaml"
    assert (tmp_path / "out" / "dataset.yaml").read_text() == committed.read_text()


def test_synthetic_truth_agrees_with_the_rows(tmp_path: Path) -> None:
    out = tmp_path / "out"
    size = 90_000
    synthesize(out, size, dense=3, sparse=5, vocabulary=50, sequence=True, labels=2, seed=3, files=3)
    check_prepared(out)
    assert [rows(out, split).num_rows for split in SPLITS] == [72_000, 9_000, 9_000]
    assert len(list((out / "train").iterdir())) == 3
    truth = json.loads((out / "truth.json").read_text())
    world = _World(dense=3, sparse=5, vocabulary=50, sequence=True, skew=1.05, seed=3, labels=2)
    for number, split in enumerate(SPLITS):
        table = rows(out, split)
        random = np.random.default_rng([3, number, 0])
        sample = world.sample(random, min(ROW_GROUP, table.num_rows))
        for name, probability in world.probabilities(sample):
            label = column(table, name)
            assert truth[split][name]["rows"] == table.num_rows
            assert truth[split][name]["positive_rate"] == pytest.approx(label.mean())
            assert label.mean() == pytest.approx(0.25, abs=0.03)
            if table.num_rows > ROW_GROUP:
                continue
            rate = label.mean()
            entropy = -(rate * np.log(rate) + (1 - rate) * np.log(1 - rate))
            assert truth[split][name]["auc"] == pytest.approx(roc_auc_score(label, probability), abs=1e-5)
            assert truth[split][name]["log_loss"] == pytest.approx(log_loss(label, probability), rel=1e-9)
            assert truth[split][name]["normalized_entropy"] == pytest.approx(log_loss(label, probability) / entropy)
            assert 0.78 < truth[split][name]["auc"] < 0.88


def test_synthetic_depends_on_the_seed_and_not_on_the_files(tmp_path: Path) -> None:
    def make(name: str, **options: Any) -> Path:
        synthesize(tmp_path / name, 2000, dense=2, sparse=3, vocabulary=20, **options)
        return tmp_path / name

    one, again, other, files = make("a"), make("b"), make("c", seed=1), make("d", files=7)
    assert digest(one) == digest(again)
    assert len(list((files / "train").iterdir())) == 7
    for split in SPLITS:
        assert rows(one, split).equals(rows(files, split))
        assert not rows(one, split).equals(rows(other, split))
    assert (one / "truth.json").read_text() == (files / "truth.json").read_text()


def test_synthetic_ids_follow_a_power_law(tmp_path: Path) -> None:
    synthesize(tmp_path / "skewed", 50_000, dense=0, sparse=1, vocabulary=1000)
    synthesize(tmp_path / "uniform", 50_000, dense=0, sparse=1, vocabulary=1000, skew=0)
    skewed, uniform = (
        np.sort(np.bincount(column(rows(tmp_path / name, "train"), "sparse_0"), minlength=1000))[::-1]
        for name in ("skewed", "uniform")
    )
    assert skewed[0] > 0.1 * skewed.sum()
    assert skewed[0] == pytest.approx(4 * skewed[4], rel=0.5)
    assert uniform[0] < 2 * uniform.mean()
    assert (uniform > 0).all()


def test_synthetic_with_a_vocabulary_beyond_memory(tmp_path: Path) -> None:
    synthesize(tmp_path / "out", 100, dense=0, sparse=2, vocabulary=2**31 - 1, sequence=True)
    check_prepared(tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": 3}, "rows is 3, must be at least 10"),
        ({"vocabulary": 2**31}, "vocabulary is 2147483648"),
        ({"skew": -1.0}, "skew is -1.0"),
        ({"dense": 0, "sparse": 0}, "nothing to learn"),
    ],
)
def test_synthetic_bad_arguments(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        synthesize(tmp_path / "out", **{"rows": 100, **options})
    assert not (tmp_path / "out").exists()
