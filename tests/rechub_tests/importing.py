"""An import in plain Python, row by row: what `data import` is compared with. No DuckDB, no Arrow, nothing fast.

It gets the plan as a mapping, the rows of the log and of its tables as dicts of typed values, and for each SQL
expression of the plan a function of a row that means the same.
"""

from __future__ import annotations

import datetime
import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from rechub_dist.derived import Derived
from rechub_dist.schema import parse_schema
from rechub_tests.derived_rows import row_by_row

Row = dict[str, Any]
Meanings = Mapping[str, Callable[[Row], Any]]  # of SQL expressions
SPLITS = ("train", "valid", "test")
ROW, FLAGS = object(), object()  # keys that no column has
EPOCH = datetime.datetime(1970, 1, 1)


class NothingLeftError(Exception):
    """There is no row to train on, or nothing that a feature could be made of."""


@dataclass
class Reference:
    """What an import must have made.

    Attributes:
        rows: by split, in the stored order, as stored: ids where the column is `encoded`.
        raw: the same rows with their values, and all that they were made of.
        vocabularies: by table, (value, id, count) in the order of ids.
        encoded: the columns that hold ids, with their table.
        moments: by dense feature, mean and standard deviation over train, after the transform.
        boundaries: by feature with bins.
    """

    rows: dict[str, list[Row]] = field(default_factory=dict)
    raw: dict[str, list[Row]] = field(default_factory=dict)
    vocabularies: dict[str, list[tuple[Any, int, int]]] = field(default_factory=dict)
    encoded: dict[str, str] = field(default_factory=dict)
    moments: dict[str, tuple[float, float]] = field(default_factory=dict)
    boundaries: dict[str, list[float]] = field(default_factory=dict)


def imported(plan: Mapping[str, Any], log: list[Row], tables: Mapping[str, list[Row]], sql: Meanings) -> Reference:
    """What importing these rows by this plan must make."""
    rows = [dict(row) for row in joined(plan, log, tables, sql)]
    for number, row in enumerate(rows):
        row[ROW] = number
    if plan.get("filter"):
        rows = [row for row in rows if sql[plan["filter"]](row)]
    if plan.get("unique"):
        first: dict[Any, Row] = {}
        for row in rows:
            first.setdefault(tuple(row[column] for column in plan["unique"]), row)
        rows = list(first.values())
    rows = k_core(rows, plan.get("k_core", {}))
    if not rows:
        raise NothingLeftError
    for row in rows:
        row[FLAGS] = {
            name: bool(sql[one["where"]](row)) if "where" in one else True
            for name, one in plan.get("histories", {}).items()
        }
    labels = {
        name: sql[label if isinstance(label, str) else label["expression"]]
        for name, label in plan.get("labels", {}).items()
    }
    made = [{name: meaning(row) for name, meaning in labels.items()} for row in rows]
    weights = [sql[plan["weight"]](row) for row in rows] if "weight" in plan else []
    for i, row in enumerate(rows):
        row.update({name: int(value) if isinstance(value, bool) else value for name, value in made[i].items()})
        if weights:
            row["row_weight"] = float(weights[i])
    splits = {row[ROW]: split_of for row, split_of in zip(rows, split_rows(plan, rows), strict=True)}
    if "train" not in splits.values():
        raise NothingLeftError
    add_derived_and_histories(plan, rows)
    by_split = {name: [row for row in rows if splits[row[ROW]] == name] for name in SPLITS}
    if plan.get("now"):
        by_split["now"] = list(rows_of_now(plan, rows))
    return stored(plan, by_split)


def joined(plan: Mapping[str, Any], log: list[Row], tables: Mapping[str, list[Row]], sql: Meanings) -> Iterator[Row]:
    for row in log:
        found = dict(row)
        for name, spec in plan.get("tables", {}).items():
            key = row[spec.get("log_key", spec["key"])]
            entry = next((e for e in tables[name] if key is not None and e[spec["key"]] == key), None)
            for column in spec.get("take") or [c for c in tables[name][0] if c != spec["key"]]:
                found[column] = None if entry is None else entry[column]
        yield found | {name: sql[expression](found) for name, expression in plan.get("columns", {}).items()}


def k_core(rows: list[Row], least: Mapping[str, int]) -> list[Row]:
    before = -1
    while len(rows) != before:
        before = len(rows)
        for column, count in least.items():
            counts = Counter(row[column] for row in rows)
            rows = [row for row in rows if row[column] is not None and counts[row[column]] >= count]
    return rows


def drawn_number(text: str) -> int:
    """64 bits of a hash of the text."""
    return int.from_bytes(hashlib.md5(text.encode()).digest()[8:], "little")


def split_rows(plan: Mapping[str, Any], rows: list[Row]) -> list[str | None]:
    """The split of each row; None for those that are only parts of histories."""
    split = {"by": "random", "valid": 0.1, "test": 0.1} | dict(plan.get("split", {}))
    time, user = plan.get("time"), plan.get("user")
    begin = None if "rows_from" not in split else as_time(split["rows_from"], [row[time] for row in rows])
    counted = [row for row in rows if begin is None or row[time] >= begin]
    found: list[str | None] = []
    if split["by"] == "time":
        times = sorted(row[time] for row in counted)
        if "valid_from" in split:
            valid, test = (as_time(split[key], times) for key in ("valid_from", "test_from"))
        else:
            valid, test = (cut(times, share) for share in (split["valid"] + split["test"], split["test"]))
        for row in rows:
            is_test, is_valid = (edge is not None and row[time] >= edge for edge in (test, valid))
            found.append("test" if is_test else "valid" if is_valid else "train")
    elif split["by"] == "column":
        names = {"validation": "valid", "val": "valid", "dev": "valid", "eval": "valid"}
        found = [names.get(row[split["column"]].lower(), row[split["column"]].lower()) for row in rows]
    elif split["by"] == "leave-last-out":
        for row in rows:
            of_user = sorted((r for r in rows if r[user] == row[user]), key=lambda r: (r[time], r[ROW]))
            place = len(of_user) - next(i for i, r in enumerate(of_user) if r[ROW] == row[ROW])
            found.append("train" if len(of_user) < 3 else {1: "test", 2: "valid"}.get(place, "train"))
    elif split["by"] == "position":
        numbers = [row[ROW] for row in counted]
        sizes = [int(len(counted) * split[key] + 1e-9) for key in ("test", "valid")]
        edges = [len(counted) - sizes[0], len(counted) - sum(sizes)]
        for row in rows:
            at = numbers.index(row[ROW]) if row[ROW] in numbers else 0
            found.append("test" if at >= edges[0] else "valid" if at >= edges[1] else "train")
    else:
        keys = [user] if split["by"] == "user" else split.get("key") or [ROW]
        for row in rows:
            texts = ["\x1e" if row[key] is None else str(row[key]) for key in keys]
            share = drawn_number("\x1f".join([str(plan.get("seed", 0)), *texts])) / 2.0**64
            tests, valids = 1 - split["test"], 1 - split["test"] - split["valid"]
            found.append("test" if share >= tests else "valid" if share >= valids else "train")
    return [name if begin is None or row[time] >= begin else None for row, name in zip(rows, found, strict=True)]


def as_time(text: str, times: list[Any]) -> Any:
    if isinstance(times[0], datetime.datetime):
        return datetime.datetime.fromisoformat(text)
    return datetime.date.fromisoformat(text) if isinstance(times[0], datetime.date) else float(text)


def cut(times: list[Any], share: float) -> Any:
    at = len(times) - round(len(times) * share)
    return None if at >= len(times) else times[at]


def lists_of(name: str, history: Mapping[str, Any]) -> dict[str, str]:
    return {name: history["column"], **history.get("also", {})}


def add_derived_and_histories(plan: Mapping[str, Any], rows: list[Row]) -> None:
    """Histories strictly before each row, and derived columns, some of which read histories."""
    user, time = plan.get("user"), plan.get("time")
    derived = parse_schema({"features": {"_": {"kind": "dense"}}, "derive": plan.get("derive", {})}).derived
    waiting = list(derived)
    histories = plan.get("histories", {})
    made = {out for name, one in histories.items() for out in lists_of(name, one)}
    for one in list(waiting):
        if made.isdisjoint(one.inputs):
            apply(one, rows)
            waiting.remove(one)
        else:
            made |= set(one.outputs)
    for name, history in histories.items():
        found = [newest(name, history, events(name, rows, row[user], row[time], plan)) for row in rows]
        for row, lists in zip(rows, found, strict=True):
            row.update(lists)
    for one in waiting:
        apply(one, rows)


def events(name: str, rows: list[Row], whose: Any, before: Any, plan: Mapping[str, Any]) -> list[Row]:
    """A user's events of a history in order: those strictly before a time, or all."""
    user, time = plan["user"], plan["time"]
    found = [row for row in rows if row[user] == whose and row[FLAGS][name] and (before is None or row[time] < before)]
    return sorted(found, key=lambda row: (row[time], row[ROW]))


def newest(name: str, history: Mapping[str, Any], found: list[Row]) -> Row:
    kept = found[-history.get("max_length", 50) :]
    return {out: [row[column] for row in kept] for out, column in lists_of(name, history).items()}


def rows_of_now(plan: Mapping[str, Any], rows: list[Row]) -> Iterator[Row]:
    """For each user, the last row, whose histories hold all that the user did."""
    user, time = plan["user"], plan["time"]
    derived = parse_schema({"features": {"_": {"kind": "dense"}}, "derive": plan.get("derive", {})}).derived
    histories = plan.get("histories", {})
    made = {out for name, one in histories.items() for out in lists_of(name, one)}
    for whose in dict.fromkeys(row[user] for row in rows):
        last = dict(max((r for r in rows if r[user] == whose), key=lambda r: (r[time], r[ROW])))
        for name, history in histories.items():
            last.update(newest(name, history, events(name, rows, whose, None, plan)))
        for one in derived:
            if not made.isdisjoint(one.inputs):
                made |= set(one.outputs)
                apply(one, [last])
        yield last


def apply(one: Derived, rows: list[Row]) -> None:
    for row in rows:
        seen = {key: seconds(value) for key, value in row.items()}
        row.update(zip(one.outputs, row_by_row(one, seen), strict=True))


def seconds(value: Any) -> Any:
    """A time as seconds since 1970, which is what a unit of `s` says."""
    if isinstance(value, datetime.datetime):
        return (value - EPOCH).total_seconds()
    if isinstance(value, datetime.date):
        return (datetime.datetime(value.year, value.month, value.day) - EPOCH).total_seconds()
    return value


def stored(plan: Mapping[str, Any], by_split: dict[str, list[Row]]) -> Reference:
    """Learn from train, and write the rows."""
    found = Reference()
    features = {name: {"column": name} | dict(spec) for name, spec in plan["features"].items()}
    for name, spec in features.items():
        if spec["kind"] == "dense":
            found.moments[name] = moments(spec, by_split["train"])
        elif "bins" in spec or "quantiles" in spec:
            found.boundaries[name] = list(spec.get("bins") or quantiles(spec, by_split["train"]))
            add_bins(name, spec, found.boundaries[name], by_split)
    histories = plan.get("histories", {})
    made_of = {out: column for name, one in histories.items() for out, column in lists_of(name, one).items()}
    readers: dict[str, set[str | None]] = {}  # by column, the tables of its features; None for any other use
    tables: dict[str, list[str]] = {}
    for name, spec in features.items():
        table = None
        if spec["kind"] in ("sparse", "sequence") and not {"hash", "bins", "quantiles"} & set(spec):
            table = spec.get("table") or shared_table(name, spec, features, made_of)
            tables.setdefault(table, []).append(spec["column"])
        read = [spec["times"], spec["now"]] if spec["kind"] == "time_gap" else [spec["column"]]
        for column in read if spec["kind"] != "cross" else []:
            readers.setdefault(column, set()).add(table)
        if spec.get("weights"):
            readers.setdefault(spec["weights"], set()).add(None)
    for table, columns in tables.items():
        found.vocabularies[table] = vocabulary(plan, table, columns, made_of, by_split["train"])
    if not all(found.vocabularies.values()) or not all(found.boundaries.values()):
        raise NothingLeftError
    for column, of in readers.items():
        if len(of) == 1 and None not in of and column not in (*plan.get("keep", ()), plan.get("time")):
            found.encoded[column] = str(next(iter(of)))
    kept = [*plan.get("keep", ()), *([plan["time"]] if "time" in plan else [])]
    columns = [*dict.fromkeys([*readers, *plan.get("labels", {}), *kept])]
    write(plan, columns + (["row_weight"] if "weight" in plan else []), by_split, found)
    return found


def write(plan: Mapping[str, Any], columns: list[str], by_split: dict[str, list[Row]], found: Reference) -> None:
    ids = {table: {value: id_ for value, id_, _ in entries} for table, entries in found.vocabularies.items()}
    lists = {c for c in columns if any(isinstance(row[c], list) for rows in by_split.values() for row in rows)}
    for split, rows in by_split.items():
        if split in ("valid", "test") and not rows:
            continue
        found.raw[split] = [
            {c: value for c, value in row.items() if isinstance(c, str)} for row in in_order(plan, rows)
        ]
        found.rows[split] = [
            {
                c: as_ids([] if row[c] is None and c in lists else row[c], ids[found.encoded[c]])
                if c in found.encoded
                else row[c]
                for c in columns
            }
            for row in found.raw[split]
        ]


def add_bins(name: str, spec: Row, edges: list[float], by_split: dict[str, list[Row]]) -> None:
    output = f"{name}_bin" if spec["column"] == name else name
    for row in (row for rows in by_split.values() for row in rows):
        value = row[spec["column"]]
        row[output] = None if value is None or math.isnan(value) else sum(value >= edge for edge in edges)
    spec["column"] = output


def shared_table(name: str, spec: Row, features: Mapping[str, Row], made_of: Mapping[str, str]) -> str:
    source = made_of.get(spec["column"])
    for other, candidate in features.items():
        if candidate["kind"] == "sparse" and source is not None and candidate["column"] == source:
            return candidate.get("table") or other
    return name


def as_ids(value: Any, ids: Mapping[Any, int]) -> Any:
    return [ids.get(one, 0) for one in value] if isinstance(value, list) else ids.get(value, 0)


def vocabulary(
    plan: Mapping[str, Any], table: str, columns: list[str], made_of: Mapping[str, str], train: list[Row]
) -> list[tuple[Any, int, int]]:
    settings = {"min_count": plan.get("min_count", 1)} | dict(plan.get("embeddings", {}).get(table, {}))
    counted = [c for c in dict.fromkeys(columns) if c not in made_of] or list(dict.fromkeys(columns))
    counts: Counter[Any] = Counter()
    for row in train:
        for column in counted:
            counts.update(row[column] if isinstance(row[column], list) else [row[column]])
    counts.pop(None, None)
    # strings by their bytes, which is the order of code points
    ranked = sorted(
        counts.items(), key=lambda pair: (-pair[1], pair[0].encode() if isinstance(pair[0], str) else pair[0])
    )
    kept = [(value, count) for value, count in ranked if count >= settings["min_count"]][: settings.get("max_size")]
    places = list(range(len(kept)))
    if settings.get("scatter"):  # the next whole number from the golden section of them on that shares no factor
        step = next(n for n in range(max(1, round(len(kept) * (5**0.5 - 1) / 2)), 10**9) if math.gcd(n, len(kept)) == 1)
        places = [place * step % len(kept) for place in places]
    return [(value, place + 1, count) for place, (value, count) in zip(places, kept, strict=True)]


def moments(spec: Row, train: list[Row]) -> tuple[float, float]:
    values = [row[spec["column"]] for row in train]
    there = [float(v) for v in values if v is not None and math.isfinite(v)]
    if spec.get("transform") == "log":
        there = [math.copysign(math.log1p(abs(value)), value) for value in there]
    if not there:
        return 0.0, 1.0
    mean = math.fsum(there) / len(there)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in there) / len(there))
    return mean, deviation if deviation > 0 else 1.0


def quantiles(spec: Row, train: list[Row]) -> list[float]:
    values = sorted(
        float(row[spec["column"]])
        for row in train
        if row[spec["column"]] is not None and math.isfinite(row[spec["column"]])
    )
    places = {len(values) * i // spec["quantiles"] for i in range(1, spec["quantiles"])}
    return sorted({values[place] for place in places if values[place] > values[0]})


def in_order(plan: Mapping[str, Any], rows: list[Row]) -> list[Row]:
    order = plan.get("order", "random")
    if order == "time":
        return sorted(rows, key=lambda row: (row[plan["time"]], row[ROW]))
    if order == "stored":
        return sorted(rows, key=lambda row: row[ROW])
    return sorted(rows, key=lambda row: (drawn_number(f"{row[ROW]}/{plan.get('seed', 0)}"), row[ROW]))
