"""Retraining day by day, by the commands of the documentation."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from rechub_dist.checkpoint.find import find_checkpoint
from rechub_dist.config import StorageConfig
from rechub_dist.inference.bundle.bundle import Bundle
from rechub_dist.inference.bundle.manifest import read_manifest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "daily.md"


def blocks(page: Path) -> list[str]:
    """The commands of a page, block by block."""
    return re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture(scope="module")
def days(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two days, made by the page's first block."""
    folder = tmp_path_factory.mktemp("daily")
    (folder / "examples").symlink_to(ROOT / "examples")
    (folder / "bin").mkdir()
    for name, module in (("rechub-dist", "-m rechub_dist"), ("python", "")):
        script = folder / "bin" / name
        script.write_text(f'#!/bin/sh\nexec {sys.executable} {module} "$@"\n')
        script.chmod(0o755)
    (folder / "said").write_text(typed(folder, blocks(PAGE)[0]))
    return folder


def typed(folder: Path, block: str) -> str:
    """What the commands of a block say."""
    env = {**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["sh", "-e"], input=block, text=True, cwd=folder, env=env, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def vocabulary(days: Path, day: str, name: str) -> dict[str, int]:
    table = pq.read_table(days / "data" / day / "_vocabularies" / f"{name}.parquet")
    return dict(zip(table["value"].to_pylist(), table["id"].to_pylist(), strict=True))


def test_known_values_keep_their_ids_and_new_ones_follow(days: Path) -> None:
    first, second = (vocabulary(days, day, "item") for day in ("2024-05-01", "2024-05-02"))
    assert second.items() > first.items()
    assert sorted(second.values()) == list(range(1, len(second) + 1))
    assert min(second[item] for item in second.keys() - first.keys()) == len(first) + 1


def test_only_the_day_is_trained_on_and_its_histories_reach_back(days: Path) -> None:
    day = days / "data" / "2024-05-02"
    rows = {split: pq.read_table(day / split, columns=["time", "history"]) for split in ("train", "valid", "test")}
    hours = {split: {(t.day, t.hour) for t in table["time"].to_pylist()} for split, table in rows.items()}
    assert {d for d, _ in hours["train"]} == {2}
    assert (hours["valid"], hours["test"]) == ({(2, 22)}, {(2, 23)})
    early = [h for t, h in zip(*(rows["train"][c].to_pylist() for c in ("time", "history")), strict=True) if not t.hour]
    assert np.mean([len(history) > 0 for history in early]) > 0.9, "the day before is in them"


def test_tables_go_on_with_more_rows(days: Path) -> None:
    weights = {}
    for day in ("2024-05-01", "2024-05-02"):
        _, manifest = find_checkpoint(str(days / "runs" / day), StorageConfig(), "best")
        weights[day] = {key: tuple(entry.shape) for key, entry in manifest.tensors.items()}
    assert weights["2024-05-01"]["tables/item/weight"][0] < weights["2024-05-02"]["tables/item/weight"][0]
    assert "grown: item from 61 rows" in (days / "said").read_text()


def test_drift_is_told(days: Path) -> None:
    said = (days / "said").read_text()
    facts = [json.loads((days / "data" / day / "import.json").read_text()) for day in ("2024-05-01", "2024-05-02")]
    before, now = (fact["labels"]["test"]["clicked"] for fact in facts)
    assert f"test: mean of clicked {now:.4f} (before: {before:.4f})" in said


def test_each_day_is_published(days: Path) -> None:
    """By the third block. There are new items on the second day, so that it is a whole bundle again."""
    said = typed(days, blocks(PAGE)[2])
    first, second = (days / "published" / "daily" / f"{number:06d}-bundle" for number in (1, 2))
    assert f"published/daily/{first.name}: version " in said
    assert "in full (no delta leads here: table 'item' is " in said
    found = Bundle(days / "published" / "daily", check=True)
    assert found.manifest == read_manifest(second)
    assert found.manifest.checked["rows"] > 100
    assert read_manifest(first).tables["item"].rows < found.manifest.tables["item"].rows


def test_the_page_says_what_the_script_does() -> None:
    """The second block is what the script runs for the second day."""
    script = (ROOT / "examples" / "daily" / "retrain.sh").read_text(encoding="utf-8")
    for option in re.findall(r"--set \"?([a-z_.]+)=", blocks(PAGE)[1]):
        assert f"{option}=" in script
