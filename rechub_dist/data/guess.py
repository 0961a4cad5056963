"""A schema to start from, guessed from a data set's columns: what `rechub-dist data inspect PATH --schema` prints."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import yaml

from rechub_dist.data.frequencies import Frequencies, count_values, value_type
from rechub_dist.data.kinds import is_list, is_number
from rechub_dist.data.manifest import Manifest
from rechub_dist.data.prepare.writer import schema_text
from rechub_dist.data.scan import THREADS, footers, scan
from rechub_dist.errors import UserError
from rechub_dist.features import DenseFeature, Feature, FeatureSchema, Label, SequenceFeature, SparseFeature, Table

_LABEL = re.compile(
    r"(is_)?(label|target|y|click(ed)?|convert(ed)?|conversion|purchase[d]?|buy|bought|like[d]?)(_?\d+)?"
    r"|label_.*|.*_label",
    re.IGNORECASE,
)
_WEIGHT = re.compile(r"(sample_|row_|example_)?(weight|importance)", re.IGNORECASE)
_SMALL_TABLE = 1_000_000  # rows that a table may have whatever the number of rows of data
_MAX_LENGTH = 50
_AMOUNT = 2**31  # negative integers within are amounts, not ids; those of a wider range are hashes
_SKEWED = 100.0  # dense values beyond are taken for amounts or counts, which the logarithm tames


@dataclass
class Facts:
    """What is known of a column, over all rows or those seen so far.

    Attributes:
        low, high: the smallest and the largest number (of a list's elements); None where there is none.
        nulls: missing values, or lists; NaN counts.
        gaps: missing elements of lists.
        shortest, longest: of the lists; None where there is none.
        values: the counts of the distinct values, for those that have to be counted.
    """

    name: str
    type: pa.DataType
    low: Any = None
    high: Any = None
    nulls: int = 0
    gaps: int = 0
    shortest: int | None = None
    longest: int | None = None
    values: Frequencies | None = None

    def add(self, other: Facts) -> None:
        """Take in what is known of other rows."""
        self.low, self.high = _either(min, self.low, other.low), _either(max, self.high, other.high)
        self.shortest = _either(min, self.shortest, other.shortest)
        self.longest = _either(max, self.longest, other.longest)
        self.nulls += other.nulls
        self.gaps += other.gaps

    @property
    def element(self) -> pa.DataType:
        """The type of the values, or of the lists' elements, without a dictionary."""
        kind = self.type.value_type if is_list(self.type) else self.type
        return kind.value_type if pa.types.is_dictionary(kind) else kind

    @property
    def binary(self) -> bool:
        """Whether the values are 0 and 1, both, and none is missing."""
        return not is_list(self.type) and is_number(self.type) and (self.low, self.high, self.nulls) == (0, 1, 0)


@dataclass
class _Guess:
    features: list[Feature] = field(default_factory=list)
    labels: list[Label] = field(default_factory=list)
    weight: str | None = None
    notes: dict[str, str] = field(default_factory=dict)
    unused: dict[str, str] = field(default_factory=dict)


def guess_schema(
    path: str, progress: Callable[[int, int], None] | None = None, threads: int = THREADS
) -> tuple[str, FeatureSchema]:
    """The YAML of a schema for a data set, with comments on what was seen, and the schema itself.

    Integers are sparse, with a table that holds the largest id, or hashed where that would be much larger than the
    data; strings are hashed; numbers with a fraction and negative ones are dense; lists of ids are sequences. Columns
    with the usual names of labels are labels, else those of 0 and 1.

    What the files' footers know exactly (the range of integers, missing values) is not read; other columns are, by
    `threads`. Distinct values are counted in memory.

    Raises:
        UserError: where the data cannot be read, or no column can be a feature.
    """
    manifest = Manifest.read(path)
    facts = {item.name: Facts(item.name, item.type) for item in manifest.schema}
    known = _from_footers(manifest, facts)
    for name in known:
        # an integer whose range is too large for a table is hashed, for which its values are counted
        if _is_id(facts[name]) and not _fits(facts[name], manifest.rows):
            facts[name].values = Frequencies(pa.uint64() if pa.types.is_uint64(facts[name].element) else pa.int64())
    unread = [name for name in facts if _supported(facts[name]) and name not in known]
    for name in unread:
        if not is_number(facts[name].element) or (pa.types.is_integer(facts[name].element) and _is_id(facts[name])):
            facts[name].values = Frequencies(value_type(facts[name].type))
    columns = [name for name in facts if name in unread or facts[name].values is not None]

    def look(table: pa.Table) -> list[tuple[Facts, pa.Table | None]]:
        found = []
        for name in columns:
            column, counted = table.column(name), facts[name].values is not None
            seen = _look(name, column) if name in unread else Facts(name, column.type)
            found.append((seen, count_values(column, value_type(column.type)) if counted else None))
        return found

    if columns:
        for done, (_, found) in enumerate(scan(manifest, columns, look, threads), 1):
            for seen, counted in found:
                facts[seen.name].add(seen)
                values = facts[seen.name].values
                if counted is not None and values is not None:
                    values.add(counted)
            if progress is not None:
                progress(done, len(manifest.counts))

    guess = _guess(manifest, list(facts.values()))
    if not guess.features:
        raise UserError(
            f"{path}: no column can be a feature: {'; '.join(f'{k}: {v}' for k, v in guess.unused.items())}"
        )
    schema = FeatureSchema(tuple(guess.features), tuple(guess.labels), guess.weight)
    name = re.sub(r"\W+", "_", PurePosixPath(path.partition("?")[0].rstrip("/")).stem).strip("_") or "data"
    return _commented(schema_text(name, schema), path, manifest, guess), schema


def _from_footers(manifest: Manifest, facts: dict[str, Facts]) -> list[str]:
    """Fill in the flat columns of integers whose every row group has statistics; returns their names."""
    wanted = {name for name, fact in facts.items() if pa.types.is_integer(fact.type)}
    for metadata in footers(manifest) if wanted else ():
        places = {metadata.schema.column(i).path: i for i in range(metadata.num_columns)}
        for name in list(wanted):
            chunks = [metadata.row_group(g).column(places[name]) for g in range(metadata.num_row_groups)]
            chunks = [chunk for chunk in chunks if chunk.num_values]
            if not all(chunk.is_stats_set and chunk.statistics.has_null_count for chunk in chunks):
                wanted.discard(name)
            for statistics in (chunk.statistics for chunk in chunks if name in wanted):
                seen = Facts(name, facts[name].type, nulls=statistics.null_count)
                if statistics.has_min_max:
                    seen.low, seen.high = statistics.min, statistics.max
                elif statistics.num_values:
                    wanted.discard(name)
                facts[name].add(seen)
    for name, fact in facts.items():
        if name not in wanted:  # some of the row groups may have been added
            facts[name] = Facts(name, fact.type)
    return sorted(wanted)


def _look(name: str, column: pa.ChunkedArray) -> Facts:
    """The facts of a piece of a column that has been read."""
    facts = Facts(name, column.type)
    for chunk in column.chunks:
        values, seen = chunk, Facts(name, column.type, nulls=chunk.null_count)
        if is_list(chunk.type):
            lengths = pc.min_max(pc.list_value_length(chunk)).as_py()
            values = chunk.flatten()
            seen.shortest, seen.longest, seen.gaps = lengths["min"], lengths["max"], values.null_count
        if pa.types.is_dictionary(values.type):
            values = values.dictionary_decode()
        if is_number(values.type):
            if pa.types.is_floating(values.type):
                nan = int(pc.sum(pc.is_nan(values)).as_py() or 0)
                values = values.filter(pc.is_finite(values))
                seen.nulls, seen.gaps = (seen.nulls, seen.gaps + nan) if is_list(chunk.type) else (seen.nulls + nan, 0)
            seen.low, seen.high = pc.min_max(values).as_py().values()
        facts.add(seen)
    return facts


def _guess(manifest: Manifest, facts: list[Facts]) -> _Guess:
    guess = _Guess()
    named = [f for f in facts if _LABEL.fullmatch(f.name) and not is_list(f.type) and is_number(f.type)]
    labels = {f.name for f in named if f.low is not None} or {f.name for f in facts if f.binary}
    for f in facts:
        if f.name in labels:
            classification = f.low in (0, 1) and f.high in (0, 1) and _whole(f)
            guess.labels.append(Label(f.name, type="classification" if classification else "regression"))
            note = "" if named else "the only kind of column that may be a label: its values are 0 and 1"
            if f.nulls:
                note = f"{f.nulls:,} missing: remove these rows before you train"
            guess.notes[f.name] = note
        elif guess.weight is None and _WEIGHT.fullmatch(f.name) and _is_weight(f):
            guess.weight = f.name
        else:
            _add_feature(guess, f, manifest.rows)
    return guess


def _add_feature(guess: _Guess, f: Facts, rows: int) -> None:
    if not _supported(f):
        guess.unused[f.name] = f"{f.type}"
    elif is_number(f.element) and f.low is None:
        guess.unused[f.name] = f"{f.type}, has no value"
    elif not _is_id(f) or _is_amount(f):
        _add_dense(guess, f)
    elif is_list(f.type):
        table, options, note = _table(f, rows)
        options["missing"] = "drop" if f.gaps else "error"
        length = max(1, min(f.longest or 1, _MAX_LENGTH))
        guess.features.append(SequenceFeature(f.name, table, length, **options))
        guess.notes[f.name] = f"{note}; lists of {f.shortest or 0:,} to {f.longest or 0:,}"
    else:
        table, options, guess.notes[f.name] = _table(f, rows)
        if f.nulls:
            # in a table that ids index, the missing get a row of their own
            options |= {"missing": "unknown"} | ({} if "hash" in options else {"unknown_id": table.rows})
            table = table if "hash" in options else Table(f.name, table.rows + 1)
            guess.notes[f.name] += f", {f.nulls:,} missing"
        if f.binary:
            guess.notes[f.name] += "; or a label?"  # as a feature, it would tell another label's outcome
        guess.features.append(SparseFeature(f.name, table, **options))


def _add_dense(guess: _Guess, f: Facts) -> None:
    dim = 1
    if is_list(f.type):
        if f.shortest != f.longest or not f.longest:
            guess.unused[f.name] = f"{f.type} of {f.shortest} to {f.longest} numbers; dense lists are of one length"
            return
        if f.longest == 1:
            guess.unused[f.name] = f"{f.type} of one number each; write the numbers without lists"
            return
        dim = f.longest
    missing = f.nulls + f.gaps
    skewed = max(abs(float(f.low)), abs(float(f.high))) > _SKEWED
    guess.features.append(
        DenseFeature(f.name, dim=dim, transform="log" if skewed else "none", missing="fill" if missing else "error")
    )
    guess.notes[f.name] = f"{float(f.low):.6g} to {float(f.high):.6g}" + (f", {missing:,} missing" if missing else "")


def _table(f: Facts, rows: int) -> tuple[Table, dict[str, Any], str]:
    """A table for a column's ids, the feature's options that go with it, and a comment."""
    if is_number(f.element) and _fits(f, rows):
        return Table(f.name, int(f.high) + 1), {}, f"ids {f.low:,} to {f.high:,}"
    count = len(f.values or ())
    what = f"{count:,} distinct" + (f" ids {f.low:,} to {f.high:,}" if is_number(f.element) else " strings")
    return Table(f.name, max(10, 2 * count)), {"hash": True}, f"{what}, hashed"


def _fits(f: Facts, rows: int) -> bool:
    """Whether a table may have a row for each id up to the largest."""
    return f.low is None or (f.low >= 0 and f.high < max(_SMALL_TABLE, 2 * rows))


def _is_id(f: Facts) -> bool:
    return value_type(f.type) is not None


def _is_amount(f: Facts) -> bool:
    """Whether integers are no ids: some are negative, and they are no hashes."""
    return bool(is_number(f.element) and f.low < 0 and max(-f.low, f.high) < _AMOUNT)


def _is_weight(f: Facts) -> bool:
    return not is_list(f.type) and is_number(f.type) and f.low is not None and f.low >= 0 and not f.nulls


def _whole(f: Facts) -> bool:
    return not (pa.types.is_floating(f.element) or pa.types.is_decimal(f.element)) or f.binary


def _supported(f: Facts) -> bool:
    return is_number(f.element) or value_type(f.type) is not None


def _either(choose: Callable[[Any, Any], Any], a: Any, b: Any) -> Any:
    return a if b is None else b if a is None else choose(a, b)


def _commented(text: str, path: str, manifest: Manifest, guess: _Guess) -> str:
    """The YAML with a heading, the notes beside their columns, and what is left out."""
    keys = {yaml.safe_dump({name: 0})[: -len(": 0\n")]: name for name in guess.notes}
    lines = []
    for line in text.splitlines():
        note = guess.notes.get(keys.get(line.strip().partition(": {")[0], ""), "") if line.startswith("  ") else ""
        lines.append(f"{line}  # {note}" if note else line)
    head = [f"# Guessed from {path} ({manifest.rows:,} rows). Check kinds and labels before you train."]
    if any(getattr(feature, "hash", False) for feature in guess.features):
        head.append("# Hashed features may have a vocabulary instead: rechub-dist data vocabulary --help")
    if any(isinstance(feature, SequenceFeature) for feature in guess.features):
        head.append("# A history shares its item's table where both name it: tables: {item: {rows: ...}}, table: item")
    if len(guess.labels) > 1:
        head.append("# Several labels: data.labels in the run file chooses, or a multi-task model learns all.")
    if not guess.labels:
        head.append("# No column looks like a label.")
    tail = [f"# not used: {name} ({why})" for name, why in guess.unused.items()]
    return "\n".join([*head, *lines, *tail]) + "\n"
