"""How fast the reader is beside Arrow's bare decoding of the same columns, on one thread each, in one run.

    python benchmarks/reader.py
    python benchmarks/reader.py --rounds 9 --rows 1600000
    python benchmarks/reader.py --files 5000

Both read the same Parquet files (zstd, dictionary-encoded, with page checksums, which the reader verifies and bare
decoding does not) from a warm page cache: `decode` calls `read_row_group` for
one row group after another and throws the columns away; the reader shuffles, converts and makes batches of 4096 that
are ready to be trained on. What the reader takes longer is what shuffling, checking, converting and batching cost.

    flat     26 int64 id columns, 13 float32 columns and a label, row groups of 65,536 rows
    jagged   20 list columns of mean length 26 (200 at most) and a label, row groups of 8,192 rows

Rounds are interleaved and the order in a round turns, so that what else the machine does hits all alike; the ratio is
the median of the rounds' ratios. `wall` compares elapsed time, `cpu` the CPU time of the process, which is steadier on
a busy machine. With `--prefetch 4` the reader works in a thread of its own, as in training, and hands batches over.
"""

from __future__ import annotations

import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import typer
from rich.console import Console
from rich.table import Table as Screen

from rechub_dist.data.columns.fit import column_names
from rechub_dist.data.parquet.manifest import Manifest
from rechub_dist.data.parquet.pages import parquet_writer
from rechub_dist.data.reader import ParquetReader
from rechub_dist.data.spec import BatchSpec
from rechub_dist.distributed.runtime import keep_freed_memory
from rechub_dist.features import DenseFeature, Label, SequenceFeature, SparseFeature, Table

BATCH = 4096
SPARSE, DENSE, VOCABULARY = 26, 13, 100_000
SEQUENCES, MEAN_LENGTH, LONGEST = 20, 26, 200
FLAT_GROUP, JAGGED_GROUP = 65_536, 8_192


def flat(folder: Path, rows: int) -> BatchSpec:
    """Write flat data, ids by a power law."""
    rng = np.random.default_rng(0)
    features = tuple(SparseFeature(f"c{i}", Table(f"c{i}", VOCABULARY, dim=16)) for i in range(SPARSE))
    dense = tuple(DenseFeature(f"d{i}") for i in range(DENSE))

    def group(n: int) -> pa.Table:
        columns = {f.name: (VOCABULARY * rng.random(n) ** 3).astype(np.int64) for f in features}
        columns |= {d.name: rng.normal(size=n).astype(np.float32) for d in dense}
        return pa.table(columns | {"label": rng.integers(0, 2, n).astype(np.int8)})

    _write(folder, rows, FLAT_GROUP, group)
    return BatchSpec(features, dense, (Label("label"),), collections={"pooled": tuple(f.name for f in features)})


def jagged(folder: Path, rows: int) -> BatchSpec:
    """Write sequences of geometric lengths."""
    rng = np.random.default_rng(0)
    features = tuple(
        SequenceFeature(f"s{i}", Table(f"s{i}", VOCABULARY, dim=16), max_length=LONGEST) for i in range(SEQUENCES)
    )

    def group(n: int) -> pa.Table:
        columns: dict[str, pa.Array] = {}
        for feature in features:
            offsets = np.concatenate([[0], np.cumsum(rng.geometric(1 / MEAN_LENGTH, n).clip(max=LONGEST))]).astype(
                np.int32
            )
            ids = (VOCABULARY * rng.random(int(offsets[-1])) ** 3).astype(np.int64)
            columns[feature.name] = pa.ListArray.from_arrays(pa.array(offsets), pa.array(ids))
        return pa.table(columns | {"label": rng.integers(0, 2, n).astype(np.int8)})

    _write(folder, rows, JAGGED_GROUP, group)
    return BatchSpec(features, (), (Label("label"),), collections={"d16": tuple(f.name for f in features)})


def _write(folder: Path, rows: int, group_rows: int, group: Callable[[int], pa.Table]) -> None:
    folder.mkdir(parents=True)
    with parquet_writer(folder / "part-0.parquet", group(1).schema) as writer:
        for _ in range(rows // group_rows):
            writer.write_table(group(group_rows), row_group_size=group_rows)


def decode(manifest: Manifest, spec: BatchSpec) -> int:
    """Bare decoding; returns the rows read."""
    rows = 0
    with pq.ParquetFile(manifest.files[0].path) as parquet:
        for index in range(parquet.num_row_groups):
            rows += parquet.read_row_group(index, columns=column_names(spec), use_threads=False).num_rows
    return rows


def consume(manifest: Manifest, spec: BatchSpec, streams: int | None, prefetch: int) -> int:
    """An epoch of batches; returns the rows read. No streams: the stored order."""
    shuffle = streams is not None
    reader = ParquetReader(manifest, spec, batch_size=BATCH, shuffle=shuffle, streams=streams, prefetch=prefetch)
    return sum(batch.rows for batch in reader.batches(0))


def main(
    rows: Annotated[int, typer.Option(help="Rows of flat data; jagged data has an eighth of it.")] = 1 << 22,
    rounds: Annotated[int, typer.Option(help="Interleaved rounds.")] = 5,
    files: Annotated[int, typer.Option(help="Time the first batch of so many files instead.")] = 0,
    prefetch: Annotated[int, typer.Option(help="Batches to read ahead in a second thread, as training does.")] = 0,
) -> None:
    """Time the reader against bare decoding."""
    keep_freed_memory()  # as in training; it serves both
    if files:
        first_batch(files)
        return
    screen = Screen("data", "reader", "wall", "cpu", "rows/s", title="share of bare decoding's speed (1 is as fast)")
    with tempfile.TemporaryDirectory() as scratch:
        for name, write, size in (("flat", flat, rows), ("jagged", jagged, rows // 8)):
            folder = Path(scratch) / name
            spec = write(folder, size)
            manifest = Manifest.read(str(folder))
            runs: dict[str, Callable[[], int]] = {"decode": lambda m=manifest, s=spec: decode(m, s)}  # type: ignore[misc]
            for streams in (None, 4, 16):
                title = "stored order" if streams is None else f"shuffled, {streams} streams"
                runs[title] = lambda m=manifest, s=spec, n=streams: consume(m, s, n, prefetch)  # type: ignore[misc]
            times = measure(runs, rounds, manifest.rows)
            for title, found in times.items():
                ratios = [
                    statistics.median(
                        base[kind] / mine[kind] for mine, base in zip(found, times["decode"], strict=True)
                    )
                    for kind in (0, 1)
                ]
                speed = manifest.rows / statistics.median(wall for wall, _ in found)
                screen.add_row(name, title, f"{ratios[0]:.2f}", f"{ratios[1]:.2f}", f"{speed:,.0f}")
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            screen.add_row(name, "most memory so far", "", "", f"{memory:,.0f} MB")
    Console().print(screen)


def first_batch(files: int) -> None:
    """Print the time to the first shuffled batch of many files, as they come and with their footers remembered."""
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["XDG_CACHE_HOME"] = str(Path(scratch) / "cache")
        folder = Path(scratch) / "flat"
        spec = flat(folder, FLAT_GROUP)
        os.utime(folder / "part-0.parquet", (1e9, 1e9))  # what has only just been written is not remembered
        for number in range(1, files):
            os.link(folder / "part-0.parquet", folder / f"part-{number}.parquet")
        for what in ("new", "remembered"):
            began = time.perf_counter()
            manifest = Manifest.read(str(folder))
            listed = time.perf_counter()
            reader = ParquetReader(manifest, spec, batch_size=BATCH)
            batches = reader.batches(0)
            next(batches)
            ended = time.perf_counter()
            batches.close()
            print(
                f"{files:,} files, {what}: manifest {listed - began:.2f} s, first batch {ended - listed:.2f} s later "
                f"({reader.order.streams} streams)"
            )


def measure(runs: dict[str, Callable[[], int]], rounds: int, rows: int) -> dict[str, list[tuple[float, float]]]:
    """Wall and CPU seconds of each run in each round, after a round that does not count."""
    names = list(runs)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for number in range(-1, rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            wall, cpu = time.perf_counter(), time.process_time()
            assert runs[name]() == rows
            if number >= 0:
                times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return times


if __name__ == "__main__":
    typer.run(main)
