"""Guesses a schema to start from, which `rechub-dist data inspect PATH --schema` prints."""

from __future__ import annotations

import posixpath
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain
from itertools import count as counting
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import yaml

from rechub_dist.data.columns.frequencies import Frequencies, vocabulary_name, write_vocabulary
from rechub_dist.data.columns.strings import python_value
from rechub_dist.data.parquet.kinds import is_list, is_number
from rechub_dist.data.parquet.manifest import Manifest, prepared_splits
from rechub_dist.data.parquet.outputs import check_file, whole_file
from rechub_dist.data.parquet.scan import THREADS
from rechub_dist.data.prepare.writer import SCHEMA_FILE, VOCABULARIES, schema_text
from rechub_dist.data.tools.facts import SMALL_TABLE, Facts, fits, gather, is_id, is_supported, numbers_rows
from rechub_dist.errors import UserError
from rechub_dist.features import DenseFeature, Feature, FeatureSchema, Label, SequenceFeature, SparseFeature, Table

_OUTCOME = (
    r"target|y|click(ed|s)?|convert(ed)?|conversions?|purchased?|buy|bought|liked?|rating|ratings|rate|stars|outcome"
)
LABEL_NAME = re.compile(rf"(is_)?(label|{_OUTCOME})(_?\d+)?|label_.*|.*_(label|rating)", re.IGNORECASE)
_FLAG = re.compile(r"(is|has|did)_.*", re.IGNORECASE)  # a label if its values are 0 and 1
_WORD_LABEL = re.compile(r"label|target|outcome|class|income", re.IGNORECASE)
_WEIGHT = re.compile(r"(sample_|row_|example_)?(weight|importance)", re.IGNORECASE)
_ROW = re.compile(r"unnamed: ?\d+|__index_level_\d+__|(row_?)?(index|idx|number|num|no|nr)|row_?id", re.IGNORECASE)
TIME_NAME = re.compile(r"time|date|(^|_)(ts|dt|day|at)(_|$)", re.IGNORECASE)
# from 1990 to 2100, in seconds (also tried in milliseconds, microseconds, nanoseconds), and as 19900101
_SECONDS = (631_152_000, 4_102_444_800)
_DAYS = (19_000_101, 21_001_231)
_MAX_LENGTH = 50
_AMOUNT = 2**31  # integers with negative ones are amounts below this magnitude, and hashes beyond it
_SKEWED = 100.0  # dense values beyond this are amounts or counts, of which the logarithm is taken
_BUCKETS = 10  # per hashed value: then less than a tenth of the values share theirs


@dataclass
class Guess:
    """A guessed schema.

    Attributes:
        path: the data.
        root: the folder for `data.root`; vocabularies are below it.
        rows: of all splits.
        features, labels, weight: of the schema.
        vocabularies: by column, the counted values of those that need a vocabulary.
        notes: a comment for each feature or label.
        unused: by column, why it is neither.
    """

    path: str
    root: str
    rows: int = 0
    features: list[Feature] = field(default_factory=list)
    labels: list[Label] = field(default_factory=list)
    weight: str | None = None
    vocabularies: dict[str, Frequencies] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    unused: dict[str, str] = field(default_factory=dict)

    @property
    def schema(self) -> FeatureSchema:
        """The schema."""
        return FeatureSchema(tuple(self.features), tuple(self.labels), self.weight)

    @property
    def text(self) -> str:
        """The schema as YAML, with a heading, notes as comments, and the columns that are left out."""
        name = re.sub(r"\W+", "_", PurePosixPath(self.path.partition("?")[0].rstrip("/")).stem).strip("_") or "data"
        keys = {yaml.safe_dump({name: 0}, allow_unicode=True)[: -len(": 0\n")]: name for name in self.notes}
        lines = []
        for line in schema_text(name, self.schema).splitlines():
            key = keys.get(line.strip().partition(": {")[0], "") if line.startswith("  ") else ""
            lines.append(f"{line}  # {note}" if (note := self.notes.get(key)) else line)
        tail = [f"# not used: {name!r} ({why})" for name, why in self.unused.items()]
        return "\n".join([*self._heading(), *lines, *tail]) + "\n"

    def _heading(self) -> list[str]:
        head = [f"# Guessed from {self.path} ({self.rows:,} rows). Check kinds and labels before you train."]
        if self.vocabularies:
            folder = posixpath.join(self.root, VOCABULARIES)
            columns = " ".join(f"--column {shlex.quote(name)}" for name in self.vocabularies)
            train = f"{self.path.rstrip('/')}/train" if prepared_splits(self.path) else self.path
            command = f"rechub-dist data vocabulary {shlex.quote(train)} {columns} --out {shlex.quote(folder)}"
            head.append("# Its vocabularies are written by `data inspect --schema --write`, or by")
            head.append(f"#   {command}")
        if any(isinstance(feature, SequenceFeature) for feature in self.features):
            head.append(
                "# A history shares its item's table where both name it: tables: {item: {rows: ...}}, table: item"
            )
        if len(self.labels) > 1:
            head.append("# Several labels: data.labels in the run file chooses, or a multi-task model learns all.")
        if not self.labels:
            head.append("# No column looks like a label: a number, 0 or 1, or a rating.")
        return head

    def write(self) -> list[Path]:
        """Write `dataset.yaml`, which must not exist, and the vocabularies beside it; returns the files.

        Raises:
            UserError: a file exists that is not replaced, or the folder cannot be written.
        """
        target = Path(self.root) / SCHEMA_FILE
        files = {name: Path(self.root) / VOCABULARIES / vocabulary_name(name) for name in self.vocabularies}
        check_file(target, _never, "to be replaced", option="--write")
        for name, frequencies in self.vocabularies.items():
            write_vocabulary(files[name], frequencies, 1, columns=(name,))
        with whole_file(target, _never, "to be replaced", option="--write") as file:
            file.write_text(self.text, encoding="utf-8")
        return [*files.values(), target]


def guess_schema(path: str, progress: Callable[[int, int], None] | None = None, threads: int = THREADS) -> Guess:
    """Guess the schema of a data set; for a prepared folder, from all of its splits.

    Integers are sparse, with a table up to the largest id. Strings, and integers with a range too wide for a table, are
    looked up in a vocabulary of the train split, or hashed if it would be too large. Fractions and negative numbers are
    dense; lists of ids are sequences. Columns with the usual names of labels and ratings are labels, or else those with
    0 and 1. Row numbers, times and the index of pandas are left out, as a model could only memorise them.

    Raises:
        UserError: the data cannot be read, or no column can be a feature.
    """
    base, _, last = path.rstrip("/").rpartition("/")
    if last == "train" and prepared_splits(base or "."):
        path = base or "."
    splits = prepared_splits(path)
    train, *others = [Manifest.read(f"{path}/{split}") for split in splits] or [Manifest.read(path)]
    guess = Guess(path, path if splits or Path(path).is_dir() else posixpath.dirname(path) or ".")
    guess.rows = sum(manifest.rows for manifest in (train, *others))
    _fill(guess, gather(train, others, progress, threads), train.rows)
    if not guess.features:
        raise UserError(
            f"{path}: no column can be a feature: {'; '.join(f'{k}: {v}' for k, v in guess.unused.items())}"
        )
    return guess


def _fill(guess: Guess, facts: list[Facts], rows: int) -> None:
    """Decide what each column is; `rows` are those of the train split."""
    scalars = [f for f in facts if f.name and not f.index and not is_list(f.type) and is_number(f.type)]
    scalars = [f for f in scalars if f.low is not None]
    named = {f.name for f in scalars if LABEL_NAME.fullmatch(f.name)}
    named |= {f.name for f in scalars if f.binary and _FLAG.fullmatch(f.name)}
    labels = named or {f.name for f in scalars if f.binary}
    names = {f.name for f in facts}
    for f in facts:
        name = _name(f, names)
        if f.name in labels:
            classification = f.low in (0, 1) and f.high in (0, 1) and _whole(f)
            kind: Any = "classification" if classification else "regression"
            guess.labels.append(Label(name, type=kind, **_column(f, name)))
            note = "" if named else "a label by its values, 0 and 1"
            if f.nulls:
                note = f"{f.nulls:,} missing: remove these rows before you train"
            guess.notes[name] = note
        elif (why := _why_not(f, rows, any_label=bool(labels))) is not None:
            guess.unused[f.name] = why
        elif guess.weight is None and _WEIGHT.fullmatch(f.name) and _is_weight(f):
            guess.weight = f.name
        else:
            _add_feature(guess, f, name, rows)


def _why_not(f: Facts, rows: int, *, any_label: bool) -> str | None:
    """Why a column is not a feature; None if it may be one."""
    why = None
    if not f.name:
        why = "it has no name: give it one"
    elif not is_supported(f):
        why = f"{f.type}"
    elif (is_number(f.element) and f.low is None) or (f.values is not None and not len(f.values)):
        why = f"{f.type}, has no value"
    elif f.index:
        why = "the index of pandas"
    elif _is_time(f):
        why = "a time, which never recurs"
    elif is_id(f) and not is_list(f.type) and _ROW.fullmatch(f.name):
        why = "a row number, by its name"
    elif numbers_rows(f, rows):
        why = "all rows have different values, which a model could only memorise"
    elif not any_label and _WORD_LABEL.fullmatch(f.name) and f.values is not None and len(f.values) == 2:
        first, second = (repr(python_value(value)) for value in f.values.sorted()["value"].sort())
        why = f"{first} or {second}: write it as 0 and 1 to make it the label"
    return why


def _is_time(f: Facts) -> bool:
    """Whether a column is named like a time, and all of its values may be times."""
    if is_list(f.type) or not TIME_NAME.search(f.name):
        return False
    if not is_number(f.element):
        values = None if f.values is None else f.values.sorted()["value"]
        iso = values is not None and pc.match_substring_regex(values, r"^\d{4}-\d\d-\d\d([T ]\d\d:.*)?$")
        return bool(iso is not None and values is not None and len(values) and pc.all(iso).as_py())
    return time_unit(f.low, f.high) is not None


def time_unit(low: Any, high: Any) -> str | None:
    """The unit in which numbers of this range may be times: s, ms, us, ns since 1970, or `day` as 19900101."""
    if _DAYS[0] <= low and high <= _DAYS[1]:
        return "day"
    units = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
    return next((name for name, n in units.items() if _SECONDS[0] * n <= low and high <= _SECONDS[1] * n), None)


def _name(f: Facts, taken: set[str]) -> str:
    """A name for a feature or label: the column's, without slashes, which tables cannot have. Added to `taken`."""
    if "/" not in f.name:
        return f.name
    plain = f.name.replace("/", "_")
    name = next(name for name in chain([plain], (f"{plain}_{i}" for i in counting(2))) if name not in taken)
    taken.add(name)
    return name


def _column(f: Facts, name: str) -> dict[str, Any]:
    return {} if name == f.name else {"column": f.name}


def _add_feature(guess: Guess, f: Facts, name: str, rows: int) -> None:
    if not is_id(f) or _is_amount(f):
        _add_dense(guess, f, name)
        return
    options: dict[str, Any] = {}
    if is_number(f.element) and fits(f, rows):
        count = int(f.high) + 1
        note = f"ids {f.low:,} to {f.high:,}"
    else:
        assert f.values is not None
        known = len(f.values)
        what = f"{known:,} distinct" + (f" ids {f.low:,} to {f.high:,}" if is_number(f.element) else " strings")
        if known <= SMALL_TABLE:
            options = {"vocabulary": f"{VOCABULARIES}/{vocabulary_name(f.name)}", "out_of_range": "unknown"}
            count, note = known + 1, what  # 0 is for unknown values
            guess.vocabularies[f.name] = f.values
        else:
            options, count = {"hash": True}, _BUCKETS * known
            note = f"{what}, hashed: about {collisions(known, count):.1%} of rows share their bucket with another value"
    options |= _column(f, name)
    if is_list(f.type):
        options["missing"] = "drop" if f.gaps else "error"
        length = max(1, min(f.longest or 1, _MAX_LENGTH))
        guess.features.append(SequenceFeature(name, Table(name, count), length, **options))
        guess.notes[name] = f"{note}; lists of {f.shortest or 0:,} to {f.longest or 0:,}"
        return
    if f.nulls:
        note += f", {f.nulls:,} missing"
        if "hash" in options:
            options["missing"] = "drop"  # no bucket is free for it, so it gets the zero vector
        elif "vocabulary" in options:
            options["missing"] = "unknown"  # 0, which no value has
        else:
            options |= {"missing": "unknown", "unknown_id": count}  # an extra row
            count += 1
    if f.binary:
        note += "; or a label?"  # as a feature, it might leak another label's outcome
    guess.notes[name] = note
    guess.features.append(SparseFeature(name, Table(name, count), **options))


def collisions(values: int, buckets: int) -> float:
    """The expected share of values (and of rows) that share their bucket with another value, in 0 .. 1."""
    return float(1.0 - (1.0 - 1.0 / buckets) ** (values - 1))


def _add_dense(guess: Guess, f: Facts, name: str) -> None:
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
    how: dict[str, Any] = {
        "transform": "log" if skewed else "none",
        "missing": "fill" if missing else "error",
        **_column(f, name),
    }
    guess.features.append(DenseFeature(name, dim=dim, **how))
    guess.notes[name] = f"{float(f.low):.6g} to {float(f.high):.6g}" + (f", {missing:,} missing" if missing else "")


def _is_amount(f: Facts) -> bool:
    """Whether integers are amounts rather than ids: some are negative, and they are too small for hashes."""
    return bool(is_number(f.element) and f.low < 0 and max(-f.low, f.high) < _AMOUNT)


def _is_weight(f: Facts) -> bool:
    return not is_list(f.type) and is_number(f.type) and f.low is not None and f.low >= 0 and not f.nulls


def _whole(f: Facts) -> bool:
    return not (pa.types.is_floating(f.element) or pa.types.is_decimal(f.element)) or f.binary


def _never(_path: Path) -> bool:
    return False
