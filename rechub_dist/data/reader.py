"""Parquet -> batches: a background thread opens the windows that a rank needs just in time, and closes them."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from rechub_dist.batch import Batch
from rechub_dist.config.data import MAX_STREAMS, SHUFFLE_ROWS
from rechub_dist.data.collate import assemble
from rechub_dist.data.columns.derive import derive
from rechub_dist.data.columns.fit import check_schema, reading
from rechub_dist.data.columns.window import Window, open_window
from rechub_dist.data.negatives import Draw
from rechub_dist.data.order.epoch import (
    EpochOrder,
    IntArray,
    RowOrder,
    ShuffleWindow,
    Slice,
)
from rechub_dist.data.order.mix import Mix, MixEpoch, MixOrder
from rechub_dist.data.parquet.files import DataFile, OpenFiles
from rechub_dist.data.parquet.manifest import Manifest
from rechub_dist.data.parquet.row_group import RowGroup
from rechub_dist.data.spec import BatchSpec
from rechub_dist.errors import UserError
from rechub_dist.skips import BadFileError, Skipped

_AT_ONCE = 4  # row groups read in parallel when several are needed: at the start, and after a restart
_FAREWELL = 5.0  # seconds for the thread to end; one that waits for a store ends by itself at the deadline


class ParquetReader:
    """One rank's batches of a data set.

    Which rows are in which global batch depends on the manifest, `batch_size`, `shuffle`, `seed`, `shuffle_rows`,
    `max_streams`, `streams`, `drop_last` and `mix` alone (see `RowOrder`), not on the world size or where an epoch is
    resumed.

    Args:
        manifest: the data set.
        spec: what to read, and the layout of batches.
        batch_size: rows of a global batch, over all ranks.
        rank, world_size: the rank, which gets a contiguous slice of each global batch.
        shuffle: False keeps the stored order.
        seed: of the order and of drawn negatives.
        shuffle_rows: bound on the rows in open windows over all ranks (a quarter more are opened ahead).
        max_streams: bound on the number of streams.
        prefetch: number of batches to prepare ahead, in a thread; 0 reads in the caller's thread.
        streams: overrides the number of streams; for an unshuffled pass on several ranks, a multiple of the world size
            is best.
        drop_last: leave out the last batch of an epoch if it is short.
        mix: how the manifest's row groups are divided into several sources, of which each batch has fixed shares; not
            with `streams`.
        finish: applied to each batch in the thread that reads it.

    Raises:
        UserError: a column of `spec` is missing or has a wrong type, or `spec` cannot be read with `skip_bad`.
        ValueError: impossible sizes, as `RowOrder` and `MixOrder`.
    """

    def __init__(
        self,
        manifest: Manifest,
        spec: BatchSpec,
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = True,
        seed: int = 0,
        shuffle_rows: int = SHUFFLE_ROWS,
        max_streams: int = MAX_STREAMS,
        prefetch: int = 4,
        streams: int | None = None,
        drop_last: bool = False,
        mix: Mix | None = None,
        finish: Callable[[Batch], Batch] | None = None,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is outside a world of {world_size}")
        if prefetch < 0:
            raise ValueError(f"prefetch is {prefetch}, must not be negative")
        check_schema(manifest.schema, spec, manifest.path)
        if manifest.skip_bad and any(catalogue.name not in spec.idle for catalogue in spec.catalogues):
            raise UserError(
                "data.on_bad_file: skip does not go with negatives: full, which shares all items out over the planned "
                "rows of each batch; use on_bad_file: error, or sampled or in_batch negatives"
            )
        self.manifest = manifest
        self.spec = spec
        self.reading = reading(spec, manifest.schema.names)
        self.rank = rank
        self.world_size = world_size
        self.prefetch = prefetch
        self.finish = finish
        self.order: RowOrder | MixOrder
        if mix is None:
            self.order = RowOrder(
                manifest.counts,
                batch_size,
                shuffle=shuffle,
                seed=seed,
                shuffle_rows=shuffle_rows,
                max_streams=max_streams,
                streams=streams,
                drop_last=drop_last,
            )
        else:
            self.order = MixOrder(
                manifest.counts,
                batch_size,
                mix,
                shuffle=shuffle,
                seed=seed,
                shuffle_rows=shuffle_rows,
                max_streams=max_streams,
                drop_last=drop_last,
            )

    @property
    def rows(self) -> int:
        """Number of rows of an epoch over all ranks."""
        return self.order.rows

    @property
    def steps(self) -> int:
        """Number of steps of an epoch, the same on all ranks."""
        return self.order.steps

    def rows_before(self, epoch: int, step: int) -> int:
        """Number of rows of all global batches before `step` of `epoch`."""
        return self.order.rows_before(epoch, step)

    def batches(self, epoch: int, start_step: int = 0) -> Generator[Batch]:
        """This rank's batches of `epoch` from `start_step` on, one per step; none if `start_step == steps`.

        Not collective. Closing the generator stops the thread that reads ahead.

        Raises:
            ValueError: `start_step` is outside 0 .. steps, or the epoch is negative.
            UserError: at the batch whose rows cannot be read or are bad. With `manifest.skip_bad`, rows of bad files
                are skipped instead, and counted in the batch (`Batch.skipped`).
        """
        if not 0 <= start_step <= self.steps:
            raise ValueError(f"start_step is {start_step}, must be within 0..{self.steps}")
        source = _Source(self, self.order.epoch(epoch))
        return self._read_ahead(source, start_step) if self.prefetch else source.batches(start_step)

    def _read_ahead(self, source: _Source, start_step: int) -> Generator[Batch]:
        ready: queue.Queue[Batch | BaseException | None] = queue.Queue(self.prefetch)
        stop = threading.Event()
        thread = threading.Thread(
            target=_fill, args=(source, start_step, ready, stop), name="rechub-dist-reader", daemon=True
        )
        thread.start()
        try:
            while (item := ready.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stop.set()
            thread.join(_FAREWELL)


def _fill(source: _Source, start_step: int, ready: queue.Queue[Any], stop: threading.Event) -> None:
    """The thread: puts the batches into the queue, then None, or the exception that ended them."""
    batches = source.batches(start_step)
    try:
        while not stop.is_set():
            item: Batch | BaseException | None = None
            try:
                item = next(batches, None)
            except BaseException as error:  # whatever it is, it is raised in the consumer
                item = error
            while not stop.is_set():
                # while the consumer is busy, open windows that are due soon: streams tend to need new ones together
                if ready.full() and source.open_ahead():
                    continue
                with contextlib.suppress(queue.Full):
                    ready.put(item, timeout=0.05)
                    break
            if not isinstance(item, Batch):
                return
    finally:
        batches.close()


class _Opened(NamedTuple):
    window: Window | None  # None if its file is bad: then it has no rows
    first_step: int
    last_step: int
    notice: Skipped | None = None


class _Source:
    """The open windows and files of one pass over an epoch; not thread-safe."""

    def __init__(self, reader: ParquetReader, order: EpochOrder | MixEpoch) -> None:
        self._reader = reader
        self._order = order
        self._checked: pa.Schema | None = None  # the schema that was last found to fit
        self._files = OpenFiles()
        self._windows: dict[int, _Opened] = {}
        self._finished: list[Window] = []  # their memory is reused
        self._notices: list[Skipped] = []  # of windows that were first skipped by this batch
        self._step = 0
        self._slices: list[Slice] = []
        self._ahead = True

    def batches(self, start_step: int) -> Generator[Batch]:
        """The rank's batches, one per step."""
        reader, order = self._reader, self._order
        try:
            for step in range(start_step, reader.steps):
                share = order.share(step, reader.rank, reader.world_size)
                self._step, self._slices = step, share.slices
                self._open([piece.window for piece in share.slices])
                parts, places = self._parts(share.slices)
                draw = Draw(reader.order.seed, order.epoch, share.position, share.first, share.total, places)
                batch = assemble(reader.spec, parts, share.stride, draw)
                batch.skipped = sum(piece.stop - piece.start for piece in share.slices) - batch.rows
                batch.notices, self._notices = tuple(self._notices), []
                del parts  # it references windows that are finished
                for index in [i for i, opened in self._windows.items() if opened.last_step <= step]:
                    window = self._windows.pop(index).window
                    if window is not None and window.memory is not None:
                        self._finished.append(window)
                    del window  # so that its memory is free for the next row group
                yield batch if reader.finish is None else reader.finish(batch)
        finally:
            self._windows.clear()
            self._files.close()

    def _parts(self, slices: list[Slice]) -> tuple[list[tuple[Window, int, int]], IntArray | None]:
        """The rows of slices; and their positions in the share, int64, if some are skipped (else None)."""
        parts: list[tuple[Window, int, int]] = []
        places: list[IntArray] = []
        first = 0
        for piece in slices:
            window = self._windows[piece.window].window
            if window is not None:
                parts.append((window, piece.start, piece.stop))
                places.append(np.arange(first, first + piece.stop - piece.start))
            first += piece.stop - piece.start
        if len(parts) == len(slices):
            return parts, None
        return parts, np.concatenate([np.zeros(0, np.int64), *places])

    def open_ahead(self) -> bool:
        """Open the window that is due next; False if none is, or enough are open.

        At most as many windows are open as the rank reads streams after the ramp-up, a quarter more, and one. Only
        windows that the rank is sure to need are opened.
        """
        if not self._ahead:
            return False
        try:
            due = self._due()
            if due is not None:
                self._open([due])
        except Exception:
            self._ahead = False  # it will be raised again at the step that needs the window
            return False
        return due is not None

    def _due(self) -> int | None:
        """The window to open ahead, if any."""
        reader, order = self._reader, self._order
        streams = -(-reader.order.streams // reader.world_size)
        if len(self._windows) > streams + streams // 4:
            return None
        due = [(order.window(i).first_step, i) for i in order.ramp_up(self._step) if i not in self._windows]
        for piece in self._slices:
            index = order.following(piece.window)
            while index is not None and index in self._windows:
                index = order.following(index)
            if index is not None:
                due.append((order.window(index).first_step, index))
        for step, index in sorted(due):
            if any(piece.window == index for piece in order.share(step, reader.rank, reader.world_size).slices):
                return index
        return None

    def _open(self, indices: list[int]) -> None:
        """Open those of the windows that are not open yet."""
        missing = [index for index in dict.fromkeys(indices) if index not in self._windows]
        if len(missing) > 1:
            with ThreadPoolExecutor(_AT_ONCE) as pool:
                opened = list(pool.map(self._opened, missing))
        else:
            opened = [self._opened(index) for index in missing]
        self._windows.update(zip(missing, opened, strict=True))
        self._notices += [found.notice for found in opened if found.notice is not None]

    def _opened(self, index: int) -> _Opened:
        """Window `index`, opened; without rows if its file is bad and may be skipped."""
        place = self._order.window(index)
        file, group = self._reader.manifest.groups[place.group]
        try:
            window = self._read(file, group, place, self._order.permutation(index))
        except BadFileError as error:
            if not self._reader.manifest.skip_bad:
                raise
            rows = place.stop - place.start
            notice = Skipped(file.path, group, place.start, rows, error.reason, str(error))
            return _Opened(None, place.first_step, place.last_step, notice)
        return _Opened(window, place.first_step, place.last_step)

    def _read(self, file: DataFile, group: int, place: ShuffleWindow, permutation: IntArray | None) -> Window:
        """Read and convert a piece of a row group."""
        spec, plan = self._reader.spec, self._reader.reading

        def convert(whole: RowGroup) -> Window:
            piece = whole.slice(place.start, place.stop - place.start)
            if self._checked is None or not piece.schema.equals(self._checked):
                check_schema(piece.schema, spec, file.path)
                self._checked = piece.schema
            if plan.computed:
                found = derive(pa.table({name: piece.column(name) for name in plan.inputs}), plan.computed, file.path)
                piece = piece.with_columns(found.select([n for n in found.column_names if n not in piece.schema.names]))
            try:
                reuse = self._finished.pop()  # taken out, as an attempt that hangs keeps using it
            except IndexError:
                reuse = None
            return open_window(piece, spec, permutation, file.path, reuse, whole.bounds)

        return self._files.convert(file, group, plan.uses, convert)
