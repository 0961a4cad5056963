"""Which step is the best, by metrics of every direction; and what a failing evaluation costs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from rechub_dist.checkpoint import saved_steps
from rechub_dist.checkpoint.folder import Folder
from rechub_dist.checkpoint.load import read_manifest
from rechub_dist.checkpoint.manifest import render
from rechub_dist.config import StorageConfig
from rechub_dist.errors import UserError
from rechub_tests.damage import spoil_pages
from rechub_tests.ranks import RankPool
from rechub_tests.runs import (
    config_of,
    last_checkpoint,
    output,
    position,
    records,
    reported_by,
    run_file,
    train,
    write_data,
)


def regression(folder: Path, root: Path, **train_section: Any) -> Path:
    """A run on noise that overfits: its error on the valid split does not fall for long."""
    schema = yaml.safe_load((root / "dataset.yaml").read_text())
    data = {"labels": ["stay"], "dataset": schema}
    return run_file(
        folder,
        root,
        "MMoE",
        model={"num_tasks": 1, "task_types": ["regression"]},
        data=data,
        train={"epochs": 3, "eval_every": 3, "log_every": 1, **train_section},
        checkpoint={"every_steps": 100},
    )


def test_a_regression_keeps_its_best_step(pool: RankPool, data_root: Path, tmp_path: Path) -> None:
    path = regression(tmp_path, data_root)
    summary = pool.run(1, train, path)[0]
    errors = {record["step"]: record["mse"] for record in records(path, "valid")}
    assert len(errors) == 9
    best, worst = min(errors, key=errors.__getitem__), max(errors, key=errors.__getitem__)
    assert best != worst
    assert summary.best_step == best
    assert best in saved_steps(output(path) / "checkpoints")
    [test] = records(path, "test")
    assert test["step"] == best
    other = regression(tmp_path / "max", data_root, best_mode="max")
    assert pool.run(1, train, other)[0].best_step == worst  # as an old run file that says so


@pytest.mark.parametrize("metric", ["log_loss", "normalized_entropy", "calibration"])
def test_metrics_of_other_directions(pool: RankPool, data_root: Path, tmp_path: Path, metric: str) -> None:
    section = {"epochs": 2, "eval_every": 3, "best_metric": metric}
    path = run_file(tmp_path, data_root, "DeepFM", train=section)
    summary = pool.run(1, train, path)[0]
    values = {record["step"]: record[metric] for record in records(path, "valid")}
    wanted = min(values, key=lambda step: abs(values[step] - 1) if metric == "calibration" else values[step])
    assert summary.best_step == wanted


@pytest.mark.parametrize(
    ("model", "objective"),
    [("SASRec", {"sampled_items": 5, "top_k": [3, 7]}), ("FacebookDSSM", {"sampled_items": 4}), ("ESMM", {})],
)
def test_what_is_reported_is_known_before(
    pool: RankPool, data_root: Path, tmp_path: Path, model: str, objective: dict[str, Any]
) -> None:
    sections = {"objective": objective} if objective else {}
    path = run_file(tmp_path, data_root, model, train={"max_steps": 1}, **sections)
    summary = pool.run(1, train, path)[0]
    reported = reported_by(config_of(path))
    assert list(summary.test) == list(reported)


def test_a_metric_that_is_not_reported_is_refused_before_anything_is_written(
    pool: RankPool, data_root: Path, tmp_path: Path
) -> None:
    path = run_file(tmp_path, data_root, "DeepFM", train={"best_metric": "logloss"})
    with pytest.raises(UserError, match=r"train.best_metric: no metric 'logloss': did you mean 'log_loss'\?"):
        pool.run(2, train, path)
    assert not output(path).exists()


def test_a_run_of_old_forgets_a_best_step_that_was_the_worst(pool: RankPool, data_root: Path, tmp_path: Path) -> None:
    """Before metrics knew their direction the mode was `max` unless the run file said otherwise."""
    path = regression(tmp_path, data_root, best_mode="max", max_steps=9)
    early = pool.run(1, train, path)[0]
    errors = {record["step"]: record["mse"] for record in records(path, "valid")}
    assert early.best_step == max(errors, key=errors.__getitem__)
    folder = Folder(str(output(path) / "checkpoints"), StorageConfig())
    for step in saved_steps(output(path) / "checkpoints"):
        manifest = read_manifest(folder, step)
        del manifest.run["position"]["best_mode"]
        manifest.run["position"]["stopped_early"] = True  # by patience, as it seemed to grow worse
        folder.replace(f"step-{step:010d}/manifest.json", render(dataclasses.replace(manifest)))
    tree = yaml.safe_load(path.read_text())
    del tree["train"]["best_mode"]
    tree["train"]["max_steps"] = None
    path.write_text(yaml.safe_dump(tree))
    again = pool.run(1, train, path)[0]
    assert again.step == 27
    errors = {record["step"]: record["mse"] for record in records(path, "valid") if record["step"] >= 9}
    assert list(errors) == [9, 12, 15, 18, 21, 24, 27]  # the weights it goes on from are judged anew
    assert again.best_step == min(errors, key=errors.__getitem__)


@pytest.mark.slow
def test_an_evaluation_that_fails_costs_no_step(pool: RankPool, tmp_path: Path) -> None:
    root = tmp_path / "root"
    write_data(root)
    reference = run_file(tmp_path / "reference", root, "DeepFM", train={"epochs": 1, "eval_every": 5})
    pool.run(2, train, reference)
    path = run_file(tmp_path, root, "DeepFM", train={"epochs": 1, "eval_every": 5}, checkpoint={"every_steps": 100})
    shard = root / "valid" / "part-0.parquet"
    good = shard.read_bytes()
    spoil_pages(shard, 0)
    with pytest.raises(UserError, match=r"part-0.parquet"):
        pool.run(2, train, path)
    assert saved_steps(output(path) / "checkpoints") == [5]
    assert pool.run(2, position, path)[0][0] == 5
    shard.write_bytes(good)
    summary = pool.run(2, train, path)[0]
    assert [record["step"] for record in records(path, "valid")] == [5, 9]
    assert summary.best_step in (5, 9)
    found, wanted = last_checkpoint(path), last_checkpoint(reference)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6, msg=name)


def test_a_checkpoint_knows_the_outcome_of_its_evaluation(pool: RankPool, data_root: Path, tmp_path: Path) -> None:
    path = run_file(tmp_path, data_root, "DeepFM", train={"epochs": 1, "eval_every": 3})
    pool.run(2, train, path)
    folder = output(path) / "checkpoints"
    store = Folder(str(folder), StorageConfig())
    for step in saved_steps(folder):
        told = read_manifest(store, step).run["position"]
        values = {r["step"]: r["auc"] for r in records(path, "valid") if r["step"] <= step}
        assert told["best_step"] == max(values, key=values.__getitem__)
        assert not told["unevaluated"]
    assert len(records(path, "checkpoint")) == 3  # one save an evaluation
