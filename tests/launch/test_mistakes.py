"""The page of mistakes lists what the script makes, and a handful of them are made as it makes them."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from mistaken.scene import LONGEST, Mistake, Scene, outcome, write_data
from mistakes import SECTIONS, cell, rows_of

PAGE = Path(__file__).parents[2] / "docs" / "errors.md"
MISTAKES = {mistake.what: mistake for section in SECTIONS for mistake in section.mistakes}


def test_the_page_lists_every_mistake_as_the_script_has_made_it() -> None:
    listed = [(cell(m.what), str(ranks)) for section in SECTIONS for m in section.mistakes for ranks in m.ranks]
    found = rows_of(PAGE.read_text())
    assert Counter(listed) == Counter(set(listed))  # no name twice
    assert set(found) - {("mistake", "ranks"), ("---", "---")} == set(listed)
    ranks = Counter(ranks for _, ranks in listed)
    assert ranks["1"] >= 100
    assert ranks["2"] >= 40
    for what, of in listed:
        _, _, _, line, code, seconds, _ = (part.strip() for part in re.split(r"(?<!\\)\|", found[what, of]))
        assert line.startswith("error: "), what
        assert len(line) <= LONGEST, what
        assert code == "2", what
        assert float(seconds) > 0, what


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "ranks"),
    [
        ("`train.epoch=3`", 1),
        ("a pipe as dataset.yaml", 1),
        ("a CSV file called .parquet", 2),
        ("logs in output_dir is a file", 2),
        ("`optimizer.betas=[2, 0.9]`", 2),
        ("a warm start with a corrupt Parquet file", 1),
    ],
)
def test_a_mistake_is_one_line(tmp_path: Path, what: str, ranks: int) -> None:
    found = outcome(MISTAKES[what], ranks, tmp_path / "here", None)
    assert found.fault is None, found.fault


@pytest.mark.slow
def test_what_is_no_mistake_is_found_to_be_none(tmp_path: Path) -> None:
    def nothing(_: Scene) -> list[str]:
        write_data(tmp_path / "more")
        return ["data", "inspect", str(tmp_path / "more" / "train")]

    assert (outcome(Mistake("nothing", nothing, (1,)), 1, tmp_path / "here", None).fault or "").startswith(
        "exit code 0"
    )
