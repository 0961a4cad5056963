"""The reader beside other ways to stream the same shuffled rows: rows per second and seconds to the first batch.

    pip install "ray[data]" mosaicml-streaming
    python benchmarks/reader_peers.py --rounds 3

Flat data as in `reader.py` (26 int64 ids, 13 floats, a label; zstd), batches of 4096, one loader on this machine:

    pyarrow      bare decoding of one row group after another: no shuffle, no batches; the ceiling
    rechub_dist  the reader as a run configures it by itself
    dataloader   torch's DataLoader, one worker, over row groups in random order, each of which it shuffles
    ray          Ray Data: read_parquet, iter_torch_batches with a local shuffle buffer of four row groups
    mosaic       MosaicML Streaming from local MDS shards (zstd), shuffle py1e, its DataLoader with one worker; the time
                 of the conversion is given apart

Each gives the columns in the form that it has by itself; only the reader's batches are checked and ready to be looked
up. A contestant whose package is absent is left out, by name. Rounds are interleaved; figures are medians.
"""

from __future__ import annotations

import importlib.util
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow.parquet as pq
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, IterableDataset

from reader import BATCH, FLAT_GROUP, flat
from rechub_dist.data.columns.fit import column_names
from rechub_dist.data.parquet.manifest import Manifest
from rechub_dist.data.reader import ParquetReader
from rechub_dist.data.spec import BatchSpec
from rechub_dist.distributed.runtime import keep_freed_memory

Epoch = Callable[[], Iterator[int]]  # an epoch's batches: the rows of each


class RowGroups(IterableDataset[dict[str, torch.Tensor]]):
    """Row groups in random order, shuffled one by one and cut into batches."""

    def __init__(self, path: str, columns: list[str]) -> None:
        self._path, self._columns = path, columns

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        rng = np.random.default_rng()
        with pq.ParquetFile(self._path) as parquet:
            for group in rng.permutation(parquet.num_row_groups):
                table = parquet.read_row_group(int(group), columns=self._columns, use_threads=False)
                order = rng.permutation(table.num_rows)
                columns = {name: torch.from_numpy(table[name].to_numpy()[order]) for name in self._columns}
                for start in range(0, table.num_rows, BATCH):
                    yield {name: values[start : start + BATCH] for name, values in columns.items()}


def main(
    rows: Annotated[int, typer.Option(help="Rows of the data set.")] = 1 << 20,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
) -> None:
    """Time an epoch of each contestant."""
    keep_freed_memory()
    console = Console()
    times: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "flat"
        spec = flat(folder, rows)
        manifest = Manifest.read(str(folder))
        contestants: dict[str, Epoch] = {
            "pyarrow": lambda: _pyarrow(manifest, spec),
            "rechub_dist": lambda: _reader(manifest, spec),
            "dataloader": lambda: _dataloader(manifest, spec),
        }
        if importlib.util.find_spec("ray") is None:
            console.print("ray: left out, it is not installed")
        else:
            contestants["ray"] = lambda: _ray(manifest, spec)
            _start_ray()
        if importlib.util.find_spec("streaming") is None:
            console.print("mosaic: left out, mosaicml-streaming is not installed")
        else:
            began = time.perf_counter()
            _convert(manifest, Path(scratch) / "mds")
            console.print(f"mosaic: converted {rows:,} rows in {time.perf_counter() - began:.0f} s")
            contestants["mosaic"] = lambda: _mosaic(Path(scratch) / "mds")
        for number in range(rounds + 1):
            for name, epoch in contestants.items():
                began = time.perf_counter()
                batches = epoch()
                found = next(batches)
                first = time.perf_counter() - began
                found += sum(batches)
                whole = time.perf_counter() - began
                assert found == manifest.rows, f"{name} gave {found} rows of {manifest.rows}"
                if number:  # the first round warms up
                    times.setdefault(name, []).append((whole, first))
    table = Table("loader", "rows/s", "share of pyarrow", "first batch s", title=f"{rows:,} rows in batches of {BATCH}")
    for name, found_times in times.items():
        share = statistics.median(base[0] / own[0] for base, own in zip(times["pyarrow"], found_times, strict=True))
        speed, first = rows / statistics.median(t[0] for t in found_times), statistics.median(t[1] for t in found_times)
        table.add_row(name, f"{speed:,.0f}", f"{share:.2f}", f"{first:.2f}")
    console.print(table)


def _pyarrow(manifest: Manifest, spec: BatchSpec) -> Iterator[int]:
    columns = column_names(spec)
    with pq.ParquetFile(manifest.files[0].path) as parquet:
        for group in range(parquet.num_row_groups):
            yield parquet.read_row_group(group, columns=columns, use_threads=False).num_rows


def _reader(manifest: Manifest, spec: BatchSpec) -> Iterator[int]:
    return (batch.rows for batch in ParquetReader(manifest, spec, batch_size=BATCH).batches(0))


def _dataloader(manifest: Manifest, spec: BatchSpec) -> Iterator[int]:
    loader = DataLoader(RowGroups(manifest.files[0].path, column_names(spec)), batch_size=None, num_workers=1)
    return (len(batch["label"]) for batch in loader)


def _start_ray() -> None:
    os.environ["RAY_DATA_DISABLE_PROGRESS_BARS"] = "1"
    import ray  # noqa: PLC0415 - optional

    ray.init(num_cpus=os.cpu_count(), include_dashboard=False, log_to_driver=False, logging_level="error")
    ray.data.DataContext.get_current().enable_progress_bars = False


def _ray(manifest: Manifest, spec: BatchSpec) -> Iterator[int]:
    import ray  # noqa: PLC0415 - optional

    data = ray.data.read_parquet(manifest.files[0].path, columns=column_names(spec))
    batches = data.iter_torch_batches(batch_size=BATCH, local_shuffle_buffer_size=4 * FLAT_GROUP)
    return (len(batch["label"]) for batch in batches)


def _convert(manifest: Manifest, out: Path) -> None:
    from streaming import MDSWriter  # noqa: PLC0415 - optional

    with pq.ParquetFile(manifest.files[0].path) as parquet:
        types = {f.name: "int64" if str(f.type) == "int64" else "float32" for f in parquet.schema_arrow}
        with MDSWriter(out=str(out), columns=types, compression="zstd", size_limit=1 << 25) as writer:
            for group in range(parquet.num_row_groups):
                columns = {
                    name: values.to_numpy().astype(types[name])
                    for name, values in zip(types, parquet.read_row_group(group, columns=list(types)), strict=True)
                }
                for row in zip(*columns.values(), strict=True):
                    writer.write(dict(zip(types, row, strict=True)))


def _mosaic(folder: Path) -> Iterator[int]:
    from streaming import StreamingDataLoader, StreamingDataset  # noqa: PLC0415 - optional
    from streaming.base.util import clean_stale_shared_memory  # noqa: PLC0415

    clean_stale_shared_memory()
    for raw in folder.glob("*.mds"):  # what the epoch before has decompressed
        raw.unlink()
    data: Any = StreamingDataset(local=str(folder), shuffle=True, batch_size=BATCH, num_canonical_nodes=1)
    loader = StreamingDataLoader(data, batch_size=BATCH, num_workers=1)
    return (len(batch["label"]) for batch in loader)


if __name__ == "__main__":
    typer.run(main)
