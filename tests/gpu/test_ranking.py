"""Evaluation and prediction on the device, by weights that were trained on CPU: what CPU says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from rechub_dist.data.run_file import load_run
from rechub_dist.evaluation.evaluate import evaluate_run
from rechub_dist.inference.predict import Prediction, predict_run
from rechub_tests.items import ITEMS, several_features, write_items
from rechub_tests.ranks import RankPool
from rechub_tests.runs import run_file, train, write_data

CASES = ["DSSM", "YoutubeDNN", "SASRec", "MIND", "FacebookDSSM", "further features", "DIN", "MMoE"]


def evaluation(path: Path, device: str) -> dict[str, float]:
    """The metrics of the run's best checkpoint on the test split."""
    config = load_run(path, [f"device={device}"])
    return evaluate_run(config, f"{config.data.root}/test")[1].metrics


def predict(path: Path, device: str, out: str) -> tuple[int, int]:
    """Predict the test split."""
    config = load_run(path, [f"device={device}"])
    return predict_run(config, Prediction(f"{config.data.root}/test", out, keep=("user",), top_k=7))


def rows_of(out: str) -> dict[str, list[Any]]:
    table = pq.read_table(out)
    return table.sort_by([("source_file", "ascending"), ("source_row", "ascending")]).to_pydict()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("items") / "data"
    write_data(found)
    write_items(found, np.random.default_rng(5).permutation(ITEMS))
    return found


@pytest.mark.parametrize(
    ("device", "model"),
    [("cpu", "further features"), *(pytest.param("cuda", model, marks=pytest.mark.gpu) for model in CASES)],
)
def test_as_on_cpu(pool: RankPool, root: Path, tmp_path: Path, device: str, model: str) -> None:
    path = several_features(tmp_path, root) if model == "further features" else run_file(tmp_path, root, model)
    [trained] = pool.run(1, train, path, ["device=cpu"])
    [metrics] = pool.run(1, evaluation, path, device)
    assert metrics == pytest.approx(trained.test, abs=1e-5, nan_ok=True)
    said = {}
    for place in ("cpu", device):
        out = str(tmp_path / f"predicted-{len(said)}")
        assert pool.run(1, predict, path, place, out) == [(trained.best_step, 70)]
        said[len(said)] = rows_of(out)
    expected, found = said[0], said[1]
    assert expected.keys() == found.keys()
    for name in expected:
        if name == "predicted_items":  # those of equal scores stand in any order
            assert [len(items) for items in found[name]] == [len(items) for items in expected[name]]
            same = [len({*a} & {*b}) for a, b in zip(found[name], expected[name], strict=True)]
            assert sum(same) >= 0.99 * sum(map(len, expected[name]))
        elif name.startswith("predicted_"):
            flat = [np.concatenate([np.atleast_1d(row) for row in said[i][name]]) for i in (0, 1)]
            np.testing.assert_allclose(flat[1], flat[0], rtol=1e-4, atol=1e-5)
        else:
            assert found[name] == expected[name]
