"""docs/models.md: its options are the constructors', and its settings make a run."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import yaml

from rechub_dist.config.run import run_from
from rechub_dist.models import catalogue

PAGE = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
SECTION = PAGE.split("## Where papers")[1].split("\n## ")[0]


def test_options_are_the_constructors() -> None:
    model, found = "", {}
    for row in re.findall(r"^\| (\w*) ?\| (`.*?) \| (.*?) \|", SECTION, re.MULTILINE):
        model = row[0] or model
        keys, values = re.findall(r"`(\w+)`", row[1]), row[2].split("; ") if "; " in row[2] else [row[2]]
        found |= {(model, key): values[min(i, len(values) - 1)].split(",")[0] for i, key in enumerate(keys)}
    assert len(found) == 18
    for (name, key), default in found.items():
        parameter = inspect.signature(catalogue()[name].__init__).parameters[key]
        assert parameter.kind is parameter.KEYWORD_ONLY
        if key == "embedding_dropout_rate":  # None: another key's
            assert (parameter.default, default) == (None, "`dropout_rate`")
        else:
            assert (None if default == "none" else yaml.safe_load(default.strip("`"))) == parameter.default, key


def test_the_published_settings_make_a_run() -> None:
    [text] = re.findall(r"```yaml\n(.*?)```", SECTION, re.DOTALL)
    tree = yaml.safe_load(text)
    run = run_from({"output_dir": "out", **tree, "data": {"root": "data", **tree["data"]}})
    assert run.objective.loss == "bpr_max"
    assert catalogue()["GRU4Rec"](**{key: value for key, value in tree["model"].items() if key != "name"}).elu == 1.0
