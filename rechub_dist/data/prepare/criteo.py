"""Criteo's click logs for click prediction: the label, 13 counts and 26 categories, as published for Kaggle in 2014
(`train.txt`, 46 million rows) and as the terabyte of 24 days (`day_0.gz` ..., 4.4 billion), or any part of them.

- The rows keep their time order: the last tenth is the test split, the tenth before it the valid split. A folder that
  has all three splits (`train`, `valid` or `dev`, `test`, each with labels) keeps them.
- Categories get ids from 1 on, by their frequency in the train split; those that occur there fewer than `min_count`
  times, or never, share id 0. A missing value is a category like any other. 10 is the customary threshold: rarer values
  are too rare to be learned, and most distinct values are rarer.
- Counts are kept; the schema takes their logarithm, sign(x) log(1 + |x|), and 0 for a missing one.

The files are read three times: to count rows, to count values, and to write. Memory is bounded by the number of
distinct values in the columns, at most 2^24 per column: a column with more is hashed into 2^24 rows instead.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pcsv
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress

from rechub_dist.data.columns.frequencies import Frequencies, count_values, frequent
from rechub_dist.data.columns.hashing import hash_ids
from rechub_dist.data.columns.strings import distinct, hash_strings, spread
from rechub_dist.data.columns.vocabulary import Vocabulary
from rechub_dist.data.parquet.pages import write_parquet
from rechub_dist.data.prepare.writer import SPLITS, VOCABULARIES, ShardWriter, prepared_folder, write_schema
from rechub_dist.errors import UserError, one_line
from rechub_dist.features import DenseFeature, FeatureSchema, Label, SparseFeature, Table

NAME = "criteo"
SUMMARY = "Criteo click logs (Kaggle 2014 or the terabyte), plain or gzip: click prediction, last tenths valid and test"
ORIGIN = "ailab.criteo.com: the Kaggle display advertising challenge, or the terabyte click logs"

LABEL = "label"
COUNTS = [f"I{i}" for i in range(1, 14)]
CATEGORIES = [f"C{i}" for i in range(1, 27)]
MIN_COUNT = 10
MOST_VALUES = 2**24
BLOCK = 16 << 20  # bytes of text at a time

_WRITTEN = pa.schema(
    [(LABEL, pa.int8()), *[(name, pa.float32()) for name in COUNTS], *[(name, pa.int32()) for name in CATEGORIES]]
)
_TEXT = {"", ".txt", ".tsv"}
Files = dict[str, list[Path]]


def prepare(source: Path, out: Path, min_count: int = MIN_COUNT) -> None:
    """Write the prepared folder `out` from a file, or from the files of a folder in the order of their numbers.

    Raises:
        UserError: there is no such file, or one is not in the published format.
    """
    if min_count < 1:
        raise UserError(f"min_count is {min_count}, must be at least 1")
    files = _find(source)
    bar = Progress(*Progress.get_default_columns(), MofNCompleteColumn(), console=Console(stderr=True), transient=True)
    with bar, prepared_folder(out, NAME, [source]) as folder:
        every = [path for paths in files.values() for path in paths]
        counted = [_count_rows(path) for path in bar.track(every, description="files: count rows")]
        rows = dict(zip(every, counted, strict=True))
        total = {split: sum(rows[path] for path in paths) for split, paths in files.items()}
        if list(total) == ["all"]:
            tenth = total["all"] // 10
            total = {"train": total["all"] - 2 * tenth, "valid": tenth, "test": tenth}
        if not total["train"]:
            raise UserError(f"{source}: there are no rows for the train split")

        task = bar.add_task("rows: count values", total=total["train"])
        vocabularies: dict[str, Vocabulary | None] = {}
        (folder / VOCABULARIES).mkdir()
        for name, frequencies in _count(files, total, bar, task).items():
            vocabularies[name] = None
            if frequencies is not None:
                kept = frequent(frequencies.sorted(), min_count)
                path = folder / VOCABULARIES / f"{name}.parquet"
                write_parquet(kept, path)
                values, ids = (kept[column].combine_chunks() for column in ("value", "id"))
                vocabularies[name] = Vocabulary.of(values, ids.to_numpy(), str(path))

        task = bar.add_task("rows: write", total=sum(total.values()))
        with ExitStack() as stack:
            writers = {split: stack.enter_context(ShardWriter(folder, split, _WRITTEN)) for split in SPLITS}
            for split, batch in _splits(files, total):
                writers[split].write(_encode(batch, vocabularies))
                bar.advance(task, batch.num_rows)
        write_schema(folder, NAME, _schema(vocabularies))


def _schema(vocabularies: dict[str, Vocabulary | None]) -> FeatureSchema:
    categories = [
        SparseFeature(name, Table(name, MOST_VALUES if found is None else len(found.ids) + 1))
        for name, found in vocabularies.items()
    ]
    counts = [DenseFeature(name, transform="log", missing="fill") for name in COUNTS]
    return FeatureSchema((*counts, *categories), (Label(LABEL),))


def _count(files: Files, total: dict[str, int], bar: Progress, task: object) -> dict[str, Frequencies | None]:
    """The counts of each category column's values in the train split; None for a column with too many values."""
    found: dict[str, Frequencies | None] = {name: Frequencies(pa.large_string()) for name in CATEGORIES}
    for split, batch in _splits(files, total):
        if split != "train":
            break  # which comes first
        for name, frequencies in found.items():
            if frequencies is not None:
                frequencies.add(count_values(pa.chunked_array([batch.column(name)]), pa.large_string()))
                if frequencies.merged > MOST_VALUES:
                    found[name] = None
        bar.advance(task, batch.num_rows)  # type: ignore[arg-type]
    return found


def _encode(batch: pa.RecordBatch, vocabularies: dict[str, Vocabulary | None]) -> pa.Table:
    """The rows as they are written: label, counts, and ids of categories."""
    columns = [batch.column(LABEL), *[batch.column(name) for name in COUNTS]]
    for name, vocabulary in vocabularies.items():
        if vocabulary is not None:
            ids = np.maximum(vocabulary.find(batch.column(name)), 0)
        else:
            strings, codes = distinct(batch.column(name))
            ids = spread(hash_ids(hash_strings(strings), name, MOST_VALUES), codes, null=0)
        columns.append(pa.array(ids))
    return pa.table(columns, names=_WRITTEN.names).cast(_WRITTEN)


def _splits(files: Files, total: dict[str, int]) -> Iterator[tuple[str, pa.RecordBatch]]:
    """(split, rows) for all rows in their order; the train split comes first."""
    if list(files) != ["all"]:
        for split, paths in files.items():
            for path in paths:
                yield from ((split, batch) for batch in _read(path))
        return
    at = 0  # rows before the piece
    ends = {"train": total["train"], "valid": total["train"] + total["valid"], "test": sum(total.values())}
    for path in files["all"]:
        for batch in _read(path):
            begin = 0
            for split, end in ends.items():
                stop = max(begin, min(end - at, batch.num_rows))
                if begin < stop:
                    yield split, batch.slice(begin, stop - begin)
                begin = stop
            at += batch.num_rows


def _read(path: Path) -> Iterator[pa.RecordBatch]:
    """The rows of a file, a few megabytes at a time; decompressed if it is named `.gz`.

    Raises:
        UserError: the file is not in the published format.
    """
    categories = dict.fromkeys(CATEGORIES, pa.dictionary(pa.int32(), pa.string()))
    types = {LABEL: pa.int8(), **dict.fromkeys(COUNTS, pa.int64()), **categories}
    wanted = f"a label, {len(COUNTS)} integers and {len(CATEGORIES)} categories, separated by tabs"
    try:
        with (
            pa.input_stream(str(path)) as stream,
            pcsv.open_csv(
                stream,
                read_options=pcsv.ReadOptions(column_names=list(types), block_size=BLOCK),
                parse_options=pcsv.ParseOptions(delimiter="\t", quote_char=False),
                convert_options=pcsv.ConvertOptions(column_types=types, null_values=[""], strings_can_be_null=False),
            ) as reader,
        ):
            for batch in reader:
                wrong = pc.invert(pc.fill_null(pc.is_in(batch.column(LABEL), pa.array([0, 1], pa.int8())), False))
                if pc.any(wrong).as_py():
                    value = batch.column(LABEL).filter(wrong)[0].as_py()
                    raise UserError(f"{path}: column 'label' is {value}, must be 0 or 1; rows are {wanted}")
                yield batch
    except (pa.ArrowException, OSError, EOFError) as error:
        raise UserError(f"{path} is not in the published format ({wanted}): {one_line(error)}") from None


def _count_rows(path: Path) -> int:
    """The number of lines of a text file, with or without a final newline. Raises UserError if it is unreadable."""
    rows, last = 0, b"\n"
    try:
        with pa.input_stream(str(path)) as stream:
            while block := stream.read(BLOCK):
                rows += block.count(b"\n")
                last = block[-1:]
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read: {one_line(error)}") from None
    return rows + (last != b"\n")


def _find(source: Path) -> Files:
    """The files by split, or all of them under `all`, to be split by their order. Raises UserError if there is none."""
    if source.is_file():
        return {"all": [source]}
    if not source.is_dir():
        raise UserError(f"missing source file {source} ({ORIGIN})")
    names = {path: path.name.removesuffix(".gz") for path in source.iterdir() if path.is_file()}
    texts = {path: Path(name) for path, name in names.items() if Path(name).suffix in _TEXT and name[0] != "."}
    by_stem = {text.stem: path for path, text in texts.items()}
    if "train" in by_stem:
        valid = next((by_stem[stem] for stem in ("valid", "val", "dev") if stem in by_stem), None)
        if valid is not None and "test" in by_stem:
            return {"train": [by_stem["train"]], "valid": [valid], "test": [by_stem["test"]]}
        return {"all": [by_stem["train"]]}  # Kaggle's own test.txt has no labels
    days = [path for path, text in texts.items() if re.search(r"\d", text.name)]
    if not days:
        raise UserError(f"missing source file {source}/train.txt ({ORIGIN})")
    return {"all": sorted(days, key=lambda path: [int(part) for part in re.findall(r"\d+", texts[path].name)])}
