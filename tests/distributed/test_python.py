"""Training and predicting from Python, in one process, held against the command line's output."""

from __future__ import annotations

import logging
import os
import random
import re
import signal
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
import yaml

import rechub_dist
from rechub_dist.checkpoint.trained import trained_config
from rechub_dist.errors import UserError
from rechub_dist.evaluation.evaluate import evaluate_run
from rechub_dist.inference.predict import Prediction, predict_run
from rechub_dist.training.loop import Loop
from rechub_tests.ranks import RankPool
from rechub_tests.runs import config_of, losses, run_file, train, write_data

PAGE = Path(__file__).parents[2] / "docs" / "notebook.md"
ROWS = 70


@pytest.fixture(scope="module")
def words_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small data set with strings for users and items, and numbers that go through a logarithm."""
    root = tmp_path_factory.mktemp("words")
    write_data(root)
    for part in root.glob("*/*.parquet"):
        table = pq.read_table(part)
        lists = [row and [f"item {i}" for i in row] for row in table["history"].to_pylist()]
        ages = [None if number % 11 == 0 else abs(age) for number, age in enumerate(table["age"].to_pylist())]
        columns = {
            "user": pa.array([f"user {i}" for i in table["user"].to_pylist()]).dictionary_encode(),
            "item": pa.array([f"item {i}" for i in table["item"].to_pylist()]),
            "history": pa.array(lists, pa.list_(pa.string())),
            "age": pa.array(ages, pa.float64()),
        }
        for name, column in columns.items():
            table = table.set_column(table.column_names.index(name), name, column)
        pq.write_table(table, part, row_group_size=30)
    vocabulary = {"value": [f"item {i}" for i in range(61)], "id": np.roll(np.arange(61), 5)}
    pq.write_table(pa.table(vocabulary), root / "_items.parquet")
    schema = yaml.safe_load((root / "dataset.yaml").read_text())
    for name in ("item", "history"):
        schema["features"][name] |= {"vocabulary": "_items.parquet"}
    schema["features"]["user"] |= {"hash": True}
    schema["features"]["age"] |= {"transform": "log", "missing": "fill", "fill": 0.5}
    (root / "dataset.yaml").write_text(yaml.safe_dump(schema, sort_keys=False))
    return root


def finished(folder: Path, root: Path, model: str, **sections: Any) -> Path:
    """The output folder of a run of one epoch."""
    path = run_file(folder, root, model, train={"epochs": 1}, **sections)
    return rechub_dist.train(path, {"data.valid": None, "data.test": None}).output_dir


def written(output_dir: Path, data: Path, **wanted: Any) -> pa.Table:
    """What `rechub-dist predict` writes."""
    out = output_dir.parent / "predicted"
    predict_run(trained_config(str(output_dir)), Prediction(str(data), str(out), **wanted))
    return pq.read_table(out)


def frame_of(data: Path, *without: str) -> pd.DataFrame:
    """The rows of a split in the order of their files, under an index of their own."""
    frame = pq.read_table(data).drop_columns(list(without)).to_pandas()
    return frame.set_index(frame.index[::-1] * 3)


LABELS = ("click", "buy", "stay")


@pytest.mark.parametrize("model", ["DeepFM", "MMoE", "DIN", "ESMM"])
def test_rows_in_memory_are_predicted_as_files_are(words_root: Path, tmp_path: Path, model: str) -> None:
    output_dir = finished(tmp_path, words_root, model)
    expected = written(output_dir, words_root / "test", keep=("user",))
    run = rechub_dist.load(output_dir)
    found = run.predict(str(words_root / "test"), keep=("user",))
    assert found.schema.names == expected.schema.names
    for name in found.schema.names:
        assert found[name].to_pylist() == expected[name].to_pylist(), name

    scores = [name for name in expected.schema.names if name.startswith("predicted_")]
    frame = frame_of(words_root / "test", *LABELS)
    of_frame = run.predict(frame)
    assert list(of_frame.columns) == scores
    assert of_frame.index.equals(frame.index)
    table = pa.Table.from_pandas(frame, preserve_index=False)
    columns = {name: frame[name].to_list() for name in frame.columns}
    for name in scores:
        exact = expected[name].to_numpy()
        np.testing.assert_array_equal(of_frame[name].to_numpy(), exact)
        np.testing.assert_array_equal(run.predict(table)[name].to_numpy(), exact)
        np.testing.assert_array_equal(run.predict(columns)[name], exact)
    assert len(run.predict(frame[:0])) == 0
    for words in ("top_k", "vectors"):
        with pytest.raises(UserError, match=f"{words}: {model} is no recall model"):
            getattr(run, words)(frame)


@pytest.mark.parametrize("model", ["DSSM", "MIND", "SASRec"])
def test_recall_models(words_root: Path, tmp_path: Path, model: str) -> None:
    objective = {"negatives": "in_batch", "loss": "softmax"} if model == "DSSM" else {}
    output_dir = finished(tmp_path, words_root, model, objective=objective)
    expected = written(output_dir, words_root / "test", top_k=5)
    run = rechub_dist.load(output_dir)
    frame = frame_of(words_root / "test", "item", "shop", *LABELS)
    best = run.top_k(frame, 5)
    assert [list(row) for row in best["predicted_items"]] == expected["predicted_items"].to_pylist()
    assert [list(row) for row in best["predicted_scores"]] == expected["predicted_scores"].to_pylist()

    items = run.vectors("item")
    assert items["item"].to_pylist() == [f"item {(i + 5) % 61}" for i in range(61)]
    vectors = dict(zip(items["item"].to_pylist(), np.array(items["vector"].to_pylist()), strict=True))
    assert {name for row in best["predicted_items"] for name in row} <= set(vectors)
    users = run.vectors("user", frame)
    assert list(users.columns) == ["vectors"]
    for own, names, scores in zip(users["vectors"], best["predicted_items"], best["predicted_scores"], strict=True):
        for name, score in zip(names, scores, strict=True):
            assert max(np.asarray(vector) @ vectors[name] for vector in own) == pytest.approx(score, abs=1e-5)
    rows = {"item": ["item 3", "item 60"], "shop": [3, 60 % 17]}
    if model != "DSSM":
        given = run.vectors("item", rows)["vector"]
        np.testing.assert_allclose(np.stack(given), [vectors["item 3"], vectors["item 60"]], rtol=1e-6)


def test_metrics_are_those_of_the_command(words_root: Path, tmp_path: Path) -> None:
    for model in ("DeepFM", "SASRec"):
        output_dir = finished(tmp_path / model, words_root, model)
        step, found = evaluate_run(trained_config(str(output_dir)), str(words_root / "test"))
        expected = {"step": step, **found.counts, **found.metrics}
        assert rechub_dist.load(output_dir).evaluate(words_root / "test") == pytest.approx(expected, rel=1e-6)


def test_metrics_by_group(words_root: Path, tmp_path: Path) -> None:
    output_dir = finished(tmp_path, words_root, "DeepFM")
    chosen = {"evaluation.metrics": [{"name": "grouped_auc", "group": "user"}]}
    found = rechub_dist.load(output_dir, overrides=chosen).evaluate(words_root / "test")
    override = "evaluation.metrics=[{name: grouped_auc, group: user}]"
    _, wanted = evaluate_run(trained_config(str(output_dir), [override]), str(words_root / "test"))
    assert found["grouped_auc"] == pytest.approx(wanted.metrics["grouped_auc"], abs=1e-12)


def test_training_is_that_of_the_command_and_leaves_nothing_behind(
    data_root: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = run_file(tmp_path / "command", data_root, "DeepFM")
    summary = train(path)
    logging.basicConfig(handlers=[mine := logging.StreamHandler()], force=True, level=logging.INFO)
    torch.manual_seed(3)
    random.seed(3)

    def state() -> tuple[Any, ...]:
        handlers = {name: logging.getLogger(name).handlers[:] for name in (None, "rechub_dist", "torch", "torchrec")}
        levels = {name: logging.getLogger(name).level for name in (None, "rechub_dist", "torch", "torchrec")}
        signals = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        flags = (logging.raiseExceptions, warnings.showwarning, torch.get_num_threads(), warnings.filters[:])
        seeds = (torch.get_rng_state().tolist(), random.getstate(), dict(os.environ))
        return handlers, levels, signals, flags, seeds

    tree = yaml.safe_load(path.read_text())
    before = state()
    for number in range(2):
        overrides = {"output_dir": str(tmp_path / f"python-{number}")}
        done = rechub_dist.train(tree, overrides)
        assert state() == before
        assert not dist.is_initialized()
        assert (done.summary.step, done.summary.test) == (summary.step, summary.test)
        assert "finished at step" in capfd.readouterr().err
        copy = run_file(tmp_path / f"copy-{number}", data_root, "DeepFM", **overrides)
        assert losses(copy) == losses(path)
    assert mine in logging.getLogger().handlers
    again = rechub_dist.train(config_of(path), {"train.epochs": 3})  # goes on
    assert again.summary.step > summary.step
    assert done.load().step == done.summary.best_step
    with pytest.raises(UserError, match=r"the run: unknown key 'train.epocs': did you mean 'epochs'"):
        rechub_dist.train(tree, {"train.epocs": 3})
    assert state() == before


def train_and_score(path: Path, rows: Path) -> tuple[int, list[float]]:
    """What a script under torchrun may do on every rank."""
    done = rechub_dist.train(path)
    assert not dist.is_initialized()
    return done.summary.step, done.load().predict(pq.read_table(rows))["predicted_click"].to_pylist()


def test_on_two_ranks(pool: RankPool, data_root: Path, tmp_path: Path) -> None:
    command, script = (run_file(tmp_path / name, data_root, "DeepFM") for name in ("command", "script"))
    pool.run(2, train, command)
    one, other = pool.run(2, train_and_score, script, data_root / "test")
    assert losses(script) == losses(command)
    assert one == other


def test_an_interrupted_cell_can_be_run_again(data_root: Path, tmp_path: Path) -> None:
    path = run_file(tmp_path, data_root, "DeepFM", train={"epochs": 4})
    before = signal.getsignal(signal.SIGINT)
    original = Loop.train

    def interrupted(loop: Loop) -> None:
        signal.raise_signal(signal.SIGINT)
        original(loop)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loop, "train", interrupted)
        assert rechub_dist.train(path).summary.preempted
    assert signal.getsignal(signal.SIGINT) == before
    assert not rechub_dist.train(path).summary.preempted


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"drop": "user"}, "the rows given: there is no column 'user'"),
        ({"item": [3] * ROWS}, "column 'item' is int64, but sparse feature 'item' needs a string"),
        ({"item": ["nothing"] * ROWS}, "the rows given: column 'item'.*nothing"),
        (7, "the rows given: got a int; give a pandas DataFrame"),
        ({"user": ["one"]}, "cannot be converted to an Arrow table"),
        ({"keep": ("user",)}, "keep: is for files"),
    ],
)
def test_mistakes(words_root: Path, shared_run: Any, change: Any, message: str) -> None:
    rows: Any = frame_of(words_root / "test").to_dict("list")
    if isinstance(change, dict):
        rows |= {name: values for name, values in change.items() if name in rows}
        rows.pop(change.get("drop"), None)
    else:
        rows = change
    keep = change.get("keep", ()) if isinstance(change, dict) else ()
    with pytest.raises(UserError, match=message):
        shared_run.predict(rows, keep=keep)


@pytest.fixture(scope="module")
def shared_run(words_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return rechub_dist.load(finished(tmp_path_factory.mktemp("shared"), words_root, "DeepFM"))


def test_the_lines_of_the_page(words_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_file(tmp_path, words_root, "DeepFM")
    frame = frame_of(words_root / "test", *LABELS)
    frame.to_parquet(tmp_path / "rows.parquet")
    monkeypatch.chdir(tmp_path)
    [code, *_] = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    scores = names["scores"]
    assert scores.index.equals(frame.index)
    assert scores["predicted_click"].between(0, 1).all()
