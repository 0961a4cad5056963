"""A user's mistake is one clear line and exit code 2, on all ranks, without waiting for anyone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rechub_dist.checkpoint.manifest import MANIFEST
from rechub_dist.errors import UserError
from rechub_tests.ranks import RankPool
from rechub_tests.representatives import slow
from rechub_tests.runs import SCHEMA, output, run_file, train, write_data


@pytest.fixture
def own_data(tmp_path: Path) -> Path:
    """A data set to break."""
    write_data(tmp_path / "data")
    return tmp_path / "data"


def replace_column(root: Path, name: str, values: Any, split: str = "train") -> Path:
    """Put `values` in place of a column of the split's last file, so that a late rank meets it."""
    path = sorted((root / split).glob("*.parquet"))[-1]
    table = pq.read_table(path)
    pq.write_table(table.set_column(table.column_names.index(name), name, values), path, row_group_size=70)
    return path


def bad_id(root: Path) -> None:
    rows = pq.read_metadata(sorted((root / "train").glob("*.parquet"))[-1]).num_rows
    replace_column(root, "user", pa.array(np.where(np.arange(rows) == rows - 1, 101, 0)))


def null_id(root: Path) -> None:
    rows = pq.read_metadata(sorted((root / "train").glob("*.parquet"))[-1]).num_rows
    replace_column(root, "item", pa.array([1] * (rows - 1) + [None], pa.int64()))


def wrong_type(root: Path) -> None:
    for path in (root / "train").glob("*.parquet"):
        table = pq.read_table(path)
        strings = pa.array([str(value) for value in table["user"].to_pylist()])
        pq.write_table(table.set_column(table.column_names.index("user"), "user", strings), path)


def missing_column(root: Path) -> None:
    for path in (root / "train").glob("*.parquet"):
        table = pq.read_table(path)
        pq.write_table(table.rename_columns(["userid" if n == "user" else n for n in table.column_names]), path)


def truncated(root: Path) -> None:
    path = sorted((root / "train").glob("*.parquet"))[-1]
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 100)


def broken_page(root: Path) -> None:
    path = sorted((root / "train").glob("*.parquet"))[-1]
    with path.open("r+b") as file:
        file.seek(4)
        file.write(b"\xff" * 400)


def empty_folder(root: Path) -> None:
    for path in (root / "train").glob("*.parquet"):
        path.unlink()


DATA = {
    bad_id: ["part-2.parquet", "'user'", "101", "0..100"],
    null_id: ["part-2.parquet", "'item'", "null"],
    wrong_type: ["'user'", "string"],
    missing_column: ["'user'", "'userid'"],
    truncated: ["part-2.parquet"],
    broken_page: ["part-2.parquet"],
    empty_folder: ["train", "no *.parquet file"],
}


@pytest.mark.parametrize("fault", list(DATA), ids=lambda fault: fault.__name__)
@pytest.mark.parametrize("ranks", [slow(1), 3])
def test_bad_data_stops_all_ranks(pool: RankPool, own_data: Path, tmp_path: Path, fault: Any, ranks: int) -> None:
    fault(own_data)
    path = run_file(tmp_path, own_data, "DeepFM", distributed={"timeout_seconds": 300})
    began = time.monotonic()
    with pytest.raises(UserError) as error:
        pool.run(ranks, train, path, timeout=200)
    assert time.monotonic() - began < 200  # well before the process group's time-out
    assert "\n" not in str(error.value)
    for word in DATA[fault]:
        assert word in str(error.value)


CONFIGURATION = [
    (["train.epoch=3"], ["train.epoch", "did you mean 'epochs'"]),
    (["model.name=DeepFn"], ["DeepFn", "did you mean 'DeepFM'"]),
    (["model.hidden_unit=[3]"], ["model.hidden_unit", "did you mean 'hidden_units'"]),
    (["model.features=[user, itme]"], ["itme", "did you mean 'item'"]),
    (["model.hidden_units=[a]"], ["model.hidden_units", "list[int]"]),
    (["train.epochs=many"], ["train.epochs", "integer", "'many'"]),
    (["data.labels=[clik]"], ["clik", "did you mean 'click'"]),
    (["data.root=/nowhere"], ["/nowhere"]),
    (["embedding.memory_per_rank_gb=1e-6"], ["embedding.memory_per_rank_gb", "do not fit"]),
    (["embedding.optimizer.name=lazy_adam"], ["fused Adam", "CPU", "rowwise_adagrad"]),
    (["embedding.optimizer.name=adam"], ["adam", "replicated"]),
    (["embedding.sharding=column_wise"], ["rowwise_adagrad", "column_wise"]),
    (["embedding.kernel=fused_uvm"], ["fused_uvm", "CUDA"]),
    (["embedding.rules=[{tables: usr}]"], ["'usr'", "matches no table"]),
    (["device=cuda"], ["CUDA"]),
    (["objective={name: retrieval}"], ["objective.name", "DeepFM is trained by pointwise, not by retrieval"]),
    (["data.labels=[click, stay]"], ["data.labels", "2 label(s) (click, stay)", "1 task(s)"]),
    (["train.best_metric=acu"], ["acu", "did you mean 'auc'"]),
    (["optimizer.schedule.name=step"], ["optimizer.schedule", "step needs period"]),
    (["embedding.schedule={name: linear, gamma: 0.5}"], ["embedding.schedule", "gamma is for step"]),
    (["optimizer.schedule.name=plateau", "data.valid=null"], ["optimizer.schedule", "data.valid"]),
    (["optimizer.lr=1e30", "optimizer.name=sgd"], ["not finite"]),
]


@pytest.mark.parametrize(("overrides", "words"), CONFIGURATION, ids=lambda value: str(value[0])[:30])
def test_bad_configuration(
    pool: RankPool, data_root: Path, tmp_path: Path, overrides: list[str], words: list[str]
) -> None:
    path = run_file(tmp_path, data_root, "DeepFM", train={"epochs": 2})
    with pytest.raises(UserError) as error:
        pool.run(2, train, path, overrides)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_unequal_histories(pool: RankPool, own_data: Path, tmp_path: Path) -> None:
    table = pq.read_table(own_data / "train" / "part-0.parquet")
    values = table["history_shop"].to_pylist()
    values[150] = [1, 2, 3, 4, 5] if len(values[150]) != 5 else [1]
    index = table.column_names.index("history_shop")
    table = table.set_column(index, "history_shop", pa.array(values, table.schema.field(index).type))
    pq.write_table(table, own_data / "train" / "part-0.parquet", row_group_size=70)
    path = run_file(tmp_path, own_data, "DIN")
    with pytest.raises(UserError, match=r"part-0.parquet: columns 'history' and 'history_shop' have \d and \d ids"):
        pool.run(2, train, path)


def test_a_row_wise_table_of_fewer_rows_than_ranks_is_table_wise(
    pool: RankPool, data_root: Path, tmp_path: Path
) -> None:
    tags = {"kind": "sparse", "rows": 3, "pooling": "mean", "out_of_range": "drop"}
    dataset = {**SCHEMA, "features": {**SCHEMA["features"], "tags": tags}}
    path = run_file(
        tmp_path,
        data_root,
        "DeepFM",
        data={"dataset": dataset},
        embedding={"rules": [{"tables": "tags", "sharding": "row_wise"}]},
    )
    pool.run(4, train, path)
    newest = max((output(path) / "checkpoints").glob("step-*"))
    placed = json.loads((newest / MANIFEST).read_text())["manifest"]["run"]["tables"]["tags"]
    assert (placed["sharding"], placed["rows"]) == ("table_wise", 3)


def command(*arguments: str, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}
    line = [sys.executable, *launcher, "-m", "rechub_dist", *arguments]
    return subprocess.run(line, capture_output=True, text=True, timeout=300, env=environment, check=False)


def test_the_command_exits_with_2_and_one_line(data_root: Path, tmp_path: Path) -> None:
    path = run_file(tmp_path, data_root, "DeepFM")
    done = command("train", str(path), "--set", "train.epoch=3")
    assert done.returncode == 2
    assert done.stderr == f"error: {path}: unknown key 'train.epoch': did you mean 'epochs'?\n"


@pytest.mark.slow
def test_local_ranks_exit_with_2_and_one_line(own_data: Path, tmp_path: Path) -> None:
    bad_id(own_data)
    path = run_file(tmp_path, own_data, "DeepFM")
    done = command("train", str(path), "--nproc", "2")
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1, done.stderr
    assert "id 101" in errors[0]
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_an_unwritable_output_folder(data_root: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    path = run_file(tmp_path, data_root, "DeepFM", output_dir=str(tmp_path / "file" / "out"))
    done = command("train", str(path), "--nproc", "2")
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1, done.stderr
    assert "output_dir" in errors[0]
    assert "cannot be written" in errors[0]


@pytest.mark.slow
def test_under_torchrun_the_worker_exits_with_2_and_the_main_rank_prints(own_data: Path, tmp_path: Path) -> None:
    missing_column(own_data)
    path = run_file(tmp_path, own_data, "DeepFM")
    launcher = (
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=localhost:0",
    )
    done = command("train", str(path), launcher=launcher)
    assert done.returncode != 0
    assert done.stderr.count("error: ") == 1, done.stderr
    assert "'userid'" in done.stderr
    assert "exitcode  : 2" in done.stderr


def test_ids_of_another_kind_in_valid_are_told_before_training(pool: RankPool, tmp_path: Path) -> None:
    """Under a hash, 7 and "7" are different ids."""
    for split, values in (("train", range(40)), ("valid", [str(i) for i in range(40)])):
        (tmp_path / "data" / split).mkdir(parents=True)
        table = pa.table({"shop": list(values), "click": [i % 2 for i in range(40)]})
        pq.write_table(table, tmp_path / "data" / split / "0.parquet")
    schema = {"name": "x", "features": {"shop": {"kind": "sparse", "rows": 50, "hash": True}}, "labels": {"click": {}}}
    model = {"features": ["shop"], "hidden_units": [4], "embedding_dim": 4}
    path = run_file(
        tmp_path, tmp_path / "data", "DeepFM", model=model, data={"dataset": schema, "batch_size": 10, "test": None}
    )
    with pytest.raises(UserError, match=r"valid: column .shop. is string here and number in .*train"):
        pool.run(2, train, path)
    assert not output(path).exists()


@pytest.mark.slow
def test_evaluate_and_data_commands(pool: RankPool, data_root: Path, tmp_path: Path) -> None:
    path = run_file(tmp_path, data_root, "DeepFM", train={"epochs": 1})
    summary = pool.run(1, train, path)[0]
    done = command("evaluate", str(output(path)), "--data", str(data_root / "test"), "--json", "--nproc", "2")
    assert done.returncode == 0, done.stderr
    assert f'"auc": {summary.test["auc"]}'[:14] in done.stdout
    assert '"rows": 70' in done.stdout
    done = command("evaluate", str(tmp_path), "--data", str(data_root / "test"))
    assert done.returncode == 2
    assert "holds no checkpoint; name a run's output folder" in done.stderr
    done = command("data", "inspect", str(data_root / "train"))
    assert done.returncode == 0
    assert "530 rows" in done.stdout
    done = command("data", "inspect", str(data_root / "nothing"))
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
