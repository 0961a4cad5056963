"""`rechub-dist models --markdown`: docs/models/ is what the code says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from torch import nn
from typer.testing import CliRunner

from rechub_dist.assembly.examples import example_model
from rechub_dist.assembly.flow import flow, parts
from rechub_dist.cli.main import app
from rechub_dist.cli.model_pages import WHEN, page, picture
from rechub_dist.errors import UserError
from rechub_dist.models import catalogue

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("name", catalogue())
def test_the_page_is_what_the_code_says(name: str) -> None:
    text = (DOCS / "models" / f"{name.lower()}.md").read_text(encoding="utf-8")
    assert text == page(catalogue()[name]), "rechub-dist models --markdown docs/models"


def test_no_page_is_of_a_model_that_is_gone() -> None:
    assert {file.stem for file in (DOCS / "models").glob("*.md")} == {name.lower() for name in catalogue()}


def test_which_model_to_take() -> None:
    assert set(WHEN) == set(catalogue())
    text = (DOCS / "choose_a_model.md").read_text(encoding="utf-8")
    assert [name for name, when in WHEN.items() if f"| [{name}](models/{name.lower()}.md) | {when} |" not in text] == []


def test_figures_are_those_of_the_results() -> None:
    table = re.findall(r"^\| \[\w+\].*\| ([^|]*) \|$", (DOCS / "choose_a_model.md").read_text(), re.MULTILINE)
    figures = re.findall(r"\b0\.\d{4}\b", " ".join(table))
    results = (DOCS / "models.md").read_text(encoding="utf-8")
    assert len(table) == len(catalogue())
    assert [figure for figure in figures if figure not in results] == []


def test_what_feeds_what() -> None:
    edges = set(flow(example_model(catalogue()["DIN"])))
    assert {("history", "attention"), ("item", "attention"), ("attention", "mlp"), ("mlp", "output.logits")} <= edges
    assert ("item", "mlp") in edges
    assert ("sparse_0", "attention") not in edges


def test_a_sum_beside_the_parts_is_an_arrow_of_its_own() -> None:
    edges = flow(example_model(catalogue()["DeepFM"]))
    assert ("sparse_0", "output.logits") in edges
    assert ("sparse_0.linear", "output.logits") not in edges


def test_parts_of_a_list_are_told_apart() -> None:
    module = nn.Module()
    module.layers = nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1)])
    module.dropout = nn.Dropout()
    assert [name for name, _ in parts(module)] == ["layers.0", "layers.1"]


def test_inputs_that_go_the_same_way_are_one_box() -> None:
    drawn = picture(example_model(catalogue()["DCN"]))
    assert drawn.count('[("') == 1
    assert "sparse_0, sparse_1, sparse_2, sparse_3" in drawn


def test_a_file_of_another_kind_stays(tmp_path: Path) -> None:
    (tmp_path / "din.md").write_text("mine")
    with pytest.raises(UserError, match="none of the pages"):
        CliRunner().invoke(app, ["models", "--markdown", str(tmp_path)], catch_exceptions=False)
    assert [file.name for file in tmp_path.iterdir()] == ["din.md"]
    with pytest.raises(UserError, match="leave NAME"):
        CliRunner().invoke(app, ["models", "DIN", "--markdown", str(tmp_path)], catch_exceptions=False)
