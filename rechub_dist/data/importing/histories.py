"""Histories: what a row's user did strictly before the row, in time order, from the rows of the log.

The events of a history lie once in a file, by user and time, and a row has the place where its list begins there, and
the list's length. Lists are made when rows are streamed, a batch at a time: the database never holds them, which would
have many times the size of everything else to write and to sort. It sorts the events by user and time, out of core.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from rechub_dist.data.columns.vocabulary import Vocabulary
from rechub_dist.data.importing.engine import BATCH_ROWS, Engine, quoted
from rechub_dist.data.importing.ids import encode
from rechub_dist.data.importing.plan import NOW, NUMBERS, RESERVED, HistoryPlan, Plan
from rechub_dist.data.importing.rows import DRAWN, FRACTIONS, ROW, ROWS, SPLIT, flag

LAST: Final = 3  # the split of rows of `now`
_POINTS: Final = f"{RESERVED}points"
_VALUES: Final = f"{RESERVED}values"
_CHUNK: Final = 1 << 20  # events that are encoded at once
_ELEMENTS: Final = 2 << 20  # of lists that are made at once

Ints = NDArray[np.int64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Events:
    """The values of one column of a history's events, by user and time.

    Attributes:
        stored: [events], the values' bits as integers of their width; of a dictionary, places in it.
        kind: the values' type.
        valid: bool [events], whether there is a value; None: there always is.
        dictionary: the different values of a column that has no fixed width.
    """

    stored: NDArray[Any]
    kind: pa.DataType
    valid: NDArray[np.bool_] | None = None
    dictionary: pa.Array | None = None

    def __len__(self) -> int:
        return len(self.stored)

    def take(self, places: Ints | slice) -> pa.Array:
        """The values at places, int64 [n], or in a slice."""
        stored = np.ascontiguousarray(self.stored[places])
        missing = None if self.valid is None else ~self.valid[places]
        if self.dictionary is not None:
            return self.dictionary.take(pa.array(stored, mask=missing))
        nulls = None if missing is None else pc.invert(pa.array(missing)).buffers()[1]
        return pa.Array.from_buffers(self.kind, len(stored), [nulls, pa.py_buffer(stored)])

    def encoded(self, vocabulary: Vocabulary, path: Path) -> Events:
        """The ids of the values, kept in a file."""
        of_dictionary = None if self.dictionary is None else encode(self.dictionary, vocabulary).to_numpy()
        kind = encode(self.take(slice(0, 0)), vocabulary).type
        with path.open("wb") as file:
            for begin in range(0, len(self), _CHUNK):
                piece = slice(begin, begin + _CHUNK)
                if of_dictionary is None:
                    encode(self.take(piece), vocabulary).to_numpy().tofile(file)
                else:
                    codes = (
                        self.stored[piece] if self.valid is None else np.where(self.valid[piece], self.stored[piece], 0)
                    )
                    ids = of_dictionary[codes] if len(of_dictionary) else np.zeros(len(codes), of_dictionary.dtype)
                    (ids if self.valid is None else np.where(self.valid[piece], ids, 0)).tofile(file)
        return Events(_mapped(path, np.dtype(kind.to_pandas_dtype())), kind)


@dataclass(frozen=True)
class Lists:
    """One list column of a history.

    Attributes:
        events: what the lists hold.
        begin, length: the columns of ROWS that say where a row's list begins among the events, and how long it is.
        longest: no list is longer.
    """

    events: Events
    begin: str
    length: str
    longest: int

    def of(self, rows: pa.Table) -> pa.Array:
        """The lists of rows that have the two columns."""
        begin, length = (rows[name].to_numpy().astype(np.int64, copy=False) for name in (self.begin, self.length))
        offsets = np.zeros(len(length) + 1, np.int64)
        np.cumsum(length, out=offsets[1:])
        places = np.repeat(begin - offsets[:-1], length)
        places += np.arange(offsets[-1])
        return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), self.events.take(places))


def batch_rows(lists: Iterable[Lists]) -> int:
    """How many rows to make at once, so that their lists take little memory however long they are."""
    return max(1024, min(BATCH_ROWS, _ELEMENTS // max(1, sum(one.longest for one in lists))))


def list_columns(name: str, history: HistoryPlan) -> dict[str, str]:
    """The columns of lists that a history has, each with the log's column that it is made of."""
    return {name: history.column, **history.also}


def list_kinds(plan: Plan, kinds: dict[str, str]) -> dict[str, str]:
    """The types of all histories' columns, in the database's words."""
    return {
        out: f"{kinds[column]}[]"
        for name, history in plan.histories.items()
        for out, column in list_columns(name, history).items()
    }


def add_histories(plan: Plan, engine: Engine) -> dict[str, Lists]:
    """Add to ROWS where each row's histories lie; rows without an earlier event have empty ones.

    Returns:
        The list columns.
    """
    if not plan.histories:
        return {}
    kinds = engine.columns(ROWS)
    columns = dict.fromkeys(c for name, h in plan.histories.items() for c in list_columns(name, h).values())
    plain = {column: _is_plain(kinds[column]) for column in columns}
    joins, dictionaries = [], {}
    for i, column in enumerate(c for c in columns if not plain[c]):
        # Values of any width are numbered. The dictionary is kept in memory, as a vocabulary would be.
        table = f"{_VALUES}_{i}"
        engine.run(
            f"create or replace table {table} as select value, (row_number() over () - 1)::INTEGER as code from "
            f"(select distinct {quoted(column)} as value from {ROWS} where {quoted(column)} is not null)"
        )
        dictionaries[column] = table
        joins.append(f"left join {table} on {table}.value = r.{quoted(column)}")
    values = [
        f"r.{quoted(c)} as v{i}" if plain[c] else f"{dictionaries[c]}.code as v{i}" for i, c in enumerate(columns)
    ]
    flags = [
        f"r.{quoted(flag(name))} and not r.{DRAWN} and r.{SPLIT} is distinct from {LAST} as f{i}"
        for i, name in enumerate(plan.histories)
    ]
    user, time = quoted(plan.user or ""), quoted(plan.time or "")
    batches = engine.stream(
        f"select r.{user} as u, r.{time} as t, r.{ROW} as r, r.{SPLIT} is not distinct from {LAST} as now, "
        f"{', '.join([*flags, *values])} from {ROWS} as r {' '.join(joins)} order by u, t, r, now"
    )
    with ExitStack() as files:
        spool = [_Spool(engine.folder / f"events_{i}", files) for i in range(len(plan.histories) * len(columns))]
        of = {key: spool[i * len(columns) : (i + 1) * len(columns)] for i, key in enumerate(plan.histories)}
        wanted = {key: [*list_columns(key, h).values()] for key, h in plan.histories.items()}
        used = {key: [s if c in wanted[key] else None for c, s in zip(columns, of[key], strict=True)] for key in of}
        engine.create(
            _POINTS,
            pa.RecordBatchReader.from_batches(_points_schema(plan), _points(batches, plan, [*used.values()])),
        )
    names = [quoted(name) for key in plan.histories for name in _pointers(key)]
    engine.run(
        f"create or replace table {ROWS} as select r.*, {', '.join(names)} from {ROWS} as r join {_POINTS} as p "
        f"on r.{ROW} = p.r and (r.{SPLIT} is not distinct from {LAST}) = p.now"
    )
    found = {}
    for key, history in plan.histories.items():
        for out, column in list_columns(key, history).items():
            place = [*columns].index(column)
            dictionary = None
            if not plain[column]:
                table = engine.table(f"select value from {dictionaries[column]} order by code")
                dictionary = table["value"].combine_chunks()
            kind = dictionary.type if dictionary is not None else batches.schema.field(f"v{place}").type
            stored = batches.schema.field(f"v{place}").type
            found[out] = Lists(of[key][place].events(stored, kind, dictionary), *_pointers(key), history.max_length)
    for table in (_POINTS, *dictionaries.values()):
        engine.run(f"drop table {table}")
    return found


def add_now(plan: Plan, engine: Engine) -> None:
    """Add the rows of the split `now`: each user's last row, whose history will hold that row's event too."""
    assert NOW
    user, time = quoted(plan.user or ""), quoted(plan.time or "")
    engine.run(
        f"insert into {ROWS} select * replace ({LAST}::TINYINT as {SPLIT}) from {ROWS} where not {DRAWN} "
        f"qualify row_number() over (partition by {user} order by {time} desc, {ROW} desc) = 1"
    )


def _is_plain(kind: str) -> bool:
    """Whether values of DuckDB's type have a fixed width of at most 64 bits."""
    integers = kind in NUMBERS and kind != "HUGEINT"
    return integers or kind in FRACTIONS or (kind.startswith(("TIMESTAMP", "DATE")) and not kind.endswith("]"))


def _pointers(history: str) -> tuple[str, str]:
    return f"{RESERVED}begin_{history}", f"{RESERVED}length_{history}"


def _points_schema(plan: Plan) -> pa.Schema:
    fields = [("r", pa.int64()), ("now", pa.bool_())]
    for key in plan.histories:
        begin, length = _pointers(key)
        fields += [(begin, pa.int64()), (length, pa.int32())]
    return pa.schema(fields)


class _Spool:
    """A file that values are appended to, and read from once it is complete."""

    def __init__(self, path: Path, files: ExitStack) -> None:
        self._path, self._files = path, files
        self._values: BinaryIO | None = None
        self._valid: BinaryIO | None = None
        self._count = 0

    def write(self, values: pa.Array) -> None:
        """Append values of a fixed width."""
        if self._values is None:
            self._values = self._files.enter_context(self._path.open("wb"))
        if values.null_count and self._valid is None:
            self._valid = self._files.enter_context(self._path.with_suffix(".valid").open("wb"))
            np.ones(self._count, np.bool_).tofile(self._valid)
        if self._valid is not None:
            values.is_valid().to_numpy(zero_copy_only=False).tofile(self._valid)
        _bits(values).tofile(self._values)
        self._count += len(values)

    def events(self, stored: pa.DataType, kind: pa.DataType, dictionary: pa.Array | None) -> Events:
        """What has been written."""
        bits = _mapped(self._path, np.dtype(f"i{stored.bit_width // 8}"))
        valid = None if self._valid is None else _mapped(self._path.with_suffix(".valid"), np.dtype(np.bool_))
        return Events(bits, kind, valid, dictionary)


def _mapped(path: Path, dtype: np.dtype[Any]) -> NDArray[Any]:
    """A file's values; an empty file cannot be mapped."""
    if not path.exists() or not path.stat().st_size:
        return np.empty(0, dtype)
    return np.memmap(path, dtype, mode="r")


def _bits(values: pa.Array) -> NDArray[Any]:
    """The bits of values of a fixed width as integers, whatever null ones have."""
    dtype = np.dtype(f"i{values.type.bit_width // 8}")
    return np.frombuffer(values.buffers()[1], dtype, len(values), values.offset * dtype.itemsize)


def _points(batches: pa.RecordBatchReader, plan: Plan, spools: list[list[_Spool | None]]) -> Iterator[pa.RecordBatch]:
    """For rows by user and time, where the list of each begins and how long it is; events go to the spools."""
    histories = [*plan.histories.values()]
    counts, user_starts, tie_starts = ([0] * len(histories) for _ in range(3))
    schema = _points_schema(plan)
    last: pa.RecordBatch | None = None
    for batch in batches:
        if not batch.num_rows:
            continue
        new_user = _changes(batch["u"], last and last["u"])
        new_time = new_user | _changes(batch["t"], last and last["t"])
        now = batch["now"].to_numpy(zero_copy_only=False)
        arrays = [batch["r"], batch["now"]]
        for i, history in enumerate(histories):
            is_event = batch[f"f{i}"].to_numpy(zero_copy_only=False)
            after = counts[i] + np.cumsum(is_event)
            before = after - is_event
            user_start = _since(new_user, before, user_starts[i])
            tie_start = _since(new_time, before, tie_starts[i])
            counts[i], user_starts[i], tie_starts[i] = int(after[-1]), int(user_start[-1]), int(tie_start[-1])
            # Events of the row's own time are not before it; a row of `now` comes last and has them all.
            end = np.where(now, after, tie_start)
            begin = np.maximum(user_start, end - history.max_length)
            arrays += [pa.array(begin), pa.array((end - begin).astype(np.int32))]
            chosen = pa.array(is_event)
            for j, spool in enumerate(spools[i]):
                if spool is not None:
                    spool.write(batch[f"v{j}"].filter(chosen))
        last = batch.slice(batch.num_rows - 1)
        yield pa.RecordBatch.from_arrays(arrays, schema=schema)


def _changes(values: pa.Array, last: pa.Array | None) -> Mask:
    """Whether each value differs from the one before it; `last` comes before the first."""
    if pa.types.is_floating(values.type):  # NaN is a value like any other, and 0.0 is -0.0
        values, last = (v if v is None else _float_bits(v) for v in (values, last))
    changed = np.ones(len(values), np.bool_)
    changed[1:] = pc.not_equal(values[1:], values[:-1]).to_numpy(zero_copy_only=False)
    changed[0] = last is None or not values[0].equals(last[0])
    return changed


def _float_bits(values: pa.Array) -> pa.Array:
    return pc.add(values.cast(pa.float64()), 0.0).view(pa.int64())


def _since(new: Mask, before: Ints, carried: int) -> Ints:
    """At each row, the value of `before` where `new` was last true; `carried` until it is."""
    at = np.maximum.accumulate(np.where(new, np.arange(len(new)), -1))
    return np.where(at >= 0, before[at], carried)
