"""Plans and files of any content: an import, or one line that says what is wrong, and nothing that looks finished."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from rechub_dist.data.importing.guess import guess_plan
from rechub_dist.data.importing.plan import Plan, plan_of, read_plan
from rechub_dist.data.importing.run import Imported, import_data
from rechub_tests.import_cases import KINDS, OF_TABLES, add_histories, random_log, random_plan, random_tables, write_csv
from rechub_tests.mutations import MUTATIONS, Mutation, cut, cuts, fuzz, mutated, outcome, places

TYPES = KINDS | {"when": "integer"}


def a_plan() -> dict[str, Any]:
    draw = random.Random(0)
    plan = random_plan(draw, "integer", 40)
    add_histories(draw, plan, "integer")
    plan["labels"] = {"good": "coalesce(rating >= 4, false)"}
    plan |= {"split": {"by": "time", "valid": 0.1, "test": 0.1}, "negatives": {"per_row": 1, "where": "good = 1"}}
    del plan["columns"], plan["features"]["shout"]
    plan["log"] = {"path": "log.csv", "columns": TYPES, "nulls": ["\\N"], "header": True, "delimiter": ","}
    for name, kinds in OF_TABLES.items():
        plan["tables"][name] |= {"path": f"{name}.csv", "columns": kinds, "nulls": ["\\N"], "header": True}
    return plan


PLAN = a_plan()
EVERY_KEY = list(places(plan_of(PLAN).model_dump(mode="json")))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files of the plan."""
    found = tmp_path_factory.mktemp("plans")
    draw = random.Random(1)
    write_csv(random_log(draw, 40, "integer"), found / "log.csv")
    for name, rows in random_tables(draw).items():
        write_csv(rows, found / f"{name}.csv")
    return found


@pytest.fixture(autouse=True)
def _in_the_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


def check_import(folder: Path, plan: Plan) -> Imported | None:
    out = folder / "out"
    found = outcome(lambda: import_data(plan, out, memory=64 << 20, threads=1))
    assert out.exists() == (found is not None)
    assert not list(folder.glob(".*"))
    shutil.rmtree(out, ignore_errors=True)
    return found


def test_the_plan_itself_is_imported(folder: Path) -> None:
    found = check_import(folder, plan_of(PLAN))
    assert found is not None
    assert found.read == 40


@fuzz(60)
@given(MUTATIONS)
def test_plans(folder: Path, mutations: list[Mutation]) -> None:
    path = folder / "plan.yaml"
    tree = mutated(PLAN, mutations, EVERY_KEY)
    path.write_text(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True), encoding="utf-8")
    plan = outcome(lambda: read_plan(path))
    if plan is not None:
        check_import(folder, plan)


PIECES = [
    b",", b'"', b"\n", b"\r", b"\\N", b"\x00", b"\xff", b"'", b"\t", b"#", b"1e999", b"nan", b"-", b"2024-01-01",
    b"user", b"\n\n", "\u2028".encode(), "\ufeff".encode(), b"[1, 2]", b"{", b"9" * 40,
]  # fmt: skip


@fuzz(60)
@given(
    st.sampled_from(["log.csv", "users.csv"]), cuts(st.sampled_from(PIECES) | st.binary(max_size=3), 4), st.booleans()
)
def test_files(folder: Path, name: str, changes: list[Any], guessed: bool) -> None:
    whole = (folder / name).read_bytes()
    try:
        (folder / name).write_bytes(cut(whole, changes))
        if not guessed:
            check_import(folder, plan_of(PLAN))
            return
        text = outcome(lambda: guess_plan(["log.csv"], {"users": "users.csv"}, memory=64 << 20, threads=1))
        if text is not None:
            check_import(folder, plan_of(yaml.safe_load(text)))
    finally:
        (folder / name).write_bytes(whole)


WORDS = [
    "(", ")", ",", ";", "--", "/*", "*/", "'", '"', "select", "from", "user", "item", "rating", "when", "*", "1", "+",
    " ", "case", "end", "null", "::", "int", "[", "]", "{", "}", "->", "lambda x: x", "over ()", "sum", "unnest", "$1",
    "read_csv('log.csv')", "log.csv", "getenv('HOME')", "pragma", "copy", "install", "attach ':memory:'", "\n",
]  # fmt: skip


@fuzz(100)
@given(
    st.lists(st.sampled_from(WORDS), min_size=1, max_size=7), st.sampled_from(["column", "label", "filter", "weight"])
)
def test_expressions(folder: Path, words: list[str], where: str) -> None:
    text = " ".join(words)
    plan: dict[str, Any] = {"log": PLAN["log"], "features": {"item": {"kind": "sparse"}}}
    if where == "column":
        plan |= {"columns": {"x": text}, "keep": ["x"]}
    elif where == "label":
        plan["labels"] = {"y": text}
    else:
        plan[where] = text
    tree = outcome(lambda: plan_of(plan))
    if tree is not None:
        check_import(folder, tree)
