"""Calibrated probabilities: the same by evaluate, predict, the Python way in and a bundle, on any number of ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from rechub_dist.checkpoint.trained import trained_config
from rechub_dist.errors import UserError
from rechub_dist.evaluation.evaluate import evaluate_run
from rechub_dist.inference.bundle.bundle import Bundle
from rechub_dist.inference.check import as_values, check_bundle
from rechub_dist.inference.export import export_bundle
from rechub_dist.inference.run import load
from rechub_dist.metrics.binary import binary_metrics
from rechub_tests.ranks import RankPool
from rechub_tests.representatives import slow
from rechub_tests.runs import output, records, run_file, train, write_data


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_data(root, 1500)
    return root


def evaluated(out: str, data: str, settings: list[str]) -> dict[str, float]:
    return evaluate_run(trained_config(out, settings), data)[1].metrics


@pytest.mark.parametrize("method", ["temperature", slow("isotonic")])
def test_every_way_says_the_same(pool: RankPool, data: Path, tmp_path: Path, method: str) -> None:
    path = run_file(tmp_path, data, "DeepFM")
    pool.run(1, train, path)
    out, calibrated = str(output(path)), [f"evaluation.calibration={method}"]
    plain = load(out)
    run = load(out, settings=calibrated)
    before, after = (one.predict(data / "valid") for one in (plain, run))
    (column,) = [name for name in before.column_names if name.startswith("predicted_")]
    p, q = before[column].to_numpy(), after[column].to_numpy()
    assert not np.allclose(p, q, atol=1e-4)
    order = np.argsort(p)
    assert (np.diff(q[order]) >= -1e-7).all()
    # on the rows that it was fitted on one number loses nothing; a curve may, between the middles of its steps
    y = pq.read_table(data / "valid")[column.removeprefix("predicted_")].to_numpy()
    assert binary_metrics(q, y)["log_loss"] <= binary_metrics(p, y)["log_loss"] + (
        1e-6 if method == "temperature" else 0.02
    )
    one, two = (pool.run(ranks, evaluated, out, str(data / "test"), calibrated)[-1] for ranks in (1, 2))
    assert two == pytest.approx(one, abs=1e-6)
    wanted = pq.read_table(data / "test")[column.removeprefix("predicted_")].to_numpy()
    mine = binary_metrics(run.predict(data / "test")[column].to_numpy(), wanted)
    assert one["log_loss"] == pytest.approx(mine["log_loss"], abs=1e-6)
    export_bundle(out, tmp_path / "bundle", overrides=calibrated)
    bundle = Bundle(tmp_path / "bundle")
    assert check_bundle(run, bundle, str(data / "test")).differences[column] < 1e-5
    rows = as_values(pq.read_table(data / "test"), bundle.schema)
    uncalibrated = plain.predict(data / "test")[column].to_numpy()
    assert not np.allclose(bundle.score(rows)[column].to_numpy(), uncalibrated, atol=1e-4)


def test_the_final_test_is_calibrated_and_none_before(pool: RankPool, data: Path, tmp_path: Path) -> None:
    plain, calibrated = (run_file(tmp_path / name, data, "MMoE") for name in ("plain", "calibrated"))
    pool.run(1, train, plain)
    pool.run(1, train, calibrated, ["evaluation.calibration=temperature"])
    one, other = ({split: records(path, split)[-1] for split in ("valid", "test")} for path in (plain, calibrated))
    names = [name for name in one["test"] if name.endswith("/log_loss")]
    assert names
    for name in names:
        assert one["valid"][name] == other["valid"][name]
        assert one["test"][name] != other["test"][name]
        auc = name.replace("log_loss", "auc")
        assert one["test"][auc] == pytest.approx(other["test"][auc], abs=1e-6)


def test_what_cannot_be_calibrated_is_told(pool: RankPool, data: Path, tmp_path: Path) -> None:
    path = run_file(tmp_path, data, "SASRec")
    pool.run(1, train, path)
    with pytest.raises(UserError, match="SASRec predicts no probability to calibrate"):
        load(output(path), settings=["evaluation.calibration=isotonic"])
