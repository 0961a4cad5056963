"""Checkpoints of released formats load, go on with the losses of their own continuation, and are looked into."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from rechub_dist.checkpoint import saved_steps
from rechub_dist.data.run_file import load_run
from rechub_dist.errors import UserError
from rechub_dist.training.trainer import run
from rechub_tests.ranks import RankPool

GOLDEN = Path(__file__).parents[1] / "golden"
FORMATS = sorted(path.name for path in GOLDEN.glob("format-*"))
RUNS = [(form, path.parent.name) for form in FORMATS for path in sorted((GOLDEN / form).glob("*/run.yaml"))]
RANKS = {"din": 2}


def test_there_are_some() -> None:
    assert FORMATS
    assert {name for _, name in RUNS} == {"deepfm", "din", "dssm", "mmoe", "sasrec"}


@pytest.fixture
def golden(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A copy of a format's folder, in which its runs lie below the working directory of their commands."""
    form = getattr(request, "param", "format-1")
    shutil.copytree(GOLDEN / form, tmp_path / form)
    return tmp_path / form


def resume(folder: Path, name: str, overrides: tuple[str, ...] = ()) -> dict[int, float]:
    """What every rank does, as the command in the folder would; returns the losses by step."""
    with contextlib.chdir(folder):
        run(load_run(Path(name, "run.yaml"), ["train.log_every=1", *overrides]))
        lines = map(json.loads, Path(name, "out", "metrics.jsonl").read_text().splitlines())
        return {line["step"]: line["loss"] for line in lines if line["split"] == "train"}


def expected(folder: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / name / "expected.json").read_text())
    return found


@pytest.mark.parametrize(("golden", "name"), RUNS, indirect=["golden"])
def test_they_go_on_with_the_losses_of_the_uninterrupted_run(pool: RankPool, golden: Path, name: str) -> None:
    steps = saved_steps(golden / name / "out" / "checkpoints")
    wanted = expected(golden, name)["losses"]
    found = pool.run(RANKS.get(name, 1), resume, golden, name)[0]
    assert list(found) == list(range(steps[-1] + 1, len(wanted) + 1))
    torch.testing.assert_close(list(found.values()), wanted[steps[-1] :], rtol=0, atol=1e-4)


@pytest.mark.parametrize(("golden", "name"), RUNS, indirect=["golden"])
def test_a_newer_one_of_a_golden_run_goes_on_as_well(pool: RankPool, golden: Path, name: str) -> None:
    """The checkpoints of today's format in the same run: saved on the way, and gone on from, on other ranks."""
    wanted = expected(golden, name)["losses"]
    first = saved_steps(golden / name / "out" / "checkpoints")[-1]
    pool.run(1, resume, golden, name, (f"train.max_steps={first + 2}",))
    found = pool.run(3, resume, golden, name)[0]
    assert list(found) == list(range(first + 1, len(wanted) + 1))
    torch.testing.assert_close(list(found.values()), wanted[first:], rtol=0, atol=1e-4)


def cli(folder: Path, *arguments: str) -> Any:
    line = [sys.executable, "-m", "rechub_dist", *arguments, "--json"]
    done = subprocess.run(line, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_they_are_verified_inspected_consolidated_and_evaluated(golden: Path) -> None:
    found = cli(golden, "checkpoint", "list", "deepfm/out")["checkpoints"]
    assert [(line["step"], line["best"], line["world_size"]) for line in found] == [(9, True, 1), (14, False, 1)]
    assert cli(golden, "checkpoint", "verify", "din/out")["step"] == 5
    found = cli(golden, "checkpoint", "inspect", "din/out")
    assert (found["model"], found["world_size"], found["data"]["batch_size"]) == ("DIN", 2, 64)
    assert {name: table["sharding"] for name, table in found["tables"].items()} == {
        "user": "row_wise",
        "brands": "replicated",
        "item": "table_wise",
        "shop": "table_wise",
    }
    assert cli(golden, "checkpoint", "diff", "deepfm/out", "deepfm/out/checkpoints/step-0000000014")["identity"] == []
    line = [sys.executable, "-m", "rechub_dist", "checkpoint", "consolidate", "mmoe/out", "--out", "mmoe.safetensors"]
    subprocess.run(line, cwd=golden, check=True, capture_output=True)
    assert (golden / "mmoe.safetensors").stat().st_size > 0
    found = cli(golden, "evaluate", "deepfm/out", "--data", "data/valid")
    assert found.pop("step") == 9
    assert found.pop("rows") == 90
    wanted = expected(golden, "deepfm")["valid"]["9"]
    assert found == pytest.approx(wanted, abs=1e-4)


SAME = {
    # what is written out at its default: of the objective, the model, the schema
    "deepfm": [
        "objective={name: pointwise, task_weights: {click: 1}, aux_weight: 1}",
        "model.activation=relu",
        "model.batch_norm=false",
        "data.features.user={kind: sparse, rows: 101, init_std: 0.3, column: user, hash: false}",
        "data.features.unread={kind: dense, column: age}",
        "embedding.optimizer={name: rowwise_adagrad}",
        "train.on_non_finite=skip",
        "version=1",
    ],
    # how recall models are evaluated, in the old place and in the new one
    "sasrec": [
        "objective={name: retrieval, num_negatives: 2, loss: bce, negatives: sampled, log_q: false, top_k: [3]}",
        "evaluation={exclude_seen: false, sampled_items: 7}",
        "model.item_num=61",
        "model.history=history",
        "embedding.sharding=row_wise",
    ],
    "dssm": ["objective={name: retrieval, negatives: in_batch}", "data.labels=[]", "model.temperature=0.05"],
}
OTHER = {
    "deepfm": {
        "objective={name: pointwise, aux_weight: 2}": "objective.aux_weight 1.0 -> 2.0",
        "model.batch_norm=true": "model.batch_norm false -> true",
        "data.features.age={kind: dense, transform: log}": 'data.features.age.transform "none" -> "log"',
        "optimizer.clip_norm=1": "optimizer.clip_norm null -> 1.0",
        "data.batch_size=32": "data.batch_size 64 -> 32",
    },
    "sasrec": {
        "objective.num_negatives=3": "objective.num_negatives 2 -> 3",
        "objective.loss=bpr": 'objective.loss "bce" -> "bpr"',
    },
}


@pytest.mark.parametrize("name", SAME)
def test_the_same_run_in_other_words_is_resumed(pool: RankPool, golden: Path, name: str) -> None:
    step = saved_steps(golden / name / "out" / "checkpoints")[-1]
    found = pool.run(1, resume, golden, name, (*SAME[name], f"train.max_steps={step + 1}"))[0]
    torch.testing.assert_close(found, {step + 1: expected(golden, name)["losses"][step]}, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", OTHER)
def test_another_run_is_refused_by_what_differs(pool: RankPool, golden: Path, name: str) -> None:
    for override, line in OTHER[name].items():
        with pytest.raises(UserError) as error:
            pool.run(1, resume, golden, name, (override,))
        message = str(error.value)
        assert f"holds another run; these differ (saved -> wanted): {line}. Choose another output_dir" in message
