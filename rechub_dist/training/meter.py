"""Loss, speed and padding of a segment of steps, for records and progress."""

from __future__ import annotations

import math
import time

import torch
import torch.distributed as dist
from torch import Tensor

from rechub_dist.data.passes import Passes
from rechub_dist.distributed.runtime import Runtime
from rechub_dist.training.feed import Feed
from rechub_dist.training.non_finite import NonFiniteGuard


class Meter:
    """What there is to tell of the steps since the last time, beginning with (0-based) step `first`."""

    def __init__(self, rt: Runtime, passes: Passes, guard: NonFiniteGuard, feed: Feed, first: int) -> None:
        self._rt = rt
        self._passes = passes
        self._guard = guard
        self._feed = feed
        self._first, self._began = first, time.monotonic()
        self._losses: list[Tensor] = []

    def add(self, step: int, loss: Tensor | None) -> None:
        """Note this rank's part of a (0-based) step's loss; None where the step was left out."""
        if loss is not None:
            self._losses.append(loss)
            self._guard.note(step, loss)

    def take(self, step: int, rate: float) -> tuple[dict[str, float], str]:
        """Of the steps up to `step`: mean loss over all ranks, samples/s, learning rate, share of padding. Collective.

        Also returns the same for a line of progress. The losses have then been looked at, on all ranks.
        """
        loss = self._mean()
        now = time.monotonic()  # when the device has done these steps: the mean waits for them
        rows = self._passes.rows_before(step) - self._passes.rows_before(self._first)
        values = {
            "loss": loss,
            "samples_per_second": rows / max(1e-9, now - self._began),
            "learning_rate": rate,
        }
        note = f"loss {loss:.4f}, {values['samples_per_second']:,.0f} samples/s"
        if (padded := self._feed.padded_share()) is not None:
            values["padded_share"] = padded
            note += f", {padded:.0%} padding"
        self._first, self._began, self._losses = step, now, []
        return values, note

    def _mean(self) -> float:
        """Of the steps that were not left out; NaN where there are none."""
        if not self._losses:
            return math.nan
        total = torch.stack(self._losses).double().cpu()
        dist.all_reduce(total, group=self._rt.control)
        self._guard.check(self._first, total)
        return float(total.mean())
