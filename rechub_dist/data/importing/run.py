"""Imports a user's own tables: the way from the sources to a prepared folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from rechub_dist.config.strict_yaml import read_yaml
from rechub_dist.data.importing.asked import asked_of
from rechub_dist.data.importing.engine import Engine
from rechub_dist.data.importing.facts import learn
from rechub_dist.data.importing.fitted import Earlier, fit
from rechub_dist.data.importing.histories import LAST
from rechub_dist.data.importing.items import item_table, write_items
from rechub_dist.data.importing.negatives import add_negatives, check_negatives
from rechub_dist.data.importing.plan import NOW, SPLITS, Plan
from rechub_dist.data.importing.rows import ROWS, SPLIT, make_rows, make_splits
from rechub_dist.data.importing.sources import source_files
from rechub_dist.data.importing.steps import (
    FACTS_FILE,
    PLAN_FILE,
    Imported,
    complete_rows,
    label_means,
    labels_of,
    output_of,
    recipe_of,
    row_kinds,
    tallies_of,
    write_descriptions,
)
from rechub_dist.data.importing.write import Progress, encoded_lists, order_of, write_rows
from rechub_dist.data.parquet.pages import read_parquet
from rechub_dist.data.prepare.writer import SCHEMA_FILE, VOCABULARIES, prepared_folder
from rechub_dist.errors import UserError
from rechub_dist.features import SequenceFeature, SparseFeature
from rechub_dist.schema import parse_schema

__all__ = ["FACTS_FILE", "PLAN_FILE", "Imported", "import_data"]


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
    say("read and join", 0, 0)
    recipe = recipe_of(plan, engine)
    read = make_rows(plan, engine, recipe.needed)
    make_splits(plan, engine, recipe.shape)
    found = Imported(out, plan, read, drawn=add_negatives(plan, engine, recipe.shape))
    say("histories", 0, 0)
    lists = complete_rows(recipe, engine)
    kinds = row_kinds(plan, engine)
    say("count values", 0, 0)
    fitted = fit(plan, kinds, learn(engine, asked_of(plan, kinds), lists), before)
    output = output_of(plan, fitted)
    output = replace(output, lists=encoded_lists(engine, lists, output.lookup))
    tallies = tallies_of(plan, engine)
    labels = labels_of(recipe, tallies)
    splits = [*enumerate(SPLITS), *([(LAST, NOW)] if plan.now else [])]
    for number, name in splits:
        if number and number != LAST and not engine.value(f"select count(*) from {ROWS} where {SPLIT} = {number}"):
            continue
        written = write_rows(engine, folder, (name, number), order_of(plan.order, plan.seed, plan.time), output, say)
        found.rows[name], found.unknown[name] = written.rows, written.unknown
    found.labels = label_means(tallies)
    found.unused = engine.value(f"select count(*) from {ROWS} where {SPLIT} is null")
    if plan.items:
        write_items(plan, engine, recipe.shape, fitted, folder)
    write_descriptions(folder, found, fitted, labels)
    return found


def _nobody(_what: str, _done: int, _total: int) -> None:
    """Where nobody asked for progress."""


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
