"""The search spaces of the package fit the models that they name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from rechub_dist.assembly.examples import example_run, example_schema
from rechub_dist.config import run_from
from rechub_dist.data.prepare.writer import schema_text
from rechub_dist.data.run_file import resolve_dataset
from rechub_dist.launching.search import read_space
from rechub_dist.models import catalogue

SPACES = Path(__file__).parents[2] / "configs" / "spaces"
CASES = [
    (path.stem, model)
    for path in sorted(SPACES.glob("*.yaml"))
    for model in re.findall(r"\b[A-Z]\w+", path.read_text().partition(": rechub-dist")[0].partition("(")[2])
    if model in catalogue()
]


def test_every_family_has_one() -> None:
    assert len(CASES) > 12
    assert {name for name, _ in CASES} == {path.stem for path in SPACES.glob("*.yaml")}


@pytest.mark.parametrize(("space", "model"), CASES)
def test_every_value_is_valid(space: str, model: str) -> None:
    tree = yaml.safe_load(example_run(catalogue()[model]))
    tree["data"]["dataset"] = yaml.safe_load(schema_text("example", example_schema()))
    config = resolve_dataset(run_from(tree), Path())
    assert read_space(SPACES / f"{space}.yaml", config, 1)
