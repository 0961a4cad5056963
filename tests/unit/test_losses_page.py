"""docs/losses.md: its run files mean what it says, and it knows every loss and argument."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import yaml

from rechub_dist.assembly.parts import build
from rechub_dist.config.strict_yaml import parse_yaml
from rechub_dist.data.run_file import load_run
from rechub_dist.objectives.label_losses import LOSSES
from rechub_tests.runs import SCHEMA, run_file

PAGE = Path(__file__).parents[2] / "docs" / "losses.md"
EXAMPLES = [part.split("```")[0] for part in PAGE.read_text().split("```yaml\n")[1:]]
TENSORS = ("logits", "values", "labels")
LABELS: dict[str, Any] = {**SCHEMA["labels"], "rating": {"type": "multiclass", "classes": 5}}  # type: ignore[dict-item]
TASKS: dict[str, Any] = {
    "data": {"labels": ["click", "buy", "stay", "rating"]},
    "model": {"task_types": ["classification", "classification", "regression", "multiclass"], "num_tasks": 4},
}


@pytest.mark.parametrize("example", EXAMPLES)
def test_each_example_is_part_of_a_run_file(tmp_path: Path, example: str) -> None:
    (tmp_path / "dataset.yaml").write_text(yaml.safe_dump({**SCHEMA, "labels": LABELS}))
    tree = parse_yaml(example, "docs/losses.md")
    recall = tree["objective"]["name"] == "retrieval"
    model = "SASRec" if recall else "SharedBottom"
    path = run_file(tmp_path, tmp_path, model, **({} if recall else TASKS))
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | tree))
    build(load_run(path), device="cpu", world_size=1)


def test_it_names_every_loss_of_a_label_and_its_arguments() -> None:
    page = PAGE.read_text().partition("## Losses within groups")[0]
    rows = {line.split("`")[1]: line for line in page.splitlines() if line.startswith("| `")}
    for losses in LOSSES.values():
        for name, loss in losses.items():
            arguments = [name for name in inspect.signature(loss).parameters if name not in TENSORS]
            assert [argument for argument in arguments if f"`{argument}`" not in rows[name]] == []
