"""A length that a run file gives its model, and that is not the one of the features, is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rechub_dist.assembly.parts import plan, unheeded
from rechub_tests.runs import config_of, run_file, write_data


@pytest.mark.parametrize(
    ("model", "given", "told"),
    [
        ("YoutubeDNN", {"max_seq_len": 7}, True),  # the data's has 6
        ("YoutubeDNN", {"max_seq_len": 6}, False),
        ("YoutubeDNN", {"max_seq_len": 3}, False),  # cut to it
        ("SASRec", {"max_len": 9}, True),
        ("SASRec", {"max_len": 6}, False),
        ("GRU4Rec", {"max_length": 9}, True),
        ("GRU4Rec", {"max_length": 6}, False),
        ("GRU4Rec", {}, False),  # the default is of a history that is no feature of the schema
        ("NARM", {"max_length": 3}, True),
        ("DIN", {}, False),
    ],
)
def test_a_length_without_effect(tmp_path: Path, model: str, given: dict[str, Any], told: bool) -> None:
    write_data(tmp_path / "data", 64)
    found = plan(config_of(run_file(tmp_path, tmp_path / "data", model, model=given)), device="cpu", world_size=1)
    [key] = given or [None]
    line = f"note: model.{key} is {given.get(key)}, but its longest history, 'history', has max_length 6 in the schema"
    assert [note.startswith(line) for note in unheeded(found)] == [True] * told
