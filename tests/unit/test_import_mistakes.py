"""Mistakes in a plan or its files: one line that names the key and the fix, exit 2, and nothing left behind."""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import re
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from rechub_dist.cli.entry import run_app
from rechub_dist.cli.main import app
from rechub_dist.errors import UserError
from rechub_tests.import_cases import run_import, split_of

LOG = "user,item,when,click,price,text\n" + "".join(
    f"u{i % 5},{i % 7},{1_700_000_000 + i * 60},{i % 2},{i}.5,w{i % 3}\n" for i in range(40)
)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "log.csv"
    path.write_text(LOG)
    return path


def a_plan(path: Path, **changes: Any) -> dict[str, Any]:
    plan: dict[str, Any] = {
        "log": {"path": str(path)},
        "user": "user",
        "item": "item",
        "time": "when",
        "labels": {"click": "click = 1"},
        "features": {"user": {"kind": "sparse"}, "item": {"kind": "sparse"}},
    }
    return {key: value for key, value in (plan | changes).items() if value is not None}


def complaint(folder: Path, plan: dict[str, Any], *options: str) -> str:
    """What the command says of a plan, in one line; nothing but the plan's own folder is left."""
    file, out = folder / "plan.yaml", folder / "out"
    file.write_text(yaml.safe_dump(plan, allow_unicode=True, sort_keys=False), encoding="utf-8")
    before = sorted(folder.rglob("*"))
    error = io.StringIO()
    command = ["data", "import", "--plan", str(file), "--out", str(out), "--memory", "200MB", *options]
    arguments, sys.argv = sys.argv, ["rechub-dist", *command]
    try:
        with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()):
            code = run_app(app)
    finally:
        sys.argv = arguments
    text = error.getvalue()
    assert code == 2, text
    assert text.count("\n") == 1, text
    assert sorted(folder.rglob("*")) == before
    assert "Traceback" not in text
    return text.strip()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"log": {"path": "nowhere.csv"}}, r"log\.path: there is no file nowhere\.csv"),
        ({"log": {"path": "s3://a/b.csv"}}, r"log\.path: 's3://a/b\.csv' is an address"),
        ({"features": {"usr": {"kind": "sparse"}}}, r"features\.usr: there is no column 'usr'; did you mean 'user'\?"),
        ({"features": {}}, r"features: dictionary should have at least 1 item"),
        ({"features": {"user": {"kind": "spars"}}}, r"features\.user"),
        ({"features": {"price": {"kind": "sparse"}}}, r"features: column 'price' is DOUBLE, which cannot be ids"),
        ({"features": {"text": {"kind": "dense"}}}, r"features\.text: column 'text' is VARCHAR, but a dense feature"),
        ({"features": {"text": {"kind": "sparse", "bins": [1.0]}}}, r"features\.text: column 'text' is VARCHAR; bins"),
        ({"features": {"price": {"kind": "sparse", "bins": [2.0, 1.0]}}}, r"boundaries are \[2\.0, 1\.0\]"),
        ({"features": {"item": {"kind": "sequence"}}}, r"features\.item: column 'item' is BIGINT; a sequence needs"),
        ({"features": {"a": {"kind": "cross", "inputs": ["user", "x"], "buckets": 3}}}, r"features\.a\.inputs"),
        ({"features": {"click": {"kind": "sparse"}}}, r"labels\.click: there is a feature of that name"),
        ({"features": {"c": {"kind": "sparse", "column": "click"}}}, r"labels\.click: a feature, key or history reads"),
        ({"time": "wen"}, r"time: there is no column 'wen'; did you mean 'when'\?"),
        ({"time": "text"}, r"time: column 'text' is VARCHAR; a time is a number"),
        ({"keep": ["ITEM"]}, r"keep: there is no column 'ITEM'; did you mean 'item'\?"),
        ({"labels": {"y": "clik = 1"}}, r"labels\.y: 'clik = 1': there is no column 'clik'; did you mean 'click'\?"),
        ({"labels": {"y": "click = "}}, r"labels\.y: 'click = ': syntax error"),
        ({"labels": {"y": "(click = 1"}}, r"labels\.y: '\(click = 1': syntax error"),
        ({"labels": {"y": "select"}, "columns": {"select": "1"}}, r"labels\.y: 'select': it is a word of SQL; write"),
        ({"labels": {"y": "text"}}, r"labels\.y: 'text' is VARCHAR; a label is a number"),
        ({"labels": {"y": {"expression": "price", "type": "classification"}}}, r"labels\.y: it has other values than"),
        ({"labels": {"y": {"expression": "item", "type": "multiclass"}}}, r"labels\.y\..*: multiclass needs classes"),
        (
            {"labels": {"y": {"expression": "item", "type": "multiclass", "classes": 6}}},
            r"labels\.y: it has other values than the integers 0 \.\. 5 of 6 classes; set classes: 7",
        ),
        (
            {"labels": {"y": {"expression": "item - 3", "type": "multiclass", "classes": 7}}},
            r"labels\.y: it has other values than the integers 0 \.\. 6 of 7 classes; number them from 0",
        ),
        (
            {"labels": {"y": {"expression": "price", "type": "multiclass", "classes": 100}}},
            r"labels\.y: it has other values than the integers 0 \.\. 99 .*; number them from 0",
        ),
        (
            {"negatives": {"per_row": 1}, "labels": {"y": {"expression": "item", "type": "multiclass", "classes": 7}}},
            r"negatives: labels\.y is of several classes",
        ),
        ({"labels": {"y": "nullif(click, 0)"}}, r"labels\.y: 20 rows have no value; leave them out with filter"),
        ({"labels": {"_rechub_x": "click"}}, r"labels: a column may not be called '_rechub_x'"),
        ({"labels": {"a": "1", "A": "0"}}, r"labels\.A: label 'a' has the same name"),
        ({"weight": "text"}, r"weight: 'text' is VARCHAR; a weight is a number"),
        ({"weight": "price - 5"}, r"weight: 5 rows have a weight that is missing, negative or not finite"),
        ({"weight": "nullif(price, 0.5)"}, r"weight: 1 rows have a weight that is missing"),
        ({"filter": "item > 100"}, r"filter 'item > 100' leaves no row"),
        ({"filter": "item"}, r"filter: 'item' is BIGINT, not true or false"),
        ({"filter": "avg(price) > 3"}, r"filter: .*: it is an aggregate over many rows"),
        ({"filter": "price > ?"}, r"filter: .*: a \? or \$ stands for nothing"),
        ({"columns": {"User": "item + 1"}}, r"columns\.User: there is a column 'user' already"),
        ({"columns": {"x": "1; drop table a"}}, r"columns\.x: .*: syntax error"),
        ({"columns": {"x": "1) from t where (1"}}, r"columns\.x: .*: that is not one expression"),
        ({"columns": {"x": "1), (2"}}, r"columns\.x: .*: that is not one expression"),
        ({"columns": {"x": "1) union all select (2"}}, r"columns\.x: .*: that is not one expression"),
        ({"columns": {"x": "(select max(item) from _rechub_rows)"}}, r"columns\.x: .*: a subquery reads other rows"),
        ({"columns": {"x": "(select 1 from read_csv('/etc/passwd'))"}}, r"columns\.x: .*: a subquery"),
        ({"columns": {"x": "lead(item) over (order by price)"}}, r"columns\.x: .*: a window function sees other rows"),
        ({"columns": {"x": "unnest([1, 2])"}}, r"columns\.x: .*: unnest makes several rows"),
        ({"columns": {"x": "*"}}, r"columns\.x: '\*': write the columns' names"),
        ({"columns": {"x": "read_text('/etc/passwd')"}}, r"columns\.x: "),
        ({"columns": {"x": "getenv('HOME')"}}, r"columns\.x: "),
        ({"columns": {"x": "item /* "}}, r"columns\.x: .*unterminated"),
        ({"columns": {"x": ""}}, r"columns\.x: write an SQL expression"),
        ({"columns": {"x": "text::int"}, "features": {"x": {"kind": "sparse"}}}, r"Could not convert string 'w\d'"),
        ({"k_core": {"item": 100}}, r"k_core: no row is left"),
        ({"k_core": {"itm": 2}}, r"k_core: there is no column 'itm'"),
        ({"split": {"by": "column", "column": "text"}}, r"split\.column: \d+ rows have 'w0' in column 'text'"),
        ({"split": {"by": "column", "column": "txt"}}, r"split\.column: there is no column 'txt'"),
        ({"split": {"by": "time", "valid_from": "soon", "test_from": "2"}}, r"split\.valid_from: 'soon' is no BIGINT"),
        ({"split": {"by": "time", "valid_from": "0", "test_from": "1"}}, r"split: by time leaves no row for train"),
        ({"split": {"by": "time", "rows_from": "1 h"}}, r"split\.rows_from: '1 h' is no BIGINT"),
        ({"split": {"valid": 0.6, "test": 0.4}}, r"split: valid 0\.6 and test 0\.4 leave nothing to train on"),
        ({"split": {"by": "time"}, "time": None}, r"time, as split or order, needs time"),
        ({"user": None, "histories": {"h": {"column": "item"}}}, r"histories needs user"),
        ({"histories": {"h": {"column": "itm"}}}, r"histories\.h: there is no column 'itm'"),
        ({"histories": {"item": {"column": "item"}}}, r"histories\.item: there is a column 'item' already"),
        ({"histories": {"h": {"column": "item", "also": {"h": "when"}}}}, r"histories\.h\.also: h is the history"),
        ({"histories": {"h": {"column": "item", "where": "click"}}}, r"histories\.h\.where: 'click' is BIGINT, not"),
        (
            {"histories": {"h": {"column": "item"}, "g": {"column": "h"}}},
            r"histories\.g: column 'h' is made of histories itself",
        ),
        ({"derive": {"d": {"kind": "splt", "column": "text"}}}, r"derive\.d\.kind: got 'splt'; did you mean 'split'"),
        ({"derive": {"d": {"kind": "split", "column": "tex"}}}, r"derive\.d: there is no column 'tex'"),
        ({"derive": {"d": {"kind": "split", "column": "item"}}}, r"column 'item' is int64, but derived column 'd'"),
        (
            {"derive": {"d": {"kind": "key_values", "column": "text", "by": "w", "between": "1", "weights": "v"}},
             "log": {"path": "log.csv", "columns": {"text": "string"}}, "filter": "text <> 'w2'"},
            r"error: the rows: column 'text': '' is no weight of 32 bits; derived column 'd' needs",
        ),
        ({"min_count": 50}, r"features: column 'user': no value occurs 50 times in train; lower min_count"),
        ({"embeddings": {"usr": {"dim": 4}}}, r"embeddings\.usr: no feature reads such a table; did you mean 'user'"),
        ({"negatives": {"per_row": 1}, "item": None}, r"negatives needs item"),
        ({"negatives": {"per_row": 1, "where": "clk"}}, r"negatives\.where: 'clk': there is no column 'clk'"),
        ({"negatives": {"per_row": 1}, "columns": {"x": "item % 2"}, "keep": ["x"]}, r"negatives: columns\.x cannot"),
        ({"negatives": {"per_row": 1, "copied": ["txt"]}}, r"negatives\.copied: there is no column 'txt'"),
        (
            {"negatives": {"per_row": 1}, "labels": {"y": {"expression": "price", "type": "regression"}}},
            r"negatives: labels\.y is a regression",
        ),
        ({"lables": {}}, r"unknown key 'lables': did you mean 'tables'"),
        ({"log": {"path": "log.csv", "columns": {"prise": "float"}}}, r"log\.columns: .* no column 'prise'; did you"),
    ],
)  # fmt: skip
def test_a_wrong_plan_is_one_line(
    log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert re.search(said, text := complaint(tmp_path, a_plan(log, **changes))), text


@pytest.mark.parametrize(
    ("kind", "text", "said"),
    [
        ("float", "many", "line 42: column 'price' is 'many', not of type float; give the column another type"),
        ("integer", "many", "line 42: column 'price' is 'many', not of type integer"),
        ("boolean", "many", "line 42: column 'price' is 'many', not of type boolean"),
        (
            "timestamp",
            "13/02/2024",
            "line 2: column 'price' is '0.5', not of type timestamp; say how times are written",
        ),
        ("date", "13/02/2024", "line 2: column 'price' is '0.5', not of type date; say how times are written"),
        ("integer", "2.5", "column 'price' is 0.5, not of type integer; give it the type float"),
    ],
)
def test_a_value_of_another_type_is_named(log: Path, tmp_path: Path, kind: str, text: str, said: str) -> None:
    whole = LOG.replace(".5,", ".0,") if text == "many" else LOG
    log.write_text(whole + f"u1,1,1,1,{text},w1\n")
    plan = a_plan(log, log={"path": str(log), "columns": {"price": kind}}, keep=["price"])
    if kind == "boolean":
        log.write_text(re.sub(r"\d+\.0,", "true,", whole) + f"u1,1,1,1,{text},w1\n")
    found = complaint(tmp_path, plan)
    assert said in found
    assert str(log) in found or text == "2.5"


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("empty.csv", b"", "there is no row"),
        ("header.csv", b"user,item,when,click\n", "there is no row"),
        ("packed.csv.gz", gzip.compress(LOG.encode() * 50)[:-40], "cut short|truncated|corrupt|damaged"),
        ("nopacked.csv.gz", LOG.encode(), "not gzip|is no gzip|GZIP"),
        ("bad.csv", LOG.encode() + b"\xff\xfe,1,1,1,1,w\n", "line 42.*encoding"),
        ("short.csv", LOG.encode() + b"u1,2\n", "cannot be told apart; write the delimiter"),
        ("log.csv", b"<!DOCTYPE html><html>", "log.csv is an HTML page"),
        ("log.tsv", b"PK\x03\x04 and so on", "log.tsv is a ZIP archive; unpack it first"),
        ("log.csv", gzip.compress(b"a,b", mtime=0), "compressed by gzip; unpack it first"),
        ("broken.parquet", b"PAR1 and nothing else", "broken.parquet"),
        ("broken.jsonl", b'{"user": 1}\n{"user": \n', "broken.jsonl"),
        ("binary", bytes(range(256)), "neither text nor Parquet"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_one_line(tmp_path: Path, name: str, data: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(data)
    text = complaint(tmp_path, a_plan(tmp_path / name))
    assert re.search(said, text), text
    assert name in text


def test_parquet_under_another_name_is_said_to_be_parquet(tmp_path: Path) -> None:
    pq.write_table(pa.table({"user": [1]}), tmp_path / "log.csv")
    assert re.search(
        r"log\.csv.*is Parquet, whatever its name; write format: parquet",
        complaint(tmp_path, a_plan(tmp_path / "log.csv")),
    )


def test_text_under_the_name_of_parquet(tmp_path: Path) -> None:
    (tmp_path / "log.parquet").write_text(LOG)
    assert "log.parquet" in complaint(tmp_path, a_plan(tmp_path / "log.parquet"))


def test_a_fifo_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "log.csv")
    assert "there is no file" in complaint(tmp_path, a_plan(tmp_path / "log.csv"))


def test_a_folder_without_tables(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "notes.md").write_text("x")
    assert "holds no file that ends in" in complaint(tmp_path, a_plan(tmp_path / "logs"))


def test_files_of_two_formats(log: Path, tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"user": 1}\n')
    assert "name files of one format" in complaint(
        tmp_path, a_plan(log, log={"path": [str(log), str(tmp_path / "log.jsonl")]})
    )


def test_keys_of_tables(log: Path, tmp_path: Path) -> None:
    users = tmp_path / "users.csv"
    users.write_text("user,Item,age\nu1,1,5\nu1,2,6\nu2,3,7\n")
    table: dict[str, Any] = {"path": str(users), "key": "user", "take": ["age"]}
    for change, said in (
        ({}, r"tables\.users\.key: 2 rows have the user 'u1', which would multiply the log's"),
        ({"key": "usr"}, r"tables\.users\.key: the table has no column 'usr'; did you mean 'user'"),
        ({"log_key": "usr"}, r"tables\.users\.log_key: the log has no column 'usr'"),
        (
            {"key": "age", "take": ["Item"]},
            r"tables\.users\.log_key: the log has no column 'age'|there is a column 'item'",
        ),
        ({"key": "age", "log_key": "user"}, r"tables\.users\.key: 'age' is BIGINT, but 'user' of the log is VARCHAR"),
        ({"key": "age", "log_key": "item", "take": None}, r"tables\.users: there is a column 'user' in the log too"),
        (
            {"key": "age", "log_key": "item", "take": ["Item"]},
            r"tables\.users: there is a column 'item' in the log too",
        ),
        (
            {"key": "age", "log_key": "item", "take": ["usr"]},
            r"tables\.users\.take: the table has no column 'usr'; did you mean 'user'",
        ),
    ):
        entry = {key: value for key, value in (table | change).items() if value is not None}
        assert re.search(said, text := complaint(tmp_path, a_plan(log, tables={"users": entry}))), text


def test_columns_that_are_ours(tmp_path: Path) -> None:
    for header, said in (("user,item,when,click,_rechub_row", "names that begin with _rechub_ are ours"),):
        (tmp_path / "log.csv").write_text(header + "\n1,2,3,0,5\n2,3,4,1,5\n")
        plan = a_plan(tmp_path / "log.csv", log={"path": str(tmp_path / "log.csv"), "header": True})
        assert re.search(said, text := complaint(tmp_path, plan)), text


def test_missing_users_and_times(log: Path, tmp_path: Path) -> None:
    log.write_text(LOG + ",1,,1,1.5,w\n")
    for changes, said in (
        ({"histories": {"h": {"column": "item"}}}, r"time: 1 rows have no 'when'; leave them out: filter"),
        ({"split": {"by": "user"}}, r"user: 1 rows have no 'user'"),
        ({"split": {"by": "leave-last-out"}}, r"time: 1 rows have no 'when'"),
        ({"split": {"by": "time"}}, r"time: 1 rows have no 'when'"),
        ({"negatives": {"per_row": 1}}, r"user: 1 rows have no 'user'"),
    ):
        assert re.search(said, text := complaint(tmp_path, a_plan(log, **changes))), text


def test_where_the_output_may_not_be(log: Path, tmp_path: Path) -> None:
    logs = tmp_path / "out"
    logs.mkdir()
    (logs / "log.csv").write_text(LOG)
    assert "holds the input" in complaint(tmp_path, a_plan(logs / "log.csv"))
    assert re.search("already holds log.csv", complaint(tmp_path, a_plan(log)))
    (logs / "log.csv").unlink()
    run_import(a_plan(log), logs)
    (logs / "train" / "mine.txt").write_text("x")
    assert "mine.txt was added since" in complaint(tmp_path, a_plan(log))


def test_an_import_replaces_its_predecessor(log: Path, tmp_path: Path) -> None:
    run_import(a_plan(log), tmp_path / "out")
    run_import(a_plan(log, order="stored", split={"valid": 0.0, "test": 0.0}), tmp_path / "out")
    assert [row["click"] for row in split_of(tmp_path / "out", "train")] == [i % 2 for i in range(40)]
    assert not (tmp_path / "out" / "test").exists()


@pytest.mark.slow
def test_a_thousand_columns(tmp_path: Path) -> None:
    wide = pa.table({"click": [0, 1, 0, 1]} | {f"c {i}'\"": [1, 2, 1, i] for i in range(1000)})
    pq.write_table(wide, tmp_path / "log.parquet")
    features = {name: {"kind": "sparse"} for name in wide.column_names[1:]}
    plan = {"log": {"path": str(tmp_path / "log.parquet")}, "labels": {"click": "click"}, "features": features}
    found = run_import(plan | {"order": "stored", "split": {"valid": 0.0, "test": 0.0}}, tmp_path / "out")
    assert len(found.vocabularies) == 1000
    assert split_of(tmp_path / "out", "train")[3]["c 999'\""] == 3


def test_columns_of_any_name(tmp_path: Path) -> None:
    names = ["n", "r", "x", "value", "row", "k", "place", "all_rows", "u", "i", "l", "e", "d", "select", "o'k", 'a "b"']
    rows = {name: [number % 3 for number in range(12)] for number, name in enumerate(names)}
    rows |= {"n": [0, 1, 2] * 4, "value": list(range(12)), "x": [0.5, 1.5, 2.5] * 4, "y": [0, 1] * 6}
    pq.write_table(pa.table(rows), tmp_path / "log.parquet")
    features: dict[str, Any] = {name: {"kind": "sparse"} for name in names if name != "x"}
    plan = {
        "log": {"path": str(tmp_path / "log.parquet")}, "user": "n", "item": "value", "time": "k",
        "labels": {"y": "y"}, "histories": {"h": {"column": "value"}}, "negatives": {"per_row": 1},
        "features": features | {"x": {"kind": "dense"}, "h": {"kind": "sequence"}},
    }  # fmt: skip
    for split in ({"by": "leave-last-out"}, {"by": "position"}, {"by": "time", "valid": 0.0, "test": 0.2}):
        found = run_import(plan | {"split": split}, tmp_path / "out")
        assert sum(found.rows.values()) == 12 + found.drawn


def test_files_whose_names_look_like_patterns(tmp_path: Path) -> None:
    for name in ("we[i]rd.csv", "st*r.csv", "wha?.csv", "o'q.csv", "it's 100%.csv"):
        (tmp_path / name).write_text(LOG)
        (tmp_path / "star.csv").write_text(LOG + LOG)
        assert run_import(a_plan(tmp_path / name), tmp_path / "out").read == 40


def test_an_expression_sees_no_file_and_no_setting(log: Path, tmp_path: Path) -> None:
    (tmp_path / "other.csv").write_text("a\n1\n")
    with pytest.raises(UserError, match="a subquery"):
        run_import(a_plan(log, columns={"x": f"(from '{tmp_path}/other.csv')"}), tmp_path / "out")
    LOCAL = pa.table({"a": [1]})  # noqa: F841 - DuckDB could see it
    with pytest.raises(UserError, match=r"columns\.x"):
        run_import(a_plan(log, columns={"x": "(table LOCAL)"}), tmp_path / "out")


def test_a_line_of_another_length_is_named(log: Path, tmp_path: Path) -> None:
    log.write_text(LOG + "u1,2\n")
    plan = a_plan(log, log={"path": str(log), "delimiter": ",", "header": True})
    text = complaint(tmp_path, plan)
    assert f"{log}: line 42: " in text
    assert "check delimiter" in text


def test_columns_that_differ_in_case(tmp_path: Path) -> None:
    pq.write_table(pa.table({"user": [1], "User": [2]}), tmp_path / "log.parquet")
    assert "User" in complaint(tmp_path, a_plan(tmp_path / "log.parquet"))


def test_times_of_a_split_are_numbers_too(log: Path, tmp_path: Path) -> None:
    split = {"by": "time", "valid_from": 1_700_000_600, "test_from": 1_700_001_200}
    assert run_import(a_plan(log, split=split), tmp_path / "out").rows == {"train": 10, "valid": 10, "test": 20}


def test_after_a_failed_import_the_next_one_works(log: Path, tmp_path: Path) -> None:
    kept = []
    for _ in range(2):  # an error that is kept holds on to what was open
        with pytest.raises(UserError, match="no value") as error:
            run_import(a_plan(log, min_count=50), tmp_path / "out")
        kept.append(error)
    assert run_import(a_plan(log), tmp_path / "out", memory=128 << 20).read == 40
