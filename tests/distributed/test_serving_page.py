"""What docs/serving.md tells its readers to type."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rechub_tests.serving import ITEMS, TOKEN, label, make_bundle, serving, variant, write_worded

PAGE = Path(__file__).parents[2] / "docs" / "serving.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(), re.DOTALL)


def curls() -> list[str]:
    """The commands, those of several lines as one."""
    text = "\n".join(blocks("sh")).replace("\\\n", " ")
    # a line that begins with blanks goes on with the one before
    return [line for line in text.replace("\n  ", " ").splitlines() if line.startswith("curl ")]


@pytest.mark.slow
def test_the_commands(tmp_path: Path) -> None:
    data = write_worded(tmp_path / "data")
    names = [f"item {i}" for i in range(ITEMS)]
    prices = [i / ITEMS for i in range(ITEMS)]
    (data / "items").mkdir()
    pq.write_table(
        pa.table({"item": names, "category": ["book", "film"] * (ITEMS // 2) + ["book"], "price": prices}),
        data / "items" / "items.parquet",
    )
    model = {"features": ["user", "item", "tags", "age"], "embedding_dim": 4}
    ctr = make_bundle(tmp_path / "ctr", data, "DeepFM", model=model)
    recall = make_bundle(tmp_path / "recall", data, "SASRec")
    arguments = (f"ctr={ctr}", f"recall={recall}", "--token-env", "SERVING_TOKEN")
    before = label(ctr)
    answers: dict[str, Any] = {}
    with serving(tmp_path / "log", *arguments, env={"SERVING_TOKEN": TOKEN}) as server:
        after = label(variant(variant(ctr, tmp_path / "next", 0), ctr, 40))
        for line in curls():
            command = line.replace("localhost:8000", server.url).replace("curl ", "curl -sS --fail-with-body ", 1)
            done = subprocess.run(
                ["bash", "-c", command], capture_output=True, text=True, check=False, env={"SERVING_TOKEN": TOKEN}
            )
            assert done.returncode == 0, (line, done.stdout, done.stderr)
            path = re.search(r"localhost:8000(/[a-z./]*)", line)
            assert path is not None
            name = "filtered" if "where=" in line else path[1]
            answers[name] = done.stdout if name == "/metrics" else json.loads(done.stdout)
        assert len(curls()) == 12
        assert len(answers["/bundles/ctr/score"]["columns"]["predicted_click"]) == 2
        assert len(answers["/bundles/recall/retrieve"]["columns"]["predicted_items"][0]) == 3
        found = answers["filtered"]["columns"]["predicted_items"][0]
        assert found
        assert {int(name.removeprefix("item ")) % 2 for name in found} == {0}
        assert answers["/admin/reload"]["versions"] == {"ctr": after}
        assert answers["/admin/rollback"]["versions"] == {"ctr": before}
        assert "rechub_serving_requests_total" in answers["/metrics"]

        (code,) = blocks("python")
        scope: dict[str, Any] = {}
        exec(code, scope)
        rows = pa.table({"user": [7, 8], "item": ["item 3"] * 2, "tags": [[1, 2], []], "age": [0.4, None]})
        with server.client(TOKEN) as client:
            assert scope["score"](client, rows).column_names == ["predicted_click"]
            with pytest.raises(httpx.HTTPStatusError):
                scope["score"](client, rows.drop_columns(["user"]))


def test_every_option_that_it_names_is_there() -> None:
    line = [sys.executable, "-m", "rechub_dist", "serve", "--help"]
    told = subprocess.run(line, capture_output=True, text=True, check=True, env={**os.environ, "COLUMNS": "200"}).stdout
    named = set(re.findall(r"`(--[a-z-]+)", PAGE.read_text()))
    assert len(named) > 10
    assert [option for option in named if option not in told] == []
