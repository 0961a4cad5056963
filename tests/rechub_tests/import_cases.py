"""Random logs, tables and plans for imports, with what each SQL expression means; and how they are written and read."""

from __future__ import annotations

import csv
import datetime
import gzip
import io
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rechub_dist.data.importing.plan import plan_of
from rechub_dist.data.importing.run import Imported, import_data
from rechub_tests.importing import Meanings, Row

NULL = "\\N"
USERS = ["ann", "Bob", "o'neil", 'the "k"', "zoë", "李", "a,b", "", "nul", "x y", "semi;colon", "ünï\u2028code"]
TAGS = ["news", "sport", "", "it's", '"', "a|b", "naïve", "東京", " lead", "NULL", "0", "é", "e\u0301"]
WORDS = ["a|b||c", "", "|", " x | y ", "a", "c|a|c", "ünï|b", None]
PAIRS = ["drama:0.5,crime:2", "", "old", "a:1,a:2", " b : 3 ", None]
TYPES = {
    "user": "string", "item": "integer", "rating": "float", "tag": "string", "words": "string", "pairs": "string",
    "city": "string", "age": "integer", "price": "float", "kind": "string", "number": "integer", "wide": "float",
}  # fmt: skip
KINDS = {"user": "string", "item": "integer", "rating": "float", "tag": "string", "words": "string",
         "pairs": "string", "number": "integer", "wide": "float"}  # fmt: skip
OF_TABLES = {"users": {"user": "string", "city": "string", "age": "integer"},
             "items": {"id": "integer", "price": "float", "kind": "string"}}  # fmt: skip
SQL: Meanings = {
    "rating >= 4": lambda r: None if r["rating"] is None else r["rating"] >= 4,
    "coalesce(rating >= 4, false)": lambda r: (r["rating"] or 0) >= 4,
    "coalesce(rating, 0)": lambda r: 0.0 if r["rating"] is None else r["rating"],
    "tag is distinct from 'it''s' -- of all": lambda r: r["tag"] != "it's",
    "coalesce(number, 0) + 1": lambda r: (r["number"] or 0) + 1,
    "lower(tag) || '!'": lambda r: None if r["tag"] is None else r["tag"].lower() + "!",
    "item % 7": lambda r: r["item"] % 7,
    "1 + item % 3": lambda r: 1 + r["item"] % 3,
    "item % 3": lambda r: r["item"] % 3,
}


def some(draw: random.Random, values: Sequence[Any], nulls: float = 0.15) -> Any:
    """One of the values, or None."""
    return None if draw.random() < nulls else draw.choice(values)


def random_time(draw: random.Random, kind: str) -> Any:
    """A time of a kind, of which there are few: many events have the same."""
    step = draw.randrange(40)
    if kind == "integer":
        return 1_700_000_000 + step * 3600
    if kind == "float":
        return 1.7e9 + step * 1800.5
    begin = datetime.datetime(2024, 2, 27, 22, 30)
    return (
        begin + datetime.timedelta(minutes=step * 100)
        if kind == "timestamp"
        else begin.date() + datetime.timedelta(days=step)
    )


def random_log(draw: random.Random, rows: int, time: str) -> list[Row]:
    """A log."""
    return [
        {
            "user": draw.choice(USERS),
            "item": draw.randrange(12),
            "when": random_time(draw, time),
            "rating": some(draw, [1.0, 2.5, 3.0, 4.0, 4.5, 5.0]),
            "tag": some(draw, TAGS),
            "words": draw.choice(WORDS),
            "pairs": draw.choice(PAIRS),
            "number": some(draw, [-3, 0, 1, 2, 1000, 123_456_789]),
            "wide": some(draw, [-2.5, 0.0, 1e-3, 7.25, 1e6]),
        }
        for _ in range(rows)
    ]


def random_tables(draw: random.Random) -> dict[str, list[Row]]:
    """Users and items, some of which are missing."""
    users = [
        {"user": name, "city": some(draw, ["Rom", "Paris", "köln"]), "age": some(draw, range(18, 40))}
        for name in draw.sample(USERS, 9)
    ]
    items = [
        {"id": i, "price": some(draw, [9.5, 10.0, 19.25]), "kind": some(draw, ["book", "CD", "book's"])}
        for i in draw.sample(range(14), 11)
    ]
    return {"users": users, "items": items}


def random_plan(draw: random.Random, time: str, rows: int) -> dict[str, Any]:
    """A plan for these, without the paths: any of everything that a plan can say."""
    maybe = lambda chance=0.5: draw.random() < chance  # noqa: E731
    plan: dict[str, Any] = {
        "name": "random",
        "log": {"columns": {"when": time}},
        "tables": {"users": {"key": "user"}, "items": {"key": "id", "log_key": "item"}},
        "user": "user",
        "item": "item",
        "time": "when",
        "seed": draw.randrange(5),
        "order": draw.choice(["random", "stored", "time"]),
        "labels": {"good": "coalesce(rating >= 4, false)"},
        "columns": {"shout": "lower(tag) || '!'"},
        "min_count": draw.choice([1, 1, 2]) if rows > 100 else 1,
        "derive": {
            "genres": {"kind": "split", "column": "words", "by": "|"},
            "keys": {"kind": "key_values", "column": "pairs", "weights": "key_weights"},
            "hour": {"kind": "hour", "column": "when"},
            "day": {"kind": "weekday", "column": "when", "utc_offset": 2.0},
        },
        "features": {
            "user": {"kind": "sparse"},
            "item": {"kind": "sparse"},
            "tag": {"kind": "sparse"},
            "city": {"kind": "sparse"},
            "shout": {"kind": "sparse", "table": "tag"} if maybe() else {"kind": "sparse"},
            "genres": {"kind": "sparse", "pooling": "mean"},
            "genre_row": {"kind": "sequence", "column": "genres", "table": "genres"},
            "keys": {"kind": "sparse", "weights": "key_weights"},
            "hour": {"kind": "sparse"},
            "day": {"kind": "sparse"},
            "age": {"kind": "dense"},
            "wide": {"kind": "dense", "transform": "log"},
            "price": {"kind": "sparse", "bins": [9.75, 15.0]},
            "rating_bin4": {"kind": "sparse", "column": "rating", "quantiles": draw.choice([2, 4])},
            "number": {"kind": "sparse", "hash": 50},
            "user_x_city": {"kind": "cross", "inputs": ["user", "city"], "buckets": 30},
        },
    }
    if time == "date":
        del plan["derive"]["hour"], plan["features"]["hour"]
    if maybe():
        plan["embeddings"] = {"tag": {"max_size": draw.choice([3, 50])}, "item": {"dim": 4, "scatter": maybe()}}
    if maybe(0.3):
        plan["filter"] = draw.choice(["tag is distinct from 'it''s' -- of all", "rating >= 4"])
    if maybe(0.3):
        plan["k_core"] = {"user": 2, "item": 2}
    if maybe(0.2):
        plan["unique"] = ["user", "when"]
    if maybe(0.4):
        plan["weight"] = "1 + item % 3"
    if maybe(0.4):
        plan["labels"]["stars"] = {"expression": "coalesce(rating, 0)", "type": "regression"}
    if maybe(0.4):
        plan["labels"]["third"] = {"expression": "item % 3", "type": "multiclass", "classes": 3}
    if maybe(0.4):
        plan["keep"] = draw.sample(["user", "when", "words", "number"], 2)
    if maybe(0.7):
        add_histories(draw, plan, time)
    plan["split"] = random_split(draw, time)
    return plan


def add_histories(draw: random.Random, plan: dict[str, Any], time: str) -> None:
    """Histories of items and of genres, with times."""
    length = draw.choice([1, 3, 50])
    plan["histories"] = {
        "items": {"column": "item", "max_length": length, "also": {"times": "when", "their_tags": "tag"}},
        "good_items": {"column": "item", "where": "rating >= 4"},
    }
    plan["features"] |= {
        "items": {"kind": "sequence"},
        "their_tags": {"kind": "sequence"},
        "good_items": {"kind": "sequence", "max_length": 2},
    }
    if time != "date":
        plan["features"]["gap"] = {
            "kind": "time_gap", "times": "times", "now": "when", "boundaries": [60, 7200], "max_length": length,
        }  # fmt: skip
    plan["derive"]["seen"] = {"kind": "overlap", "left": "item", "right": "items"}
    plan["features"]["seen"] = {"kind": "dense", "standardize": False}
    plan["now"] = draw.random() < 0.5


def random_split(draw: random.Random, time: str) -> dict[str, Any]:
    """Any split."""
    edges = {
        "integer": ("1700050400", "1700100800"), "float": ("1700028808", "1700050000.25"),
        "timestamp": ("2024-02-28 20:00:00", "2024-02-29"), "date": ("2024-03-15", "2024-03-28"),
    }[time]  # fmt: skip
    begin = {"integer": "1700010800", "float": "1.70001e9", "timestamp": "2024-02-28 01:00:00", "date": "2024-03-01"}
    shares = {"valid": draw.choice([0.0, 0.1, 0.2]), "test": draw.choice([0.0, 0.15])}
    found: dict[str, Any] = draw.choice(
        [
            {"by": "random", **shares},
            {"by": "random", "key": ["user", "item"], **shares},
            {"by": "user", **shares},
            {"by": "time", **shares},
            {"by": "time", "valid_from": edges[0], "test_from": edges[1]},
            {"by": "leave-last-out"},
            {"by": "position", **shares},
        ]
    )
    if draw.random() < 0.3:
        found["rows_from"] = begin[time]
    return found


def as_text(value: Any) -> str:
    """A value in a delimited file."""
    if value is None:
        return NULL
    return repr(value) if isinstance(value, float) else str(value)


def write_csv(
    rows: list[Row], path: Path, *, delimiter: str = ",", header: bool = True, encoding: str = "utf-8"
) -> None:
    """A delimited file."""
    sink = io.StringIO()
    writer = csv.writer(sink, delimiter=delimiter, lineterminator="\n")
    if header:
        writer.writerow(rows[0])
    for row in rows:
        writer.writerow([as_text(value) for value in row.values()])
    data = sink.getvalue().encode(encoding)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def write_rows(draw: random.Random, rows: list[Row], folder: Path, name: str, kinds: dict[str, str]) -> Row:
    """Write rows in some format, in one file or several; returns the source as a plan has it."""
    how = draw.choice(["csv", "csv.gz", "tsv", "jsonl", "parquet"])
    pieces = [rows]
    if len(rows) > 3 and draw.random() < 0.5:
        at = sorted(draw.sample(range(1, len(rows)), 2))
        pieces = [rows[: at[0]], rows[at[0] : at[1]], rows[at[1] :]]
    place = folder / name
    place.mkdir()
    types = {column: kinds[column] for column in rows[0]}
    source: Row = {"path": str(place), "columns": types}
    header = draw.random() < 0.7
    for number, piece in zip((2, 9, 10), pieces, strict=False):
        path = place / f"part-{number}.{how}"
        if how == "parquet":
            pq.write_table(pa.Table.from_pylist(piece, arrow_schema(types)), path, row_group_size=7)
        elif how == "jsonl":
            path.write_text("".join(json.dumps(row, default=str, ensure_ascii=False) + "\n" for row in piece))
        else:
            write_csv(piece, path, delimiter="\t" if how == "tsv" else ",", header=header)
    if how not in ("parquet", "jsonl"):
        source |= {"nulls": [NULL], "header": header, "delimiter": "\t" if how == "tsv" else ","}
    return source


def arrow_schema(types: dict[str, str]) -> pa.Schema:
    """The types of a plan as Arrow's."""
    kinds = {
        "integer": pa.int64(), "float": pa.float64(), "string": pa.string(), "boolean": pa.bool_(),
        "timestamp": pa.timestamp("us"), "date": pa.date32(), "integers": pa.list_(pa.int64()),
        "floats": pa.list_(pa.float64()), "strings": pa.list_(pa.string()),
    }  # fmt: skip
    return pa.schema([(name, kinds[kind]) for name, kind in types.items()])


def run_import(tree: dict[str, Any], out: Path, **options: Any) -> Imported:
    """Import by a plan's tree."""
    return import_data(plan_of(tree), out, **{"memory": 256 << 20, "threads": 2} | options)


def split_of(out: Path, name: str) -> list[Row]:
    """The rows of a split of a prepared folder, in order."""
    files = sorted((out / name).glob("*.parquet"))
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def same(left: Any, right: Any) -> bool:
    """Whether two values are the same; NaN is like NaN."""
    if isinstance(left, float) and isinstance(right, float) and math.isnan(left):
        return math.isnan(right)
    return bool(left == right)
