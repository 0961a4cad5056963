"""Writes the vectors of a recall bundle's items or users as Parquet, in several processes; without torch."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Final, Literal

import pyarrow as pa

from rechub_dist.data.given import windows
from rechub_dist.data.parquet.outputs import claim
from rechub_dist.data.parquet.overlap import refuse_overlap
from rechub_dist.errors import UserError
from rechub_dist.inference.bundle.bundle import BATCH, Bundle, lists_of_vectors
from rechub_dist.inference.written import SOURCE_FILE, FileRows, PartFile, finish, part_name

KIND: Final = "vectors"
VECTORS: Final = "vectors"  # the column of users' vectors
_ROWS: Final = 1 << 15  # of a row group: 8 MB of vectors 64 wide


@dataclass(frozen=True)
class Wanted:
    """The vectors to write.

    Attributes:
        bundle: its folder.
        side: whose vectors.
        out: folder or address for `part-<process>.parquet` and, when all are written, `_SUCCESS`; as for predictions.
        data: rows of users: Parquet file, folder, glob or address; of items None.
        keep: columns to copy, of the users' rows or of the bundle's table of items.
        encoded: whether the rows hold ids as the data set's own files do, rather than values.
        processes: among which row groups are divided.
    """

    bundle: str
    side: Literal["items", "users"]
    out: str
    data: str | None = None
    keep: tuple[str, ...] = ()
    encoded: bool = True
    processes: int = 1


def write_vectors(wanted: Wanted) -> int:
    """Write the vectors; returns their rows.

    Of items: `item`, the columns to keep, and `vector`, a list of fixed size of float32. Of users: `source_file`,
    `source_row`, the columns to keep, and `vectors`, any number of such lists in a row.

    Raises:
        UserError: the bundle's model is no recall model, rows do not fit, or the output cannot be written.
    """
    bundle = Bundle(wanted.bundle)
    bundle.catalogue.check_columns(wanted.keep if wanted.side == "items" else ())
    inputs = [wanted.bundle]
    if wanted.side == "users":
        inputs += [str(wanted.data), *(file.path for file in _rows_of(bundle, wanted).manifest.files)]
    refuse_overlap(wanted.out, inputs)
    claim(wanted.out, KIND, [part_name(number) for number in range(wanted.processes)])
    rows = _write_part(wanted, 0) if wanted.processes == 1 else _by_processes(wanted)
    finish(wanted.out, "write vectors", text=bundle.fingerprint if wanted.side == "items" else "")
    return rows


def _rows_of(bundle: Bundle, wanted: Wanted) -> FileRows:
    if wanted.data is None:
        raise UserError("--data: name the rows of the users")
    return FileRows.of(wanted.data, bundle.user_spec(encoded=wanted.encoded), wanted.keep, (VECTORS,))


def _by_processes(wanted: Wanted) -> int:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(wanted.processes, context, initializer=_end_with, initargs=(os.getpid(),)) as pool:
        try:
            return sum(pool.map(_write_part, [wanted] * wanted.processes, range(wanted.processes)))
        except BrokenProcessPool:
            raise UserError("a process was killed, perhaps for want of memory; give fewer with --nproc") from None


def _end_with(parent: int) -> None:
    """Have the kernel kill this process with the one that started it, so that no orphan goes on writing."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _write_part(wanted: Wanted, number: int) -> int:
    """Write one share of the vectors; returns its rows."""
    bundle = Bundle(wanted.bundle, threads=max(1, (os.cpu_count() or 1) // wanted.processes))
    part = PartFile(wanted.out, number, "write vectors", rows=_ROWS)
    count = 0
    for table in _tables(bundle, wanted, number):
        part.write(table)
        count += table.num_rows
    part.close()
    return count


def _tables(bundle: Bundle, wanted: Wanted, number: int) -> Iterator[pa.Table]:
    if wanted.side == "items":
        yield from bundle.catalogue.batches(wanted.keep, number, wanted.processes)
        return
    rows = _rows_of(bundle, wanted)
    for table, own in rows.groups(number, wanted.processes):
        where, first = own[SOURCE_FILE][0].as_py(), 0
        for window in windows(table, rows.spec, BATCH, where):
            vectors = lists_of_vectors(*bundle.user_vectors(window))
            yield own.slice(first, window.rows).append_column(VECTORS, vectors)
            first += window.rows
