"""Time breakdown of a training step, from torch's profiler."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

PARTS = ("data", "embedding", "dense", "communication")
WAITING_FOR_DATA = "rechub_dist: waiting for a batch"
REPLICATED_LOOKUP = "rechub_dist: replicated tables"

_COMPUTE = re.compile(r"aten::|fbgemm::")
_TRANSFER = re.compile(r"(gloo|nccl):")
_EMBEDDING = re.compile(
    re.escape(REPLICATED_LOOKUP)
    + r"|\[(lookup|input_dist|output_dist)\]"  # TorchRec's sharded collections
    + r"|fbgemm::|.*(SplitLookup|Embedding(Bag)?Backward|All2All_)"  # backward
)

Spans = list[tuple[float, float]]


class StepTimes:
    """Profiles one step in `every` (None: never), which slows that step by some tens of milliseconds."""

    def __init__(self, every: int | None) -> None:
        self._every = every
        os.environ.setdefault("KINETO_LOG_LEVEL", "7")  # otherwise it prints to stderr on every start and stop
        self._last: dict[str, float] | None = None

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Context of a step, profiled if due: the 10th step, and the 10th after each multiple of `every`.

        Args:
            number: the step, counted from 1.
        """
        if self._every is None or number % self._every != min(10, self._every - 1):
            yield
            return
        began = time.perf_counter()
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            yield
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            seconds = time.perf_counter() - began
        self._last = split(profiler.events(), seconds)

    def take(self) -> dict[str, float] | None:
        """Return, once, the seconds of the last profiled step by part, else None; they add up to the step's time."""
        last, self._last = self._last, None
        return last


def split(events: Any, seconds: float) -> dict[str, float]:
    """Divide the `seconds` of a step among `PARTS`; returns seconds by part.

    Overlapping time counts for the first of: waiting for data; communication not overlapped with computation;
    embedding, i.e. lookups, their backward pass, and sorting ids for the all-to-all. The rest is dense.

    On a GPU these are host times: kernel time appears where the host waits for it.
    """
    names = [(event.name, event.time_range.start, event.time_range.end) for event in events]
    waiting = union([(a, b) for name, a, b in names if name == WAITING_FOR_DATA])
    computing = union([(a, b) for name, a, b in names if _COMPUTE.match(name)])
    transfer = without(union([(a, b) for name, a, b in names if _TRANSFER.match(name)]), computing)
    transfer = without(transfer, waiting)
    embedding = union([(a, b) for name, a, b in names if _EMBEDDING.match(name)])
    embedding = without(without(embedding, waiting), transfer)
    found = {"data": total(waiting), "embedding": total(embedding), "communication": total(transfer)}
    return {**found, "dense": max(0.0, seconds - sum(found.values()))}


def union(spans: Spans) -> Spans:
    """The union of spans, sorted and disjoint."""
    joined: Spans = []
    for start, end in sorted(spans):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return joined


def without(spans: Spans, others: Spans) -> Spans:
    """`spans` minus `others`; both sorted and disjoint."""
    left: Spans = []
    for start, end in spans:
        at = start
        for other_start, other_end in others:
            if other_end <= at:
                continue
            if other_start >= end:
                break
            if other_start > at:
                left.append((at, other_start))
            at = other_end
        if at < end:
            left.append((at, end))
    return left


def total(spans: Spans) -> float:
    """Total length in seconds of spans in microseconds."""
    return sum(end - start for start, end in spans) / 1e6
