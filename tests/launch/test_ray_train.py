"""Ray: the same losses as under our own launcher, workers that are killed, mistakes, jobs."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from faults.account import account, losses
from ranks import RankPool
from ray_runs import TwoNodes, main_worker, script
from runs import output, run_file, train

pytest.importorskip("ray", reason="ray is not installed (the extra `ray`)")

BIG = {"hidden_units": [768, 768], "dropout_rates": 0.0, "batch_norm": False}
SECTIONS: dict[str, Any] = {
    "model": BIG,
    "checkpoint": {"every_steps": 10},
    "train": {"epochs": 1, "log_every": 1, "trace_rows": True},
}


@pytest.fixture(scope="session")
def reference(pool: RankPool, launch_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run without Ray and without interruption."""
    path = run_file(tmp_path_factory.mktemp("reference"), launch_data, "DeepFM", **SECTIONS)
    pool.run(2, train, path)
    return path


def check_same(path: Path, reference: Path, tolerance: float = 1e-5) -> None:
    """Each row once, in the same batches, and the same losses."""
    found, wanted = account(output(path)), account(output(reference))
    assert found.compare(wanted) == (0, 0, 0)
    torch.testing.assert_close(losses(output(path)), losses(output(reference)), rtol=0, atol=tolerance)


def test_a_killed_worker_of_two_nodes(two_nodes: TwoNodes, launch_data: Path, reference: Path, tmp_path: Path) -> None:
    path = run_file(tmp_path, launch_data, "DeepFM", **SECTIONS)
    options = ["--num-workers", "2", "--placement", "STRICT_SPREAD"]
    run = script("ray_train", str(path), *options, address=two_nodes.address)
    run.wait_for("step 20: saved")
    os.kill(main_worker(run), signal.SIGKILL)
    assert run.wait() == 0, run.text
    assert run.saw("resumed at step"), run.text
    check_same(path, reference)
    # what Ray was told: metrics, and where the checkpoint lies, whose bytes it does not copy
    (snapshot,) = (output(path) / "ray").glob("*/checkpoint_manager_snapshot.json")
    told = json.loads(snapshot.read_text())["latest_checkpoint_result"]
    assert told["metrics"]["step"] == 94
    note = snapshot.parent / told["checkpoint_dir_name"]
    assert [file.name for file in note.iterdir()] == ["checkpoint.json"]
    assert Path(json.loads((note / "checkpoint.json").read_text())["path"]).name == "step-94"
