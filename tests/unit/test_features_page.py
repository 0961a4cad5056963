"""The page of features: what its examples declare can be parsed, and it leaves no kind out."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from rechub_dist.schema import DERIVED_KINDS, KINDS, parse_schema

TEXT = (Path(__file__).parents[2] / "docs" / "features.md").read_text(encoding="utf-8")
EXAMPLES: list[dict[str, Any]] = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)]


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_can_be_parsed(example: dict[str, Any]) -> None:
    schema = parse_schema(example, "data")
    assert len(schema.features) == len(example["features"])
    read = {name for one in schema.derived for name in one.inputs}
    read |= {feature.source for feature in schema.features if hasattr(feature, "source")}
    assert {one.name for one in schema.derived} <= read, "an example derives a column for nothing"


def test_every_kind_has_an_example() -> None:
    sections = [example.get(part, {}) for example in EXAMPLES for part in ("features", "derive")]
    shown = {spec["kind"] for section in sections for spec in section.values()}
    assert shown == KINDS.keys() | DERIVED_KINDS.keys()
    headings = set(re.findall(r"^### (.*)$", TEXT, re.MULTILINE))
    told = {kind.strip() for heading in headings for kind in heading.partition(":")[0].split(",")}
    assert told == KINDS.keys() | DERIVED_KINDS.keys()
