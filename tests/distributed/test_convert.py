"""Weights of torch-rechub: converted, they answer as torch-rechub did; golden/torch_rechub has what that was."""

from __future__ import annotations

import json
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from torch import Tensor

from rechub_dist.data.run_file import load_run
from rechub_dist.errors import UserError
from rechub_dist.inference.convert import convert
from rechub_dist.inference.run import load
from rechub_dist.inference.torch_rechub import REFUSED
from rechub_dist.models import catalogue
from rechub_tests.runs import run_file, write_data

GOLDEN = Path(__file__).parents[1] / "golden" / "torch_rechub"
CASES = sorted(path.parent.name for path in GOLDEN.glob("*/weights.pth"))
ROWS = json.loads((GOLDEN / "rows.json").read_text())


def converted(case: str, out: Path, weights: Path | None = None, *overrides: str) -> Path:
    config = load_run(GOLDEN / case / "run.yaml", [f"output_dir={out}", *overrides])
    convert(weights or GOLDEN / case / "weights.pth", config)
    return out


@pytest.mark.parametrize("case", CASES)
def test_answers_are_those_of_torch_rechub(case: str, tmp_path: Path) -> None:
    run = load(converted(case, tmp_path / "out"))
    assert run.step == 0
    expected = json.loads((GOLDEN / case / "expected.json").read_text())
    if "user" in expected:
        vectors = {"user": "vectors", "item": "vector"}
        found = {side: run.vectors(side, ROWS)[column] for side, column in vectors.items()}
        got = {side: np.array([np.ravel(row) for row in map(_flat, rows)]) for side, rows in found.items()}
    else:
        got = run.predict(ROWS)
    for name, values in expected.items():
        wanted = np.array(values)
        assert np.std(wanted) > 0.05
        np.testing.assert_allclose(got[name], wanted, rtol=1e-5, atol=1e-5)


def _flat(vectors: Any) -> np.ndarray:
    """A row's only vector."""
    return np.concatenate([np.atleast_1d(part) for part in vectors])


def test_most_models_are_covered() -> None:
    assert {"afm", "deepfm", "dssm", "esmm", "sharedbottom"} <= set(CASES)
    assert set(REFUSED) < set(catalogue())


@pytest.mark.parametrize("model", REFUSED)
def test_other_mathematics_is_refused(model: str, tmp_path: Path) -> None:
    write_data(tmp_path / "data", 10)
    config = load_run(run_file(tmp_path, tmp_path / "data", model))
    with pytest.raises(UserError, match=f"weights.pth: {model} of torch-rechub does not convert: .*; train it here"):
        convert(tmp_path / "weights.pth", config)
    assert not (tmp_path / "out").exists()


Change = Callable[[dict[str, Tensor]], Any]


def renamed(state: dict[str, Tensor]) -> Any:
    return {f"module.{name}": value for name, value in state.items()}  # as DataParallel does


def without(state: dict[str, Tensor]) -> Any:
    return {name: value for name, value in state.items() if name != "mlp.mlp.0.bias"}


def another(state: dict[str, Tensor]) -> Any:
    return {**state, "mlp.mlp.9.weight": torch.zeros(2)}


def narrower(state: dict[str, Tensor]) -> Any:
    return {**state, "embedding.embed_dict.user.weight": torch.zeros(10, 4)}


def reordered(state: dict[str, Tensor]) -> Any:
    last = {name: value for name, value in state.items() if ".user." in name}
    return {**{name: value for name, value in state.items() if name not in last}, **last}


def with_nan(state: dict[str, Tensor]) -> Any:
    return {**state, "mlp.mlp.0.bias": torch.full((8,), torch.nan)}


def with_dice(state: dict[str, Tensor]) -> Any:
    return {**state, "mlp.mlp.2.alpha": torch.zeros(1)}


def a_list(state: dict[str, Tensor]) -> Any:
    return list(state.values())


@pytest.mark.parametrize(
    ("change", "overrides", "error"),
    [
        (without, (), "has no mlp.mlp.0.bias, which the run's model needs: did you mean"),
        (another, (), "has mlp.mlp.9.weight, for which the run's model has no place; make it the same model"),
        (narrower, (), "has table 'user' as 10x4, and the run's model as 11x4; make its sizes those of the file"),
        (reordered, (), "has the features in the order item, tags, brands, user, the run's model in the order user,"),
        (with_nan, (), "'mlp.mlp.0.bias' has values that are no finite numbers"),
        (with_dice, (), "has Dice in mlp, which normalises over the units of a row; it does not convert"),
        (a_list, (), "holds a list, not weights: save model.state_dict()"),
        (dict, ("model.batch_norm=false",), "is of networks with batch norm: set model.batch_norm: true"),
        (dict, ("model.activation=prelu",), "has no prelu in mlp: set the model's activation to what it was"),
        (dict, ("model.activation=dice",), "is of networks whose Dice is another one"),
        (dict, ("model.hidden_units=[8,5]",), "make its sizes those of the file"),
        (dict, ("model.features=[user,item,tags,brands,history]",), "for 'item' and for 'history', which share a tab"),
    ],
)
def test_what_does_not_fit_is_told(change: Change, overrides: tuple[str, ...], error: str, tmp_path: Path) -> None:
    weights = tmp_path / "weights.pth"
    torch.save(change(torch.load(GOLDEN / "deepfm" / "weights.pth", weights_only=True)), weights)
    with pytest.raises(UserError, match=re.escape(error)):
        converted("deepfm", tmp_path / "out", weights, *overrides)


def test_weights_of_data_parallel(tmp_path: Path) -> None:
    weights = tmp_path / "weights.pth"
    torch.save(renamed(torch.load(GOLDEN / "deepfm" / "weights.pth", weights_only=True)), weights)
    one, other = (load(converted("deepfm", tmp_path / str(n), path)) for n, path in enumerate((None, weights)))
    np.testing.assert_array_equal(one.predict(ROWS)["predicted_click"], other.predict(ROWS)["predicted_click"])


class _Opens:
    def __reduce__(self) -> Any:
        return (open, ("opened", "w"))


def test_a_pickle_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, content in (("pickle", pickle.dumps(_Opens())), ("text", b"weights")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=rf"{name} is no file of torch.save\(model.state_dict\(\)\): "):
            converted("deepfm", tmp_path / "out", tmp_path / name)
    torch.save(_Opens(), tmp_path / "saved")
    with pytest.raises(UserError, match=r"saved is no file of torch.save"):
        converted("deepfm", tmp_path / "out", tmp_path / "saved")
    with pytest.raises(UserError, match=r"no such file: .*none\.pth"):
        converted("deepfm", tmp_path / "out", tmp_path / "none.pth")
    assert not (tmp_path / "opened").exists()


def test_no_checkpoint_is_replaced(tmp_path: Path) -> None:
    converted("deepfm", tmp_path / "out")
    with pytest.raises(UserError, match=r"has a checkpoint of step 0 already, which is not replaced; choose another"):
        converted("deepfm", tmp_path / "out")


@pytest.mark.slow
def test_the_commands(tmp_path: Path) -> None:
    """Convert, evaluate, predict, export, and train on: what came of torch-rechub is a run like any other."""
    labels = np.array(json.loads((GOLDEN / "deepfm" / "expected.json").read_text())["predicted_click"]) > 0.5
    for split in ("train", "valid", "test"):
        (tmp_path / "data" / split).mkdir(parents=True)
        pq.write_table(pa.table({**ROWS, "click": labels.astype(np.int8)}), tmp_path / "data" / split / "0.parquet")
    shutil.copy(GOLDEN / "dataset.yaml", tmp_path / "data" / "dataset.yaml")
    tree = yaml.safe_load((GOLDEN / "deepfm" / "run.yaml").read_text())
    tree["data"] = {"root": "data", "batch_size": 16, "labels": ["click"]}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))

    def run(*arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "rechub_dist", *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stderr
        return done

    weights = str(GOLDEN / "deepfm" / "weights.pth")
    told = run("convert", "torch-rechub", weights, "run.yaml", "--out", "converted").stdout
    assert told == f"converted: DeepFM with the weights of {weights}, as a checkpoint of step 0\n"
    assert json.loads(run("evaluate", "converted", "--data", "data/test", "--json").stdout)["auc"] == 1.0
    run("predict", "converted", "--data", "data/test", "--out", "predictions")
    predicted = pq.read_table(tmp_path / "predictions")["predicted_click"].to_numpy()
    np.testing.assert_array_equal(predicted > 0.5, labels)
    assert "largest differences" in run("export", "converted", "--out", "bundle", "--format", "onnx,torch").stdout
    told = run("train", "run.yaml", "--set", "warm_start.from=converted", "--set", "output_dir=more").stderr
    assert re.search(r"warm start from \S*converted\S*, step 0: 8 tables, ", told), told
    assert "left as initialised" not in told
    refused = run("train", "run.yaml", "--set", "output_dir=converted", code=2).stderr
    assert "holds another run" in refused
    refused = run("convert", "torch-rechub", weights, "run.yaml", "--out", "converted", code=2).stderr
    assert refused.count("\n") == 1
