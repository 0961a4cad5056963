"""The driver of an import in parts: what is done once, and in which order tasks run."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from secrets import token_hex

from rechub_dist.data.importing.asked import asked_of
from rechub_dist.data.importing.engine import Engine, quoted
from rechub_dist.data.importing.facts import merge_facts
from rechub_dist.data.importing.fitted import Earlier, fit
from rechub_dist.data.importing.items import item_table, write_items
from rechub_dist.data.importing.negatives import add_negatives, check_negatives
from rechub_dist.data.importing.parts import (
    Completed,
    Encoded,
    Job,
    Read,
    Run,
    complete_part,
    count_piece,
    edges_of,
    encode_part,
    gathered,
    pool_part,
    read_piece,
    write_range,
)
from rechub_dist.data.importing.plan import Plan
from rechub_dist.data.importing.rows import (
    ROW,
    ROWS,
    check_present,
    check_rows,
    check_train,
    drop_by_k_core,
    expression_of,
    fill_rows,
    rows_begin,
    split_rule,
    values_named,
)
from rechub_dist.data.importing.run import earlier_import
from rechub_dist.data.importing.sources import source_files, source_pieces, source_query
from rechub_dist.data.importing.steps import (
    Imported,
    Tally,
    complete_rows,
    label_means,
    labels_of,
    output_of,
    recipe_of,
    row_kinds,
    write_descriptions,
)
from rechub_dist.data.importing.write import shares_of_unknown
from rechub_dist.data.prepare.writer import prepared_folder
from rechub_dist.errors import UserError, shown

PIECE_BYTES = 256 << 20


def import_in_parts(
    plan: Plan,
    out: Path,
    run: Run,
    *,
    memory: int,
    task_memory: int,
    threads: int = 1,
    parts: int | None = None,
    work: Path | None = None,
    scratch: Path | None = None,
    grow: Path | None = None,
    piece_bytes: int = PIECE_BYTES,
) -> Imported:
    """Write the prepared folder `out` from the plan's sources, with the same rows as `import_data`, in the same order.

    Files are more, since each range of the order has its own.

    Args:
        plan: the plan.
        out: the folder, which all tasks reach, as they do the sources; an earlier, unchanged import is replaced.
        run: runs tasks.
        memory: bytes for the driver's database.
        task_memory: bytes for that of a task.
        threads: of a task's database.
        parts: the number of parts; default: one for 256 MB of the sources' log.
        work: a folder that all tasks reach, for what they exchange; default: beside `out`.
        scratch: a folder on each machine for tasks' databases; default: in `work`.
        grow: an earlier import, whose values keep their ids.
        piece_bytes: of a piece of a Parquet file.

    Raises:
        UserError: as `import_data`; most of it before anything is read.
    """
    logs = source_files(plan.log, "log")
    inputs = [Path(file) for file in logs]
    inputs += [Path(f) for name, table in plan.tables.items() for f in source_files(table, f"tables.{name}")]
    check_negatives(plan)
    if plan.unique:
        raise UserError("unique: equal rows may lie in different parts; leave it out, or import on one machine")
    if plan.items:
        item_table(plan)
    before = None if grow is None else earlier_import(grow)
    parts = parts or 1 + sum(Path(file).stat().st_size for file in logs) // PIECE_BYTES
    with prepared_folder(out, f"import {plan.name}", inputs) as folder, _folders(folder, work) as (final, exchange):
        engine = Engine(exchange / "driver", memory)
        try:
            files = [*map(str, inputs)]
            engine.confine(files, [exchange])
            recipe = recipe_of(plan, engine)
            _check_windows(plan, engine)
            pieces = tuple(source_pieces(plan.log, engine, "log", piece_bytes))
            job = Job(recipe, exchange, scratch, final, parts, task_memory, threads, pieces, tuple(files))
            job = _rehearsed(job, engine)
            if plan.log.explode is not None:
                counts: list[int] = run("count", count_piece, job, len(pieces))
                firsts = [*accumulate(counts[:-1], initial=0)]
                job = replace(job, pieces=tuple(source_pieces(plan.log, engine, "log", piece_bytes, firsts)))
            return _import(job, engine, folder, out, run, before)
        finally:
            engine.close()


def _check_windows(plan: Plan, engine: Engine) -> None:
    """Raise UserError for labels and weights that look at other rows, which may lie in another piece of the log."""
    for key, one in {**{f"labels.{name}": label for name, label in plan.labels.items()}, "weight": plan.weight}.items():
        if one is not None and engine.has_windows(expression_of(one)):
            raise UserError(
                f"{key}: {shown(expression_of(one))} has a window function, which sees rows of other pieces; "
                "write the column into the files, or import on one machine: rechub-dist data import"
            )


def _rehearsed(job: Job, engine: Engine) -> Job:
    """The job, tried on no rows: types are known, and mistakes in the plan are told before anything is read."""
    plan = job.plan
    for name, table in plan.tables.items():
        query = source_query(table, engine, f"tables.{name}")
        job.tables[name] = engine.columns(f"({query})")
        with values_named(plan, engine):
            engine.save(query, job.table_file(name))
    with job.engine() as empty:
        empty.stand_in("log", f"select * from ({job.pieces[0].query}) limit 0")
        recipe = recipe_of(plan, empty, empty=True)
        fill_rows(plan, empty, recipe.needed)
        job.kinds.update(empty.columns(ROWS))
        add_negatives(plan, empty, recipe.shape, first=0)
        complete_rows(recipe, empty)
        kinds = row_kinds(plan, empty)
    return replace(job, all_kinds=kinds, asked=asked_of(plan, kinds))


def _import(job: Job, engine: Engine, folder: Path, out: Path, run: Run, before: Earlier | None) -> Imported:
    plan = job.plan
    pieces: list[Read] = run("read", read_piece, job, len(job.pieces))
    read = sum(piece.read for piece in pieces)
    check_rows(plan, read, sum(piece.left for piece in pieces))
    job = replace(job, firsts=tuple(accumulate((piece.read for piece in pieces[:-1]), initial=0)))
    job = _with_splits(_with_survivors(job, engine), engine)
    if plan.negatives is not None:
        run("count items", pool_part, job, job.parts)
        count = "1" if plan.negatives.by == "uniform" else "sum(count)::BIGINT"
        kinds = {"value": job.kinds[plan.item or ""], "count": "BIGINT"}
        pools = engine.saved(job.part_files("pool.parquet"), kinds)
        engine.save(f"select value, {count} as count from ({pools}) group by value", job.pool)
    completed: list[Completed] = run("histories", complete_part, job, job.parts)
    rows = {name: sum(part.rows.get(number, 0) for part in completed) for number, name in job.splits}
    check_train(plan, rows["train"])
    tallies: dict[str, Tally] = {name: sum((part.tallies[name] for part in completed), Tally()) for name in plan.labels}
    labels = labels_of(job.recipe, tallies)
    facts = merge_facts(engine, job.asked, [part.facts for part in completed], job.part_files)
    fitted = fit(plan, job.all_kinds, facts, before)
    encoded: list[Encoded] = run("write", encode_part, replace(job, output=output_of(plan, fitted)), job.parts)
    ranges = run("sort", write_range, replace(job, schema=encoded[0].schema), job.parts)
    gathered(ranges, folder)
    found = Imported(
        out,
        plan,
        read,
        rows={name: count for name, count in rows.items() if count},
        drawn=sum(part.drawn for part in completed),
        unused=sum(part.unused for part in completed),
        labels=label_means(tallies),
    )
    for number, name in job.splits:
        if name in found.rows:
            found.unknown[name] = shares_of_unknown(encoded_.unknown[number] for encoded_ in encoded)
    if plan.items:
        write_items(plan, engine, job.recipe.shape, fitted, folder)
    write_descriptions(folder, found, fitted, labels)
    return found


def _with_survivors(job: Job, engine: Engine) -> Job:
    """The job, with the values that the k-core leaves in files. Its columns pass through the driver's database."""
    plan = job.plan
    if plan.k_core:
        columns = ", ".join(map(quoted, plan.k_core))
        engine.run(f"create or replace table {ROWS} as select {columns} from ({job.rows_query(engine)})")
        drop_by_k_core(plan, engine)
        for column in plan.k_core:
            engine.save(f"select distinct {quoted(column)} from {ROWS}", job.survivors(column))
        engine.run(f"drop table {ROWS}")
    return replace(job, cored=bool(plan.k_core))


def _with_splits(job: Job, engine: Engine) -> Job:
    """The job, with what splits, drawn rows and the final order need to know of all rows."""
    plan = job.plan
    engine.run(f"create or replace view {ROWS} as {job.rows_query(engine)}")
    check_present(plan, engine, job.recipe.shape)
    job = replace(job, begin=rows_begin(plan, engine, job.recipe.shape))
    engine.run(f"create or replace view {ROWS} as {job.rows_query(engine)}")
    rule = split_rule(plan, engine, job.recipe.shape)
    first = 1 + int(engine.value(f"select max({ROW}) from {ROWS}"))
    last = first * (1 + (plan.negatives.per_row if plan.negatives is not None else 0))
    return replace(job, rule=rule, first_drawn=first, edges=edges_of(plan, engine, job.parts, last))


@contextmanager
def _folders(folder: Path, work: Path | None) -> Iterator[tuple[Path, Path]]:
    """A folder for the rows that are written in the end, and one for what tasks exchange, for as long as it takes."""
    hidden = folder / ".scratch"
    exchange = hidden / "exchange" if work is None else work / f"import-{token_hex(8)}"
    try:
        exchange.mkdir(parents=True)
        yield hidden / "final", exchange
    finally:
        for path in (hidden, exchange):
            shutil.rmtree(path, ignore_errors=True)
