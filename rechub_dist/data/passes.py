"""What a run trains on: a sequence of passes over data, over which its steps are counted."""

from __future__ import annotations

import bisect
import time
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist

from rechub_dist.config import StorageConfig
from rechub_dist.data.parquet.partitions import new_partitions
from rechub_dist.data.reader import ParquetReader
from rechub_dist.distributed.runtime import Runtime

_DEFAULTS = StorageConfig()
_POLL_SECONDS = (0.2, 5.0)  # the first and the longest interval between two looks at a growing folder


class Pass(NamedTuple):
    """One pass: the run's steps first_step .. end - 1 are the steps of the reader's epoch `number`, from 0."""

    number: int
    reader: ParquetReader
    first_step: int

    @property
    def end(self) -> int:
        """The run's step at which the pass is done: one past its last."""
        return self.first_step + self.reader.steps


class Passes(Protocol):
    """The passes of a run."""

    @property
    def steps(self) -> int:
        """Number of steps of all known passes."""

    @property
    def rows(self) -> int:
        """Number of rows of the known data, each counted once."""

    def current(self, step: int) -> Pass:
        """The pass that is current at the run's (0-based) step `step`."""

    def rows_before(self, step: int) -> int:
        """Number of rows of the global batches of the steps before `step`."""

    def identity(self, step: int) -> Any:
        """What identifies the data of the steps before `step`, in JSON types, for the run's identity."""

    def wait(self, stop: Callable[[], bool]) -> bool:
        """Wait for a pass beyond the known ones; False if none will come, or `stop` is true on any rank. Collective."""


class Epochs:
    """`epochs` passes over the same data, which `data` identifies."""

    def __init__(self, reader: ParquetReader, epochs: int, data: Any) -> None:
        self.reader = reader
        self.epochs = epochs
        self._data = data

    @property
    def steps(self) -> int:
        """Number of steps of all epochs."""
        return self.epochs * self.reader.steps

    @property
    def rows(self) -> int:
        """Number of rows of an epoch."""
        return self.reader.rows

    def current(self, step: int) -> Pass:
        """The epoch that a step is in."""
        number = step // self.reader.steps
        return Pass(number, self.reader, number * self.reader.steps)

    def rows_before(self, step: int) -> int:
        """Number of rows of the steps before `step`."""
        return self.reader.rows_before(*divmod(step, self.reader.steps))

    def identity(self, step: int) -> Any:  # noqa: ARG002 - all of the data, from the first step on
        """The identity of all the data."""
        return self._data

    def wait(self, stop: Callable[[], bool]) -> bool:  # noqa: ARG002 - there is nothing to wait for
        """False: there are no others."""
        return False


class Partitions:
    """One pass over each partition of a folder, in the order of their names, each shuffled by itself.

    A batch has rows of one partition only, and the last batch of a partition has the rest of it. So a partition's
    batches depend only on the number of partitions before it, and a folder may grow during and between runs.

    Args:
        path: the folder.
        open_reader: opens the reader of a partition, given its name; called on every rank.
        rt: the ranks, all of which construct this.
        storage: settings of the folder's store.
        follow: take only partitions with a `_SUCCESS` file, and let `wait` wait for new ones.
        timeout_seconds: how long to wait for a new one; None for no limit.

    Raises:
        UserError: no such folder, files beside the partitions, or unsuitable data.
    """

    def __init__(
        self,
        path: str,
        open_reader: Callable[[str], ParquetReader],
        rt: Runtime,
        storage: StorageConfig = _DEFAULTS,
        *,
        follow: bool,
        timeout_seconds: float | None,
    ) -> None:
        self._path = path
        self._open_reader = open_reader
        self._rt = rt
        self._storage = storage
        self._follow = follow
        self._timeout = timeout_seconds
        self._names: list[str] = []
        self._passes: list[Pass] = []
        self._ends: list[int] = []
        self._rows: list[int] = [0]  # rows before each pass
        self._look()

    @property
    def steps(self) -> int:
        """Number of steps of all partitions so far."""
        return self._ends[-1] if self._ends else 0

    @property
    def rows(self) -> int:
        """Number of rows of all partitions so far."""
        return self._rows[-1]

    def current(self, step: int) -> Pass:
        """The partition that a step is in; past the end, the last one.

        Raises:
            IndexError: there is none yet.
        """
        # bisect_right skips partitions without steps
        return self._passes[min(bisect.bisect_right(self._ends, step), len(self._passes) - 1)]

    def rows_before(self, step: int) -> int:
        """Number of rows of the steps before `step`."""
        if not self._passes:
            return 0
        current = self.current(step)
        return self._rows[current.number] + current.reader.rows_before(0, min(step, current.end) - current.first_step)

    def identity(self, step: int) -> dict[str, str]:
        """The fingerprint of each partition that has been started, by name: later ones may still change."""
        return {
            name: begun.reader.manifest.fingerprint()
            for name, begun in zip(self._names, self._passes, strict=True)
            if begun.first_step < step
        }

    def wait(self, stop: Callable[[], bool]) -> bool:
        """Wait for a partition with steps; False on `stop` or timeout, or at once if the folder is not followed.

        Collective. The main rank polls the folder and tells the others at short intervals, so that none waits long in a
        collective.

        Raises:
            UserError: as the constructor.
        """
        began, steps, pause = time.monotonic(), self.steps, _POLL_SECONDS[0]
        while self._follow:
            self._look()
            if self.steps > steps:
                return True
            over = self._timeout is not None and time.monotonic() - began > self._timeout
            end = torch.tensor([int(stop() or (self._rt.is_main and over))])
            dist.all_reduce(end, group=self._rt.control)
            if end.item():
                return False
            time.sleep(pause)
            pause = min(1.5 * pause, _POLL_SECONDS[1])
        return False

    def _look(self) -> None:
        """Take new partitions, the same on every rank. Collective."""
        for name in self._rt.from_main(self._new):
            reader = self._open_reader(name)
            self._passes.append(Pass(len(self._passes), reader, self.steps))
            self._ends.append(self.steps + reader.steps)
            self._rows.append(self._rows[-1] + reader.rows)
            self._names.append(name)

    def _new(self) -> list[str]:
        return new_partitions(self._path, self._names, complete=self._follow, settings=self._storage)
