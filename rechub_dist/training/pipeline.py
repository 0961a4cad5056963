"""One training step after another: plainly, or with the id exchange of the next batch under the compute of this one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.profiler import record_function
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.train_pipeline import PrefetchTrainPipelineSparseDist, TrainPipelineSparseDist

from rechub_dist.assembly.readers import looks_ahead
from rechub_dist.batch import Batch
from rechub_dist.distributed.runtime import Runtime
from rechub_dist.distributed.watchdog import WAITING, Watchdog
from rechub_dist.embedding.optim import Optimizers, kernels
from rechub_dist.embedding.planning import kind_of
from rechub_dist.errors import UserError
from rechub_dist.objectives import Objective
from rechub_dist.reporting.step_times import WAITING_FOR_DATA
from rechub_dist.skips import Skipped, Tally
from rechub_dist.training.non_finite import LossCheck


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
        losses: LossCheck | None = None,
        watchdog: Watchdog | None = None,
    ) -> None:
        self._batches = batches
        self._objective = objective
        self._runtime = runtime
        self._stop = stop
        self._sequences = sequences
        self._real = self._computed = 0.0  # positions over all ranks
        self._losses = losses
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
        control[2] = self._losses.sent() if self._losses is not None else 0
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
        if self._losses is not None:
            self._losses.received(loss)
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
        if self._losses is not None:
            self._losses.keep(batch)
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


class Pipeline(Protocol):
    """What trains step after step."""

    def progress(self, batches: Iterator[Batch], step: int, /) -> Tensor | None:
        """Train on a batch, as the (0-based) `step`; returns this rank's part of its loss, None if it was left out.

        Raises StopIteration when all are done.
        """

    def release(self) -> None:
        """Give the modules back for use outside the pipeline, which must be empty; `progress` takes them again."""


class PlainPipeline:
    """Forward, backward, step; one batch at a time. The next one is copied to another device meanwhile."""

    def __init__(
        self, module: DistributedModelParallel, optimizers: Optimizers, device: torch.device, losses: LossCheck | None
    ) -> None:
        self._module = module
        self._optimizers = optimizers
        self._copies = _Copies(device) if looks_ahead(device) else None
        self._losses = losses if losses is not None and losses.skips else None

    def progress(self, batches: Iterator[Batch], step: int, /) -> Tensor | None:
        """Train on the next batch."""
        batch = next(batches) if self._copies is None else self._copies.take(batches)
        self._optimizers.zero_grad()
        if self._losses is not None:
            self._losses.before()
        loss, local = self._module(batch)
        accepted = self._losses is None or self._losses.accepts(step, local)
        if accepted:
            loss.backward()
            self._optimizers.step()
        if self._copies is not None:
            self._copies.send_for(batches)
        return local if accepted else None

    def release(self) -> None:
        """Nothing is held."""


class _Copies:
    """Copies batches to a device on a stream of their own, so that a copy goes on under the step before."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None
        self._next: Batch | None = None

    def send_for(self, batches: Iterator[Batch]) -> None:
        """Begin to copy the next batch, if there is one."""
        batch = next(batches, None)
        if batch is not None:
            with torch.cuda.stream(self._stream):
                self._next = batch.to(self._device, non_blocking=True)

    def take(self, batches: Iterator[Batch]) -> Batch:
        """The batch that was sent for, else the next one; raises StopIteration where there is none."""
        if self._next is None:
            self.send_for(batches)
        batch, self._next = self._next, None
        if batch is None:
            raise StopIteration
        if self._stream is not None:
            here = torch.cuda.current_stream(self._device)
            here.wait_stream(self._stream)
            batch.record_stream(here)  # its memory is the other stream's, which must not use it again too soon
        return batch


class SparseDistPipeline:
    """TorchRec's: the ids of the next batches travel while this one is computed."""

    def __init__(
        self, module: DistributedModelParallel, optimizers: Optimizers, device: torch.device, losses: LossCheck | None
    ) -> None:
        self.inner = _Choosing(module, _Chosen(optimizers), device, execute_all_batches=True)
        self.inner.losses = losses if losses is not None and losses.skips else None
        self._released = False

    def progress(self, batches: Iterator[Batch], step: int, /) -> Tensor | None:
        """Train on the oldest batch in flight, and send for another."""
        if self._released:
            self.inner.attach()
            self._released = False
        if self.inner.losses is not None:
            self.inner.losses.before()
        self.inner.step = step
        local = self.inner.progress(batches)
        return local if self.inner.accepted else None

    def release(self) -> None:
        """Put the sharded modules' own forward back: the pipeline's takes only batches that it has sent for."""
        self.inner.detach()
        self._released = True


class _Choosing(TrainPipelineSparseDist):
    """Leaves backward and optimizers out where the loss is not accepted."""

    losses: LossCheck | None = None
    step = 0

    @property
    def accepted(self) -> bool:
        """Whether the last step was trained on."""
        return self._optimizer.accepted

    def _backward(self, losses: Tensor) -> None:
        # the step's first output, this rank's part times the number of ranks
        part = losses.detach().sum() / self._model.module.world_size
        self._optimizer.accepted = self.losses is None or self.losses.accepts(self.step, part)
        if self.accepted:
            super()._backward(losses)


class _Chosen:
    """The optimizers, as the pipeline steps them: not where the loss is not accepted."""

    def __init__(self, optimizers: Optimizers) -> None:
        self._optimizers = optimizers
        self.accepted = True

    def zero_grad(self) -> None:
        self._optimizers.zero_grad()

    def step(self) -> None:
        if self.accepted:
            self._optimizers.step()


class PrefetchPipeline:
    """TorchRec's with one more stage: while a batch is computed, the rows of the next one are fetched into the caches.

    For kernels that keep tables in the host's memory. They lock what they have fetched until the backward pass that
    follows, so this cannot leave one out; and an evaluation, which has none, must not lock.
    """

    def __init__(self, module: DistributedModelParallel, optimizers: Optimizers, device: torch.device) -> None:
        self.inner = PrefetchTrainPipelineSparseDist(module, optimizers, device, execute_all_batches=True)
        self._caching = [kernel for kernel in kernels(module) if kernel.prefetch_pipeline]
        self._device = device
        self._released = True

    def progress(self, batches: Iterator[Batch], step: int, /) -> Tensor | None:  # noqa: ARG002
        """Train on the oldest batch in flight, and send for another."""
        if self._released:
            self._begin()
            self._released = False
        return self.inner.progress(batches)

    def _begin(self) -> None:
        """Take the modules over, with no batch in flight."""
        for kernel in self._caching:
            kernel.lxu_cache_locking_counter.zero_()  # of lookups before the first step
            kernel.lock_cache_line = True
        if self.inner._prefetch_stream is not None:
            # What changed tables and caches meanwhile (an evaluation, a save, a load) is on this stream.
            self.inner._prefetch_stream.wait_stream(torch.cuda.current_stream(self._device))
        self.inner.attach()

    def release(self) -> None:
        """Put the sharded modules' own forward back, and have rows evicted as lookups want."""
        self.inner.detach()
        for kernel in self._caching:
            kernel.lock_cache_line = False
        self._released = True


def make_pipeline(
    setting: Literal["auto", "base", "sparse_dist"],
    module: DistributedModelParallel,
    optimizers: Optimizers,
    device: torch.device,
    losses: LossCheck | None = None,
) -> Pipeline:
    """The pipeline for this device; see `kind_of`."""
    skips = losses is not None and losses.skips
    kind = kind_of(setting, module.module.stage.layout, device.type, skips=skips)
    if kind == "prefetch":
        return PrefetchPipeline(module, optimizers, device)
    return (SparseDistPipeline if kind == "sparse_dist" else PlainPipeline)(module, optimizers, device, losses)
