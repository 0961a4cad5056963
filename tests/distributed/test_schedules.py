"""Learning rates of runs: against plain torch, over a resume, and changed in mid-run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rechub_dist.checkpoint.manifest import MANIFEST
from rechub_dist.errors import UserError
from rechub_tests.plain import PlainRun, assert_same_weights, rowwise_adagrad_, set_rate
from rechub_tests.ranks import RankPool
from rechub_tests.runs import last_checkpoint, losses, output, records, run_file, train

STEPS = 18


def last_position(path: Path) -> dict[str, Any]:
    newest = max((output(path) / "checkpoints").glob("step-*"))
    found: dict[str, Any] = json.loads((newest / MANIFEST).read_text())["manifest"]["run"]["position"]
    return found


def rates(path: Path) -> list[float]:
    return [record["learning_rate"] for record in records(path, "train")]


@pytest.mark.parametrize("ranks", [1, 2])
def test_dense_parameters_and_tables_have_their_own(
    pool: RankPool, data_root: Path, tmp_path: Path, ranks: int
) -> None:
    path = run_file(
        tmp_path,
        data_root,
        "DeepFM",
        optimizer={"schedule": {"name": "one_cycle", "pct_start": 0.4, "div_factor": 10, "final": 0.01}},
        embedding={
            "optimizer": {"lr": 0.05},
            "schedule": {"name": "step", "period": 5, "gamma": 0.5},
            "rules": [{"tables": "*.linear", "sharding": "replicated"}],
        },
        train={"epochs": 2, "log_every": 1, "lr_changes": [{"step": 8, "factor": 0.5}, {"step": 14, "factor": 2}]},
    )
    pool.run(ranks, train, path)
    run = PlainRun(path)
    dense = torch.optim.Adam(run.model.parameters())
    one_cycle = torch.optim.lr_scheduler.OneCycleLR(
        torch.optim.SGD(run.model.parameters(), lr=1),
        max_lr=0.01,
        total_steps=STEPS + 1,
        pct_start=(0.4 * STEPS + 1) / (STEPS + 1),
        div_factor=10,
        final_div_factor=10,
        cycle_momentum=False,
    )
    sums = {name: torch.zeros(len(run.tables.weight(name))) for name in run.placed}

    def update(step: int, _: Any) -> None:
        scale = 1 if step < 8 else 0.5 if step < 14 else 2
        set_rate(dense, scale * one_cycle.get_last_lr()[0])
        dense.step()
        one_cycle.step()
        for name, state in sums.items():
            rowwise_adagrad_(run.tables.weight(name), state, scale * 0.05 * 0.5 ** (step // 5))

    torch.testing.assert_close(losses(path), run.train(update), rtol=0, atol=3e-6)
    assert_same_weights(last_checkpoint(path), run.weights())


PLATEAU = {"name": "plateau", "gamma": 0.5, "patience": 1}
# The metric gets worse from some step on: rates that are too high.
OVERFITS = {"epochs": 4, "log_every": 1, "eval_every": 4}


@pytest.mark.slow
def test_plateau_goes_on_where_it_was(pool: RankPool, data_root: Path, tmp_path: Path) -> None:
    sections = {
        "optimizer": {"lr": 0.05, "schedule": PLATEAU},
        "embedding": {"optimizer": {"lr": 0.3}, "schedule": {**PLATEAU, "patience": 2}},
        "train": OVERFITS,
    }
    reference = run_file(tmp_path / "reference", data_root, "DeepFM", **sections)
    pool.run(2, train, reference)
    best, expected, rate = -1.0, [], 0.05
    found = {record["step"]: record["auc"] for record in records(reference, "valid")}
    for step in range(36):
        if step in found:
            rate *= 1 if found[step] > best else 0.5
            best = max(best, found[step])
        expected.append(rate)
    assert rates(reference) == pytest.approx(expected)
    assert rate < 0.05 / 4, "there was nothing to see"
    path = run_file(tmp_path / "resumed", data_root, "DeepFM", **sections)
    for ranks, end in ((2, 12), (2, 21), (2, 36)):
        pool.run(ranks, train, path, [f"train.max_steps={end}"])
    # The run's last evaluations, at 21 and 36, are not due by cadence; that at 21 is another look.
    state = last_position(reference)["plateaus"]
    assert state["optimizer"]["reductions"] > state["embedding"]["reductions"] > 0
    assert rates(path)[:21] == rates(reference)[:21]
    torch.testing.assert_close(losses(path)[:21], losses(reference)[:21], rtol=0, atol=1e-6)


def test_a_plateau_is_in_the_position_of_its_runs_alone(pool: RankPool, data_root: Path, tmp_path: Path) -> None:
    plain = run_file(tmp_path / "plain", data_root, "DeepFM", train={"epochs": 1, "log_every": 1})
    pool.run(1, train, plain)
    assert "plateaus" not in last_position(plain)


def test_rates_change_in_mid_run(pool: RankPool, data_root: Path, tmp_path: Path) -> None:
    changed = "train.lr_changes=[{step: 9, factor: 0.1}]"
    reference = run_file(tmp_path / "reference", data_root, "DeepFM", train={"epochs": 2, "log_every": 1})
    pool.run(2, train, reference, [changed])
    path = run_file(tmp_path / "changed", data_root, "DeepFM", train={"epochs": 2, "log_every": 1})
    pool.run(2, train, path, ["train.max_steps=9"])
    pool.run(2, train, path, [changed, "train.max_steps=12"])
    torch.testing.assert_close(losses(path), losses(reference)[:12], rtol=0, atol=1e-6)
    with pytest.raises(UserError, match=r"train\.lr_changes\.9 0\.1 -> null"):
        pool.run(2, train, path)
    with pytest.raises(UserError, match=r"train\.lr_changes\.9 0\.1 -> 0\.2"):
        pool.run(2, train, path, ["train.lr_changes=[{step: 9, factor: 0.2}]"])
    pool.run(2, train, path, ["train.lr_changes=[{step: 9, factor: 0.1}, {step: 15, factor: 1}]"])
    assert rates(path) == pytest.approx([0.01] * 9 + [0.001] * 6 + [0.01] * 3)
    newest = json.loads((max((output(path) / "checkpoints").glob("step-*")) / MANIFEST).read_text())["manifest"]["run"]
    assert newest["identity"]["train"]["lr_changes"] == {"9": 0.1, "15": 1.0}


def test_a_decay_over_the_run(pool: RankPool, data_root: Path, tmp_path: Path) -> None:
    schedule = {"schedule": {"name": "linear", "warmup_steps": 2}}
    path = run_file(tmp_path, data_root, "DeepFM", optimizer=schedule, train={"epochs": 1, "log_every": 1})
    pool.run(1, train, path, ["train.max_steps=9"])
    expected = [0.005, 0.01, *(0.01 * (1 - done / 7) for done in range(7))]
    assert rates(path) == pytest.approx(expected)
    with pytest.raises(UserError, match=r"optimizer\.schedule\.decay_steps 7 -> 16"):
        pool.run(1, train, path, ["train.epochs=2"])
    pool.run(1, train, path, ["train.epochs=2", "optimizer.schedule.decay_steps=7"])
    assert rates(path) == pytest.approx([*expected, *[0.0] * 9])
