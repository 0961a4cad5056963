"""A rank that makes no progress ends with its threads' stacks told, so that its agent starts it again."""

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
_PATIENCE = 10.0  # times the limit: for a first step, an evaluation, a checkpoint, a wait for data
_FOR_OTHERS = 1.25  # times the limit: of those that wait for each other, the one at fault is to speak first
_TELL_SECONDS = 5.0  # for what may hang as well: a file, or the store that ranks report to


class _State(NamedTuple):
    marks: int
    at: float
    doing: str
    slow: bool


class Watchdog:
    """Watches this rank's progress from a thread while it is entered.

    The training thread says by `mark` what it goes on to do. Where it has said nothing for `stall_seconds` (ten times
    as long for what may take long), the process tells which rank hangs, doing what, and which ranks are behind; writes
    the stacks of all threads to stderr and to `folder`, and there the exchanges that have not ended, NCCL's and Gloo's;
    and exits with `process.STALLED`. A process that was itself
    stopped for a while (Ctrl-Z, a frozen container) starts to count anew.

    Marks are made at the same points on all ranks, and told to the others through the process group's store; so those
    that have made the fewest are the ones that the others wait for.
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
        """This rank has come to something new."""
        self._state = _State(self._state.marks + 1, time.monotonic(), doing, slow or not self._stepped)

    def stepped(self, step: int) -> None:
        """A training step is done."""
        self._step, self._stepped = step, True

    def __enter__(self) -> Self:
        self._state = _State(0, time.monotonic(), "starting", True)
        if self._rt.world_size > 1:
            # a connection of its own: the other may be in use for long
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
            if now - looked > 2 * self._interval + 1:  # this process was stopped: nothing is known of that time
                self._state = self._state._replace(at=now)
            looked, state = now, self._state
            if now - state.at > self._allowed(state):
                self._give_up(state, now - state.at)

    def is_healthy(self) -> bool:
        """Whether this rank's last mark is younger than it may be."""
        state = self._state
        return time.monotonic() - state.at <= self._allowed(state)

    def _allowed(self, state: _State) -> float:
        return self._limit * (_PATIENCE if state.slow else 1.0) * (_FOR_OTHERS if state.doing == WAITING else 1.0)

    def _report(self) -> None:
        """Tell the other ranks of this one's marks; apart from `_watch`, as the store's host may not answer."""
        assert self._store is not None
        while not self._end.wait(self._interval):
            with suppress(Exception):  # it is gone: then the peers' connections break, which ends this rank
                self._store.set(f"watchdog/{self._rt.rank}", f"{self._state.marks} {time.time()}")

    def _give_up(self, state: _State, silence: float) -> None:
        blame = _in_time(self._behind, state.marks) if self._store is not None else ""
        text = (
            f"rank {self._rt.rank} (process {os.getpid()} on {socket.gethostname()}) has made no progress for "
            f"{silence:.0f} s after step {self._step}, while {state.doing}{blame}; it ends, to be started again"
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
        """Add to `path`, and tell, in which exchange this rank is; the whole records go to files beside it."""
        for backend, dump in exchanges():
            if lines := unfinished(dump):
                (self._folder / f"exchanges-{backend}-rank-{self._rt.rank}").write_bytes(dump)
                text = "".join(f"{backend}: {line}\n" for line in lines)
                with path.open("a", encoding="utf-8") as file:
                    file.write(f"\n{text}")
                print(text, end="", file=sys.stderr, flush=True)
        return ""

    def _behind(self, own: int) -> str:
        """A clause that names the ranks that are behind or silent."""
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
        found += [f"nothing is heard of rank {', '.join(silent)}"] if silent else []
        return f" ({'; '.join(found)})" if found else " (no rank is behind it)"


def _in_time(work: Callable[[T], str], argument: T) -> str:
    """What `work(argument)` returns, if it does so soon."""
    found = [" (the store of the ranks does not answer)"]

    def call() -> None:
        with suppress(Exception):
            found[0] = work(argument)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(_TELL_SECONDS)
    return found[0]
