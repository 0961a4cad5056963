"""Makes a prepared folder of a user's own file of events: who did something with which item, and when.

Users and items get dense ids in the order of their original ones, which are in `users.parquet` and `items.parquet`
(columns `id`, `original`). For the splits see `sequences`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pcsv
from numpy.typing import NDArray

from rechub_dist.data.columns.strings import is_string
from rechub_dist.data.parquet.pages import read_parquet, read_schema, write_parquet
from rechub_dist.data.prepare import sequences as cut
from rechub_dist.data.prepare.source import array, encode, numpy, vocabulary
from rechub_dist.data.prepare.writer import ITEMS_FILE, USERS_FILE, prepared_folder
from rechub_dist.errors import UserError, nearest, one_line

DATASET = "sequences"
WAYS = ("leave-one-out", "temporal", "session")
Bools = NDArray[np.bool_]


class Columns(NamedTuple):
    """The columns of the event file."""

    user: str
    item: str
    time: str | None = None


class Counts(NamedTuple):
    """Events read and kept, users and items kept, and the items that no train row contains (`unlearned`)."""

    read: int
    kept: int
    users: int
    items: int
    unlearned: int


@dataclass(frozen=True)
class EventPlan:
    """How events become rows.

    Args:
        way: `leave-one-out`, `temporal` or `session` (with sessions in the user column).
        valid_from, test_from: the times at which valid and test begin, as text that the time column's type can parse;
            for `temporal` and `session`.
        min_user_events, min_item_events: users and items with fewer events are dropped, repeatedly, until none is left
            (the k-core).
        max_length: items of a history.

    Raises:
        UserError: an unknown way, a number below 1, or bounds that are missing or superfluous.
    """

    way: str = "leave-one-out"
    valid_from: str | None = None
    test_from: str | None = None
    min_user_events: int = 5
    min_item_events: int = 5
    max_length: int = 50

    def __post_init__(self) -> None:
        if self.way not in WAYS:
            raise UserError(f"split is {self.way!r}: {nearest(self.way, WAYS)}")
        for name in ("min_user_events", "min_item_events", "max_length"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}, must be at least 1")
        bounds = (self.valid_from, self.test_from)
        if self.way == "leave-one-out" and bounds != (None, None):
            raise UserError("valid_from and test_from have no effect with split leave-one-out: leave them out")
        if self.way != "leave-one-out" and None in bounds:
            raise UserError(f"split {self.way} needs valid_from and test_from: the times at which these splits begin")


def prepare_events(path: Path, out: Path, columns: Columns, plan: EventPlan) -> Counts:
    """Prepare the events of a .csv, .tsv or .parquet file in the folder `out`; returns what became of them.

    Raises:
        UserError: the file, a column or a value is unsuitable, or a split would have no row.
    """
    if plan.way != "leave-one-out" and columns.time is None:
        raise UserError(f"split {plan.way} needs the column of the events' times")
    table = _read(path, columns)
    users, items = array(table[columns.user]), array(table[columns.item])
    times: NDArray[Any] | None = None
    bounds = (0.0, 0.0)
    if columns.time is not None:
        times, bounds = _times(table[columns.time], f"{path}: column {columns.time!r}", plan)
    user_words, item_words = vocabulary(users), vocabulary(items)
    by_user, by_item = numpy(encode(users, user_words)), numpy(encode(items, item_words))
    kept = k_core(by_user, by_item, plan.min_user_events, plan.min_item_events)
    if not kept.any():
        raise UserError(
            f"{path}: none of the {len(kept):,} events is left after dropping users with fewer than "
            f"{plan.min_user_events} events and items with fewer than {plan.min_item_events}; lower min_user_events or "
            f"min_item_events"
        )
    by_user, user_words = _densely(by_user[kept], user_words)
    by_item, item_words = _densely(by_item[kept], item_words)
    sequences = cut.Sequences.group(by_user, by_item, None if times is None else times[kept])
    splits = _splits(sequences, plan, bounds)
    for name, split in splits.items():
        if not len(split.targets):
            raise UserError(f"{path}: the {name} split has no row: {_why_empty(plan, name)}")
    with prepared_folder(out, DATASET, [path]) as folder:
        cut.write_sequences(folder, DATASET, sequences, splits, items=len(item_words), max_length=plan.max_length)
        for file, words in ((USERS_FILE, user_words), (ITEMS_FILE, item_words)):
            ids = pa.array(np.arange(len(words), dtype=np.int32))
            write_parquet(pa.table({"id": ids, "original": words}), folder / file)
    learned = np.unique(sequences.items[cut.covered(sequences, splits["train"].targets)])
    return Counts(len(kept), len(by_user), len(user_words), len(item_words), len(item_words) - len(learned))


def k_core(users: NDArray[Any], items: NDArray[Any], min_user: int, min_item: int) -> Bools:
    """Which events, bool [n], are left after repeatedly dropping users and items with too few of them."""
    kept = np.ones(len(users), bool)
    while True:
        of_user = np.bincount(users[kept], minlength=users.max(initial=-1) + 1)
        of_item = np.bincount(items[kept], minlength=items.max(initial=-1) + 1)
        left = kept & (of_user[users] >= min_user) & (of_item[items] >= min_item)
        if left.sum() == kept.sum():
            return left
        kept = left


def _splits(sequences: cut.Sequences, plan: EventPlan, bounds: tuple[float, float]) -> cut.Splits:
    if plan.way == "leave-one-out":
        return cut.leave_one_out(sequences)
    return (cut.temporal if plan.way == "temporal" else cut.sessions)(sequences, *bounds)


def _why_empty(plan: EventPlan, split: str) -> str:
    if plan.way == "leave-one-out":
        return "no user has enough events (four for all splits)"
    if split.startswith("train"):
        return f"no user has two events before {plan.valid_from}; let valid_from be later"
    return f"no user has an event there and one before it; move valid_from ({plan.valid_from}) or test_from"


def _densely(ids: NDArray[Any], words: pa.Array) -> tuple[NDArray[Any], pa.Array]:
    """Ids renumbered densely, and the vocabulary without the words that no id uses."""
    used, ids = np.unique(ids, return_inverse=True)
    return ids.astype(np.int32), words.take(pa.array(used))


def _read(path: Path, columns: Columns) -> pa.Table:
    """The columns of the file. Raises UserError if they are empty, have nulls or an unsuitable type."""
    if not path.is_file():
        raise UserError(f"there is no file {path}; check the path")
    chosen = [name for name in columns if name is not None]
    if len(set(chosen)) < len(chosen):
        raise UserError(f"user, item and time are {', '.join(chosen)}: they must be different columns")
    delimiters = {".csv": ",", ".tsv": "\t"}
    try:
        if path.suffix == ".parquet":
            _check_present(path, chosen, read_schema(path).names)
            table = read_parquet(path, chosen)
        elif path.suffix in delimiters:
            parsing = pcsv.ParseOptions(delimiter=delimiters[path.suffix], newlines_in_values=True)
            with pcsv.open_csv(path, parse_options=parsing) as reader:
                _check_present(path, chosen, reader.schema.names)
            # ids as text, so that 007 stays 007
            reading = pcsv.ConvertOptions(
                include_columns=chosen,
                column_types={columns.user: pa.string(), columns.item: pa.string()},
                null_values=[""],
                strings_can_be_null=True,
            )
            table = pcsv.read_csv(path, parse_options=parsing, convert_options=reading)
        else:
            raise UserError(f"{path} is no event file: it must end in .csv, .tsv or .parquet; rename or convert it")
    except pa.ArrowInvalid as error:
        raise UserError(f"{path} cannot be read: {one_line(error)}") from None
    if not table.num_rows:
        raise UserError(f"{path} has no events; name a file with some")
    for name in chosen:
        _check_no_nulls(table[name], f"{path}: column {name!r}")
    for place, name in enumerate((columns.user, columns.item)):
        values = table[name]
        if not _is_id(values.type):
            raise UserError(f"{path}: column {name!r} is {values.type}: ids must be integers or strings")
        if pa.types.is_dictionary(values.type):
            values = values.cast(values.type.value_type)
        if pa.types.is_string_view(values.type):  # which Arrow cannot make distinct
            values = values.cast(pa.large_string())
        table = table.set_column(place, name, values if path.suffix == ".parquet" else _whole_numbers(values))
    return table


def _check_present(path: Path, chosen: list[str], present: list[str]) -> None:
    for name in chosen:
        if name not in present:
            raise UserError(f"{path} has no column {name!r}: {nearest(name, present)}")
        if present.count(name) > 1:
            raise UserError(f"{path} has several columns {name!r}: rename them")


def _check_no_nulls(values: Any, where: str) -> None:
    missing = pc.is_null(array(values), nan_is_null=True)
    number = int(pc.sum(missing).as_py() or 0)
    if number:
        row = int(numpy(missing).argmax())
        raise UserError(f"{where} has {number:,} missing value(s), the first in row {row} (from 0): drop such events")


def _is_id(kind: pa.DataType) -> bool:
    return is_string(kind) or pa.types.is_integer(kind.value_type if pa.types.is_dictionary(kind) else kind)


def _whole_numbers(values: Any) -> Any:
    """Text as integers if every value is the canonical text of one; otherwise unchanged."""
    try:
        integers = values.cast(pa.int64())
    except pa.ArrowInvalid:
        return values
    return integers if integers.cast(values.type).equals(values) else values


def _times(values: Any, where: str, plan: EventPlan) -> tuple[NDArray[Any], tuple[float, float]]:
    """The times as numbers [n], and those at which valid and test begin ((0, 0) if the plan has none)."""
    values = array(values)
    kind = values.type
    if pa.types.is_date(kind):
        kind = pa.timestamp("s")
    elif not (pa.types.is_timestamp(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        raise UserError(f"{where} is {kind}: times must be numbers, dates or timestamps")
    if pa.types.is_timestamp(kind):
        values = values.cast(kind)
    numbers = values if pa.types.is_floating(kind) else values.cast(pa.int64())
    if plan.valid_from is None or plan.test_from is None:
        return numpy(numbers), (0.0, 0.0)
    found = [_bound(text, kind, where) for text in (plan.valid_from, plan.test_from)]
    if not found[0] < found[1]:  # also true for NaN
        raise UserError(f"valid_from {plan.valid_from} must be earlier than test_from {plan.test_from}")
    return numpy(numbers), (found[0], found[1])


def _bound(text: str, kind: Any, where: str) -> Any:
    """A time given as text as a number of the column's unit; without a zone it is UTC."""
    forms = [pa.timestamp(kind.unit, zone) for zone in (None, "UTC")] if pa.types.is_timestamp(kind) else [kind]
    for form in forms:  # Arrow parses a text with a zone only as a type with one, and the other way round
        try:
            value = pa.scalar(text).cast(form)
        except pa.ArrowInvalid:
            continue
        return (value.cast(pa.int64()) if pa.types.is_timestamp(form) else value).as_py()
    raise UserError(f"{text!r} is not a time of {where}, which is {kind}")
