"""End to end, for every model that the folders hold: it can fit what it has seen, and its printed run file works."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from rechub_dist.assembly.examples import DATA, ROOT, example_run
from rechub_dist.cli.describe import describe_model
from rechub_dist.data.prepare.synthetic import synthesize
from rechub_dist.data.run_file import load_run
from rechub_dist.errors import UserError
from rechub_dist.models import catalogue
from rechub_tests.ranks import RankPool
from rechub_tests.representatives import each_model
from rechub_tests.runs import records, reported_by, run_file, train, write_data

MODELS = catalogue()


@pytest.fixture(scope="module")
def rows_256(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("rows_256")
    write_data(root, 256)
    return root


@pytest.mark.parametrize("model", each_model(fast=("DIN",)))
def test_overfits_256_rows(pool: RankPool, rows_256: Path, tmp_path: Path, model: str) -> None:
    epochs = 60
    path = run_file(
        tmp_path,
        rows_256,
        model,
        data={"batch_size": 64, "valid": "train", "test": None},
        embedding={"optimizer": {"name": "rowwise_adagrad", "lr": 0.1}},
        train={"epochs": epochs, "eval_epochs": epochs, "histograms": False},
        checkpoint={"every_steps": 4 * epochs},
    )
    pool.run(1, train, path)
    [found] = [record for record in records(path, "valid") if record["step"] == 4 * epochs]
    for name, value in found.items():
        if name.endswith("auc"):
            assert value > 0.99, name
        if name.endswith("mse"):
            assert value < 0.1, name  # the label's variance is 1
        if name == "ndcg@10":
            assert value > 0.35  # by chance 0.07


@pytest.fixture(scope="module")
def example_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("example") / "data"
    synthesize(root, 2000, sequence=True, **DATA)
    return root


@pytest.mark.parametrize("model", MODELS)
def test_the_printed_run_file_works(pool: RankPool, example_data: Path, tmp_path: Path, model: str) -> None:
    console = Console(record=True, width=150, file=io.StringIO())
    describe_model(console, model)
    text = example_run(MODELS[model])
    assert ROOT in text
    path = tmp_path / "run.yaml"
    path.write_text(text.replace(ROOT, str(example_data)))
    [summary] = pool.run(1, train, path, [f"output_dir={tmp_path}/out", "train.epochs=1"])
    assert summary.step == 7  # 1600 rows in batches of 256
    reported = reported_by(load_run(path))
    assert list(summary.test) == list(reported)
    shown = console.export_text()
    for word in (MODELS[model].paper.split()[0], *(name for name in text.split() if name.endswith("_features:"))):
        assert word.removesuffix(":") in shown


def test_an_unknown_model() -> None:
    with pytest.raises(UserError, match="no model 'DIEM': did you mean 'DIEN'"):
        describe_model(Console(quiet=True), "DIEM")
