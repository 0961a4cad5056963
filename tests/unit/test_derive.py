"""Derived columns against the same computed row by row in plain Python."""

from __future__ import annotations

import datetime
import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rechub_dist.data.columns import derive as derive_module
from rechub_dist.data.columns.derive import derive
from rechub_dist.derived import (
    Age,
    Bucket,
    Derived,
    Hour,
    KeyValues,
    Lookup,
    Overlap,
    Ratio,
    Split,
    Weekday,
    check_derived,
)
from rechub_dist.errors import UserError
from rechub_dist.schema import parse_schema
from rechub_tests.derived_rows import elements, row_by_row


def agrees(table: pa.Table, *derived: Derived) -> pa.Table:
    """Check `derive` against plain Python, and return its result."""
    found = derive(table, derived, "f")
    rows = table.to_pylist()
    for one in derived:
        for row in rows:
            row.update(zip(one.outputs, row_by_row(one, row), strict=True))
    assert found.column_names == [*table.column_names, *(name for one in derived for name in one.outputs)]
    assert found.select(table.column_names) == table
    assert found.to_pylist() == rows
    found.validate(full=True)
    return found


def maybe(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(st.none(), values)


TEXT = st.text("ab |,:é", max_size=8)
NUMBERS = st.text("ab ", max_size=2).flatmap(
    lambda key: st.sampled_from([key, f"{key}:2", f"{key}:x:-0.25", f" {key} : 1e3 ", ":1", f"{key}:.1"])
)
INTEGERS = st.integers(-(2**63) + 2**17, 2**63 - 2**17)
TIMES = st.integers(-(10**11), 10**11)
WORDS = st.lists(maybe(st.sampled_from(["a", "b", "c", "d"])), max_size=4)
IDS = st.lists(maybe(st.integers(-2, 2)), max_size=4)


@settings(deadline=None, max_examples=60)
@given(st.lists(maybe(TEXT), max_size=9), st.sampled_from(["|", ",", "a", "::"]))
def test_split(texts: list[str | None], by: str) -> None:
    for kind in (pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())):
        table = pa.table({"t": pa.array(texts * 3).cast(pa.string()).cast(kind)})
        found = agrees(table, Split("out", "t", by))
        assert found.schema.field("out").type == pa.list_(pa.string())


@settings(deadline=None, max_examples=60)
@given(st.lists(maybe(st.lists(NUMBERS, max_size=3).map(",".join)), max_size=9))
def test_key_values(texts: list[str | None]) -> None:
    found = agrees(pa.table({"t": pa.array(texts * 3, pa.string())}), KeyValues("out", "weights", "t"))
    assert found.schema.field("weights").type == pa.list_(pa.float32())


@settings(deadline=None, max_examples=60)
@given(
    st.lists(maybe(INTEGERS), max_size=9),
    st.sampled_from(["s", "ms", "us", "ns"]),
    st.sampled_from([0.0, 8.0, -3.5, 5.75, 24.0, -24.0]),
)
def test_hours_and_weekdays_of_integers(times: list[int | None], unit: Any, offset: float) -> None:
    table = pa.table({"t": pa.array(times, pa.int64())})
    agrees(table, Hour("hour", "t", offset, unit), Weekday("day", "t", offset, unit))


@settings(deadline=None, max_examples=60)
@given(
    st.lists(maybe(st.floats(-1e12, 1e12, allow_subnormal=False) | st.sampled_from([math.nan, math.inf])), max_size=9)
)
def test_hours_and_weekdays_of_floats(times: list[float | None]) -> None:
    made = derive(pa.table({"t": pa.array(times, pa.float64())}), [Hour("h", "t", 2.0, "ms"), Weekday("d", "t")], "f")
    for time, hour, day in zip(times, made["h"].to_pylist(), made["d"].to_pylist(), strict=True):
        assert (hour,) == row_by_row(Hour("h", "t", 2.0, "ms"), {"t": time})
        assert (day,) == row_by_row(Weekday("d", "t"), {"t": time})


@settings(deadline=None, max_examples=60)
@given(st.lists(st.datetimes(datetime.datetime(1800, 1, 1), datetime.datetime(2200, 1, 1)), max_size=9))
def test_hours_and_weekdays_of_timestamps_and_dates(times: list[datetime.datetime]) -> None:
    for kind in (pa.timestamp("us"), pa.timestamp("us", "UTC"), pa.timestamp("ns"), pa.timestamp("s"), pa.date32()):
        date = pa.types.is_date(kind)
        # Arrow's cast to seconds goes towards 1970, not down
        whole = [t.replace(microsecond=0) if kind == pa.timestamp("s") else t for t in times]
        column = pa.array([t.date() for t in times], kind) if date else pa.array(whole, pa.timestamp("us")).cast(kind)
        made = derive(pa.table({"t": column}), EAST, "f")
        local = [(t.replace(hour=0, minute=0) if date else t) + datetime.timedelta(hours=1) for t in times]
        assert made["h"].to_pylist() == [t.hour for t in local]
        assert made["d"].to_pylist() == [t.weekday() for t in local]


EAST = (Hour("h", "t", 1.0, "ns"), Weekday("d", "t", 1.0, "ns"))


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(maybe(TIMES), maybe(TIMES)), max_size=9),
    st.sampled_from(["second", "minute", "hour", "day"]),
    st.sampled_from(["s", "ms", "us", "ns"]),
)
def test_age(pairs: list[tuple[Any, Any]], per: Any, unit: Any) -> None:
    for kind in (pa.int64(), pa.float64()):
        columns = [pa.array([pair[i] for pair in pairs], pa.int64()).cast(kind, safe=False) for i in (0, 1)]
        agrees(pa.table(columns, ["t", "now"]), Age("out", "t", "now", per, unit))


def test_ages_of_unlike_times() -> None:
    when = datetime.datetime(2024, 5, 6, 12)
    table = pa.table(
        {
            "date": pa.array([when.date(), None]),
            "ns": pa.array([when, when], pa.timestamp("ns")),
            "s": pa.array([when, when], pa.timestamp("s")),
            "float": pa.array([when.replace(tzinfo=datetime.UTC).timestamp() + 0.5, math.nan]),
            "integer": pa.array([int(when.replace(tzinfo=datetime.UTC).timestamp()) - 60, None], pa.int32()),
        }
    )

    def age(column: str, now: str, per: Any) -> Any:
        return derive(table, [Age("out", column, now, per)], "f")["out"].to_pylist()

    assert age("date", "ns", "hour") == [12.0, None]
    assert age("ns", "date", "day") == [-0.5, None]
    assert age("s", "ns", "second") == [0.0, 0.0]
    assert age("ns", "float", "second") == [0.5, None]
    assert age("integer", "s", "minute") == [1.0, None]


@settings(deadline=None, max_examples=60)
@given(
    st.lists(maybe(st.integers(-(2**63), 2**63 - 1) | st.integers(-9, 9)), max_size=9),
    st.lists(maybe(st.floats(width=32, allow_subnormal=False) | st.integers(-9, 9).map(float)), max_size=9),
    st.lists(st.floats(-1e20, 1e20) | st.integers(-9, 9).map(float), min_size=1, max_size=4, unique=True),
)
def test_bucket(integers: list[Any], floats: list[Any], boundaries: list[float]) -> None:
    ascending = tuple(sorted(boundaries))
    found = derive(pa.table({"x": pa.array(integers, pa.int64())}), [Bucket("out", "x", ascending)], "f")
    assert found["out"].to_pylist() == [row_by_row(Bucket("out", "x", ascending), {"x": x})[0] for x in integers]
    for kind in (pa.float64(), pa.float32()):
        found = derive(pa.table({"x": pa.array(floats, kind)}), [Bucket("out", "x", ascending)], "f")
        assert found["out"].to_pylist() == [row_by_row(Bucket("out", "x", ascending), {"x": x})[0] for x in floats]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(maybe(st.integers(-9, 9)), maybe(st.integers(-2, 2))), max_size=9))
def test_ratio(pairs: list[tuple[Any, Any]]) -> None:
    for kinds in ((pa.int8(), pa.int64()), (pa.float64(), pa.uint8()), (pa.float32(), pa.decimal128(19))):
        values = [[None if pair[i] is None else abs(pair[i]) for pair in pairs] for i in (0, 1)]
        columns = [pa.array(own, pa.int64()).cast(kind) for own, kind in zip(values, kinds, strict=True)]
        agrees(pa.table(columns, ["a", "b"]), Ratio("out", "a", "b"))


LISTS: list[Callable[[pa.DataType], pa.DataType]] = [pa.list_, pa.large_list, pa.list_view, pa.large_list_view]


@settings(deadline=None, max_examples=80)
@given(st.data(), st.sampled_from(LISTS), st.booleans(), st.booleans())
def test_overlap(data: st.DataObject, lists: Any, words: bool, share: bool) -> None:
    rows = data.draw(st.lists(st.tuples(*[maybe(WORDS if words else IDS)] * 2), max_size=6))
    kinds = (pa.string(), pa.large_string()) if words else (pa.int8(), pa.int64())
    columns = [pa.array([row[i] for row in rows], lists(kind)) for i, kind in enumerate(kinds)]
    agrees(pa.table(columns, ["l", "r"]), Overlap("out", "l", "r", share))
    one = pa.array([elements(row[0])[0] if elements(row[0]) else None for row in rows], kinds[0])
    agrees(pa.table([one, columns[1]], ["l", "r"]), Overlap("out", "l", "r", share))
    agrees(pa.table([one.dictionary_encode(), columns[1]], ["l", "r"]), Overlap("out", "l", "r", share))


@settings(deadline=None, max_examples=120)
@given(st.data(), st.sampled_from(["sum", "mean", "max", "first"]), st.booleans())
def test_lookup(data: st.DataObject, combine: Any, words: bool) -> None:
    some = WORDS if words else IDS
    values = maybe(st.sampled_from([0.5, -1.0, 3.25, 1e30, math.nan, 0.1]))
    rows = data.draw(st.lists(st.tuples(maybe(some), maybe(some)), max_size=6))
    kind = pa.string() if words else pa.int32()
    keys, of = (pa.array([row[i] for row in rows], pa.list_(kind)) for i in (0, 1))
    weights = pa.array([row[1] and [data.draw(values) for _ in row[1]] for row in rows], pa.list_(pa.float64()))
    one = Lookup("out", "keys", "of", "values", -7.5, combine)
    table = pa.table([keys, of, weights], ["keys", "of", "values"])
    made = [row_by_row(one, row)[0] for row in table.to_pylist()]
    assert derive(table, [one], "f")["out"].to_pylist() == made
    first = pa.array([elements(row[0])[0] if elements(row[0]) else None for row in rows], kind)
    table = table.set_column(0, "keys", first)
    made = [row_by_row(one, row)[0] for row in table.to_pylist()]
    assert derive(table, [one], "f")["out"].to_pylist() == made


def big_table(rows: int) -> tuple[pa.Table, tuple[Derived, ...]]:
    """Rows of all kinds, with nulls, and derived columns that read them and each other."""
    draw = random.Random(3)
    genres = ["drama", "crime", "war", "sci-fi", "docu"]

    def some(make: Callable[[], Any]) -> list[Any]:
        return [None if draw.random() < 0.1 else make() for _ in range(rows)]

    table = pa.table(
        {
            "genre_text": some(lambda: "|".join(draw.sample(genres, draw.randint(0, 3)))),
            "taste_text": some(lambda: ",".join(f"{g}:{draw.randint(1, 9) / 4}" for g in draw.sample(genres, 2))),
            "time": some(lambda: draw.randint(0, 2 * 10**9)),
            "released": some(lambda: draw.randint(0, 2 * 10**9)),
            "price": some(lambda: draw.random() * 100),
            "usual": some(lambda: float(draw.randint(0, 3))),
        }
    )
    return table, (
        Split("genres", "genre_text"),
        KeyValues("taste", "taste_weights", "taste_text"),
        Hour("hour", "time", 8.0),
        Weekday("weekday", "time"),
        Age("age", "released", "time"),
        Bucket("age_bucket", "age", (0.0, 100.0, 1000.0)),
        Ratio("relative", "price", "usual"),
        Overlap("liked", "genres", "taste"),
        Overlap("liked_share", "genres", "taste", share=True),
        Lookup("liking", "genres", "taste", "taste_weights", combine="mean"),
    )


def test_columns_derived_from_each_other_in_chunks_and_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    table, derived = big_table(1000)
    whole = agrees(table, *derived)
    monkeypatch.setattr(derive_module, "_ROWS", 64)
    chunked = pa.concat_tables([table.slice(0, 10), table.slice(10, 0), table.slice(10, 333), table.slice(343)])
    assert derive(chunked, derived, "f") == whole
    assert derive(table.slice(123, 456), derived, "f") == whole.slice(123, 456)
    coded = table.set_column(0, "genre_text", table["genre_text"].dictionary_encode()).slice(5, 99)
    assert derive(coded, derived, "f").drop_columns("genre_text") == whole.slice(5, 99).drop_columns("genre_text")


def test_tables_without_rows_or_values() -> None:
    table, derived = big_table(1)
    types = derive(table, derived, "f").schema
    assert derive(table.slice(0, 0), derived, "f").schema == types
    assert derive(table.schema.empty_table(), derived, "f").schema == types
    nulls = derive(pa.table({name: pa.nulls(2) for name in table.column_names}), derived, "f")
    assert [nulls.schema.field(name).type for name in nulls.column_names[6:]] == [kind.type for kind in types][6:]
    nothing = dict.fromkeys(nulls.column_names) | {"liked": 0, "liked_share": 0.0, "liking": 0.0}
    assert nulls.to_pylist() == [nothing] * 2
    pairs = pa.array([[1, 2], None, [2, 2]], pa.list_(pa.int16(), 2))
    agrees(pa.table({"l": pairs, "r": [[2], [2], None]}).slice(1), Overlap("out", "l", "r"))
    lists = pa.table({"l": pa.nulls(2), "r": pa.array([[None], None], pa.list_(pa.null()))})
    assert derive(lists, [Overlap("out", "l", "r")], "f")["out"].to_pylist() == [0, 0]


def test_a_column_that_is_there_stays() -> None:
    table = pa.table({"t": ["a|b", "c"], "kv": ["a:2", "b"], "keys": [["x"], ["y"]]})
    pieces, pairs = Split("pieces", "t"), KeyValues("keys", "weights", "kv")
    found = derive(table, [pieces, pairs], "f")
    assert found.column_names == ["t", "kv", "keys", "pieces", "weights"]
    assert found["keys"].to_pylist() == [["x"], ["y"]]
    assert found["weights"].to_pylist() == [[2.0], [1.0]]
    assert derive(found, [pieces, pairs], "f") is found
    assert derive(pa.table({"pieces": [1]}), [pieces], "f").to_pydict() == {"pieces": [1]}  # nor is its input needed


def test_integers_beyond_what_floats_can_tell_apart() -> None:
    big = 2**53
    table = pa.table({"x": pa.array([big, big + 1, 2**64 - 1], pa.uint64())})
    assert derive(table, [Bucket("b", "x", (-1.0, big, big + 2.0, 2.0**64))], "f")["b"].to_pylist() == [2, 2, 3]


@pytest.mark.parametrize(
    ("one", "columns", "message"),
    [
        (
            Split("g", "tx"),
            {"t": ["a"]},
            "f: there is no column 'tx', which derived column 'g' (kind: split) needs; did",
        ),
        (Split("g", "t"), {"t": [1]}, "f: column 't' is int64, but derived column 'g' (kind: split) needs strings"),
        (
            Split("g", "t"),
            {"t": [["a"]]},
            "column 't' is list<item: string>, but derived column 'g' (kind: split) needs s",
        ),
        (
            Hour("h", "t"),
            {"t": ["12:00"]},
            "column 't' is string, but derived column 'h' (kind: hour) needs timestamps, d",
        ),
        (Hour("h", "t"), {"t": [True]}, "needs timestamps, dates or numbers"),
        (
            Hour("h", "t"),
            {"t": pa.array([2**63], pa.uint64())},
            "f: derived column 'h': Integer value 9223372036854775808",
        ),
        (Age("a", "t", "n"), {"t": [-(2**63)], "n": [1]}, "f: derived column 'a': overflow; fix the data"),
        (
            Age("a", "t", "n"),
            {"t": pa.array([1], pa.timestamp("s", "UTC")), "n": pa.array([1], pa.timestamp("s"))},
            "columns 't' and 'n' are timestamp[s, tz=UTC] and timestamp[s], but derived column 'a' (kind: age) needs ",
        ),
        (Bucket("b", "x", (1,)), {"x": ["1"]}, "needs numbers"),
        (Ratio("r", "x", "y"), {"x": [1], "y": [[1]]}, "column 'y' is list<item: int64>, but derived column 'r'"),
        (
            Overlap("o", "l", "r"),
            {"l": ["a"], "r": ["a"]},
            "column 'r' is string, but derived column 'o' (kind: overlap) n",
        ),
        (Overlap("o", "l", "r"), {"l": [0.5], "r": [[0.5]]}, "needs strings or integers, or lists of them"),
        (Overlap("o", "l", "r"), {"l": ["a"], "r": [[1]]}, "needs strings in both, or integers in both"),
        (Lookup("o", "k", "of", "v"), {"k": ["a"], "of": [["a"]], "v": [["b"]]}, "needs lists of numbers"),
        (
            Lookup("o", "k", "of", "v"),
            {"k": ["a"] * 2, "of": [["a"], ["b"]], "v": [[1], [1, 2]]},
            "f: columns 'of' and 'v' have 1 and 2 elements in one row; derived column 'o' needs one value per key",
        ),
        (
            KeyValues("k", "w", "t"),
            {"t": ["a:1", "b:c"]},
            "f: column 't': 'c' is no weight of 32 bits; derived column 'k'",
        ),
        (KeyValues("k", "w", "t"), {"t": ["a:1e99"]}, "f: column 't': '1e99' is no weight of 32 bits"),
        (KeyValues("k", "w", "t"), {"t": ["a:nan"]}, "'nan' is no weight of 32 bits"),
        (KeyValues("k", "w", "t"), {"t": ["a:"]}, "'' is no weight of 32 bits"),
    ],
)
def test_what_cannot_be_derived(one: Derived, columns: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        derive(pa.table(columns), [one], "f")
    assert message in str(caught.value)


def test_a_column_that_is_there_twice() -> None:
    with pytest.raises(UserError, match="f: 2 columns are named 't'; rename all but one"):
        derive(pa.table([["a"], ["b"]], ["t", "t"]), [Split("g", "t")], "f")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Split("t", "t"), "has the name of the column that it reads"),
        (lambda: KeyValues("k", "t", "t"), "derived column 't' has the name"),
        (lambda: KeyValues("k", "k", "t"), "its columns of keys and of weights have the same name"),
        (lambda: KeyValues("k", "w", "t", ":", ":"), "by and between are both ':', must differ"),
        (lambda: KeyValues("k", "w", "t", between=""), "between is empty"),
        (lambda: Split("g", "t", ""), "by is empty"),
        (lambda: Split("g", ""), "the name of a column is empty"),
        (lambda: Split("", "t"), "the name of a column is empty"),
        (lambda: Hour("h", "t", 25), "utc_offset is 25, must be hours"),
        (lambda: Weekday("h", "t", math.nan), "utc_offset is nan"),
        (lambda: Bucket("b", "t", ()), "boundaries are [], must be ascending numbers"),
        (lambda: Bucket("b", "t", (1, 1)), "boundaries are [1, 1]"),
        (lambda: Bucket("b", "t", (1, math.inf)), "boundaries are [1, inf]"),
        (lambda: Lookup("l", "k", "o", "v", math.inf), "default is inf, must be a finite number"),
        (lambda: check_derived([Split("a", "t"), Split("a", "u")]), "'a' and 'a' both make column 'a'"),
        (lambda: check_derived([KeyValues("a", "b", "t"), Split("b", "t")]), "'a' and 'b' both make column 'b'"),
        (
            lambda: check_derived([Overlap("a", "b", "c"), Split("b", "t")]),
            "'a' reads column 'b', which is derived after",
        ),
    ],
)
def test_what_cannot_be_declared(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is compared below
        make()
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"g": {"kind": "spilt", "column": "t"}}, "dataset.derive.g.kind: got 'spilt'; did you mean 'split'?"),
        ({"g": {"column": "t"}}, "dataset.derive.g.kind: got None; valid: age, bucket, hour"),
        ({"g": {"kind": "split"}}, "missing key 'dataset.derive.g.column'"),
        ({"g": {"kind": "split", "column": "t", "sep": ","}}, "unknown key 'dataset.derive.g.sep'"),
        (
            {"g": {"kind": "split", "column": "g"}},
            "dataset.derive.g: derived column 'g' has the name of the column that",
        ),
        (
            {"g": {"kind": "hour", "column": "t", "unit": "m"}},
            "dataset.derive.g.unit: input should be 's', 'ms', 'us' or",
        ),
        (
            {"g": {"kind": "bucket", "column": "t", "boundaries": ["a"]}},
            "dataset.derive.g.boundaries.0: input should be a",
        ),
        (
            {"g": {"kind": "overlap", "left": "h", "right": "t"}, "h": {"kind": "split", "column": "t"}},
            "dataset: derived",
        ),
        (["g"], "dataset.derive: write a mapping of names to mappings"),
    ],
)
def test_sections_that_cannot_be(section: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_schema({"features": {"x": {"kind": "dense"}}, "derive": section})
    assert message in str(caught.value)


def inputs_and_outputs(derived: Sequence[Derived]) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
    return [(one.inputs, one.outputs) for one in derived]


def test_inputs_and_outputs() -> None:
    found = inputs_and_outputs(
        (KeyValues("k", "w", "t"), Age("a", "t", "now"), Lookup("l", "keys", "of", "values"), Overlap("o", "x", "y"))
    )
    assert found == [
        (("t",), ("k", "w")),
        (("t", "now"), ("a",)),
        (("keys", "of", "values"), ("l",)),
        (("x", "y"), ("o",)),
    ]
