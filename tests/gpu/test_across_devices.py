"""A checkpoint knows no device: what one saves the other loads, bit by bit, and trains on from."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rechub_dist.checkpoint.state import train_state
from rechub_dist.checkpoint.tensors import as_matrix
from rechub_dist.data.run_file import load_run
from rechub_dist.distributed.runtime import device_type, runtime
from rechub_dist.training.trainer import Trainer
from rechub_tests.ranks import RankPool
from rechub_tests.runs import done_steps, last_checkpoint, losses, output, run_file, train, wait_for

TESTS = Path(__file__).parents[1]
WAYS = [
    ("cpu", "cpu"),
    *(pytest.param(*way, marks=pytest.mark.gpu) for way in (("cuda", "cpu"), ("cpu", "cuda"), ("cuda", "cuda"))),
]


def loaded_state(path: Path, device: str) -> dict[str, list[tuple[int, int, Tensor]]]:
    """The live state of a run that goes on from its newest checkpoint: pieces with their first row and column."""
    config = load_run(path, [f"device={device}"])
    with runtime(device_type(config.device), 60) as rt:
        trainer = Trainer(config, rt)
        state = train_state(trainer.module, trainer.parts.layout, trainer.optimizers)
        found = {
            key: [(piece.row, piece.column, piece.values.detach().cpu().clone()) for piece in entry.pieces]
            for key, entry in state.items()
        }
        trainer.checkpoints.close(60)
        trainer.report.close()
        return found


@pytest.mark.parametrize(("saved_on", "loaded_on"), WAYS)
@pytest.mark.parametrize(
    ("model", "sharding", "optimizer"),
    [("DeepFM", "row_wise", "rowwise_adagrad"), ("DIN", "table_wise", "adagrad"), ("MMoE", "replicated", "adam")],
)
def test_loaded_bit_by_bit(
    pool: RankPool,
    data_root: Path,
    tmp_path: Path,
    saved_on: str,
    loaded_on: str,
    model: str,
    sharding: str,
    optimizer: str,
) -> None:
    embedding = {"sharding": sharding, "optimizer": {"name": optimizer, "lr": 0.02}}
    path = run_file(tmp_path, data_root, model, embedding=embedding, train={"epochs": 1, "max_steps": 8})
    pool.run(1, train, path, [f"device={saved_on}"])
    saved = last_checkpoint(path)
    [loaded] = pool.run(1, loaded_state, path, loaded_on)
    assert loaded.keys() == saved.keys()
    assert any(key.startswith("tables/") and not key.endswith("weight") for key in saved)
    for key, pieces in loaded.items():
        whole = as_matrix(saved[key])
        for row, column, values in pieces:
            rows, columns = values.shape
            assert torch.equal(values, whole[row : row + rows, column : column + columns]), key
        assert sum(values.numel() for _, _, values in pieces) == whole.numel(), key


@pytest.mark.parametrize(("first", "second"), WAYS)
def test_goes_on_elsewhere(pool: RankPool, data_root: Path, tmp_path: Path, first: str, second: str) -> None:
    more: dict[str, Any] = {"data": {"valid": None, "test": None}, "optimizer": {"name": "adam", "lr": 0.002}}
    whole, moved = (run_file(tmp_path / name, data_root, "DIN", **more) for name in ("whole", "moved"))
    pool.run(1, train, whole, ["device=cpu"])
    pool.run(1, train, moved, [f"device={first}", "train.max_steps=11"])
    pool.run(1, train, moved, [f"device={second}"])
    assert len(losses(moved)) == 18
    torch.testing.assert_close(losses(moved), losses(whole), rtol=0, atol=1e-5)


def start_alone(path: Path) -> subprocess.Popen[str]:
    """The run in a process of its own, in a process group of its own."""
    code = "import sys; from pathlib import Path; from rechub_tests.runs import train; train(Path(sys.argv[1]))"
    paths = [str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")]
    return subprocess.Popen(
        [sys.executable, "-c", code, str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
    )


@pytest.mark.slow
@pytest.mark.parametrize("model", ["DeepFM", "SASRec"])
def test_killed_and_started_again(pool: RankPool, data_root: Path, tmp_path: Path, device: str, model: str) -> None:
    """SIGKILL between two checkpoints, the same command again: to the bit the losses of a run that was left alone."""
    steps = {"epochs": 8, "log_every": 1, "eval_every": 30}
    whole, killed = (
        run_file(tmp_path / name, data_root, model, device=device, train=steps, checkpoint={"every_steps": 10})
        for name in ("whole", "killed")
    )
    pool.run(1, train, whole)
    process = start_alone(killed)
    wait_for(process, lambda: done_steps(killed) >= 25)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run was over before the signal"
    assert list((output(killed) / "checkpoints").glob("step-*"))
    process = start_alone(killed)
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 0, said
    assert len(losses(whole)) == 72
    assert losses(killed) == losses(whole)
