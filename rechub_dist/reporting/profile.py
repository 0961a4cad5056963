"""`train --profile N`: a trace of some steps, and where their time goes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from rechub_dist.reporting.step_times import REPLICATED_LOOKUP, WAITING_FOR_DATA, Spans, total, union, without

BEFORE: Final = 10  # steps of a process that are not looked at: they allocate, compile and open files
STEP: Final = "rechub_dist: step"

# What an instant belongs to is the first of these whose events cover it. Exchanges are those of vectors and gradients.
_PARTS: Final[dict[str, re.Pattern[str]]] = {
    "data": re.compile(re.escape(WAITING_FOR_DATA)),
    "id exchange": re.compile(r"\[(input_dist|splits_dist|input_dist_wait)\]|## KJT"),
    "table update": re.compile(r".*(CppNode<SplitLookup|split_embedding_backward|Embedding(Bag)?Backward)"),
    "exchange": re.compile(
        r"\[output_dist(_wait)?\]|.*(All2All|ReduceScatter|AllGather)\w*(Backward|_Wait|_Req)|c10d::"
    ),
    "lookup": re.compile(r"\[lookup\]|" + re.escape(REPLICATED_LOOKUP)),
    "optimizer": re.compile(r"Optimizer\.(step|zero_grad)#"),
    "dense backward": re.compile(r"autograd::engine::evaluate_function"),
    "dense forward": re.compile(r"aten::|fbgemm::"),
}
_TRANSFER: Final = re.compile(r"(gloo|nccl):")
BOOKKEEPING: Final = "bookkeeping"
PARTS: Final = (*_PARTS, BOOKKEEPING)


class Profile:
    """The profile of `steps` steps, from the 11th of this process on, or of as many as come before an evaluation.

    Args:
        steps: how many.
        folder: gets `rank<r>.json.gz`, a trace in Chrome's format.
        rank: of this process.
        say: prints a line.
    """

    def __init__(self, steps: int, folder: Path, rank: int, say: Callable[[str], None]) -> None:
        self._steps, self._path, self._say = steps, folder / f"rank{rank}.json.gz", say
        self._after: int | None = None
        self._profiler: Any = None
        self._mark: Any = None
        self._first = 0
        self._done = 0
        self._told = False

    def wants(self, step: int) -> bool:
        """Whether the (1-based) step is one of its own: then it is to go through `step`."""
        if self._after is None:
            self._after = step - 1 + BEFORE
        if step > self._after + self._steps:
            self.finish()
        return not self._told and step > self._after

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Context of a step that it wants."""
        self._end_of_step()
        if self._profiler is None:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_initialized() else [])]
            self._profiler, self._first = profile(activities=activities), number
            self._profiler.start()
        self._mark = record_function(STEP)
        self._mark.__enter__()
        try:
            yield
        except StopIteration:  # there was no step, and what comes next is none's
            self._mark.__exit__(None, None, None)
            self._mark = None
            if self._done:
                self.finish()
            else:
                self._profiler.stop()
                self._profiler = None
            raise

    def _end_of_step(self) -> None:
        """A step lasts to the begin of the next: what is done between them is its, too."""
        if self._mark is not None:
            self._mark.__exit__(None, None, None)
            self._mark = None
            self._done += 1

    def finish(self) -> None:
        """Write the trace and say where the time went, once."""
        if self._told:
            return
        self._told = True
        self._end_of_step()
        if self._profiler is None:
            self._say(f"profile: there were no steps after the first {BEFORE} of a process, which are left out")
            return
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        self._profiler.stop()
        parts, count = breakdown(self._profiler.events()), self._done
        seconds = sum(parts.values())
        written = f"trace: {self._path}; open it at https://ui.perfetto.dev or chrome://tracing"
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._profiler.export_chrome_trace(str(self._path))
        except OSError as error:
            written = f"warning: profile: {self._path} cannot be written: {error.strerror or error}"
        self._profiler = None
        last = self._first + count - 1
        self._say(f"profile of {count} steps, {self._first} to {last}: {1e3 * seconds / count:.2f} ms a step, of which")
        for part, spent in parts.items():
            self._say(f"  {part:<15} {1e3 * spent / count:9.3f} ms {spent / seconds:6.1%}")
        if torch.cuda.is_initialized():
            self._say("  (of the host: what a kernel takes shows where the host waits for it; the trace has both)")
        self._say(written)


def breakdown(events: Iterable[Any]) -> dict[str, float]:
    """The seconds of the steps in a profile's events, by part of `PARTS`; they add up to the steps' time.

    Only what the training thread does counts: what another thread does meanwhile costs time where this one waits. DDP
    waits for the gradients' exchange without an event: where nothing else is done during one, that is its time.
    """
    found = [(event.name, event.thread, event.time_range.start, event.time_range.end) for event in events]
    threads = {thread for name, thread, _, _ in found if name == STEP}
    steps = union([(a, b) for name, _, a, b in found if name == STEP])
    mine = [(name, a, b) for name, thread, a, b in found if thread in threads and name != STEP]
    left, parts = steps, {}
    for part, pattern in _PARTS.items():
        spans: Spans = union([(a, b) for name, a, b in mine if pattern.match(name)])
        rest = without(left, spans)
        parts[part] = total(left) - total(rest)
        left = rest
    rest = without(left, union([(a, b) for name, _, a, b in found if _TRANSFER.match(name)]))
    parts["exchange"] += total(left) - total(rest)
    return {**parts, BOOKKEEPING: total(rest)}
