"""From tables that nobody has described to a trained model: `init`, `data import`, `train`; also from Python."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

import rechub_dist
from rechub_dist.assembly.examples import DATA, example_schema
from rechub_dist.assembly.first_run import batch_size_for, first_run, run_on
from rechub_dist.assembly.parts import build_model
from rechub_dist.config import VERSION, run_from
from rechub_dist.data.importing.plan import Plan, plan_of, read_plan
from rechub_dist.data.prepare.synthetic import synthesize
from rechub_dist.errors import UserError
from rechub_dist.models import catalogue
from rechub_tests.runs import write_data

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "rechub_dist"]


@pytest.fixture(scope="module")
def tables() -> dict[str, pd.DataFrame]:
    """A log of ratings, and the tables of its users and movies."""
    rng = np.random.default_rng(5)
    log = pd.DataFrame(
        {
            "user_id": [f"u{i}" for i in rng.integers(0, 40, 1500)],
            "movie_id": rng.integers(0, 60, 1500),
            "timestamp": 1_700_000_000 + np.sort(rng.integers(0, 10**6, 1500)),
            "rating": rng.integers(1, 6, 1500),
        }
    )
    users = pd.DataFrame({"user_id": [f"u{i}" for i in range(40)], "age": rng.integers(18, 80, 40) + 0.5})
    genres = np.array(["Drama", "Comedy", "Crime|Drama", "Comedy|War|Drama"])
    movies = pd.DataFrame({"movie_id": np.arange(60), "genres": genres[rng.integers(0, 4, 60)]})
    return {"log": log, "users": users, "movies": movies}


@pytest.fixture(scope="module")
def files(tables: dict[str, pd.DataFrame], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    for name, table in tables.items():
        table.to_csv(folder / f"{name}.csv", index=False)
    return folder


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    return subprocess.run([*COMMAND, *arguments], cwd=folder, env=env, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def mine(files: Path) -> Path:
    tables = ("--table", "users=users.csv", "--table", "movies=movies.csv")
    done = run(files, "init", "log.csv", *tables, "--dir", "mine")
    assert done.returncode == 0, done.stderr
    commands = [line.split("rechub-dist ")[1].split() for line in done.stdout.splitlines() if "rechub-dist " in line]
    assert [words[0] for words in commands] == ["data", "data", "train"]
    for words in commands:
        done = run(files, *words)
        assert done.returncode == 0, done.stderr[-3000:]
    return files / "mine"


@pytest.mark.slow
def test_the_commands_that_init_prints_end_in_a_trained_model(mine: Path) -> None:
    assert yaml.safe_load((mine / "run.yaml").read_text())["model"]["name"] == "DIN"
    assert (mine / "out" / "checkpoints").is_dir()


@pytest.mark.slow
def test_nothing_is_replaced(mine: Path) -> None:
    before = (mine / "plan.yaml").read_text()
    done = run(mine.parent, "init", "log.csv", "--dir", "mine")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "mine/plan.yaml exists, and is not replaced; choose another --dir" in done.stderr
    assert (mine / "plan.yaml").read_text() == before


@pytest.mark.slow
def test_from_python_the_same_tables_make_the_same_data(
    mine: Path, tables: dict[str, pd.DataFrame], tmp_path: Path
) -> None:
    rest = {"tables": {"movies": pa.Table.from_pandas(tables["movies"])}, "users": tables["users"]}
    found = rechub_dist.prepare(tmp_path / "data", log=tables["log"], **rest)
    assert (found.root, found.rows) == (tmp_path / "data", {"train": 1200, "valid": 150, "test": 150})
    assert (tmp_path / "data" / "dataset.yaml").read_text().split("\n", 1)[1] == (
        mine / "data" / "dataset.yaml"
    ).read_text().split("\n", 1)[1]
    for split in found.rows:
        assert pq.read_table(tmp_path / "data" / split).equals(pq.read_table(mine / "data" / split))


@pytest.mark.slow
def test_a_plan_and_paths_from_python(files: Path, mine: Path, tables: dict[str, pd.DataFrame], tmp_path: Path) -> None:
    plan = read_plan(mine / "plan.yaml")
    rechub_dist.prepare(
        tmp_path / "data",
        log=files / "log.csv",
        users=tables["users"],
        tables={"movies": str(files / "movies.csv")},
        plan=plan,
    )
    for split in ("train", "valid", "test"):
        assert pq.read_table(tmp_path / "data" / split).equals(pq.read_table(mine / "data" / split))
    with pytest.raises(UserError, match=r"shops: the plan has no such table; write tables: \{shops: \{key: COLUMN\}\}"):
        rechub_dist.prepare(tmp_path / "no", log=tables["log"], tables={"shops": tables["users"]}, plan=plan)
    with pytest.raises(UserError, match="log: got a list; give a pandas DataFrame"):
        rechub_dist.prepare(tmp_path / "no", log=[1], plan=plan)
    with pytest.raises(UserError, match="are for a guessed plan; write them into the plan"):
        rechub_dist.prepare(tmp_path / "no", log=tables["log"], plan=plan, user="user_id")
    assert not (tmp_path / "no").exists()


@pytest.mark.slow
def test_in_a_terminal_it_asks(files: Path, tmp_path: Path) -> None:
    answers = ["user_id", "movie_id", "none", "rating = 5", "DCNv2"]
    master, slave = pty.openpty()
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    line = [*COMMAND, "init", "log.csv", "--dir", str(tmp_path / "asked")]
    asked = subprocess.Popen(line, cwd=files, env=env, stdin=slave, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    os.write(master, "".join(f"{answer}\n" for answer in answers).encode())
    _, err = asked.communicate()
    os.close(slave)
    os.close(master)
    assert asked.returncode == 0, err
    plan = read_plan(tmp_path / "asked" / "plan.yaml")
    assert (plan.time, plan.labels, plan.split.by) == (None, {"label": "rating = 5"}, "random")
    assert yaml.safe_load((tmp_path / "asked" / "run.yaml").read_text())["model"]["name"] == "DCNv2"


@pytest.fixture(scope="module")
def plan() -> Plan:
    return plan_of(
        {
            "tables": {"items": {"path": "i.csv", "key": "item", "columns": {"item": "integer", "price": "float"}}},
            "user": "user", "item": "item", "time": "time", "items": True,
            "labels": {"click": "click", "buy": "buy"},
            "histories": {"history": {"column": "item"}},
            "features": {
                "user": {"kind": "sparse"}, "item": {"kind": "sparse"}, "price": {"kind": "dense"},
                "history": {"kind": "sequence"},
            },
        }
    )  # fmt: skip


@pytest.mark.parametrize("name", catalogue())
def test_a_run_file_for_any_model(plan: Plan, name: str) -> None:
    tree = yaml.safe_load(first_run(plan, name, "data/mine", "runs/mine"))
    model = tree["model"]
    assert model["name"] == name
    if "user_features" in model:
        assert (model["user_features"], model["item_features"]) == (["user", "history"], ["item", "price"])
    elif "target_features" in model:
        assert (model["features"], model["target_features"]) == (["user", "price"], ["item"])
    elif "features" in model:
        assert model["features"] == ["user", "item", "price"]


def test_what_a_model_needs_is_told(plan: Plan) -> None:
    for change, model, text in (
        ({}, "DeepFN", "there is no model 'DeepFN': did you mean 'DeepFM'?"),
        ({"item": None}, "DIN", "--model DIN needs a history of items: name the column(s) of item (--item)"),
        ({"labels": {}}, "DeepFM", "--model DeepFM needs 1 label(s), and the plan has 0: write its labels"),
        ({"labels": {"click": "click"}}, "MMoE", "--model MMoE needs 2 label(s), and the plan has 1"),
    ):
        with pytest.raises(UserError) as error:
            first_run(plan.model_copy(update=change), model, "data", "out")
        assert text in str(error.value)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared") / "data"
    synthesize(folder, rows=1000, sequence=True, **DATA)
    return folder


@pytest.mark.parametrize("name", catalogue())
def test_a_run_file_for_data_that_are_there(name: str, prepared: Path) -> None:
    config = run_from(yaml.safe_load(run_on(str(prepared), name, "runs/mine")))
    assert config.version == VERSION
    assert config.data.batch_size == 256
    model = build_model(config, example_schema())
    assert type(model).__name__ == name
    if name == "DIN":
        assert (config.model.parameters["target_features"], config.model.parameters["behavior_features"]) == (
            ["item"], ["history"],
        )  # fmt: skip
        assert "item" not in config.model.parameters["features"]


def test_batches_grow_with_the_data() -> None:
    rows = (0, 1, 5_760, 269_272, 360_000, 591_210, 1_000_000, 3_000_000, 10**10)
    assert [batch_size_for(one) for one in rows] == [256, 256, 256, 256, 256, 512, 1024, 4096, 4096]


def test_types_of_labels_are_the_schemas(tmp_path: Path) -> None:
    synthesize(tmp_path / "data", rows=1000, sequence=True, **DATA)
    file = tmp_path / "data" / "dataset.yaml"
    tree = yaml.safe_load(file.read_text())
    tree["labels"] = {"label_0": {"type": "regression"}, "label_1": {"type": "multiclass", "classes": 2}}
    file.write_text(yaml.safe_dump(tree))
    config = run_from(yaml.safe_load(run_on(str(tmp_path / "data"), "SharedBottom", "runs/mine")))
    assert config.model.parameters["task_types"] == ["regression", "multiclass"]


@pytest.mark.slow
def test_run_files_for_data_by_command(tmp_path: Path) -> None:
    def models(*arguments: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", "rechub_dist", "models", *arguments]
        return subprocess.run(line, capture_output=True, text=True, check=False)

    write_data(tmp_path / "data")
    done = models("DCNv2", "--run-file", "--data", str(tmp_path / "data"))
    assert yaml.safe_load(done.stdout)["data"]["root"] == str(tmp_path / "data")
    for arguments, message in (
        (("DCNv2", "--run-file", "--data", str(tmp_path / "none")), "holds no dataset.yaml"),
        (("DCNv2", "--data", str(tmp_path / "data")), "--data: is for a run file"),
    ):
        refused = models(*arguments)
        assert refused.returncode == 2
        assert message in refused.stderr
        assert refused.stderr.count("\n") == 1
