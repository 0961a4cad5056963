"""A rank's batches, and the ranks' agreement on each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.profiler import record_function

from rechub_dist.assembly.readers import looks_ahead
from rechub_dist.batch import Batch
from rechub_dist.distributed.runtime import Runtime
from rechub_dist.distributed.watchdog import WAITING, Watchdog
from rechub_dist.errors import UserError
from rechub_dist.objectives import Objective
from rechub_dist.reporting.step_times import WAITING_FOR_DATA
from rechub_dist.skips import Skipped, Tally
from rechub_dist.training.non_finite import NonFiniteGuard


class _Asked(NamedTuple):
    """A batch that the ranks are about to agree on."""

    batch: Batch | None  # None: it cannot be read, or there is none
    message: str | None
    control: Tensor
    answer: torch.distributed.Work | None  # None: no rank has a batch left


class Feed:
    """This rank's batches, with the ranks' agreement on each before anyone starts on it.

    One small all-reduce a batch adds up the objective's normalisers and tells whether a rank has failed to read its
    part, was asked to stop, or saw a loss that is bad; so no rank waits in a collective for one that has failed.
    It counts the rows, too: `tally` has those of all ranks, and `new_skips` the pieces of files left out since it was
    last emptied.

    On a device other than the host the all-reduce for a batch begins when the one before it is handed out, and goes on
    under that one's step. All ranks do so at the same place between their other exchanges. What a rank says of a
    batch, that it was asked to stop for one, is then known one step later.

    `sequences` names the features that the model computes as padded sequences, for `padded_share`.
    """

    def __init__(
        self,
        batches: Iterator[Batch],
        objective: Objective,
        runtime: Runtime,
        stop: Callable[[], bool],
        sequences: tuple[str, ...] = (),
        guard: NonFiniteGuard | None = None,
        watchdog: Watchdog | None = None,
    ) -> None:
        self._batches = batches
        self._objective = objective
        self._runtime = runtime
        self._stop = stop
        self._sequences = sequences
        self._real = self._computed = 0.0  # positions over all ranks
        self._guard = guard
        self._mark = watchdog.mark if watchdog is not None else _unwatched
        self._ahead = looks_ahead(runtime.device)
        self._asked: _Asked | None = None
        self.stopped = False
        self.tally = Tally()
        self.new_skips: list[Skipped] = []

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """The next batch.

        Raises:
            StopIteration: no more batches, or all ranks agree to stop (`stopped`).
            UserError: on all ranks, if one of them cannot read its rows, or a loss is bad.
        """
        if self.stopped:
            raise StopIteration
        asked, self._asked = self._asked or self._ask(), None
        batch = self._agree(asked)
        if self._ahead:
            self._asked = self._ask()
            self._mark("computing a step")
        return batch

    def _ask(self) -> _Asked:
        """Read a batch, and begin to tell the other ranks."""
        self._mark("waiting for a batch")
        batch, message = None, None
        try:
            with record_function(WAITING_FOR_DATA):
                batch = next(self._batches, None)
        except UserError as error:
            message = str(error)
        terms, ranks = self._objective.terms, self._runtime.world_size if self._ahead else 0
        control = torch.zeros(8 + terms + ranks, dtype=torch.float64, pin_memory=self._runtime.device.type == "cuda")
        if batch is None and message is None:
            return _Asked(None, None, control, None)
        control[0] = message is not None
        control[1] = self._stop()
        control[2] = self._guard.sent() if self._guard is not None else 0
        if batch is not None:
            control[3:8] = torch.tensor([*self._count(batch), batch.rows, batch.skipped, len(batch.notices)])
            control[8 : 8 + terms] = self._objective.weight_sums(batch)
            if batch.candidates is not None:
                [control[8 + terms + self._runtime.rank]] = batch.candidates
        answer = torch.distributed.all_reduce(control, group=self._runtime.control, async_op=True)
        return _Asked(batch, message, control, answer)

    def _agree(self, asked: _Asked) -> Batch:
        """The batch, when all ranks have told; raises as `__next__`."""
        if asked.answer is None:
            raise StopIteration
        self._mark(WAITING)
        asked.answer.wait()
        self._mark("computing a step")
        failed, stop, loss, real, computed, rows, skipped, notices, *others = asked.control.tolist()
        if failed:
            self._runtime.raise_together(asked.message)
        if self._guard is not None:
            self._guard.received(loss)
        if stop:
            self.stopped = True
            raise StopIteration
        batch = asked.batch
        assert batch is not None
        self._real, self._computed = self._real + real, self._computed + computed
        self.tally.add(int(rows), int(skipped))
        if notices:
            self.new_skips += self.tally.note(self._runtime.gather_list(batch.notices))
        batch.weight_sums = asked.control[8 : 8 + self._objective.terms]
        if batch.candidates is not None:
            batch.candidates = tuple(int(n) for n in others[self._objective.terms :])
        if self._guard is not None:
            self._guard.keep(batch)
        return batch

    def padded_share(self) -> float | None:
        """The share of padding in the sequences of the batches since the last call; None where there are none."""
        real, computed = self._real, self._computed
        self._real = self._computed = 0.0
        return 1 - real / computed if computed else None

    def _count(self, batch: Batch) -> tuple[int, int]:
        """The real and the computed positions of this rank's sequences."""
        real = sum(len(batch.feature(name).values()) for name in self._sequences)
        return real, sum(batch.rows * max(1, batch.longest[name]) for name in self._sequences)


def _unwatched(doing: str, *, slow: bool = False) -> None:
    """Nobody watches."""
