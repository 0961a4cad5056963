"""What a run learns beside its weights, and its learning rates, are curves of TensorBoard."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rechub_tests.ranks import RankPool
from rechub_tests.runs import last_checkpoint, output, run_file, train

STEPS = [2, 4, 6]


def curves(pool: RankPool, root: Path, folder: Path, model: str, **sections: Any) -> dict[str, list[float]]:
    """The scalars of a run of six steps on two ranks, by name, and what its last checkpoint has of the objective."""
    path = run_file(folder, root, model, **{"train": {"max_steps": 6, "log_every": 2}, **sections})
    pool.run(2, train, path)
    board = EventAccumulator(str(output(path) / "tensorboard"))
    board.Reload()
    names = [name for name in board.Tags()["scalars"] if name.startswith("train/")]
    for name in names:
        assert [event.step for event in board.Scalars(name)] == STEPS
    found = {name.removeprefix("train/"): [event.value for event in board.Scalars(name)] for name in names}
    learnt = {key: value for key, value in last_checkpoint(path).items() if key.startswith("dense/objective/")}
    return found | {key: value.reshape(-1).tolist() for key, value in learnt.items()}


def test_a_learnt_temperature(pool: RankPool, data_root: Path, tmp_path: Path) -> None:
    objective = {"name": "retrieval", "temperature": "learn", "loss": "softmax", "negatives": "in_batch"}
    found = curves(pool, data_root, tmp_path, "DSSM", objective=objective)
    [last] = found["dense/objective/_temperature.log_value"]
    assert found["temperature"][-1] == pytest.approx(math.exp(last))
    assert len(set(found["temperature"])) == 3


@pytest.mark.parametrize("name", ["uncertainty", "gradnorm", "pareto", "pcgrad", "fixed"])
def test_weights_of_labels(pool: RankPool, data_root: Path, tmp_path: Path, name: str) -> None:
    found = curves(pool, data_root, tmp_path, "MMoE", objective={"name": "pointwise", "task_weighting": name})
    weights = [found[key] for key in ("weight/click", "weight/stay") if key in found]
    assert len(weights) == (0 if name == "fixed" else 2)
    if name == "uncertainty":
        last = found["dense/objective/weighting.log_variances"]
        assert [each[-1] for each in weights] == pytest.approx([math.exp(-s) for s in last])
    if name in ("gradnorm", "pareto"):
        assert weights[0] != weights[1]
        assert [sum(both) for both in zip(*weights, strict=True)] == pytest.approx([2 if name == "gradnorm" else 1] * 3)


def test_learning_rates(pool: RankPool, data_root: Path, tmp_path: Path) -> None:
    tables = {"optimizer": {"lr": 0.05}, "schedule": {"name": "step", "period": 3, "gamma": 0.5}}
    dense = {"lr": 0.01, "schedule": {"warmup_steps": 6}}
    changes = {"lr_changes": [{"step": 5, "factor": 0.1}], "max_steps": 6, "log_every": 2}
    found = curves(pool, data_root, tmp_path, "DCN", embedding=tables, optimizer=dense, train=changes)
    assert found["learning_rate"] == pytest.approx([0.01 * 2 / 6, 0.01 * 4 / 6, 0.001])
    assert found["table_learning_rate"] == pytest.approx([0.05, 0.025, 0.0025])
