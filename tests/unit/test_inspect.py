"""`rechub-dist data inspect`: odd data sets as text, JSON and a page."""

from __future__ import annotations

import json
import re
import sys
from decimal import Decimal
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from rechub_dist.cli.data import data_app
from rechub_dist.cli.inspect import bars
from rechub_dist.data.tools.figures import ColumnProfile, number_text
from rechub_dist.data.tools.profile import profile
from rechub_dist.data.tools.profile_html import page, write_page
from rechub_dist.errors import UserError

NAMES = [
    'q"u',
    "it's",
    "a b",
    "x/y",
    "größe",
    "<b>&amp;",
    "A",
    "a",
    "",
    "[red]x[/red]",
    "line\nbreak",
    "v",
    "s",
    "n0",
    "%s",
]
VOID = {"meta", "line", "rect", "br"}


def odd_table() -> pa.Table:
    """Three rows of every type, some of which hold next to nothing."""
    return pa.table(
        {
            "half": pa.array(np.array([1, 2, np.nan], np.float16)),
            "decimal": pa.array([Decimal("1.50"), None, Decimal(2)], pa.decimal128(20, 2)),
            "exact": pa.array([Decimal("0.1"), None, Decimal("12345678901234567890.1")], pa.decimal128(38, 1)),
            "huge": pa.array([Decimal("1.50"), None, Decimal(2)], pa.decimal256(60, 2)),
            "nothing": pa.nulls(3),
            "no float": pa.array([None] * 3, pa.float32()),
            "no list": pa.array([None] * 3, pa.list_(pa.int8())),
            "no time": pa.array([None] * 3, pa.date32()),
            "only nan": pa.array([float("nan")] * 3),
            "only inf": pa.array([float("inf"), float("-inf"), None]),
            "extremes": pa.array([-sys.float_info.max, 0.0, sys.float_info.max]),
            "tiny": pa.array([0.0, 5e-324, None]),
            "duration": pa.array([1, 2, 3], pa.duration("s")),
            "clock": pa.array([1, 2, 3], pa.time32("s")),
            "date": pa.array([1, 2, 8_000_000], pa.date32()),
            "last date": pa.array([2**31 - 1, 0, None], pa.date32()),
            "instant": pa.array([1, 2, 3], pa.timestamp("ns", "Asia/Tokyo")),
            "milli": pa.array([1, 2, 3], pa.timestamp("ms")),
            "bytes": pa.array([b"\x00\xff", b"a", None]),
            "fixed": pa.array([b"12", b"34", None], pa.binary(2)),
            "lists": pa.array([[[1], [2, None]], None, []]),
            "struct": pa.array([{"a": 1, "b": "x"}, None, {"a": 2, "b": None}]),
            "structs": pa.array([[{"a": 1}], None, []]),
            "map": pa.array([[("a", 1)], [], None], pa.map_(pa.string(), pa.int64())),
            "unsigned": pa.array([2**64 - 1, 0, None], pa.uint64()),
            "far": pa.array([2**62, 2**62 + 1, None], pa.int64()),
            "vectors": pa.array([[1.0, 2.0], [float("nan"), 4.0], None], pa.list_(pa.float32(), 2)),
            "nan in lists": pa.array([[float("nan"), None], [float("inf")], []]),
            "nulls in lists": pa.array([[None], [], None], pa.list_(pa.null())),
            "view": pa.array(["a", "b", None], pa.string_view()),
            "long": pa.array(["x" * 5000, "\x1b[31m", None]),
            "constant": pa.array([7, 7, 7]),
        }
    )


def run(*arguments: str) -> str:
    result = CliRunner().invoke(data_app, ["inspect", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def by_name(path: Path) -> dict[str, ColumnProfile]:
    return {column.name: column for column in profile(str(path)).columns}


class Page(HTMLParser):
    """Fails for tags that are not closed in order; notes figures, their plots and what they refer to."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.titles: list[str] = []
        self.plots: list[int] = []
        self.references: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag != "script"
        self.references += [str(value) for name, value in attrs if name in ("src", "href", "style")]
        if tag == "figure":
            self.plots.append(0)
            self.titles.append("")
        if tag == "svg" and "figure" in self.open:
            self.plots[-1] += 1
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, _attrs: list[tuple[str, str | None]]) -> None:
        assert tag in VOID

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["h3"]:
            self.titles[-1] += data


def test_odd_types(tmp_path: Path) -> None:
    pq.write_table(odd_table(), tmp_path / "odd.parquet")
    found = by_name(tmp_path / "odd.parquet")
    part = {name: column.parts[""] for name, column in found.items()}
    assert [part[name].nulls for name in ("nothing", "no float", "no list", "no time", "only nan")] == [3, 3, 3, 3, 0]
    assert (part["half"].nans, part["half"].distinct, part["half"].high) == (1, 2, 2.0)
    assert (part["only nan"].nans, part["only nan"].distinct, part["only nan"].mean) == (3, 0, None)
    assert (part["only inf"].infinities, part["only inf"].distinct, part["only inf"].low) == (2, 2, None)
    assert {top.value for top in found["only inf"].top} == {"inf", "-inf"}
    assert (part["decimal"].low, part["decimal"].high, part["decimal"].mean) == (1.5, 2, 1.75)
    assert part["exact"].high == "12345678901234567890.1"  # which no float is
    assert part["unsigned"].high == 2**64 - 1
    assert (part["extremes"].low, part["extremes"].high) == (-sys.float_info.max, sys.float_info.max)
    assert [sum(part[name].bins) for name in ("extremes", "tiny", "far", "constant", "only inf")] == [3, 2, 2, 3, 0]
    assert [c.histogram and c.histogram.scale for c in (found["far"], found["constant"])] == ["linear", "each"]
    assert (part["last date"].infinities, part["last date"].low) == (1, "1970-01-01")  # it means that there is no end
    assert part["date"].high == "23873-04-04"
    assert part["instant"].high == "1970-01-01 00:00:00.000000003+00"
    assert found["bytes"].top[0].value == "\\x00\\xFF"
    assert [top.value for top in found["lists"].top] == ["[1]", "[2, NULL]"]
    assert part["struct"].distinct == part["map"].distinct == 2
    assert (part["vectors"].elements, part["vectors"].nans, part["vectors"].distinct) == (4, 1, 3)
    nan_lists = part["nan in lists"]
    assert (nan_lists.elements, nan_lists.element_nulls, nan_lists.nans, nan_lists.infinities) == (3, 1, 1, 1)
    assert (part["nulls in lists"].elements, part["nulls in lists"].element_nulls) == (1, 1)
    assert max(len(top.value) for top in found["long"].top) == 200


@pytest.mark.parametrize("options", [(), ("--sample", "2")])
def test_odd_types_can_be_shown(tmp_path: Path, options: tuple[str, ...]) -> None:
    """Also through Arrow, as a sample is."""
    for split in ("train", "valid"):
        (tmp_path / split).mkdir()
        pq.write_table(odd_table(), tmp_path / split / "odd.parquet")
    text = run(str(tmp_path), "--leaks", *options, "--html", str(tmp_path / "page.html"))
    assert max(map(len, text[text.index("columns") :].partition("leaks\n")[0].splitlines())) <= 100
    assert "\x1b" not in text
    json.loads(run(str(tmp_path), "--json", "--leaks", *options), parse_constant=pytest.fail)
    html = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert Page(html).plots == [1] * len(odd_table().schema.names)
    assert "\x1b" not in html


def test_odd_names(tmp_path: Path) -> None:
    folder = tmp_path / "key=1" / "set [v2] it's"
    folder.mkdir(parents=True)
    pq.write_table(pa.table([[i, i, None] for i in range(len(NAMES))], names=NAMES), folder / "p[0]*?.parquet")
    found = by_name(folder)
    assert list(found) == NAMES  # neither more nor others
    for i, name in enumerate(NAMES):
        assert (found[name].parts[""].low, found[name].parts[""].nulls) == (i, 1)
    text = run(str(folder))
    for shown in ("<b>&amp;", "[red]x[/red]", r"line\nbreak", "''"):
        assert shown in text
    page_ = Page(page(profile(str(folder))))
    assert page_.titles == [{"": "(no name)", "line\nbreak": r"line\nbreak"}.get(name, name) for name in NAMES]


def test_two_columns_of_one_name(tmp_path: Path) -> None:
    pq.write_table(pa.table([[1], [2]], names=["a", "a"]), tmp_path / "x.parquet")
    with pytest.raises(UserError, match="2 columns are named 'a'; rename all but one"):
        profile(str(tmp_path))


def test_many_columns(tmp_path: Path) -> None:
    pq.write_table(pa.table({f"c{i}": np.arange(50) * i for i in range(300)}), tmp_path / "x.parquet")
    found = profile(str(tmp_path))
    assert [column.parts[""].high for column in found.columns] == [49 * i for i in range(300)]
    assert Page(page(found)).plots == [1] * 300


def test_an_empty_split(tmp_path: Path) -> None:
    table = pa.table({"user": [1, 2, 2], "item": [1, 2, 3], "label": [0, 1, 1], "history": [[1], [], None]})
    for split, rows in (("train", 3), ("valid", 0), ("test", 1)):
        (tmp_path / split).mkdir()
        pq.write_table(table[:rows], tmp_path / split / "x.parquet")
    found = profile(str(tmp_path))
    assert [split.rows for split in found.splits] == [3, 0, 1]
    assert [item.split for item in found.overlaps["user"]] == ["test"]
    parts = found.columns[3].parts
    assert (parts["valid"].rows, parts["valid"].lengths, parts["valid"].bins) == (0, None, [0, 0])
    assert found.labels[0].positive_rate == pytest.approx({"train": 2 / 3, "valid": None, "test": 0.0})
    text = run(str(tmp_path), "--leaks")
    assert "valid: 0 rows" in text
    assert "no row of test" not in text  # its row is in train
    Page(page(found))


def test_no_rows_at_all(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": pa.array([], pa.int64())}), tmp_path / "x.parquet")
    with pytest.raises(UserError, match="there are no rows"):
        profile(str(tmp_path))


def test_splits_and_files_that_differ(tmp_path: Path) -> None:
    """In the order of columns, their types, and which there are."""
    pieces: dict[str, list[dict[str, Any]]] = {
        "train": [{"a": pa.array([1, 2], pa.int32()), "b": ["x", "y"], "l": [[1], [2]]},
                  {"b": ["z"], "a": pa.array([2**40]), "l": [[2**40]]}],
        "valid": [{"a": pa.array([1.5, 2.0]), "b": pa.array([7, 8]), "more": [1, 2], "l": pa.array([[1.5], None])}],
    }  # fmt: skip
    for split, tables in pieces.items():
        (tmp_path / split).mkdir()
        for i, columns in enumerate(tables):
            pq.write_table(pa.table(columns), tmp_path / split / f"{i}.parquet")
    found = profile(str(tmp_path))
    a, b, lists, more = found.columns
    assert (a.parts["train"].high, a.parts["valid"].high) == (2**40, 2.0)
    assert a.parts["train"].distinct == 3
    assert next(top for top in a.top if top.value == 2.0).counts == {"train": 1, "valid": 1}
    assert {top.value for top in b.top} == {"x", "y", "z", "7", "8"}
    assert (lists.parts["train"].high, lists.parts["valid"].distinct) == (2**40, 1)
    assert list(more.parts) == ["valid"]
    assert "'more' is not in train" in found.notes
    assert "'a' has different types: int64 in train, double in valid" in found.notes
    Page(page(found))
    run(str(tmp_path), "--leaks")


def test_original_values_of_encoded_ids(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "_words").mkdir()
    pq.write_table(pa.table({"city": [1, 1, 2, 0]}), tmp_path / "train" / "x.parquet")
    words = pa.table({"value": ["Oslo", "Rome"], "id": [1, 2], "count": [2, 1]})
    pq.write_table(words, tmp_path / "_words" / "city.parquet")
    (tmp_path / "dataset.yaml").write_text(
        "features: {city: {kind: sparse, rows: 3, vocabulary: _words/city.parquet, out_of_range: unknown}}\n"
    )
    found = profile(str(tmp_path))
    assert found.roles.vocabularies == {}  # the column holds the vocabulary's values
    assert found.columns[0].uses == ("sparse",)

    from rechub_dist.data.tools.profile import Tables, profile_tables  # noqa: PLC0415
    from rechub_dist.data.tools.roles import find_roles  # noqa: PLC0415

    with Tables(str(tmp_path)) as tables:
        roles = find_roles(tables)
        roles.vocabularies = {"city": str(tmp_path / "_words" / "city.parquet")}  # as `encoded` says
        found = profile_tables(tables, roles, found.splits[0].run)
        assert [(top.value, top.original) for top in found.columns[0].top] == [(1, "Oslo"), (0, None), (2, "Rome")]
        roles.vocabularies = {"city": str(tmp_path / "_words" / "none.parquet")}
        assert "none.parquet" in profile_tables(tables, roles, found.splits[0].run).notes[-1]


def test_a_schema_that_cannot_be_read_is_a_note(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": [1]}), tmp_path / "x.parquet")
    (tmp_path / "dataset.yaml").write_text("features: {a: {kind: sparze}}\n")
    assert "note: dataset.yaml is not used: dataset.features.a.kind" in run(str(tmp_path))


def test_the_page_replaces_none_but_its_own(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": [1]}), tmp_path / "x.parquet")
    found, out = profile(str(tmp_path / "x.parquet")), tmp_path / "page.html"
    write_page(out, found)
    write_page(out, found)
    other = tmp_path / "other.html"
    other.write_text("mine")
    for path in (other, tmp_path / "x.parquet"):
        result = CliRunner().invoke(data_app, ["inspect", str(tmp_path / "x.parquet"), "--html", str(path)])
        assert isinstance(result.exception, UserError)
        assert re.search("exists and is not a page of rechub-dist data inspect", str(result.exception))
    assert other.read_text() == "mine"


def test_the_page_needs_nothing_from_elsewhere(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": ["</title><script>alert(1)</script>", "javascript:x"]}), tmp_path / "x.parquet")
    text = page(profile(str(tmp_path / "x.parquet")))
    assert Page(text).references == []
    assert "http://" not in text
    assert "https://" not in text
    assert "url(" not in text
    assert "prefers-color-scheme:dark" in text
    assert 'name="viewport"' in text


def test_bars_and_numbers() -> None:
    assert bars([0, 1, 8, 4]) == " ▁█▄"
    assert bars([1, 0] * 6 + [4, 4] * 6) == "▁" * 6 + "█" * 6  # two bins a cell
    assert bars([]) == bars([0, 0]) == ""
    assert [number_text(x) for x in (1234567, 0.123456789, 1e300, None, "a", 1234567.8)] == [
        "1,234,567",
        "0.123457",
        "1e+300",
        "-",
        "a",
        "1,234,568",
    ]
