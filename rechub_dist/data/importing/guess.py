"""Guesses a plan from the files: a beginning to edit, with what each column looks like as a comment."""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import yaml

from rechub_dist.data.importing.engine import Engine, literal, quoted, reserved_words
from rechub_dist.data.importing.look import (
    Column,
    format_of,
    guess_source,
    is_text,
    look_at,
    sniffed,
    unit_of,
)
from rechub_dist.data.importing.plan import Source
from rechub_dist.data.importing.rows import FRACTIONS, alike, is_numeric
from rechub_dist.data.importing.sources import source_files, source_query
from rechub_dist.errors import UserError, nearest, printable, shown

_USER = re.compile(
    r"(user|uid|member|customer|visitor|session|reviewer|account|client)s?([ _-]?(id|no|num|key))?", re.I
)
_ITEM = re.compile(
    r"(item|movie|video|product|article|asin|sku|ad|song|track|book|news|goods|game|business|photo|note)s?"
    r"([ _-]?(id|no|key))?",
    re.I,
)
_TIME = re.compile(r"(.*_)?(time|timestamp|ts|date|datetime|created(_at)?|time_?ms|event_?time|dt)", re.I)
_OUTCOME = re.compile(
    r"((is|has|did)_.*|label.*|.*_label|target|y|clicks?(ed)?|conversions?|convert(ed)?|purchased?|buy|bought|liked?|"
    r"follow(ed)?|income|class|outcome|churn(ed)?|survived|long_view)",
    re.I,
)
_RATING = re.compile(r"(.*_)?(ratings?|rate|stars|score|grade)", re.I)
_ROW_NUMBER = re.compile(r"unnamed: ?\d+|column0|(row_?)?(index|idx|number|no|nr)|row_?id", re.I)
_WORDS: Final = 40  # characters, from which on strings are texts rather than categories
_MANY: Final = 100  # rows, from which on it tells something that all values differ
_FEW: Final = 64  # integers of so few values are categories


@dataclass
class Draft:
    """A plan in the making: sections, features and the notes on them."""

    tree: dict[str, Any] = field(default_factory=dict)
    features: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    unused: dict[str, str] = field(default_factory=dict)


def guess_plan(
    sources: Sequence[str],
    tables: Mapping[str, str],
    *,
    user: str | None = None,
    item: str | None = None,
    time: str | None = None,
    labels: Sequence[str] = (),
    names: Sequence[Sequence[str]] = (),
    frames: Mapping[str, pa.Table] | None = None,
    memory: int,
    threads: int | None = None,
) -> str:
    """The text of a plan for a log and the tables to join to it.

    Args:
        sources: files, folders or patterns of the log.
        tables: by name, the path of a table; its key is a column that the log has too, unique in the table.
        user, item, time: columns of the log; empty: none; default: by their names and values.
        labels: columns or expressions; default: by names and values.
        names: of the columns of files without a header, the log's first, then those of the tables.
        frames: tables in memory for the sources `log` and `tables.NAME`, whose paths are then names alone.
        memory, threads: of the database.

    Raises:
        UserError: a file cannot be read, or nothing can be a feature.
    """
    with tempfile.TemporaryDirectory(prefix="guess-") as folder:
        engine = Engine(Path(folder), memory, threads)
        try:
            for where, rows in (frames or {}).items():
                engine.give(where, rows)
            return _guess(engine, sources, tables, {"user": user, "item": item, "time": time}, labels, names)
        finally:
            engine.close()


def _guess(
    engine: Engine,
    sources: Sequence[str],
    tables: Mapping[str, str],
    given: dict[str, str | None],
    labels: Sequence[str],
    given_names: Sequence[Sequence[str]],
) -> str:
    paths = {"log": tuple(sources), **{f"tables.{name}": (path,) for name, path in tables.items()}}
    given_paths = {where: path for where, path in paths.items() if engine.given(where) is None}
    engine.confine([file for where, path in given_paths.items() for file in source_files(Source(path=path), where)])
    log = guess_source(engine, tuple(sources), given_names[0] if given_names else (), "log")
    query = source_query(log, engine, "log")
    columns = look_at(engine, query, None)
    if not columns:
        raise UserError(f"{sources[0]}: there is no column")
    draft = Draft()
    draft.tree["name"] = re.sub(r"\W+", "_", Path(sources[0]).stem.partition(".")[0]).strip("_").lower() or "data"
    draft.tree["log"] = {"path": list(sources), **format_of(engine, log, columns, "log")}
    for place, (name, path) in enumerate(tables.items(), 1):
        where = f"tables.{name}"
        names = given_names[place] if place < len(given_names) else ()
        source = guess_source(engine, (path,), names, where)
        if is_text(source_query(source, engine, where)) and not source.columns and not sniffed(engine, source)[2]:
            raise UserError(
                f"--table {name}: {path} has no header: give --columns for the log and for each table, in this order"
            )
        added = look_at(engine, source_query(source, engine, where), name)
        key = _key(name, path, columns, added)
        entry = {"path": path, "key": key, **format_of(engine, source, added, where)}
        fresh = {k: c for k, c in added.items() if k != key and alike(k, columns) is None}
        if len(fresh) < len(added) - 1:
            entry["take"] = list(fresh)  # the log has columns of the other names
        draft.tree.setdefault("tables", {})[name] = entry
        columns |= fresh
    roles = _roles(columns, given)
    draft.tree |= {key: value for key, value in roles.items() if value is not None}
    used = _labels(draft, columns, roles, labels, engine, query)
    for column in columns.values():
        if column.name not in used and column.name != roles["time"]:
            _feature(draft, column, roles, columns)
    _split_and_histories(draft, columns, roles)
    if not draft.features:
        raise UserError(
            f"{sources[0]}: no column can be a feature: " + "; ".join(f"{k}: {v}" for k, v in draft.unused.items())
        )
    return _text(draft, sources)


def _key(name: str, path: str, log: Mapping[str, Column], table: Mapping[str, Column]) -> str:
    shared = [column for column in table if column in log]
    for column in shared:
        if table[column].distinct == table[column].rows:
            return column
    if not shared:
        raise UserError(
            f"--table {name}: {path} has no column of the log's: {nearest(next(iter(table)), log)}; rename its key"
        )
    raise UserError(f"--table {name}: none of {', '.join(shared)}, which the log has too, is unique in {path}")


def _roles(columns: Mapping[str, Column], given: dict[str, str | None]) -> dict[str, str | None]:
    for option, name in given.items():
        if name and name not in columns:
            raise UserError(f"--{option}: there is no column {name!r}; {nearest(name, columns)}")
    found = dict(given)
    of_log = [column for column in columns.values() if column.table is None]
    for option, pattern in (("user", _USER), ("item", _ITEM)):
        named = [c.name for c in of_log if pattern.fullmatch(c.name) and not c.is_list and c.base not in FRACTIONS]
        if found[option] is None:
            found[option] = next((c for c in named if c not in found.values()), None)
    if found["time"] is None:
        moments = [c.name for c in of_log if c.kind.startswith("TIMESTAMP")]
        named = [c.name for c in of_log if _TIME.fullmatch(c.name) and unit_of(c)]
        found["time"] = next(iter(named or (moments if len(moments) == 1 else [])), None)
    return {role: name or None for role, name in found.items()}


def _labels(
    draft: Draft,
    columns: Mapping[str, Column],
    roles: Mapping[str, str | None],
    given: Sequence[str],
    engine: Engine,
    query: str,
) -> set[str]:
    """Write the labels; returns the columns that are not to be features."""
    found: dict[str, str] = {}
    used: set[str] = set()
    for text in given:
        name = text if text in columns else _free("label" if len(given) == 1 else f"label_{len(found)}", columns)
        found[name] = _plain(text) if text in columns else text
        read = {column.casefold() for column in engine.columns_in(found[name], "--label")}
        used |= {column for column in columns if column.casefold() in read}
    for column in columns.values() if not given else ():
        if column.name in roles.values() or column.is_list or column.table is not None:
            continue
        two = column.distinct == 2 and not column.nulls
        if _RATING.fullmatch(column.name) and is_numeric(column.kind) and column.distinct > 2:
            found[_free(f"{column.name}_high", columns)] = f"{_plain(column.name)} >= {math.ceil(column.mean or 0)}"
            used.add(column.name)
        elif (
            _OUTCOME.fullmatch(column.name) and two and is_numeric(column.kind) and (column.low, column.high) == (0, 1)
        ) or (_OUTCOME.fullmatch(column.name) and two and column.kind == "BOOLEAN"):
            found[column.name] = _plain(column.name)
            used.add(column.name)
        elif _OUTCOME.fullmatch(column.name) and two and column.kind == "VARCHAR":
            rarer = engine.value(f"select {quoted(column.name)} from ({query}) group by 1 order by count(*), 1 limit 1")
            found[column.name] = f"{_plain(column.name)} = {literal(rarer)}"
            used.add(column.name)
    draft.tree["labels"] = found
    return used


def _feature(draft: Draft, column: Column, roles: Mapping[str, str | None], columns: Mapping[str, Column]) -> None:
    name = column.name
    draft.notes[name] = column.note
    why = _why_not(column, roles)
    if why is not None:
        draft.unused[name] = why
    elif column.is_list:
        if column.base in FRACTIONS:
            draft.features[name] = {"kind": "dense", "dim": int(column.length or 1), "standardize": False}
        else:
            draft.features[name] = {"kind": "sparse", "pooling": "mean"}
    elif column.kind == "VARCHAR" and column.pairs:
        keys, weights = _free(f"{name}_keys", columns), _free(f"{name}_weights", columns)
        draft.tree.setdefault("derive", {})[keys] = {"kind": "key_values", "column": name, "weights": weights}
        draft.features[keys] = {"kind": "sparse", "weights": weights}
    elif column.kind == "VARCHAR" and column.separator:
        pieces = _free(f"{name}_list", columns)
        draft.tree.setdefault("derive", {})[pieces] = {"kind": "split", "column": name, "by": column.separator}
        draft.features[pieces] = {"kind": "sparse", "pooling": "mean"}
    elif column.kind == "VARCHAR" or name in (roles["user"], roles["item"]):
        draft.features[name] = {"kind": "sparse"}
    elif column.kind == "BOOLEAN":
        draft.features[name] = {"kind": "dense", "standardize": False}
    elif column.kind.startswith(("TIMESTAMP", "DATE")):
        draft.unused[name] = "a time: derive hour, weekday or age of it"
    elif column.base in FRACTIONS or column.base.startswith("DECIMAL"):
        draft.features[name] = _dense(column)
    elif column.distinct <= _FEW or re.search(r"(^|_)(id|code|type|cat|category)$|Id$|ID$", name):
        draft.features[name] = {"kind": "sparse"}
    else:
        draft.features[name] = _dense(column)


def _dense(column: Column) -> dict[str, Any]:
    """A number; its logarithm is taken where it is skewed: its mean is far from the middle of its range."""
    low, high, mean = float(column.low), float(column.high), column.mean or 0.0
    skewed = low >= 0 and high > 100 and mean < low + (high - low) / 10
    return {"kind": "dense", **({"transform": "log"} if skewed else {})}


def _why_not(column: Column, roles: Mapping[str, str | None]) -> str | None:
    """Why a column is no feature; None if it may be one."""
    readable = column.base in ("VARCHAR", "BOOLEAN") or is_numeric(column.base)
    all_differ = column.table is None and column.distinct == column.rows
    why = None
    if not readable and not column.kind.startswith(("TIMESTAMP", "DATE")):
        why = f"{column.kind}, which no feature can be made of"
    elif column.base == "HUGEINT":
        why = "integers of more than 64 bits"
    elif column.nulls == column.rows:
        why = "it has no value"
    elif column.is_list and column.base in FRACTIONS and column.length is None:
        why = "lists of different lengths"
    elif column.is_list or column.name in (roles["user"], roles["item"]):
        pass
    elif column.distinct <= 1 and not column.nulls:
        why = "all values are equal"
    elif all_differ and _ROW_NUMBER.fullmatch(column.name):
        why = "a row's number"
    elif column.kind == "VARCHAR" and (column.length or 0) > _WORDS and not column.separator:
        why = "texts; make vectors of them, as lists of numbers"
    elif all_differ and column.rows >= _MANY and column.kind == "VARCHAR":
        why = "all values differ, which a model could only memorise"
    return why


def _split_and_histories(draft: Draft, columns: Mapping[str, Column], roles: Mapping[str, str | None]) -> None:
    user, item, time = roles["user"], roles["item"], roles["time"]
    if time is not None:
        draft.tree["split"] = {"by": "time", "valid": 0.1, "test": 0.1}
        unit = unit_of(columns[time])
        of = {"column": time} | ({} if unit in ("timestamp", None) else {"unit": unit})
        for kind in ("weekday",) if columns[time].kind == "DATE" else ("hour", "weekday"):
            name = _free(f"{time}_{kind}", columns)
            draft.tree.setdefault("derive", {})[name] = {"kind": kind, **of}
            draft.features[name] = {"kind": "sparse"}
    else:
        draft.tree["split"] = {"by": "random", "valid": 0.1, "test": 0.1}
    if item and any(table["key"] == item for table in draft.tree.get("tables", {}).values()):
        draft.tree["items"] = True
    if user and item and time:
        name = _free("history", [*columns, *draft.tree["labels"]])
        draft.tree["histories"] = {name: {"column": item, "max_length": 50}}
        draft.features[name] = {"kind": "sequence"}
        draft.notes[name] = f"the user's {item}s strictly before the row, the newest 50"

    placed = [name for name in ((time, user) if user and item and time else (time,)) if name and columns[name].nulls]
    if placed:
        draft.tree["filter"] = " and ".join(f"{_plain(name)} is not null" for name in placed)


def _free(name: str, columns: Iterable[str]) -> str:
    """The name, or with underscores after it one that no column has."""
    columns = list(columns)
    while alike(name, columns) is not None:
        name += "_"
    return name


def _text(draft: Draft, sources: Sequence[str]) -> str:
    lines = [
        f"# Guessed from {printable(', '.join(sources))}. Look through it: what is a label? what may a model know?",
        "# docs/import.md says what else can stand here.",
    ]
    order = (
        "name",
        "log",
        "tables",
        "filter",
        "user",
        "item",
        "time",
        "split",
        "labels",
        "histories",
        "items",
        "derive",
    )
    for key in order:
        if draft.tree.get(key):
            if key == "split" and draft.tree["split"]["by"] == "time":
                lines.append("# the newest rows are test, as in use; or by: random, user, leave-last-out")
            lines += _dump({key: draft.tree[key]})
    if not draft.tree.get("labels"):
        two = [name for name, note in draft.notes.items() if note.startswith("2 distinct")]
        lines.append("# No column is called like a label. Write one, such as labels: {liked: rating >= 4}")
        lines += [f"# two values: {', '.join(map(shown, two))}"] if two else []
    lines.append("features:")
    for name, entry in draft.features.items():
        note = draft.notes.get(name)
        lines.append(f"  {_key_text(name)}: {_flow(entry)}{f'  # {printable(note)}' if note else ''}")
    lines += [f"# not used: {name!r}: {why} ({draft.notes[name]})" for name, why in draft.unused.items()]
    return "\n".join(lines) + "\n"


def _dump(tree: dict[str, Any]) -> list[str]:
    plain = all(not isinstance(value, dict | list) for value in tree.values())
    style = False if plain else None
    return yaml.safe_dump(tree, default_flow_style=style, sort_keys=False, width=110, allow_unicode=True).splitlines()


def _flow(tree: dict[str, Any]) -> str:
    """A mapping in one line."""
    text: str = yaml.safe_dump(tree, default_flow_style=True, sort_keys=False, width=math.inf, allow_unicode=True)
    return text.strip()


def _key_text(name: str) -> str:
    """A name as a key, in one line whatever it holds."""
    text: str = yaml.safe_dump(name, width=math.inf, allow_unicode=True).removesuffix("\n...\n").removesuffix("\n")
    return text if "\n" not in text else yaml.safe_dump(name, default_style='"', width=math.inf).strip()


def _plain(name: str) -> str:
    """A name in an expression, with quotes where SQL needs them."""
    plain = re.fullmatch(r"[a-z_][a-z0-9_]*", name) and name not in reserved_words()
    return name if plain else quoted(name)
