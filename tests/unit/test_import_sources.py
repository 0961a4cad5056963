"""How the files of an import are read: what a value becomes, by its format, its type and how it is written."""

from __future__ import annotations

import datetime
import decimal
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rechub_dist.errors import UserError
from rechub_tests.import_cases import Row, run_import, split_of

UTC = datetime.UTC


def read(source: dict[str, Any], out: Path, *columns: str, **plan: Any) -> list[Row]:
    """The rows of a source as an import writes them, untouched."""
    tree: dict[str, Any] = {
        "log": source, "keep": list(columns), "order": "stored", "split": {"valid": 0.0, "test": 0.0},
        "features": {"one": {"kind": "dense"}}, "columns": {"one": "1"}, **plan,
    }  # fmt: skip
    run_import(tree, out)
    return [{name: value for name, value in row.items() if name != "one"} for row in split_of(out, "train")]


def from_text(tmp_path: Path, text: str, name: str = "log.csv", encoding: str = "utf-8", **source: Any) -> list[Row]:
    (tmp_path / name).write_bytes(text.encode(encoding))
    columns = source.pop("read", None) or text.split("\n", maxsplit=1)[0].split(source.get("delimiter", ","))
    return read({"path": str(tmp_path / name), **source}, tmp_path / "out", *columns)


MANY = "".join(f"{i},x{i},{i * 2}\n" for i in range(50))


def test_lines_that_begin_with_a_hash_are_rows(tmp_path: Path) -> None:
    hashes = "".join(f"#{i},x,{i}\n" for i in range(5))
    rows = from_text(tmp_path, "a,b,c\n" + hashes + MANY)
    assert [row["a"] for row in rows[:6]] == ["#0", "#1", "#2", "#3", "#4", "0"]
    assert len(rows) == 55


@pytest.mark.parametrize("line", ["9,9,9,9\n", "9,9\n"])
@pytest.mark.parametrize("options", [{"delimiter": ",", "header": True}, {}])
def test_no_line_is_skipped_to_find_a_table(tmp_path: Path, line: str, options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"line 52|cannot be told|there is no column"):
        from_text(tmp_path, "a,b,c\n" + MANY + line, **options)
    with pytest.raises(UserError, match=r"line 52|cannot be told|there is no column"):
        from_text(tmp_path, "a,b,c\n" + MANY + line + MANY, **options)


def test_integers_are_not_rounded(tmp_path: Path) -> None:
    text = "a\n1\n2.0\n-3.\n9007199254740993\n9007199254740993.0\n\n +7 \n"
    rows = from_text(
        tmp_path, "b," + text.replace("\n", "\nx,").removesuffix("x,"), columns={"a": "integer"}, read=["a"]
    )
    assert [row["a"] for row in rows] == [1, 2, -3, 9007199254740993, 9007199254740993, None, 7]
    for wrong in ("2.5", "1e3", "1e-1", "inf", "x", "99999999999999999999"):
        with pytest.raises(UserError, match=r"column 'a' is .*not of type integer"):
            from_text(tmp_path, f"a,b\n1,1\n{wrong},2\n", columns={"a": "integer"})
    pq.write_table(pa.table({"a": [1.0, None, -2.0]}), tmp_path / "log.parquet")
    source = {"path": str(tmp_path / "log.parquet"), "columns": {"a": "integer"}}
    assert [row["a"] for row in read(source, tmp_path / "out", "a")] == [1, None, -2]
    pq.write_table(pa.table({"a": [1.0, 2.5]}), tmp_path / "log.parquet")
    with pytest.raises(UserError, match=r"column 'a' is 2\.5, not of type integer"):
        read(source, tmp_path / "out", "a")


def test_a_time_keeps_its_instant(tmp_path: Path) -> None:
    written = ["2024-05-01T10:11:12+02:00", "2024-05-01 10:11:12", "2024-05-01T10:11:12.5Z", "2024-05-01", ""]
    expected = [
        datetime.datetime(2024, 5, 1, 8, 11, 12), datetime.datetime(2024, 5, 1, 10, 11, 12),
        datetime.datetime(2024, 5, 1, 10, 11, 12, 500_000), datetime.datetime(2024, 5, 1), None,
    ]  # fmt: skip
    text = "t,b\n" + "".join(f"{time},1\n" for time in written)
    assert [row["t"] for row in from_text(tmp_path, text, columns={"t": "timestamp"})] == expected
    lines = "".join(json.dumps({"t": time or None, "b": 1}) + "\n" for time in written)
    assert [r["t"] for r in from_text(tmp_path, lines, "log.jsonl", columns={"t": "timestamp"}, read=["t"])] == expected
    zoned = pa.array([datetime.datetime(2024, 5, 1, 8, 11, 12, tzinfo=UTC)], pa.timestamp("ns", "Europe/Berlin"))
    pq.write_table(pa.table({"t": zoned}), tmp_path / "log.parquet")
    source = {"path": str(tmp_path / "log.parquet"), "columns": {"t": "timestamp"}}
    assert read(source, tmp_path / "out", "t")[0]["t"] == expected[0]


@pytest.mark.parametrize(
    ("times", "written", "kind", "expected"),
    [
        ("%d/%m/%Y %H:%M", "02/01/2024 10:11", "timestamp", datetime.datetime(2024, 1, 2, 10, 11)),
        ("%m/%d/%Y", "02/01/2024", "date", datetime.date(2024, 2, 1)),
        ("%d/%m/%Y", "02/01/2024", "date", datetime.date(2024, 1, 2)),
        ("%d/%m/%Y", "02/01/2024", "timestamp", datetime.datetime(2024, 1, 2)),
        ("%d/%b/%Y:%H:%M:%S %z", "02/Jan/2024:10:11:12 +0200", "timestamp", datetime.datetime(2024, 1, 2, 8, 11, 12)),
    ],
)  # fmt: skip
def test_times_as_they_are_written(tmp_path: Path, times: str, written: str, kind: str, expected: Any) -> None:
    text = f"t,b\n{written},1\n"
    assert from_text(tmp_path, text, columns={"t": kind}, times=times)[0]["t"] == expected
    with pytest.raises(UserError, match=r"line 2: column 't' is .*; say how times are written \(times\)"):
        from_text(tmp_path, text, columns={"t": kind})
    assert from_text(tmp_path, text)[0]["t"] == written  # what could be either is no time


@pytest.mark.parametrize("packed", [".gz", ".zst", ""])
@pytest.mark.parametrize(
    ("delimiter", "name"), [(",", "a.csv"), ("\t", "a.tsv"), ("::", "a.dat"), (";", "a.txt"), (" ", "a.csv")]
)
def test_delimiters(tmp_path: Path, packed: str, delimiter: str, name: str) -> None:
    lines = [["name", "number", "text"], ["zoë", "1", "'x'"], ["李", "-2", 'say_"hi"'], ["", "", "NULL"]]
    text = "".join(delimiter.join(line) + "\n" for line in lines).encode()
    data = gzip.compress(text) if packed == ".gz" else pa.compress(text, "zstd", asbytes=True) if packed else text
    (tmp_path / (name + packed)).write_bytes(data)
    source = {"path": str(tmp_path / (name + packed)), "delimiter": delimiter, "header": True, "quote": ""}
    rows = read(source | {"columns": {"number": "integer"}}, tmp_path / "out", "name", "number", "text")
    assert rows == [
        {"name": "zoë", "number": 1, "text": "'x'"},
        {"name": "李", "number": -2, "text": 'say_"hi"'},
        {"name": None, "number": None, "text": "NULL"},
    ]


def test_quotes(tmp_path: Path) -> None:
    rows = from_text(tmp_path, 'a,b\n"x,y",1\n"say ""hi""",2\n"two\nlines",3\n" ",4\n', columns={"a": "string"})
    assert [row["a"] for row in rows] == ["x,y", 'say "hi"', "two\nlines", " "]
    rows = from_text(tmp_path, "a;b\n'x;y';1\n", quote="'", delimiter=";")
    assert [row["a"] for row in rows] == ["x;y"]


def test_missing_values(tmp_path: Path) -> None:
    text = 'a,b,c\nNA,1,\n,NA,x\n"",2,""\n'
    rows = from_text(tmp_path, text, nulls=["", "NA"], columns={"a": "string", "b": "integer", "c": "string"})
    assert rows == [{"a": None, "b": 1, "c": None}, {"a": None, "b": None, "c": "x"}, {"a": None, "b": 2, "c": None}]
    rows = from_text(
        tmp_path, text, nulls=["", "NA"], empty=["c"], columns={"a": "string", "b": "integer", "c": "string"}
    )
    assert [row["c"] for row in rows] == ["", "x", ""]
    rows = from_text(tmp_path, "a,b\n,1\nNA,2\n", nulls=["?"], columns={"a": "string", "b": "integer"})
    assert [row["a"] for row in rows] == ["", "NA"]


def test_without_a_header(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("1,a\n2,b\n")
    source: dict[str, Any] = {"path": str(tmp_path / "log.csv"), "header": False}
    types = {"n": "integer", "s": "string"}
    assert read(source | {"columns": types}, tmp_path / "out", "n", "s") == [{"n": 1, "s": "a"}, {"n": 2, "s": "b"}]
    for wrong in ({"n": "integer"}, types | {"x": "string"}):
        with pytest.raises(UserError, match=r"log\.columns: .* has 2 columns, and [13] are named"):
            read(source | {"columns": wrong}, tmp_path / "out", "n")


@pytest.mark.parametrize(
    ("encoding", "ours"), [("latin-1", "latin-1"), ("utf-16-le", "utf-16"), ("utf-8-sig", "utf-8")]
)
def test_encodings(tmp_path: Path, encoding: str, ours: str) -> None:
    (tmp_path / "log.csv").write_bytes("name,b\nzoë,1\nñandú,2\n".encode(encoding))
    source = {"path": str(tmp_path / "log.csv"), "encoding": ours, "header": True, "delimiter": ","}
    assert [row["name"] for row in read(source, tmp_path / "out", "name")] == ["zoë", "ñandú"]


def test_carriage_returns_and_a_missing_last_line_end(tmp_path: Path) -> None:
    assert from_text(tmp_path, "a,b\r\n1,x\r\n2,y", read=["a", "b"]) == [{"a": 1, "b": "x"}, {"a": 2, "b": "y"}]


def test_one_row_and_one_column(tmp_path: Path) -> None:
    assert from_text(tmp_path, "a\n5\n", columns={"a": "integer"}) == [{"a": 5}]


def test_json_is_read_as_it_is_written(tmp_path: Path) -> None:
    row = {"id": "550E8400-E29B-41D4-A716-446655440000", "when": "2024-05-01T10:00:00", "n": 3, "list": [1, 2],
           "words": ["a", None], "flag": True, "f": 1.5}  # fmt: skip
    lines = json.dumps(row) + "\n" + json.dumps({"n": None, "extra": 1}) + "\n{}\n"
    types = {"id": "string", "when": "string", "n": "integer", "list": "integers", "flag": "boolean"}
    rows = from_text(tmp_path, lines, "log.jsonl", columns=types, read=list(row))
    assert rows[0] == row
    assert rows[1] == rows[2] == dict.fromkeys(row)
    untyped = from_text(tmp_path, lines, "log.ndjson.gz".removesuffix(".gz"), read=list(row))
    assert untyped[0] == row | {"when": datetime.datetime(2024, 5, 1, 10)}
    with pytest.raises(UserError, match=r"column 'n' is 2\.5, not of type integer"):
        from_text(tmp_path, '{"n": 1}\n{"n": 2.5}\n', "log.jsonl", columns={"n": "integer"}, read=["n"])
    with pytest.raises(UserError, match=r"log\.jsonl"):
        from_text(tmp_path, '{"n": 1}\n{"n": \n', "log.jsonl", read=["n"])


def test_every_width_of_parquet(tmp_path: Path) -> None:
    names = ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]
    columns = {name: pa.array([1, None, 3, 1], getattr(pa, name)()) for name in names}
    columns |= {
        "large": pa.array(["a", None, "ü", "a"], pa.large_string()),
        "coded": pa.array(["a", None, "ü", "a"]).dictionary_encode(),
        "lists": pa.array([[1, 2], None, [], [1]], pa.list_(pa.int32())),
        "large_lists": pa.array([["x", "y"], None, [], ["x"]], pa.large_list(pa.large_string())),
        "huge": pa.array([2**64 - 1, 0, 2**63, 2**63], pa.uint64()),
    }
    numbers = {
        "money": pa.array([decimal.Decimal("1.50"), None, decimal.Decimal("-2.25"), decimal.Decimal(0)]),
        "single": pa.array([0.5, None, 1.5, -1.0], pa.float32()),
        "flag": pa.array([True, None, False, True]),
        "vector": pa.array([[0.5, 1.0]] * 4, pa.list_(pa.float32(), 2)),
    }
    pq.write_table(pa.table(columns | numbers), tmp_path / "log.parquet")
    features: dict[str, Any] = {name: {"kind": "sparse"} for name in columns}
    features |= {name: {"kind": "dense", "standardize": False} for name in numbers}
    features["vector"] = {"kind": "dense", "dim": 2, "fill": "error"}
    plan = {
        "log": {"path": str(tmp_path / "log.parquet")}, "order": "stored", "split": {"valid": 0.0, "test": 0.0},
        "features": features,
    }  # fmt: skip
    run_import(plan, tmp_path / "out")
    rows = split_of(tmp_path / "out", "train")
    for name in (*names, "large", "coded"):
        assert [row[name] for row in rows] == [1, 0, 2, 1], name
    assert [row["lists"] for row in rows] == [[1, 2], [], [], [1]]
    assert [row["large_lists"] for row in rows] == [[1, 2], [], [], [1]]
    assert [row["huge"] for row in rows] == [3, 2, 1, 1]
    assert [row["money"] for row in rows] == [decimal.Decimal("1.50"), None, decimal.Decimal("-2.25"), 0]
    assert [row["vector"] for row in rows] == [[0.5, 1.0]] * 4
    vocabulary = pq.read_table(tmp_path / "out" / "_vocabularies" / "huge.parquet")
    assert vocabulary["value"].to_pylist() == [2**63, 0, 2**64 - 1]


def test_integers_of_different_widths_share_a_table(tmp_path: Path) -> None:
    table = {"a": pa.array([1, 2, 2], pa.int8()), "b": pa.array([2, 3, 2**63], pa.uint64()), "c": pa.array([-1] * 3)}
    pq.write_table(pa.table(table), tmp_path / "log.parquet")
    plan: dict[str, Any] = {
        "log": {"path": str(tmp_path / "log.parquet")}, "order": "stored", "split": {"valid": 0.0, "test": 0.0},
        "features": {"a": {"kind": "sparse"}, "b": {"kind": "sparse", "table": "a"}},
    }  # fmt: skip
    run_import(plan, tmp_path / "out")
    assert split_of(tmp_path / "out", "train") == [{"a": 2, "b": 1}, {"a": 1, "b": 3}, {"a": 1, "b": 4}]
    plan["features"]["c"] = {"kind": "sparse", "table": "a"}
    with pytest.raises(UserError, match=r"hold -1 and 9223372036854775808: no type of 64 bits has both"):
        run_import(plan, tmp_path / "out")


def test_integers_beyond_64_bits_are_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"column 'h' is HUGEINT, which cannot be ids .* 64 bits at most"):
        read(
            {"path": make(tmp_path, "a\n1\n")}, tmp_path / "out", columns={"one": "1", "h": "a::HUGEINT"},
            features={"a": {"kind": "sparse", "column": "h"}},
        )  # fmt: skip


def make(tmp_path: Path, text: str) -> str:
    (tmp_path / "log.csv").write_text(text)
    return str(tmp_path / "log.csv")


def test_files_of_a_folder_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    for number in (1, 2, 10):
        (tmp_path / "logs" / f"day-{number}.csv").write_text(f"a,b\n{number},x\n")
    (tmp_path / "logs" / "_hidden.csv").write_text("a,b\n5,x\n")
    (tmp_path / "logs" / "notes.md").write_text("no table")
    source = {"path": str(tmp_path / "logs"), "file_column": "file"}
    rows = read(source, tmp_path / "out", "a", "file")
    assert [row["a"] for row in rows] == [1, 2, 10]
    assert [Path(row["file"]).name for row in rows] == ["day-1.csv", "day-2.csv", "day-10.csv"]
    rows = read(
        {"path": [str(tmp_path / "logs" / "day-10.csv"), str(tmp_path / "logs" / "day-?.csv")]}, tmp_path / "out", "a"
    )
    assert [row["a"] for row in rows] == [10, 1, 2]
    (tmp_path / "logs" / "day-3.csv").write_text("a,c\n3,x\n")
    with pytest.raises(UserError, match=r"day-3\.csv"):
        read(source, tmp_path / "out", "a", "b")
    (tmp_path / "logs" / "day-3.csv").write_text("b,a\nx,3\n")
    typed = source | {"columns": {"a": "integer", "b": "string"}}
    assert [row["a"] for row in read(typed, tmp_path / "out", "a")] == [1, 2, 3, 10]


def test_lists_become_rows(tmp_path: Path) -> None:
    sessions = {"session": [[5, 6, 7], None, [], [8], [9, None]], "shop": ["a", "b", "c", "d", "e"]}
    pq.write_table(pa.table(sessions), tmp_path / "log.parquet")
    explode = {"column": "session", "row": "number", "place": "place"}
    source = {"path": str(tmp_path / "log.parquet"), "explode": explode}
    rows = read(source, tmp_path / "out", "number", "place", "session", "shop")
    assert [tuple(row.values()) for row in rows] == [
        (0, 0, 5, "a"), (0, 1, 6, "a"), (0, 2, 7, "a"), (3, 0, 8, "d"), (4, 0, 9, "e"), (4, 1, None, "e"),
    ]  # fmt: skip
    for change, said in (
        ({"column": "sesion"}, r"log\.explode: there is no column 'sesion'; did you mean 'session'"),
        ({"column": "shop"}, r"log\.explode: column 'shop' is VARCHAR; lists are exploded"),
        ({"row": "Shop"}, r"log\.explode: row and place need names that no other column has"),
    ):
        with pytest.raises(UserError, match=said):
            read(source | {"explode": explode | change}, tmp_path / "out", "shop")
