"""The notebooks of examples/: their cells run, in order, and what they teach has learnt something."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "notebooks"
# what a metric of each has to be beyond
LEARNT = {
    "ctr": ("auc", 0.65),
    "retrieval": ("ndcg@10", 0.08),
    "several_labels": ("click/auc", 0.6),
    "own_model": ("auc", 0.6),
}


def code_of(name: str) -> str:
    book = json.loads((FOLDER / f"{name}.ipynb").read_text())
    assert (book["nbformat"], book["nbformat_minor"]) == (4, 5)
    cells = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] for cell in cells)  # they are made where they are read
    return "\n".join("".join(cell["source"]) for cell in cells)


def test_each_is_run() -> None:
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == set(LEARNT)


@pytest.mark.slow
@pytest.mark.parametrize("name", LEARNT)
def test_its_cells_run(tmp_path: Path, name: str) -> None:
    code = f"{code_of(name)}\nimport json\nprint(json.dumps(metrics))\n"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    metric, least = LEARNT[name]
    assert json.loads(done.stdout.splitlines()[-1])[metric] > least
