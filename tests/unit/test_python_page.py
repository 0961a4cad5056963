"""docs/python.md is what the code says, and docs/formats.md has every key of what is written."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from rechub_dist.checkpoint.manifest import CheckpointManifest, SavedRun
from rechub_dist.cli.python_page import page
from rechub_dist.inference.bundle.deltas import DeltaManifest
from rechub_dist.inference.bundle.manifest import BundleManifest

DOCS = Path(__file__).parents[2] / "docs"
FORMATS = (DOCS / "formats.md").read_text(encoding="utf-8")
KEYS = {
    "| key | |\n|---|---|\n| `format` | 1 |\n| `step`": {
        field.name for field in dataclasses.fields(CheckpointManifest)
    },  # type: ignore[arg-type]
    "| key of `run` | |": set(SavedRun.__annotations__),
    "| key | |\n|---|---|\n| `format` | 1 |\n| `model`": set(BundleManifest.model_fields),
    "| key | |\n|---|---|\n| `format` | 1 |\n| `parent`": set(DeltaManifest.model_fields),
}


def test_the_page_is_what_the_code_says() -> None:
    text = (DOCS / "python.md").read_text(encoding="utf-8")
    assert page() + "\n" == text, "python -m rechub_dist.cli.python_page > docs/python.md"


def test_every_argument_has_a_meaning_and_every_method_a_text() -> None:
    assert [line for line in page().splitlines() if re.match(r"- `[\w`, ]*`: *$", line)] == []


@pytest.mark.parametrize("start", KEYS)
def test_every_key_of_a_manifest_is_there(start: str) -> None:
    assert FORMATS.count(start) == 1
    table = FORMATS[FORMATS.index(start) :].partition("\n\n")[0]
    rows = table.splitlines()[2:]
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row.split(" | ")[0])} == KEYS[start]
