"""A run that is loaded on to a device predicts there what it predicts on CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

import rechub_dist
from rechub_tests.runs import run_file


@pytest.mark.parametrize(("model", "column"), [("DeepFM", "predicted_click"), ("DSSM", "predicted_scores")])
def test_predictions(device: Any, data_root: Path, tmp_path: Path, model: str, column: str) -> None:
    done = rechub_dist.train(run_file(tmp_path, data_root, model), {"device": "cpu", "train.epochs": 1})
    rows = pq.read_table(data_root / "test")
    found, expected = (done.load(where).predict(rows)[column].combine_chunks() for where in (device, "cpu"))
    flat = [array.flatten() if column == "predicted_scores" else array for array in (found, expected)]
    np.testing.assert_allclose(*(array.to_numpy() for array in flat), rtol=1e-4, atol=1e-5)
    if model == "DSSM":
        run = done.load(device)
        assert len(run.vectors("item")) == 61
        assert len(run.vectors("user", rows)) == rows.num_rows
    assert done.load(device).evaluate(data_root / "test")["rows"] == rows.num_rows
