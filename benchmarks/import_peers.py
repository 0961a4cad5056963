"""The data and the contestants of benchmarks/imports.py: an import, and the same tables made by pandas and by bare SQL.

Each contestant is given the folder of the sources, a folder to write and the memory that it may use, where it can be
told. All write train/, valid/ and test/ with the same values: `digest` compares them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rechub_dist.data.importing.plan import Plan, plan_of
from rechub_dist.data.importing.run import import_data

LENGTH = 50
EVENTS = 50  # of a user, on average
ITEMS = 100_000
SPLITS = ("train", "valid", "test")
IDS = ("user", "item", "page", "device", "city", "category", "brand")
NUMBERS = ("position", "age", "price")


def generate(folder: Path, rows: int) -> None:
    """Write log.csv, users.csv and items.csv; items by a power law, rows in time order."""
    folder.mkdir(parents=True)
    users = max(rows // EVENTS, 1)
    made = duckdb.connect(config={"threads": 2, "memory_limit": "2GB", "temp_directory": str(folder)})
    made.execute("select setseed(0.5)")
    for name, query in (
        (
            "log",
            f"select floor(random() * {users})::BIGINT as user, floor({ITEMS} * random() ** 3)::BIGINT * 7 as item, "
            f"1600000000 + n * 3 as time, floor(random() * 500)::BIGINT as page, 'device ' || floor(random() * 20) as "
            "device, floor(random() * 30)::BIGINT as position, floor(random() * 5 + 1)::BIGINT as rating "
            f"from range({rows}) as r(n)",
        ),
        (
            "users",
            "select n as user, floor(random() * 60 + 15)::BIGINT as age, 'city ' || floor(random() * 900) as city "
            f"from range({users}) as r(n)",
        ),
        (
            "items",
            "select n * 7 as item, 'category ' || floor(random() * 300) as category, round(random() * 90 + 1, 2) as "
            f"price, 'brand ' || floor(random() * 4000) as brand from range({ITEMS}) as r(n)",
        ),
    ):
        made.execute(f"copy ({query}) to '{folder / name}.csv' (header)")


def plan_for(folder: Path) -> Plan:
    """The plan of the import."""
    tree: dict[str, Any] = {
        "name": "benchmark",
        "log": {"path": str(folder / "log.csv")},
        "tables": {name: {"path": str(folder / f"{name}.csv"), "key": name[:-1]} for name in ("users", "items")},
        "user": "user",
        "item": "item",
        "time": "time",
        "split": {"by": "time"},
        "labels": {"click": "rating >= 4"},
        "histories": {"history": {"column": "item", "max_length": LENGTH}},
        "features": {
            **{name: {"kind": "sparse"} for name in IDS},
            **{name: {"kind": "dense"} for name in NUMBERS},
            "history": {"kind": "sequence"},
        },
    }
    return plan_of(tree)


def ours(source: Path, out: Path, memory: int, threads: int) -> None:
    """The import."""
    import_data(plan_for(source), out, memory=memory, threads=threads)


def by_sql(source: Path, out: Path, memory: int, threads: int) -> None:
    """Bare DuckDB: vocabularies by GROUP BY, ids by joins, histories by a window, written by COPY."""
    out.mkdir()
    scratch = out / "scratch"
    base = duckdb.connect(str(out / "scratch.duckdb"))
    for setting in (f"memory_limit = '{memory}B'", f"temp_directory = '{scratch}'", f"threads = {threads}"):
        base.execute(f"set {setting}")
    log, users, items = (f"read_csv('{source / name}.csv') as {name}" for name in ("log", "users", "items"))
    base.execute(
        f"create table joined as select *, row_number() over () as row from {log} left join {users} using (user) "
        f"left join {items} using (item)"
    )
    rows = base.execute("select count(*) from joined").fetchall()[0][0]
    valid, test = (
        base.execute(f"select time from joined order by time limit 1 offset {rows - round(rows * share)}").fetchall()[
            0
        ][0]
        for share in (0.2, 0.1)
    )
    base.execute(
        f"create table parted as select *, case when time >= {test} then 2 when time >= {valid} then 1 else 0 end "
        "as split from joined"
    )
    base.execute("drop table joined")
    for name in IDS:
        base.execute(
            f"create table v_{name} as select value, row_number() over (order by n desc, value)::INTEGER as id from "
            f"(select {name} as value, count(*) as n from parted where split = 0 group by 1)"
        )
    ids = ", ".join(f"coalesce(v_{name}.id, 0) as {name}" for name in IDS)
    joins = " ".join(f"left join v_{name} on v_{name}.value = p.{name}" for name in IDS)
    base.execute(
        f"create table encoded as select row, split, time, p.user as who, {ids}, {', '.join(NUMBERS)}, "
        f"(rating >= 4)::TINYINT as click from parted as p {joins}"
    )
    base.execute("drop table parted")
    base.execute(
        "create table lists as select who, time, history from (select who, time, row, list(item) over (partition by "
        f"who order by time, row rows between {LENGTH - 1} preceding and current row) as history from encoded) "
        "qualify row_number() over (partition by who, time order by row desc) = 1"
    )
    columns = ", ".join([*IDS, *NUMBERS, "click"])
    base.execute(
        f"create table rows as select row, split, {columns}, coalesce(history, []) as history from encoded as e "
        "asof left join lists as l on l.who = e.who and e.time > l.time"
    )
    for number, split in enumerate(SPLITS):
        (out / split).mkdir()
        base.execute(
            f"copy (select {columns}, history from rows where split = {number} order by hash(row)) to "
            f"'{out / split}/part-0.parquet' (compression zstd, row_group_size 65536)"
        )
    base.close()
    (out / "scratch.duckdb").unlink()


def by_pandas(source: Path, out: Path, _memory: int, threads: int) -> None:
    """pandas, vectorised: categories by factorize, histories by sorting and one array of indices."""
    import pandas as pd  # noqa: PLC0415 - its memory is not the others'

    pa.set_cpu_count(threads)
    out.mkdir()
    log, users, items = (pd.read_csv(source / f"{name}.csv", engine="pyarrow") for name in ("log", "users", "items"))
    rows = log.merge(users, on="user", how="left").merge(items, on="item", how="left")
    del log
    times = np.sort(rows["time"].to_numpy())
    valid, test = (times[len(times) - round(len(times) * share)] for share in (0.2, 0.1))
    split = (rows["time"] >= valid).to_numpy().astype(np.int8) + (rows["time"] >= test).to_numpy()
    rows["click"] = (rows["rating"] >= 4).astype(np.int8)
    who = rows["user"].to_numpy()
    for name in IDS:
        values = rows[name]
        codes, distinct = pd.factorize(values, sort=True)
        counts = np.bincount(codes[split == 0], minlength=len(distinct))
        ids = np.zeros(len(distinct), np.int32)
        by_count = np.argsort(-counts, kind="stable")[: int((counts > 0).sum())]
        ids[by_count] = np.arange(1, len(by_count) + 1)
        rows[name] = ids[codes]
    order = np.lexsort((np.arange(len(rows)), rows["time"].to_numpy(), who))
    sorted_who, sorted_time = who[order], rows["time"].to_numpy()[order]
    new_user = np.r_[True, sorted_who[1:] != sorted_who[:-1]]
    new_time = new_user | np.r_[True, sorted_time[1:] != sorted_time[:-1]]
    places = np.arange(len(rows))
    first, upto = (np.maximum.accumulate(np.where(new, places, 0)) for new in (new_user, new_time))
    begins = np.maximum(first, upto - LENGTH)
    start, length = np.empty(len(rows), np.int64), np.empty(len(rows), np.int64)
    start[order], length[order] = begins, upto - begins
    sorted_items = rows["item"].to_numpy()[order]
    shuffled = np.random.default_rng(0).permutation(len(rows))
    table = pa.Table.from_pandas(rows[[*IDS, *NUMBERS, "click"]], preserve_index=False)
    for number, name in enumerate(SPLITS):
        (out / name).mkdir()
        chosen = shuffled[split[shuffled] == number]
        with pq.ParquetWriter(
            out / name / "part-0.parquet",
            table.schema.append(pa.field("history", pa.list_(pa.int32()))),
            compression="zstd",
        ) as writer:
            for begin in range(0, len(chosen), 65_536):
                some = chosen[begin : begin + 65_536]
                ends = np.cumsum(length[some])
                at = np.arange(ends[-1]) + np.repeat(start[some] - ends + length[some], length[some])
                lists = pa.ListArray.from_arrays(
                    pa.array(np.r_[0, ends].astype(np.int32)), pa.array(sorted_items[at].astype(np.int32))
                )
                writer.write_table(table.take(pa.array(some)).append_column("history", lists))


CONTESTANTS = {"import": ours, "sql": by_sql, "pandas": by_pandas}


def digest(out: Path) -> tuple[Any, ...]:
    """Numbers that are equal for equal tables, whatever the order of the rows."""
    base = duckdb.connect(config={"threads": 2, "memory_limit": "2GB"})
    ids = ", ".join(f"sum(hash({name}::INTEGER, history::INTEGER[], click::TINYINT) % 1000003)" for name in IDS)
    numbers = ", ".join(f"sum({name}::DECIMAL(18, 2))" for name in NUMBERS)
    return tuple(
        base.execute(f"select count(*), {ids}, {numbers} from read_parquet('{out / split}/*.parquet')").fetchall()[0]
        for split in SPLITS
    )
