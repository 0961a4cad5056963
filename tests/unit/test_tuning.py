"""What a search may vary, and what is said of its trials."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from rechub_dist.config import RunConfig, changed
from rechub_dist.data.run_file import load_run
from rechub_dist.errors import UserError
from rechub_dist.launching.search import judged_by, note_trial, read_space, read_trials, show_trials, trial_config

DATASET = {"features": {"user": {"kind": "sparse", "rows": 9}, "age": {"kind": "dense"}}, "labels": {"click": {}}}


@pytest.fixture
def run(tmp_path: Path) -> RunConfig:
    model = {"name": "DeepFM", "features": ["user", "age"], "hidden_units": [4], "dropout_rates": 0.1}
    tree = {
        "output_dir": str(tmp_path / "out"),
        "data": {"root": "nowhere", "dataset": DATASET},
        "model": {**model, "embedding_dim": 4},
        "checkpoint": {"folder": "s3://bucket/search"},
    }
    tree["data"]["dataset"] = DATASET
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    return load_run(path)


def space_file(folder: Path, tree: Any) -> Path:
    path = folder / "space.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def test_a_space(run: RunConfig, tmp_path: Path) -> None:
    tree = {
        "optimizer.lr": {"loguniform": [1e-4, 1e-2]},
        "model.dropout_rates": {"uniform": [0.0, 0.5]},
        "model.embedding_dim": {"randint": [2, 8]},
        "model.hidden_units": {"choice": [[4], [8, 4]]},
        "embedding.optimizer": {"choice": [{"name": "sgd"}, {"name": "adagrad", "lr": 0.1}]},
    }
    space = read_space(space_file(tmp_path, tree), run, ranks=2)
    assert set(space) == set(tree)
    assert space["optimizer.lr"].loguniform == (1e-4, 1e-2)
    assert space["model.embedding_dim"].randint == (2, 8)
    assert space["model.hidden_units"].choice == ([4], [8, 4])


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (
            {"optimizer.lrr": {"choice": [1.0]}},
            "1.0 is not valid: .*unknown key 'optimizer.lrr': did you mean 'lr'",
        ),
        ({"model.dropuot_rates": {"choice": [0.1]}}, "unknown key 'model.dropuot_rates': did you mean 'dropout_rates'"),
        (
            {"optimizer.lr": {"logunifrom": [1, 2]}},
            "unknown distribution 'logunifrom': did you mean 'loguniform'",
        ),
        ({"optimizer.lr": {"uniform": [0.2, 0.1]}}, "the lower end, 0.2, must be below the upper end, 0.1"),
        ({"optimizer.lr": {"loguniform": [0, 0.1]}}, "the ends must be above 0"),
        ({"optimizer.lr": {"uniform": [-0.1, 0.1]}}, "optimizer.lr: -0.1 is not valid: .*greater than 0"),
        ({"optimizer.lr": {"uniform": [0.1, 0.2], "choice": [1.0]}}, "set exactly one of uniform, loguniform"),
        ({"optimizer.lr": 0.1}, "write how it is sampled"),
        ({"model.embedding_dim": {"choice": [4, "wide"]}}, "'wide' is not valid: .*model.embedding_dim: should be int"),
        ({"model.features": {"choice": [["usr"]]}}, "no feature 'usr': did you mean 'user'"),
        ({"output_dir": {"choice": ["a"]}}, "output_dir: set by the search itself"),
        ({}, "empty; add at least one key"),
    ],
)
def test_mistakes_in_a_space(run: RunConfig, tmp_path: Path, tree: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_space(space_file(tmp_path, tree), run, ranks=1)


def test_each_trial_has_folders_of_its_own(run: RunConfig) -> None:
    trial = trial_config(run, "t7", {"optimizer.lr": 0.5})
    assert trial.output_dir == run.output_dir / "trials" / "t7"
    assert trial.checkpoint.folder == "s3://bucket/search/t7"
    assert trial.optimizer.lr == 0.5


def test_trials_are_judged_by_what_an_evaluation_reports(run: RunConfig, tmp_path: Path) -> None:
    assert judged_by(run, None, 1) == ("auc", "max")
    assert judged_by(run, "log_loss", 1) == ("log_loss", "min")
    assert judged_by(run, "calibration", 1) == ("calibration", "nearest_to_one")
    overridden = changed(run, {"train.best_mode": "max", "train.best_metric": "log_loss"}, "test")
    assert judged_by(overridden, None, 1) == ("log_loss", "max")
    with pytest.raises(UserError, match=r"--metric: no metric 'logloss': did you mean 'log_loss'\?"):
        judged_by(run, "logloss", 1)
    other = changed(run, {"train.best_metric": "click/auc"}, "test")
    space = space_file(tmp_path, {"optimizer.lr": {"choice": [0.1]}})
    with pytest.raises(UserError, match=r"0.1 is not valid: train.best_metric: no metric 'click/auc'"):
        read_space(space, other, ranks=1)


def test_results_are_read_from_the_trials(tmp_path: Path) -> None:
    found = {"a": [0.5, 0.4, 0.45], "b": [0.3], "c": []}
    for name, values in found.items():
        folder = tmp_path / "trials" / name
        note_trial(folder, {"optimizer.lr": len(values)}, "finished" if values else "failed: no luck")
        lines = [{"step": 10 * i, "split": "valid", "log_loss": v} for i, v in enumerate(values, 1)]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / "metrics.jsonl").write_text(text + '{"step": 40, "split": "valid", "log_lo')
    trials = read_trials(tmp_path, "log_loss", "min")
    assert [(t.name, t.best, t.step, t.evaluations) for t in trials] == [
        ("b", 0.3, 10, 1),
        ("a", 0.4, 20, 3),
        ("c", None, None, 0),
    ]
    assert [t.name for t in read_trials(tmp_path, "log_loss", "max")] == ["a", "b", "c"]
    with (tmp_path / "shown").open("w") as file:
        show_trials(Console(file=file, width=120), tmp_path, trials, "log_loss")
    assert "failed: no luck" in (tmp_path / "shown").read_text()
    assert (tmp_path / "results.csv").read_text().splitlines() == [
        "trial,optimizer.lr,valid log_loss,step,evaluations,state",
        "b,1,0.3,10,1,finished",
        "a,3,0.4,20,3,finished",
        "c,0,,,0,failed: no luck",
    ]
