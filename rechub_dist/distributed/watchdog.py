"""Ends a rank that makes no progress, with the stacks of its threads, so that its agent restarts it."""

from __future__ import annotations

import faulthandler
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, Self, TypeVar

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from rechub_dist.distributed.flight import exchanges, unfinished
from rechub_dist.distributed.process import STALLED
from rechub_dist.distributed.runtime import Runtime

T = TypeVar("T")

WAITING = "waiting for the other ranks"
_PATIENCE = 10.0  # times the limit, for the first step, an evaluation, a checkpoint, a wait for data
_FOR_OTHERS = 1.25  # times the limit, for ranks that wait, so that the one that is waited for reports first
_TELL_SECONDS = 5.0  # for what may hang too: a file, or the store that ranks report to


class _State(NamedTuple):
    marks: int
    at: float
    doing: str
    slow: bool


class Watchdog:
    """Context manager that watches this rank's progress from a thread.

    The training thread calls `mark` with what it does next. After `stall_seconds` without a mark (ten times as long for
    what may take long), the process reports what it hangs in and which ranks are behind; writes the stacks of all
    threads to stderr and to `folder`, with the unfinished collectives of NCCL and Gloo; and exits with
    `process.STALLED`. If the process itself was stopped for a while (Ctrl-Z, a frozen container), the time restarts.

    Marks are made at the same points on all ranks, and shared through the process group's store; so the ranks with the
    fewest marks are the ones that the others wait for.
    """

    def __init__(self, rt: Runtime, folder: Path, stall_seconds: float) -> None:
        self._rt = rt
        self._folder = folder
        self._limit = stall_seconds
        self._interval = min(5.0, stall_seconds / 8)
        self._end = threading.Event()
        self._threads: list[threading.Thread] = []
        self._store: dist.Store | None = None
        self._state = _State(0, time.monotonic(), "starting", True)
        self._step = 0
        self._stepped = False

    def mark(self, doing: str, *, slow: bool = False) -> None:
        """Note progress: this rank now does `doing`, which may take long if `slow`. Not collective."""
        self._state = _State(self._state.marks + 1, time.monotonic(), doing, slow or not self._stepped)

    def stepped(self, step: int) -> None:
        """Note that training step `step` is done."""
        self._step, self._stepped = step, True

    def __enter__(self) -> Self:
        self._state = _State(0, time.monotonic(), "starting", True)
        if self._rt.world_size > 1:
            # a separate connection: the other one may be blocked for long
            self._store = _get_default_store().clone()  # type: ignore[attr-defined]
        self._end.clear()
        works = [self._watch, *([self._report] if self._store is not None else [])]
        self._threads = [threading.Thread(target=w, name="rechub-dist-watchdog", daemon=True) for w in works]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join(_TELL_SECONDS)

    def _watch(self) -> None:
        looked = time.monotonic()
        while not self._end.wait(self._interval):
            now = time.monotonic()
            if now - looked > 2 * self._interval + 1:  # this process was stopped: that time does not count
                self._state = self._state._replace(at=now)
            looked, state = now, self._state
            if now - state.at > self._allowed(state):
                self._give_up(state, now - state.at)

    def is_healthy(self) -> bool:
        """Whether this rank's last mark is recent enough."""
        state = self._state
        return time.monotonic() - state.at <= self._allowed(state)

    def _allowed(self, state: _State) -> float:
        return self._limit * (_PATIENCE if state.slow else 1.0) * (_FOR_OTHERS if state.doing == WAITING else 1.0)

    def _report(self) -> None:
        """Publish this rank's marks; in a thread of its own, as the store's host may not answer."""
        assert self._store is not None
        while not self._end.wait(self._interval):
            with suppress(Exception):  # the store is gone: then the peers' connections break, which ends this rank
                self._store.set(f"watchdog/{self._rt.rank}", f"{self._state.marks} {time.time()}")

    def _give_up(self, state: _State, silence: float) -> None:
        blame = _in_time(self._behind, state.marks) if self._store is not None else ""
        text = (
            f"rank {self._rt.rank} (process {os.getpid()} on {socket.gethostname()}) has made no progress for "
            f"{silence:.0f} s after step {self._step}, while {state.doing}{blame}; exiting, to be restarted"
        )
        with suppress(Exception):
            print(f"watchdog: {text}", file=sys.stderr, flush=True)
            faulthandler.dump_traceback(sys.stderr)
        path = self._folder / f"stalled-rank-{self._rt.rank}-step-{self._step}.txt"
        _in_time(lambda where: self._write(where, text), path)
        _in_time(self._tell_exchanges, path)  # last, as it may wait for a device that hangs
        os._exit(STALLED)

    def _write(self, path: Path, text: str) -> str:
        self._folder.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} {text}\n\n")
            file.flush()
            faulthandler.dump_traceback(file)
        return ""

    def _tell_exchanges(self, path: Path) -> str:
        """Append the collectives this rank is in to `path`, and print them; the full records go to files beside it."""
        for backend, dump in exchanges():
            if lines := unfinished(dump):
                (self._folder / f"exchanges-{backend}-rank-{self._rt.rank}").write_bytes(dump)
                text = "".join(f"{backend}: {line}\n" for line in lines)
                with path.open("a", encoding="utf-8") as file:
                    file.write(f"\n{text}")
                print(text, end="", file=sys.stderr, flush=True)
        return ""

    def _behind(self, own: int) -> str:
        """A clause that names the ranks that are behind or silent, given this one's marks."""
        assert self._store is not None
        behind, silent = [], []
        for rank in range(self._rt.world_size):
            if rank == self._rt.rank or not self._store.check([f"watchdog/{rank}"]):
                continue
            marks, told = self._store.get(f"watchdog/{rank}").decode().split()
            if time.time() - float(told) > 3 * self._interval + 1:
                silent.append(str(rank))
            elif int(marks) < own:
                behind.append(str(rank))
        found = [f"rank {', '.join(behind)} is behind"] if behind else []
        found += [f"no sign of life from rank {', '.join(silent)}"] if silent else []
        return f" ({'; '.join(found)})" if found else " (no rank is behind it)"


def _in_time(work: Callable[[T], str], argument: T) -> str:
    """What `work(argument)` returns, or a note that it did not within a few seconds."""
    found = [" (the ranks' store does not answer)"]

    def call() -> None:
        with suppress(Exception):
            found[0] = work(argument)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(_TELL_SECONDS)
    return found[0]
