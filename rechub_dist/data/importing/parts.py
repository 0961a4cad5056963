"""Imports in parts, for tables that one machine cannot hold: the same steps, with the rows in many databases.

Tasks are functions of the job, a number and nothing else. They may run anywhere and again: what they leave is files of
their own in a folder that all of them see, each whole or not there. In order:

1. `read_piece`, of a piece of the log: its rows, joined and filtered, into a file sorted by part: that of the row's
   user, where the user's rows are needed together.
2. The driver, over the few columns that it takes: rows of the k-core, where the splits are.
3. `pool_part`, where negatives are drawn: how often train has each item.
4. `complete_part`: splits, negatives, histories and derived columns of a part, and what train knows of its values.
5. The driver: the schema and the vocabularies.
6. `encode_part`: what is written of each row, into a file sorted by range of the final order.
7. `write_range`: the rows of a range, sorted, as they are to be read.
"""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from secrets import token_hex
from typing import Any, Final, NamedTuple, TypeVar

import pyarrow as pa

from rechub_dist.data.importing.engine import BATCH_ROWS, Engine, literal, quoted, whole
from rechub_dist.data.importing.facts import Asked, Facts, write_facts
from rechub_dist.data.importing.histories import LAST, batch_rows
from rechub_dist.data.importing.negatives import add_negatives, pool_query
from rechub_dist.data.importing.plan import NOW, RESERVED, SPLITS, Plan
from rechub_dist.data.importing.rows import ROW, ROWS, SPLIT, fill_rows, write_splits
from rechub_dist.data.importing.sources import Piece, check_values
from rechub_dist.data.importing.steps import Recipe, Tally, complete_rows, recipe_of, tallies_of
from rechub_dist.data.importing.write import Finishing, Output, encoded_lists, order_of
from rechub_dist.data.parquet.pages import parquet_writer
from rechub_dist.data.prepare.writer import ShardWriter
from rechub_dist.errors import UserError

PART: Final = f"{RESERVED}part"
PIECE: Final = f"{RESERVED}piece"
RANGE: Final = f"{RESERVED}range"
TIME: Final = f"{RESERVED}time"
_GROUP: Final = 8_192  # rows of a row group of files that are read by part or range: little is read in vain

T = TypeVar("T")


class Read(NamedTuple):
    """What is known of a piece: rows of the log, and those that are left of them."""

    read: int
    left: int


class Completed(NamedTuple):
    """What is known of a part: the answers, labels' tallies, rows by split, drawn rows, rows only in histories."""

    facts: Facts
    tallies: dict[str, Tally]
    rows: dict[int, int]
    drawn: int
    unused: int


class Encoded(NamedTuple):
    """What is known of what is written of a part: the schema, and by split and column the unknown and all values."""

    schema: pa.Schema
    unknown: dict[int, dict[str, list[int]]]


@dataclass(frozen=True)
class Job:
    """An import in parts, as far as it has come.

    Attributes:
        recipe: the plan, and what it means for its sources.
        folder: where tasks exchange files; all of them see it.
        scratch: where a task's database lies; default: in `folder`.
        final: where the rows are written in the end.
        parts: the number of parts, and of ranges of the final order.
        memory, threads: of a task's database.
        pieces: of the log.
        inputs: the files of all sources.
        tables: the types of the columns of the plan's tables, by name.
        kinds: the types of the columns of a piece's rows.
        all_kinds: those of the columns of complete rows, and of the histories.
        firsts: the number of each piece's first row.
        cored: whether the k-core's values are known.
        begin, rule: of the splits, in SQL.
        first_drawn: the number of the first drawn row.
        edges: where ranges of the final order begin, but for the first; in SQL.
        asked: what has to be known of train.
        output: what is written of a row.
        schema: of the written rows.
    """

    recipe: Recipe
    folder: Path
    scratch: Path | None
    final: Path
    parts: int
    memory: int
    threads: int
    pieces: tuple[Piece, ...]
    inputs: tuple[str, ...]
    tables: dict[str, dict[str, str]] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)
    all_kinds: dict[str, str] = field(default_factory=dict)
    firsts: tuple[int, ...] = ()
    cored: bool = False
    begin: str | None = None
    rule: str | None = None
    first_drawn: int = 0
    edges: tuple[str, ...] = ()
    asked: Asked = field(default_factory=Asked)
    output: Output = field(default_factory=lambda: Output(()))
    schema: pa.Schema | None = None

    @property
    def plan(self) -> Plan:
        """The plan."""
        return self.recipe.plan

    @property
    def splits(self) -> list[tuple[int, str]]:
        """The numbers and names of all splits."""
        return [*enumerate(SPLITS), *([(LAST, NOW)] if self.plan.now else [])]

    def table_file(self, name: str) -> Path:
        """The file of one of the plan's tables."""
        return self.folder / "tables" / f"{[*self.plan.tables].index(name)}.parquet"

    def piece_files(self) -> list[Path]:
        """The files of all pieces."""
        return [self.folder / "pieces" / f"{i}.parquet" for i in range(len(self.pieces))]

    def survivors(self, column: str) -> Path:
        """The file of a column's values that the k-core leaves."""
        return self.folder / "survivors" / f"{[*self.plan.k_core].index(column)}.parquet"

    def part_file(self, part: int, name: str) -> Path:
        """A file of a part."""
        return self.folder / "parts" / str(part) / name

    def part_files(self, name: str) -> list[Path]:
        """The files of this name of all parts."""
        return [self.part_file(part, name) for part in range(self.parts)]

    @property
    def pool(self) -> Path:
        """The file of the items that negatives are drawn from."""
        return self.folder / "pool.parquet"

    @contextmanager
    def engine(self, memory: int | None = None, threads: int | None = None) -> Iterator[Engine]:
        """A database for a task, which knows the plan's tables, and is removed in the end."""
        folder = (self.scratch or self.folder / "scratch") / token_hex(8)
        try:
            engine = Engine(folder, memory or self.memory, threads or self.threads)
            try:
                for name, kinds in self.tables.items():
                    engine.stand_in(f"tables.{name}", engine.saved([self.table_file(name)], kinds))
                engine.confine(self.inputs, [self.folder])
                yield engine
            finally:
                engine.close()
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def rows_query(self, engine: Engine, part: int | None = None) -> str:
        """A query for the rows of a part, or of all, as one database would have them before splits are written."""
        columns = ", ".join(
            f"(f.first + r.{ROW})::{kind} as {ROW}" if name == ROW else f"r.{quoted(name)}::{kind} as {quoted(name)}"
            for name, kind in self.kinds.items()
        )
        firsts = ", ".join(f"({i}, {first})" for i, first in enumerate(self.firsts))
        rows = engine.saved(self.piece_files()) + ("" if part is None else f" where {PART} = {part}")
        joined = f"select {columns} from ({rows}) as r join (values {firsts}) as f(piece, first) on f.piece = r.{PIECE}"
        kept = "".join(
            f" semi join ({engine.saved([self.survivors(c)], {c: self.kinds[c]})}) as s{i} "
            f"on s{i}.{quoted(c)} = j.{quoted(c)}"
            for i, c in enumerate(self.plan.k_core if self.cored else ())
        )
        query = f"select j.* from ({joined}) as j{kept}"
        if self.begin is None:
            return query
        past = f"case when {quoted(self.plan.time or '')} < {self.begin} then null else {SPLIT} end"
        return f"select * replace ({past} as {SPLIT}) from ({query})"

    def load(self, engine: Engine, part: int) -> None:
        """Fill ROWS with a part, with its splits."""
        engine.run(f"create or replace table {ROWS} as {self.rows_query(engine, part)}")
        write_splits(self.plan, engine, self.rule)


Run = Callable[[str, Callable[[Job, int], Any], Job, int], list[Any]]
"""Runs a task of a job for the numbers below some number; named for progress. Returns the results in order."""


def needs_whole_users(plan: Plan) -> bool:
    """Whether something of a row depends on its user's other rows."""
    return bool(plan.histories) or plan.now or plan.negatives is not None or plan.split.by == "leave-last-out"


def count_piece(job: Job, number: int) -> int:
    """The rows of a piece of the log before lists are exploded."""
    with job.engine() as engine:
        found: int = engine.value(f"select count(*) from ({job.pieces[number].whole_rows})")
        return found


def read_piece(job: Job, number: int) -> Read:
    """Read a piece of the log."""
    piece = job.pieces[number]
    with job.engine() as engine:
        engine.stand_in("log", piece.query)
        recipe_of(job.plan, engine, empty=True)
        try:
            read = fill_rows(job.plan, engine, job.recipe.needed)
        except UserError:
            with job.engine() as other:  # in which the log is a file: a value that is not of its type is found there
                check_values(job.plan.log.model_copy(update={"path": (piece.file,)}), other, "log")
            raise
        of = quoted(job.plan.user or "") if needs_whole_users(job.plan) else ROW
        engine.save(
            f"select *, (hash({of}) % {job.parts})::INTEGER as {PART}, {number} as {PIECE} from {ROWS} order by {PART}",
            job.piece_files()[number],
            _GROUP,
        )
        return Read(read, engine.value(f"select count(*) from {ROWS}"))


def pool_part(job: Job, part: int) -> None:
    """Count train's items in a part, for negatives."""
    with job.engine() as engine:
        job.load(engine, part)
        engine.save(pool_query(job.plan), job.part_file(part, "pool.parquet"))


def complete_part(job: Job, part: int) -> Completed:
    """Add to the rows of a part all that can be known of them, and learn from them."""
    plan = job.plan
    with job.engine() as engine:
        job.load(engine, part)
        drawn = 0
        if plan.negatives is not None:
            pool = engine.saved([job.pool], {"value": job.kinds[plan.item or ""], "count": "BIGINT"})
            drawn = add_negatives(plan, engine, job.recipe.shape, pool, job.first_drawn)
        lists = complete_rows(job.recipe, engine)
        facts = write_facts(engine, job.asked, lists, partial(job.part_file, part))
        engine.save(f"select * from {ROWS}", job.part_file(part, "rows.parquet"))
        with whole(job.part_file(part, "lists")) as path:
            path.write_bytes(pickle.dumps((engine.columns(ROWS), lists)))
        rows = dict(engine.run(f"select {SPLIT}, count(*) from {ROWS} group by 1"))
        unused = rows.pop(None, 0)
        return Completed(facts, tallies_of(plan, engine), rows, drawn, unused)


def encode_part(job: Job, part: int) -> Encoded:
    """Make of the rows of a part what is written of them."""
    unknown = {}
    with job.engine() as engine:
        kinds, lists = pickle.loads(job.part_file(part, "lists").read_bytes())
        rows = engine.saved([job.part_file(part, "rows.parquet")], kinds)
        engine.run(f"create or replace view {ROWS} as {rows}")
        output = replace(job.output, lists=encoded_lists(engine, lists, job.output.lookup))
        keys = [ROW, RANGE] + ([TIME] if job.plan.order == "time" else [])
        timed = f", {quoted(job.plan.time or '')} as {TIME}" if job.plan.order == "time" else ""
        for number, name in job.splits:
            reads = f"{', '.join(map(quoted, dict.fromkeys([*output.reads, ROW])))}, {_range(job)} as {RANGE}{timed}"
            batches = engine.stream(
                f"select {reads} from {ROWS} where {SPLIT} = {number} order by {RANGE}",
                batch_rows(output.lists.values()),
            )
            finish = Finishing(output, f"split {name}", keys)
            schema = finish(batches.schema.empty_table()).schema
            with whole(job.part_file(part, f"{name}.parquet")) as path, parquet_writer(path, schema) as writer:
                for batch in batches:
                    writer.write_table(finish(pa.Table.from_batches([batch])), row_group_size=_GROUP)
            unknown[number] = finish.counts
    return Encoded(pa.schema([schema.field(i) for i in range(len(schema) - len(keys))]), unknown)


def write_range(job: Job, number: int) -> dict[str, list[str]]:
    """Write the rows of a range of the final order; returns the names of the files by split."""
    found = {}
    assert job.schema is not None
    order = order_of(job.plan.order, job.plan.seed, TIME)
    folder = job.final / str(number) / token_hex(8)  # of this attempt
    with job.engine() as engine:
        for _, name in job.splits:
            rows = f"({engine.saved(job.part_files(f'{name}.parquet'))} where {RANGE} = {number})"
            if not engine.value(f"select count(*) from {rows}"):
                continue
            batches = engine.stream(
                f"select {', '.join(map(quoted, job.schema.names))} from {rows} order by {order}", BATCH_ROWS
            )
            folder.mkdir(parents=True, exist_ok=True)
            with ShardWriter(folder, name, job.schema) as writer:
                for batch in batches:
                    writer.write(pa.Table.from_batches([batch]))
            found[name] = sorted(str(path) for path in (folder / name).iterdir())
    return found


def _range(job: Job) -> str:
    """An expression for the range of a row."""
    if job.plan.order == "random":
        key = order_of("random", job.plan.seed, None).rpartition(",")[0]
        return f"least(floor({key}::DOUBLE / 18446744073709551616.0 * {job.parts}), {job.parts - 1})::INTEGER"
    column = ROW if job.plan.order == "stored" else quoted(job.plan.time or "")
    passed = " + ".join(f"({column} >= {edge})::INTEGER" for edge in job.edges)
    return f"coalesce({passed or '0'}, {job.parts - 1})"  # rows without a time come last


def edges_of(plan: Plan, engine: Engine, parts: int, rows: int) -> tuple[str, ...]:
    """Where to cut the final order into parts of about equal size, in SQL; () for a random order: its parts are known.

    Args:
        plan: the plan.
        engine: with all rows in ROWS.
        parts: how many.
        rows: the numbers of rows are below it, those of drawn ones included.
    """
    if plan.order == "random":
        return ()
    if plan.order == "stored":
        return tuple(str(rows * i // parts) for i in range(1, parts))
    places = ", ".join(str(i / parts) for i in range(1, parts))
    found = engine.run(
        f"select distinct x::VARCHAR, typeof(x) from (select unnest(approx_quantile({quoted(plan.time or '')}, "
        f"[{places}])) as x from {ROWS}) where x is not null"
    ) if places else []  # fmt: skip
    return tuple(f"{literal(text)}::{kind}" for text, kind in found)


def gathered(files: Sequence[dict[str, list[str]]], folder: Path) -> None:
    """Move the files of all ranges to where they belong, in order."""
    for name in dict.fromkeys(split for found in files for split in found):
        (folder / name).mkdir()
        moved = [path for found in files for path in found.get(name, [])]
        for i, path in enumerate(moved):
            Path(path).rename(folder / name / f"part-{i:05d}.parquet")
