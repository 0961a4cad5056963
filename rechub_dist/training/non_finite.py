"""What becomes of a step whose loss is not finite, or too high: decided by all ranks together."""

from __future__ import annotations

import math
import sys
from collections import deque
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rechub_dist.batch import Batch
from rechub_dist.config import TrainConfig
from rechub_dist.data.stored import StoredRows
from rechub_dist.distributed.runtime import Runtime
from rechub_dist.errors import UserError

_KEPT = 6  # batches: as many as the sparse-dist pipeline has in flight, the one whose loss comes late, and one more
_ADVICE = (
    "Lower optimizer.lr or embedding.optimizer.lr, set optimizer.clip_norm, "
    "or look for extreme values in dense features"
)
_SKIPS_IN_A_ROW = 20  # then the weights are at fault, not the rows


class NonFiniteGuard:
    """Looks at the losses of a run, step by step.

    Tables are updated inside the backward pass. So `skip` asks between forward and backward (`accepts`, a small
    all-reduce of its own, and on a GPU a wait for the forward pass). `stop` needs no such wait: a loss travels with
    the control all-reduce of a later batch (`sent`, `received`), on a GPU one step late. Before anything is saved, all
    losses up to there have been looked at (`check`): weights that a bad step has touched are never saved.

    The rows of a bad step are written to `folder`, each rank's own.
    """

    def __init__(self, config: TrainConfig, folder: Path, rt: Runtime, modules: tuple[nn.Module, ...]) -> None:
        self._config = config
        self._folder = folder
        self._rt = rt
        self._buffers = [buffer for module in modules for buffer in module.buffers()]
        self._before: list[Tensor] = []
        self._recent: deque[tuple[int, Batch]] = deque(maxlen=_KEPT)
        self._losses: deque[tuple[int, Tensor, Any]] = deque(maxlen=2)
        self._late = rt.device.type != "cpu"
        self._stored: StoredRows | None = None
        self._first = self._next = self._sent = 0
        self._in_a_row = 0
        self.skips = config.on_non_finite == "skip"

    def begin(self, stored: StoredRows, first_step: int, next_step: int) -> None:
        """From here on batches are of the epoch of `stored`, which began at the run's step `first_step`."""
        self._stored, self._first, self._next = stored, first_step, next_step
        self._recent.clear()
        self._losses.clear()

    def keep(self, batch: Batch) -> None:
        """Keep the next step's batch for a while."""
        self._recent.append((self._next, batch))
        self._next += 1

    def note(self, step: int, loss: Tensor) -> None:
        """This rank's part of the loss of (0-based) `step`."""
        event = None
        if self._late:
            loss = loss.to("cpu", non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._losses.append((step, loss, event))

    def sent(self) -> float:
        """This rank's part of the newest loss that is known without waiting; 0 where there is none yet."""
        if self.skips or len(self._losses) <= self._late:
            return 0.0
        self._sent, loss, event = self._losses[-1 - self._late]
        if event is not None:
            event.synchronize()
        return float(loss)

    def received(self, total: float) -> None:
        """The sum over ranks of what was `sent`.

        Raises:
            UserError: a bad loss; on all ranks.
        """
        if self._bad(total):
            self._stop(self._sent, total)

    def check(self, first_step: int, losses: Tensor) -> None:
        """Look at the losses of all ranks, float64 [n], of the (0-based) steps from `first_step` on.

        Raises:
            UserError: one is bad.
        """
        if not self.skips:
            for step, loss in enumerate(losses.tolist(), first_step):
                if self._bad(loss):
                    self._stop(step, loss)

    def before(self) -> None:
        """Called before a forward pass of `skip`: remembers what it changes, the statistics of batch normalisation."""
        if self.skips:
            self._before = [buffer.clone() for buffer in self._buffers]

    def accepts(self, step: int, loss: Tensor) -> bool:
        """Whether (0-based) `step` may change weights, given this rank's part of its loss. Collective.

        Raises:
            UserError: too many steps in a row may not.
        """
        total = float(self._rt.all_reduce_sum(loss.detach().double().reshape(1)))
        if not self._bad(total):
            self._in_a_row = 0
            return True
        for buffer, value in zip(self._buffers, self._before, strict=True):
            buffer.copy_(value)
        self._in_a_row += 1
        path = self._save(step, total)
        if self._in_a_row >= _SKIPS_IN_A_ROW:
            raise UserError(
                f"{self._what(step, total)}, as those of the {_SKIPS_IN_A_ROW - 1} steps before it, which were "
                f"skipped; the rows are in {path}. {_ADVICE}"
            )
        if self._rt.is_main:
            print(f"{self._what(step, total)}: skipped; its rows are in {path}", file=sys.stderr, flush=True)
        return False

    def _bad(self, loss: float) -> bool:
        limit = self._config.max_loss
        return not math.isfinite(loss) or (limit is not None and loss > limit)

    def _what(self, step: int, loss: float) -> str:
        fault = f"above train.max_loss {self._config.max_loss:g}" if math.isfinite(loss) else "not finite"
        return f"step {step + 1}: the loss is {fault} ({loss:g})"

    def _stop(self, step: int, loss: float) -> None:
        path = self._save(step, loss)
        raise UserError(
            f"{self._what(step, loss)}; the rows are in {path}. {_ADVICE}, or leave such steps out with "
            f"train.on_non_finite: skip. The run goes on from its last checkpoint, which is from before that step"
        )

    def _save(self, step: int, loss: float) -> Path:
        """Write this rank's rows of `step`; returns the path, with * for the rank."""
        batch = next((batch for number, batch in self._recent if number == step), None)
        if batch is not None and self._stored is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            where = [(path, group, torch.from_numpy(rows)) for path, group, rows in self._stored.of(step - self._first)]
            found = _contents(batch) | {"step": step + 1, "loss": loss, "stored": where}
            torch.save(found, self._path(step, self._rt.rank))
        return self._path(step, "*")

    def _path(self, step: int, rank: int | str) -> Path:
        return self._folder / f"step-{step + 1}-rank-{rank}.pt"


def _contents(batch: Batch) -> dict[str, Any]:
    """A batch as plain tensors, without padding: ids by feature as (values, lengths)."""
    ids = {}
    for collection in batch.jagged.values():
        for name in collection.keys():  # noqa: SIM118 - no mapping
            feature = collection[name]
            lengths = feature.lengths()[: batch.rows].clone()
            ids[name] = (feature.values()[: int(lengths.sum())].clone(), lengths)
    return {"rows": batch.rows, "ids": ids, "dense": batch.dense, "labels": batch.labels, "weights": batch.weights}
