"""Searches by Ray Tune: sharded trials, ASHA, results, and going on after an interruption."""

from __future__ import annotations

import csv
import signal
from pathlib import Path

import pytest
import yaml

from rechub_dist.data.run_file import load_run
from rechub_tests.ray_runs import TwoNodes, ray_command
from rechub_tests.runs import records, run_file

pytest.importorskip("ray", reason="ray is not installed (the extra `ray`)")

# With the seed of the draws below, the first learning rate is good and the second one far too low.
SPACE = {"optimizer.lr": {"loguniform": [1e-6, 1e-1]}, "model.embedding_dim": {"randint": [2, 3]}}
SEARCH = ["--trials", "2", "--metric", "auc", "--grace", "2", "--reduction", "2", "--draw-seed", "0"]
MODEL = {"hidden_units": [128, 128], "dropout_rates": 0.0, "batch_norm": False}


def write_search(folder: Path, data: Path, epochs: int) -> list[str]:
    """A run file with a space beside it, as arguments."""
    train, batches, checkpoint = {"epochs": epochs}, {"batch_size": 32}, {"every_steps": 50}
    path = run_file(folder, data, "DeepFM", model=MODEL, train=train, data=batches, checkpoint=checkpoint)
    space = folder / "space.yaml"
    space.write_text(yaml.safe_dump(SPACE, sort_keys=False))
    return [str(path), "--space", str(space), *SEARCH]


def results(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open() as file:
        return list(csv.DictReader(file))


def evaluations(folder: Path, trial: str) -> list[int]:
    """The steps at which a trial was evaluated."""
    return [record["step"] for record in records(folder / "trials" / trial / "config.yaml", "valid")]


@pytest.mark.slow
def test_trials_side_by_side(two_nodes: TwoNodes, launch_data: Path, tmp_path: Path) -> None:
    arguments, out = write_search(tmp_path, launch_data, 3), tmp_path / "out"
    run = ray_command("tune", *arguments, address=two_nodes.address)
    assert run.wait() == 0, run.text
    best, other = results(out)
    assert float(best["valid auc"]) > 0.9 > float(other["valid auc"])
    assert float(best["optimizer.lr"]) > 1e-4 > float(other["optimizer.lr"])
    assert best["state"] == "finished"
    assert evaluations(out, best["trial"]) == [188, 376, 564]
    folder = out / "trials" / best["trial"]
    tried = load_run(folder / "config.yaml")
    assert tried.optimizer.lr == float(best["optimizer.lr"])
    assert tried.model.parameters["embedding_dim"] == int(best["model.embedding_dim"])
    assert list((folder / "tensorboard").glob("events*"))


@pytest.mark.slow
def test_an_interrupted_search_of_sharded_trials_goes_on(launch_data: Path, tmp_path: Path) -> None:
    arguments, out = write_search(tmp_path, launch_data, 6), tmp_path / "out"
    options = ["--num-workers", "2", "--concurrent", "1"]
    run = ray_command("tune", *arguments, *options)
    run.wait_for("step 188 valid")
    run.signal(signal.SIGTERM)
    assert run.wait() == 0, run.text
    assert run.saw("search interrupted; run the same command to resume"), run.text
    assert len(results(out)) == 1
    other = ray_command("tune", *arguments, *options, "--set", "seed=3")
    assert other.wait() == 2
    assert other.saw(r"^error: output_dir: .* holds another search; .*run.seed 7 -> 3"), other.text
    run = ray_command("tune", *arguments, *options)
    assert run.wait() == 0, run.text
    assert run.saw(r"2 rank\(s\) on cpu.*resumed at step"), run.text
    best, other_trial = results(out)
    assert (best["state"], other_trial["state"]) == ("finished", "stopped"), run.text
    assert evaluations(out, best["trial"]) == [188, 376, 564, 752, 940, 1128]
    assert evaluations(out, other_trial["trial"])[:2] == [188, 376]
    assert len(evaluations(out, other_trial["trial"])) < 6
