"""Imports a user's own tables: the way from the sources to a prepared folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Final

import pyarrow as pa

from rechub_dist.config.strict_yaml import read_yaml
from rechub_dist.data.columns.frequencies import vocabulary_name
from rechub_dist.data.importing.engine import Engine, quoted
from rechub_dist.data.importing.facts import MAX_FLOAT32
from rechub_dist.data.importing.fitted import (
    Earlier,
    Fitted,
    derived_of,
    fit,
    needed_columns,
    of_histories,
    stored_columns,
)
from rechub_dist.data.importing.histories import LAST, add_histories, add_now
from rechub_dist.data.importing.items import item_table, write_items
from rechub_dist.data.importing.negatives import add_negatives, check_negatives, needed_for_negatives
from rechub_dist.data.importing.plan import NOW, SPLITS, Plan, plan_text
from rechub_dist.data.importing.rows import ROWS, SPLIT, WEIGHT, Shape, join_sources, make_rows, make_splits
from rechub_dist.data.importing.sources import source_files
from rechub_dist.data.importing.write import Progress, derived_rows, order_of, write_rows
from rechub_dist.data.parquet.pages import read_parquet, write_parquet
from rechub_dist.data.prepare.writer import SCHEMA_FILE, VOCABULARIES, prepared_folder, write_schema
from rechub_dist.errors import UserError
from rechub_dist.features import Label, SequenceFeature, SparseFeature
from rechub_dist.schema import parse_schema

PLAN_FILE: Final = "plan.yaml"
FACTS_FILE: Final = "import.json"
_MARK: Final = {b"rechub_dist": b"vocabulary"}


@dataclass
class Imported:
    """What has been imported.

    Attributes:
        root: the folder.
        plan: by which.
        read: rows of the log.
        rows: by split.
        drawn: negatives among them.
        unused: rows that are only parts of histories.
        labels: by split and label, the mean.
        vocabularies: by table, the values that have ids.
        unknown: by split and column, the share of values that are missing or have no id of their own.
    """

    root: Path
    plan: Plan
    read: int
    rows: dict[str, int] = field(default_factory=dict)
    drawn: int = 0
    unused: int = 0
    labels: dict[str, dict[str, float]] = field(default_factory=dict)
    vocabularies: dict[str, int] = field(default_factory=dict)
    unknown: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def facts(self) -> dict[str, Any]:
        """All but folder and plan, as `import.json` holds it."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("root", "plan")}


def import_data(
    plan: Plan,
    out: Path,
    *,
    memory: int,
    threads: int | None = None,
    grow: Path | None = None,
    frames: Mapping[str, pa.Table] | None = None,
    progress: Progress | None = None,
) -> Imported:
    """Write the prepared folder `out` from the plan's sources.

    Args:
        plan: the plan.
        out: the folder; an earlier, unchanged import of the same name is replaced.
        memory: bytes that the database may use; it goes on on disk beyond that, beside `out`.
        threads: default: as many as there are cores.
        grow: an earlier import, whose values keep their ids; new values get the ids after them.
        frames: tables in memory that stand for the sources `log` and `tables.NAME`.
        progress: called with what is being done.

    Raises:
        UserError: the plan does not fit its sources; a source cannot be read; nothing is left to train on.
    """
    sources = {"log": plan.log, **{f"tables.{name}": table for name, table in plan.tables.items()}}
    frames = frames or {}
    inputs = [Path(f) for where, source in sources.items() if where not in frames for f in source_files(source, where)]
    check_negatives(plan)
    if plan.items:
        item_table(plan)
    before = None if grow is None else earlier_import(grow)
    say = progress or _nobody
    with prepared_folder(out, f"import {plan.name}", inputs) as folder, _scratch(folder) as scratch:
        engine = Engine(scratch, memory, threads)
        try:
            for where, rows in frames.items():
                engine.give(where, rows)
            engine.confine(map(str, inputs))
            return _import(plan, engine, folder, out, before, say)
        finally:
            engine.close()


def _import(plan: Plan, engine: Engine, folder: Path, out: Path, before: Earlier | None, say: Progress) -> Imported:
    derived = derived_of(plan)
    say("read and join", 0, 0)
    shape = join_sources(plan, engine)
    needed = needed_columns(plan, shape, derived)
    read = make_rows(plan, engine, dict.fromkeys([*needed, *needed_for_negatives(plan)]))
    make_splits(plan, engine, shape)
    late = of_histories(plan, derived)
    early = tuple(one for one in derived if one not in late)
    found = Imported(out, plan, read, drawn=add_negatives(plan, engine, shape))
    derived_rows(engine, early)
    if plan.now:
        add_now(plan, engine)
    if plan.histories:
        say("histories", 0, 0)
        add_histories(plan, engine)
    derived_rows(engine, late)
    say("count values", 0, 0)
    fitted = fit(plan, engine, before)
    _write_vocabularies(folder, fitted)
    labels = _labels(plan, engine, shape)
    schema = fitted.schema
    bins = tuple(one for one in schema.derived if one.name not in plan.derive)
    columns = stored_columns(schema)
    kept = [*plan.keep, *([plan.time] if plan.time is not None else [])]  # by the time, splits can be compared
    columns += [name for name in dict.fromkeys([*plan.labels, *kept]) if name not in columns]
    columns += [WEIGHT] if plan.weight is not None else []
    lookup = fitted.lookup()
    splits = [*enumerate(SPLITS), *([(LAST, NOW)] if plan.now else [])]
    for number, name in splits:
        if number and number != LAST and not engine.value(f"select count(*) from {ROWS} where {SPLIT} = {number}"):
            continue
        order = order_of(plan.order, plan.seed, plan.time)
        written = write_rows(engine, folder, (name, number), order, columns, bins, lookup, say)
        found.rows[name], found.unknown[name] = written.rows, written.unknown
        if plan.labels and number != LAST:
            means = ", ".join(f"avg({quoted(label)})" for label in plan.labels)
            values = engine.run(f"select {means} from {ROWS} where {SPLIT} = {number}")[0]
            found.labels[name] = dict(zip(plan.labels, values, strict=True))
    found.unused = engine.value(f"select count(*) from {ROWS} where {SPLIT} is null")
    found.vocabularies = {name: table.num_rows for name, table in fitted.vocabularies.items()}
    if plan.items:
        write_items(plan, engine, shape, fitted, folder)
    weight = WEIGHT if plan.weight is not None else None
    write_schema(folder, plan.name, replace(schema, labels=labels, weight=weight))
    (folder / PLAN_FILE).write_text(plan_text(plan), encoding="utf-8")
    (folder / FACTS_FILE).write_text(json.dumps(found.facts, indent=1), encoding="utf-8")
    return found


def _nobody(_what: str, _done: int, _total: int) -> None:
    """Where nobody asked for progress."""


def _labels(plan: Plan, engine: Engine, shape: Shape) -> tuple[Label, ...]:
    """The labels of the schema.

    Raises:
        UserError: a label or weight is missing or cannot be one in some row.
    """
    found = []
    if plan.weight is not None:
        wrong = engine.value(
            f"select count(*) from {ROWS} where {SPLIT} is not null and "
            f"not coalesce({WEIGHT} >= 0 and {WEIGHT} <= {MAX_FLOAT32!r}, false)"
        )
        if wrong:
            raise UserError(
                f"weight: {wrong:,} rows have a weight that is missing, negative or not finite; use 0 for none"
            )
    for name in plan.labels:
        column = quoted(name)
        nulls, binary = engine.run(
            f"select count(*) filter ({column} is null or not abs({column}::DOUBLE) <= {MAX_FLOAT32!r}), "
            f"coalesce(bool_and({column} in (0, 1)), true) from {ROWS} where {SPLIT} is not null"
        )[0]
        if nulls:
            raise UserError(
                f"labels.{name}: {nulls:,} rows have no value; leave them out with filter, or write coalesce(..., 0)"
            )
        kind = shape.labels[name] or ("classification" if binary else "regression")
        if kind == "classification" and not binary:
            raise UserError(f"labels.{name}: it has other values than 0 and 1; compare it, or set type: regression")
        found.append(Label(name, type=kind))
    return tuple(found)


def _write_vocabularies(folder: Path, fitted: Fitted) -> None:
    if fitted.vocabularies:
        (folder / VOCABULARIES).mkdir()
    for name, table in fitted.vocabularies.items():
        write_parquet(table.replace_schema_metadata(_MARK), folder / VOCABULARIES / vocabulary_name(name))


def earlier_facts(root: Path) -> dict[str, Any]:
    """What an earlier import wrote into `import.json`; {} if there is none."""
    try:
        found: dict[str, Any] = json.loads((root / FACTS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found


def earlier_import(root: Path) -> Earlier:
    """What an earlier import learned.

    Raises:
        UserError: `root` holds no import.
    """
    if not (root / PLAN_FILE).is_file() or not (root / VOCABULARIES).is_dir():
        raise UserError(f"{root} is no folder that data import has written: it lacks {PLAN_FILE} or {VOCABULARIES}/")
    schema = parse_schema(read_yaml(root / SCHEMA_FILE), str(root))
    features = [f for f in schema.features if isinstance(f, SparseFeature | SequenceFeature) and f.vocabulary]
    return Earlier(schema, {feature.table.name: read_parquet(feature.vocabulary) for feature in features})


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """A folder within the one that is written, removed before that becomes visible."""
    path = folder / ".scratch"
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
