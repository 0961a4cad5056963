"""Batch prediction by Ray: the same as by our own launcher."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from rechub_dist.inference.predict import Prediction, predict_run
from rechub_tests.ranks import RankPool
from rechub_tests.ray_runs import TwoNodes, ray_command
from rechub_tests.runs import config_of, output, run_file, train

pytest.importorskip("ray", reason="ray is not installed (the extra `ray`)")


def predict(path: Path, wanted: Prediction) -> tuple[int, int]:
    return predict_run(config_of(path), wanted)


@pytest.mark.slow
def test_a_prediction_is_the_same(pool: RankPool, two_nodes: TwoNodes, launch_data: Path, tmp_path: Path) -> None:
    path = run_file(tmp_path, launch_data, "DeepFM", train={"epochs": 1})
    pool.run(2, train, path)
    config, data = str(output(path) / "config.yaml"), f"{launch_data}/test"
    pool.run(2, predict, path, Prediction(data, str(tmp_path / "ours"), keep=("user",)))
    options = ["--predict", data, "--out", str(tmp_path / "theirs"), "--keep", "user"]
    job = ray_command("train", config, "--num-workers", "2", *options, address=two_nodes.address)
    assert job.wait() == 0, job.text
    order = [("source_file", "ascending"), ("source_row", "ascending")]
    ours, theirs = (pq.read_table(tmp_path / who).sort_by(order) for who in ("ours", "theirs"))
    assert theirs.num_rows == 70
    assert theirs.drop_columns("predicted_click").equals(ours.drop_columns("predicted_click"))
    assert theirs["predicted_click"].to_pylist() == pytest.approx(ours["predicted_click"].to_pylist(), abs=1e-6)


def test_a_prediction_needs_a_place(launch_data: Path, tmp_path: Path) -> None:
    path = run_file(tmp_path, launch_data, "DeepFM")
    job = ray_command("train", str(path), "--predict", f"{launch_data}/test")
    assert job.wait() == 2
    assert job.text == "error: --predict: needs --out FOLDER, and cannot be combined with --evaluate\n"
