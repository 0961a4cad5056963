"""One training step after another: plainly, or with the id exchange of the next batch under the compute of this one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, Protocol, cast

import torch
from torch import Tensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.train_pipeline import PrefetchTrainPipelineSparseDist, TrainPipelineSparseDist

from rechub_dist.assembly.readers import looks_ahead
from rechub_dist.batch import Batch
from rechub_dist.embedding.layout import REPLICATED
from rechub_dist.embedding.optim import Optimizers, kernels
from rechub_dist.embedding.planning import kind_of
from rechub_dist.training.non_finite import NonFiniteGuard


class Pipeline(Protocol):
    """What trains step after step."""

    def progress(self, batches: Iterator[Batch], step: int, /) -> Tensor | None:
        """Train on a batch, as the (0-based) `step`; returns this rank's part of its loss, None if it was left out.

        Raises StopIteration when all are done.
        """

    def release(self) -> None:
        """Give the modules back for use outside the pipeline, which must be empty; `progress` takes them again."""


def train_step(
    module: DistributedModelParallel, batch: Batch, optimizers: Optimizers, guard: NonFiniteGuard | None, step: int
) -> Tensor | None:
    """Forward, backward, step: what training on a batch is. Collective.

    Args:
        module: the sharded `TrainModule`.
        guard: decides between forward and backward, which updates the tables, whether the step is taken at all.
        step: its (0-based) number.

    Returns:
        This rank's part of the loss, float []; None if the step was left out.
    """
    optimizers.zero_grad()
    if guard is not None:
        guard.before()
    loss, local = module(batch)
    if guard is not None and not guard.accepts(step, local):
        return None
    loss.backward()
    optimizers.step()
    return local


def accumulated_step(
    module: DistributedModelParallel,
    batch: Batch,
    optimizers: Optimizers,
    guard: NonFiniteGuard | None,
    step: int,
    parts: int,
) -> Tensor | None:
    """As `train_step`, the batch computed part after part; gradients are exchanged with the last. All tables are local.

    Their losses add up to the batch's, as each is a sum over rows divided by what belongs to the whole batch.
    """
    optimizers.zero_grad()
    if guard is not None:
        guard.before()
    *first, last = batch.split(parts, REPLICATED)
    with module._dmp_wrapped_module.no_sync():  # DDP's
        losses = [_backward(module, part) for part in first]
    local = torch.stack([*losses, _backward(module, last)]).sum()
    if guard is not None and not guard.accepts(step, local):
        return None
    optimizers.step()
    return local


def _backward(module: DistributedModelParallel, batch: Batch) -> Tensor:
    loss, local = module(batch)
    loss.backward()
    return cast(Tensor, local)


class PlainPipeline:
    """Forward, backward, step; one batch at a time. The next one is copied to another device meanwhile."""

    def __init__(
        self,
        module: DistributedModelParallel,
        optimizers: Optimizers,
        device: torch.device,
        guard: NonFiniteGuard | None,
        parts: int = 1,
    ) -> None:
        self._module = module
        self._optimizers = optimizers
        self._copies = _Copies(device) if looks_ahead(device) else None
        self._guard = guard if guard is not None and guard.skips else None
        self._parts = parts

    def progress(self, batches: Iterator[Batch], step: int, /) -> Tensor | None:
        """Train on the next batch."""
        batch = next(batches) if self._copies is None else self._copies.take(batches)
        given = (self._module, batch, self._optimizers, self._guard, step)
        local = train_step(*given) if self._parts == 1 else accumulated_step(*given, self._parts)
        if self._copies is not None:
            self._copies.send_for(batches)
        return local

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
        self,
        module: DistributedModelParallel,
        optimizers: Optimizers,
        device: torch.device,
        guard: NonFiniteGuard | None,
    ) -> None:
        self.inner = _Choosing(module, _Chosen(optimizers), device, execute_all_batches=True)
        self.inner.guard = guard if guard is not None and guard.skips else None
        self._released = False

    def progress(self, batches: Iterator[Batch], step: int, /) -> Tensor | None:
        """Train on the oldest batch in flight, and send for another."""
        if self._released:
            self.inner.attach()
            self._released = False
        if self.inner.guard is not None:
            self.inner.guard.before()
        self.inner.step = step
        local = self.inner.progress(batches)
        return local if self.inner.accepted else None

    def release(self) -> None:
        """Put the sharded modules' own forward back: the pipeline's takes only batches that it has sent for."""
        self.inner.detach()
        self._released = True


class _Choosing(TrainPipelineSparseDist):
    """Leaves backward and optimizers out where the loss is not accepted."""

    guard: NonFiniteGuard | None = None
    step = 0

    @property
    def accepted(self) -> bool:
        """Whether the last step was trained on."""
        return self._optimizer.accepted

    def _backward(self, losses: Tensor) -> None:
        # the step's first output, this rank's part times the number of ranks
        part = losses.detach().sum() / self._model.module.world_size
        self._optimizer.accepted = self.guard is None or self.guard.accepts(self.step, part)
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
    guard: NonFiniteGuard | None = None,
    parts: int = 1,
) -> Pipeline:
    """The pipeline for this device; see `kind_of`. `parts` is how many a batch is computed in."""
    skips = guard is not None and guard.skips
    kind = kind_of(setting, module.module.stage.layout, device.type, skips=skips)
    if kind == "prefetch":
        return PrefetchPipeline(module, optimizers, device)
    if kind == "sparse_dist":
        return SparseDistPipeline(module, optimizers, device, guard)
    return PlainPipeline(module, optimizers, device, guard, parts)
