"""A user's own model, loss and optimizer over ranks: resumed as ours are, and the example's own commands."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from rechub_dist.errors import UserError
from rechub_dist.inference.bundle.bundle import Bundle
from rechub_tests.ranks import RankPool
from rechub_tests.runs import last_checkpoint, losses, output, records, run_file, train

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "own_model"
CODE = '''
import torch
import torch.nn.functional as F
from rechub_dist.features import Label
from rechub_dist.models import DeepFM
from rechub_dist.objectives import TaskObjective

class Net(DeepFM):
    """DeepFM under another name."""

def bce(logits, labels):
    return F.binary_cross_entropy_with_logits(logits, labels, reduction="none")

class Bernoulli(TaskObjective):
    def __init__(self, labels: tuple[Label, ...]) -> None:
        super().__init__(labels, {})

    def losses(self, output, labels):
        return bce(output.logits, labels).sum(dim=1)

    def predictions(self, output):
        return dict(zip(self.scored, output.logits.sigmoid().unbind(dim=1)))

class Share:
    """Of predictions above one half."""
    direction, group = "max", None

    def __init__(self) -> None:
        self.sums = torch.zeros(2, dtype=torch.float64)

    def update(self, rows):
        self.sums += torch.tensor([(rows.predictions > 0.5).sum(), len(rows.predictions)])

    def merge(self, ranks):
        self.sums = ranks.all_reduce_sum(self.sums)

    def compute(self):
        return (self.sums[0] / self.sums[1]).item()

def mean(logits, labels):
    return bce(logits, labels).mean()
'''


def own_run(folder: Path, root: Path, module: str) -> Path:
    """A run file with a module beside it; of its own name, as the pool's ranks keep what they have imported."""
    path = run_file(folder, root, "DeepFM")
    (folder / f"{module}.py").write_text(CODE)
    return path


@pytest.mark.slow
def test_the_same_run_under_another_name(pool: RankPool, data_root: Path, tmp_path: Path) -> None:
    ours = run_file(tmp_path / "ours", data_root, "DeepFM")
    theirs = own_run(tmp_path / "theirs", data_root, "own_ranks_code")
    pool.run(2, train, ours)
    wanted = last_checkpoint(ours)
    named = ["model.name=own_ranks_code:Net", "objective={name: pointwise, loss: own_ranks_code:bce}"]
    pool.run(2, train, theirs, [*named, "optimizer.name=torch.optim:Adam"])
    check_same(theirs, ours, wanted)
    whole = own_run(tmp_path / "whole", data_root, "own_ranks_code_2")
    named = ["model.name=own_ranks_code_2:Net", "objective={name: 'own_ranks_code_2:Bernoulli'}"]
    pool.run(2, train, whole, [*named, "evaluation.metrics=[default, own_ranks_code_2:Share]"])
    check_same(whole, ours, wanted)
    (test,) = records(whole, "test")
    arguments = [str(output(whole)), "--data", str(data_root / "test"), "--json", "--set", f"code={whole.parent}"]
    command = [sys.executable, "-m", "rechub_dist", "evaluate", *arguments, "--allow-code", "own_ranks_code_2"]
    alone = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert alone["Share"] == pytest.approx(test["Share"], abs=1e-12)


def check_same(theirs: Path, ours: Path, wanted: dict[str, torch.Tensor]) -> None:
    assert losses(theirs) == losses(ours)
    found = last_checkpoint(theirs)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name


def test_an_optimizer_goes_on_where_it_was(pool: RankPool, data_root: Path, tmp_path: Path) -> None:
    code = tmp_path / "code"
    code.mkdir()
    (code / "own_resumed_code.py").write_text(CODE)
    settings = [f"code={code}", "objective={name: pointwise, loss: own_resumed_code:bce}"]
    settings += ["optimizer={name: 'torch.optim:NAdam', lr: 0.01, arguments: {momentum_decay: 0.01}}"]
    reference, path = (run_file(tmp_path / name, data_root, "DeepFM") for name in ("reference", "path"))
    pool.run(2, train, reference, settings)
    pool.run(2, train, path, [*settings, "train.epochs=1"])
    pool.run(1, train, path, settings)
    torch.testing.assert_close(losses(path), losses(reference), rtol=0, atol=1e-5)
    state = last_checkpoint(path)
    assert any(name.endswith("/mu_product") for name in state)
    with pytest.raises(UserError, match=r"objective.loss .*own_resumed_code:bce.* -> null"):
        pool.run(2, train, path, [settings[2]])


def test_a_mean_is_refused_on_all_ranks(pool: RankPool, data_root: Path, tmp_path: Path) -> None:
    path = own_run(tmp_path, data_root, "own_mean_code")
    with pytest.raises(UserError, match=r"objective.loss: returns a tensor"):
        pool.run(2, train, path, ["objective={name: pointwise, loss: own_mean_code:mean}"])


def commands(document: Path) -> list[str]:
    """Those of the document's block of commands that trains the example."""
    blocks = re.findall(r"```sh\n(.*?)```", document.read_text(encoding="utf-8"), flags=re.DOTALL)
    (found,) = [block for block in blocks if "own_model/run.yaml" in block]
    return found.replace("\\\n", " ").splitlines()


def test_the_example_is_told_alike() -> None:
    assert commands(EXAMPLE / "README.md") == commands(ROOT / "docs" / "models.md")


def run(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    name, *arguments = shlex.split(command)
    assert name == "rechub-dist"
    whole = [sys.executable, "-m", "rechub_dist", *arguments]
    return subprocess.run(whole, cwd=folder, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
def test_the_example(tmp_path: Path) -> None:
    shutil.copytree(EXAMPLE, tmp_path / "examples" / "own_model")
    for command in commands(EXAMPLE / "README.md"):
        done = run(command, tmp_path)
        assert done.returncode == 0, done.stderr
        if "evaluate" in command:
            found = json.loads(done.stdout)
    trained = tmp_path / "runs" / "own_model"
    recorded = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    (test,) = [record for record in recorded if record["split"] == "test"]
    assert found["auc"] == pytest.approx(test["auc"], abs=1e-9)
    assert found["auc"] > 0.6  # it has learnt something
    assert found["Profit"] == pytest.approx(test["Profit"], abs=1e-9)
    table = pq.read_table(tmp_path / "predictions")
    assert table.num_rows == found["rows"] == 2000
    chosen = table["predicted_label"].to_numpy() >= 0.3
    labels = table["label"].to_numpy()
    assert found["Profit"] == pytest.approx(np.mean(chosen * (4 * labels - (1 - labels))), abs=1e-6)
    refused = run("rechub-dist evaluate runs/own_model --data data/own_model/test", tmp_path)
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert "--allow-code model --allow-code loss --allow-code metric --set code=examples/own_model" in refused.stderr


@pytest.mark.slow
def test_a_model_of_ones_own_is_exported(pool: RankPool, data_root: Path, tmp_path: Path) -> None:
    path = own_run(tmp_path, data_root, "own_exported_code")
    pool.run(1, train, path, ["model.name=own_exported_code:Net"])
    out = ["--out", str(tmp_path / "bundle"), "--format", "onnx,torch,whole,triton"]
    command = [sys.executable, "-m", "rechub_dist", "export", str(output(path)), *out]
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "--allow-code own_exported_code" in refused.stderr
    allowed = [*command, "--allow-code", "own_exported_code", "--set", f"code={tmp_path}"]
    done = subprocess.run(allowed, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "own_exported_code:Net, step" in done.stdout
    assert "largest differences from the run's own on 90 rows: predicted_click " in done.stdout
    assert (tmp_path / "bundle" / "model_repository" / "Net" / "config.pbtxt").exists()
    sys.modules.pop("own_exported_code", None)
    for engine in ("onnx", "torch"):
        scores = Bundle(tmp_path / "bundle", engine=engine).score(pq.read_table(data_root / "test"))  # type: ignore[arg-type]
        assert scores.num_rows == 70
    assert "own_exported_code" not in sys.modules  # whoever scores needs none of it
