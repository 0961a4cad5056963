"""Ray: a model of a user's own travels to the ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rechub_tests.ray_runs import ray_command
from rechub_tests.runs import run_file

pytest.importorskip("ray", reason="ray is not installed (the extra `ray`)")

# What has travelled is on a rank's path: code without data. (Its working directory is one that Ray Train has made.)
CODE = """
import os
import sys
from pathlib import Path
from rechub_dist.models import DeepFM

if "RANK" in os.environ:
    (shipped,) = {place for place in map(Path, sys.path) if place.name.startswith("_ray_pkg_")}
    assert (shipped / "own_ray_code.py").exists() and (shipped / "deeper" / "part.py").exists()
    assert not (shipped / "large.bin").exists()

class Net(DeepFM): ...
"""


@pytest.mark.slow
def test_a_model_travels_with_the_working_directory(launch_data: Path, tmp_path: Path) -> None:
    path = run_file(tmp_path, launch_data, "DeepFM", train={"epochs": 1})
    (tmp_path / "own_ray_code.py").write_text(CODE)
    (tmp_path / "large.bin").write_bytes(b"0" * 1000)
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper" / "part.py").write_text("")
    named = ["--set", "model.name=own_ray_code:Net", "--num-workers", "2"]
    run = ray_command("train", str(path), *named)
    assert run.wait() == 0, run.text
    evaluated = ray_command("train", str(path), *named, "--evaluate", f"{launch_data}/test", "--json")
    assert evaluated.wait() == 0, evaluated.text
    assert json.loads(evaluated.text.strip().splitlines()[-1])["rows"] > 0
    # a run file that does not name the code of the checkpoint beside it does not allow it
    other = ray_command("train", str(path), "--num-workers", "2", "--evaluate", f"{launch_data}/test")
    assert other.wait() == 2
    assert "--allow-code own_ray_code" in other.text
