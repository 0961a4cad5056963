"""Rewrites rows into other files and row groups, in the stored order or shuffled, in bounded memory."""

from __future__ import annotations

import posixpath
import shutil
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from itertools import chain, repeat
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rechub_dist.config import StorageConfig
from rechub_dist.data.order.epoch import permutation
from rechub_dist.data.parquet.files import DataFile
from rechub_dist.data.parquet.footers import corrupt
from rechub_dist.data.parquet.manifest import Manifest, prepared_splits
from rechub_dist.data.parquet.outputs import MARK, whole_folder
from rechub_dist.data.parquet.overlap import refuse_overlap
from rechub_dist.data.parquet.pages import open_parquet, parquet_writer
from rechub_dist.data.parquet.partitions import COMPLETE
from rechub_dist.data.parquet.storage import exists
from rechub_dist.errors import UserError

ROW_GROUP_ROWS = 65_536
FILE_ROWS = 64 * ROW_GROUP_ROWS
_BUCKET_BYTES = 256 << 20  # bytes, in Arrow, of a part that is shuffled in memory
_MOST_BUCKETS = 500  # each is an open file
_READ_ROWS = 65_536


def rechunk(
    source: str,
    out: Path,
    *,
    row_group_rows: int = ROW_GROUP_ROWS,
    files: int | None = None,
    file_rows: int | None = None,
    shuffle: bool = False,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, int]:
    """Write the rows of `source` to the new folder `out`, which appears once it is complete.

    A prepared folder (with `train/` in it) is written split by split; its other files, and its folders that begin with
    `_`, are copied. Hive partitions (`date=2022-04-25/`) are kept and written one by one, with their `_SUCCESS`; other
    sub-folders are not kept.

    Args:
        source: a prepared folder, or what `Manifest.read` accepts.
        out: the folder, new or empty.
        row_group_rows: rows of each row group; the last of a file may have fewer.
        files: number of files of each split or partition, of equal size; at most one per row.
        file_rows: rows of each file, instead of `files`; default 4,194,304.
        shuffle: permute the rows of each split or partition, uniformly at random. While it runs this takes the size of
            the data once more on the disk of `out`, and about 1 GB of memory (more beyond some 100 GB of data).
        seed: of the order.
        progress: called with the split ('' for the only one), and the rows done and in total: twice the number of rows
            for a shuffle.

    Returns:
        The number of rows of each split.

    Raises:
        UserError: there is no data, `out` is not empty, a file cannot be read or written, or rows were lost.
        ValueError: sizes below 1, a negative seed, or both `files` and `file_rows`.
    """
    if min(row_group_rows, files or 1, file_rows or 1) < 1 or seed < 0 or (files and file_rows):
        raise ValueError("row_group_rows, files and file_rows must be at least 1, and not both of the latter given")
    refuse_overlap(str(out), [source])
    splits = prepared_splits(source) or ("",)
    counts: dict[str, int] = {}
    with whole_folder(out, "rechunked") as work:
        for split in splits:
            if split and _no_rows(Path(source) / split):
                shutil.copytree(Path(source) / split, work / split)
                counts[split] = 0
                continue
            manifest = Manifest.read(f"{source}/{split}" if split else source)
            total, before = manifest.rows * (1 + shuffle), 0
            for folder, part in _by_partition(manifest):

                def tell(done: int, split: str = split, total: int = total, before: int = before) -> None:
                    if progress is not None:
                        progress(split, before + done, total)

                rows = _shuffled(part, work / ".buckets", seed, tell) if shuffle else _stored(part, tell)
                # rows beyond those of the manifest would be written too, and be noticed by `_check`
                sizes = chain(_even(part.rows, files or 0), repeat(file_rows or FILE_ROWS))
                target = work / split / folder
                with closing(rows):
                    _write(rows, target, manifest.schema, row_group_rows, sizes)
                _check(part, target)
                if folder and exists(posixpath.join(posixpath.dirname(part.files[0].path), COMPLETE), StorageConfig()):
                    (target / COMPLETE).touch()
                before += part.rows * (1 + shuffle)
            counts[split] = manifest.rows
        if splits != ("",):
            for entry in Path(source).iterdir():
                if entry.is_file() and entry.name != MARK:
                    shutil.copy2(entry, work / entry.name)
                elif entry.is_dir() and entry.name.startswith("_"):  # such as vocabularies, which dataset.yaml names
                    shutil.copytree(entry, work / entry.name)
    return counts


def _even(rows: int, files: int) -> Iterator[int]:
    """The rows of each of `files` files; they differ by one at most."""
    return (rows // files + (i < rows % files) for i in range(min(rows, files)))


def _no_rows(folder: Path) -> bool:
    """Whether a split was prepared without any row; it is kept for its columns."""
    files = list(folder.glob("*.parquet"))
    return bool(files) and not any(pq.read_metadata(file).num_rows for file in files)


def _by_partition(manifest: Manifest) -> list[tuple[str, Manifest]]:
    """(folder, files) of each hive partition; a single ('', all files) if there are files elsewhere."""
    folders: dict[str, list[DataFile]] = {}
    for file in manifest.files:
        if sum(file.counts):
            folders.setdefault(posixpath.dirname(file.name), []).append(file)
    if not all(part.count("=") == 1 for folder in folders for part in folder.split("/")):
        return [("", manifest)]
    return [(folder, replace(manifest, path=folder, files=tuple(files))) for folder, files in sorted(folders.items())]


def _check(manifest: Manifest, written: Path) -> None:
    """Raise UserError if more or fewer rows were written than there were."""
    rows = Manifest.read(str(written)).rows
    if rows != manifest.rows:
        raise UserError(
            f"{manifest.path}: {rows:,} of {manifest.rows:,} rows were written; its files changed meanwhile: "
            "try again when nothing writes to them"
        )


def _plain(schema: pa.Schema) -> pa.Schema:
    """The schema with dictionary columns decoded.

    So pieces of files with different dictionaries can be concatenated, and each row group gets only the entries that it
    uses.
    """
    return pa.schema(
        field.with_type(field.type.value_type) if pa.types.is_dictionary(field.type) else field for field in schema
    )


def _stored(manifest: Manifest, tell: Callable[[int], None]) -> Generator[pa.Table]:
    """The rows in the stored order, in tables of `_READ_ROWS` at most, with dictionaries decoded."""
    plain, done = _plain(manifest.schema), 0
    for file in manifest.files:
        if not sum(file.counts):
            continue
        try:
            with file.store.open(file.store.inside(file.path)) as source:
                # with a buffer, a column of a large row group is read piece by piece
                parquet = open_parquet(source, buffer_size=1 << 20)
                for batch in parquet.iter_batches(_READ_ROWS, use_threads=False):
                    yield pa.Table.from_batches([batch]).select(plain.names).cast(plain)
                    done += batch.num_rows
                    tell(done)
        except (OSError, pa.ArrowException) as error:
            raise corrupt(file.path, error) from None


def _shuffled(manifest: Manifest, buckets: Path, seed: int, tell: Callable[[int], None]) -> Generator[pa.Table]:
    """The rows in random order: each goes to a random bucket, and each bucket is shuffled in memory.

    All orders are equally likely, as the buckets do not depend on where a row was stored.
    """
    buckets.mkdir()
    number = _scatter(manifest, buckets, seed, tell)
    done = manifest.rows
    for bucket in range(number):
        path = buckets / f"{bucket}.arrow"
        with pa.OSFile(str(path)) as file, pa.ipc.open_stream(file) as stream:
            table = stream.read_all()
        path.unlink()
        table = table.take(permutation(table.num_rows, seed, 1, bucket))
        for start in range(0, table.num_rows, _READ_ROWS):
            piece = table.slice(start, _READ_ROWS)
            yield piece
            done += piece.num_rows
            tell(done)
    buckets.rmdir()


def _scatter(manifest: Manifest, buckets: Path, seed: int, tell: Callable[[int], None]) -> int:
    """Write each row to a randomly drawn bucket; returns the number of buckets."""
    tables = _stored(manifest, tell)
    first = next(tables)
    size = first.nbytes / first.num_rows * manifest.rows
    number = min(_MOST_BUCKETS, int(size // _BUCKET_BYTES) + 1)
    with ExitStack() as stack:
        writers = []
        for bucket in range(number):
            file = stack.enter_context(pa.OSFile(str(buckets / f"{bucket}.arrow"), "wb"))
            options = pa.ipc.IpcWriteOptions(compression="lz4")
            writers.append(stack.enter_context(pa.ipc.new_stream(file, first.schema, options=options)))
        stack.enter_context(closing(tables))
        # enough rows at once for a reasonable piece per bucket
        for chunk, table in enumerate(_gathered(chain([first], tables), number * 1024)):
            draws = np.random.PCG64(np.random.SeedSequence((seed, 0, chunk))).random_raw(table.num_rows)
            drawn = (draws % np.uint64(number)).astype(np.int64)
            ends = np.cumsum(np.bincount(drawn, minlength=number)).tolist()
            by_bucket = table.take(np.argsort(drawn, kind="stable")).combine_chunks()
            for writer, start, end in zip(writers, [0, *ends[:-1]], ends, strict=True):
                if end > start:
                    writer.write_table(by_bucket.slice(start, end - start))
    return number


def _gathered(tables: Iterable[pa.Table], rows: int) -> Iterator[pa.Table]:
    """The tables concatenated to at least `rows` rows each, except the last."""
    waiting: list[pa.Table] = []
    for table in tables:
        waiting.append(table)
        if sum(part.num_rows for part in waiting) >= rows:
            yield pa.concat_tables(waiting)
            waiting = []
    if waiting:
        yield pa.concat_tables(waiting)


def _write(
    tables: Iterator[pa.Table], folder: Path, schema: pa.Schema, row_group_rows: int, sizes: Iterable[int]
) -> None:
    """Write the rows to files of `sizes` rows."""
    folder.mkdir(parents=True, exist_ok=True)
    waiting = _plain(schema).empty_table()
    for number, size in enumerate(sizes):
        if not waiting.num_rows and (waiting := next(tables, waiting)).num_rows == 0:
            return
        room = size
        with parquet_writer(folder / f"part-{number:05d}.parquet", schema) as writer:
            while room:
                wanted = min(row_group_rows, room)
                parts = [waiting]
                while sum(part.num_rows for part in parts) < wanted and (table := next(tables, None)) is not None:
                    parts.append(table)
                waiting = pa.concat_tables(parts)
                group, waiting = waiting.slice(0, wanted), waiting.slice(wanted)
                if not group.num_rows:
                    return
                writer.write_table(_encoded(group.combine_chunks(), schema), row_group_size=wanted)
                room -= group.num_rows


def _encoded(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """The table with the types of `schema`, dictionary columns encoded."""
    columns = [
        column.dictionary_encode() if pa.types.is_dictionary(field.type) else column
        for column, field in zip(table.columns, schema, strict=True)
    ]
    return pa.Table.from_arrays(columns, names=schema.names).cast(schema)
