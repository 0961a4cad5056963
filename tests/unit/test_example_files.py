"""`rechub-dist examples`: what configs/ and launch/ hold, from wherever the package lies."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from rechub_dist.cli.example_files import copy_examples, list_examples, read_example
from rechub_dist.errors import UserError

ROOT = Path(__file__).parents[2]


def test_each_file_is_listed_and_can_be_printed() -> None:
    console = Console(file=io.StringIO(), record=True, width=200)
    list_examples(console)
    shown = console.export_text()
    files = sorted((ROOT / "configs").rglob("*.yaml"))
    assert len(files) > 20
    for file in files:
        name = f"{file.parent.name}/{file.stem}"
        assert f"{name} " in shown
        assert read_example(name) == file.read_text()
    assert read_example("deepfm_synthetic") == (ROOT / "configs/runs/deepfm_synthetic.yaml").read_text()
    assert read_example("configs/runs/deepfm_synthetic.yaml") == read_example("deepfm_synthetic")


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(UserError, match="deepfm_synthetc: no such example; did you mean 'deepfm_synthetic'"):
        read_example("deepfm_synthetc")


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    copy_examples(tmp_path / "mine")
    assert (tmp_path / "mine/launch/slurm/train.sbatch").exists()
    kept = tmp_path / "mine/configs/runs/deepfm_synthetic.yaml"
    kept.write_text("mine")
    for out in (tmp_path / "mine", kept):
        with pytest.raises(UserError, match="exists already; name a new or empty folder"):
            copy_examples(out)
    assert kept.read_text() == "mine"
