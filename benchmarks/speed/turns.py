"""Contestants in turns within one run: each in processes of its own, which are stopped while others have theirs.

A contestant is set up once: its function makes everything ready, sends None down its pipe, and from then on answers
each number of steps that it receives with a `Turn`, when it has done them; 0 ends it. Its reading ahead stops with it.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import multiprocessing
import os
import signal
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from speed.machine import busy_seconds, loopback_bytes

_LIMIT = 900  # seconds without an answer after which a contestant counts as hung


@dataclass(frozen=True)
class Seat:
    """What a process of a contestant is told: which rank of how many it is, and where it may write files."""

    rank: int
    ranks: int
    threads: int
    port: int
    scratch: Path

    def join(self) -> None:
        """Set what torchrun would set."""
        world = str(self.ranks)
        os.environ.update(RANK=str(self.rank), LOCAL_RANK=str(self.rank), WORLD_SIZE=world, LOCAL_WORLD_SIZE=world)
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(self.port))


@dataclass(frozen=True)
class Turn:
    """CPU seconds of a turn, seconds of it spent waiting for data, and the process's largest resident size in bytes."""

    cpu: float
    waited: float = 0.0
    peak: int = 0


@dataclass(frozen=True)
class Contestant:
    """Who takes part.

    Attributes:
        name: for the page.
        enter: called in each process with the pipe and its seat; can be pickled.
        samples: of a step, over all ranks.
        ranks, threads: processes, and threads of each.
        env: variables that its processes begin with.
        steps: of a turn; None: as many as fill it.
        warmup: steps before the first round; None: those of the pace.
    """

    name: str
    enter: Callable[[Connection, Seat], None]
    samples: int
    ranks: int = 2
    threads: int = 1
    env: dict[str, str] = field(default_factory=dict)
    steps: int | None = None
    warmup: int | None = None


@dataclass
class Result:
    """What a contestant has come to, one value a round.

    Attributes:
        rates: samples/s.
        cpu: CPU seconds for a million samples.
        waited: share of the time spent waiting for data.
        sent: bytes that all ranks together have sent to each other in a step, by the loopback interface's count.
        peak: the largest resident size of a rank so far, bytes.
    """

    rates: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    waited: list[float] = field(default_factory=list)
    sent: list[float] = field(default_factory=list)
    peak: int = 0


@dataclass(frozen=True)
class Pace:
    """How long a contest lasts: rounds of `turns` turns each, of about `seconds`, after `warmup` steps."""

    rounds: int
    turns: int = 2
    seconds: float = 2.0
    warmup: int = 20


@dataclass
class Contest:
    """What all have come to, by name.

    Attributes:
        foreign: the share of the cores that other programs took meanwhile.
        losses: by step, where a contestant leaves records of them.
    """

    results: dict[str, Result]
    foreign: float
    losses: dict[str, dict[int, float]] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Result:
        return self.results[name]


def contest(contestants: list[Contestant], pace: Pace, scratch: Path, say: Callable[[str], None] = print) -> Contest:
    """Set all up, and let them take turns A B C A B C ...

    Raises:
        RuntimeError: one could not be set up, has failed or hangs; names it, with its last line.
    """
    found = {one.name: Result() for one in contestants}
    seats: list[_Seated] = []
    foreign = seconds = 0.0
    with _all_ended(seats):
        for one in contestants:
            began = time.monotonic()
            seats.append(seated := _Seated(one, scratch / f"contestant-{len(seats)}"))
            seated.start()
            warmup = pace.warmup if one.warmup is None else one.warmup
            seated.take(warmup)
            if one.steps is None:
                sample = max(1, warmup // 4)
                taken = seated.take(sample).seconds
                seated.steps = max(1, math.ceil(pace.seconds / (taken / sample)))
            say(f"  {one.name}: ready after {time.monotonic() - began:.0f} s, {seated.steps} steps a turn")
        for number in range(pace.rounds):
            turns: dict[str, list[_Taken]] = {one.name: [] for one in contestants}
            for _ in range(pace.turns):
                for seated in seats:
                    turn = seated.take(seated.steps)
                    turns[seated.contestant.name].append(turn)
                    seconds, foreign = seconds + turn.seconds, foreign + turn.foreign
            for seated in seats:
                _add(found[seated.contestant.name], seated, turns[seated.contestant.name])
            rates = ", ".join(f"{name} {result.rates[-1]:,.0f}" for name, result in found.items())
            say(f"  round {number + 1}/{pace.rounds}: {rates} samples/s")
    return Contest(found, foreign / max(seconds, 1e-9) / (os.cpu_count() or 1))


@dataclass(frozen=True)
class _Taken:
    """A turn as seen from outside: seconds, CPU seconds of other programs, bytes on the loopback interface, and what
    the processes tell.
    """

    seconds: float
    foreign: float
    sent: int
    told: list[Turn]


def _add(result: Result, seated: _Seated, turns: list[_Taken]) -> None:
    """Sum up a round's turns."""
    seconds = sum(turn.seconds for turn in turns)
    steps = seated.steps * len(turns)
    samples = seated.contestant.samples * steps
    told = [one for turn in turns for one in turn.told]
    result.rates.append(samples / seconds)
    result.cpu.append(sum(one.cpu for one in told) / samples * 1e6)
    result.waited.append(sum(one.waited for one in told) / seconds / seated.contestant.ranks)
    result.sent.append(sum(turn.sent for turn in turns) / steps)
    result.peak = max(one.peak for one in told)


class _Seated:
    """The processes of a contestant, stopped unless it is their turn."""

    def __init__(self, contestant: Contestant, scratch: Path) -> None:
        self.contestant, self.scratch = contestant, scratch
        self.steps = contestant.steps or 1
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def start(self) -> None:
        """Set everything up; returns when that is done."""
        one, port = self.contestant, _free_port()
        self.scratch.mkdir(parents=True)
        context = multiprocessing.get_context("spawn")
        # threads that spin cost those contestants dearly that have two, where other programs run
        own = {"OMP_NUM_THREADS": str(one.threads), "OMP_WAIT_POLICY": "passive", **one.env}
        before = {name: os.environ.get(name) for name in own}
        os.environ.update(own)
        try:
            for rank in range(one.ranks):
                mine, theirs = context.Pipe()
                seat = Seat(rank, one.ranks, one.threads, port, self.scratch)
                process = context.Process(target=_process, args=(one.enter, theirs, seat), daemon=True)
                process.start()
                theirs.close()
                self._processes.append(process)
                self._pipes.append(mine)
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})
        self._replies()
        self._signal(signal.SIGSTOP)

    def take(self, steps: int) -> _Taken:
        """Let it do its steps."""
        busy, sent = busy_seconds(), loopback_bytes()
        self._signal(signal.SIGCONT)
        began = time.perf_counter()
        for pipe in self._pipes:
            pipe.send(steps)
        told = self._replies()
        seconds = time.perf_counter() - began
        self._signal(signal.SIGSTOP)
        foreign = max(0.0, busy_seconds() - busy - sum(one.cpu for one in told))
        return _Taken(seconds, foreign, loopback_bytes() - sent, told)

    def end(self) -> None:
        """Ask the processes to end, and make sure of it."""
        self._signal(signal.SIGCONT)
        for pipe in self._pipes:
            with contextlib.suppress(OSError):
                pipe.send(0)
        for process in self._processes:
            process.join(10)
        self.kill()

    def kill(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.join()

    def _replies(self) -> list[Any]:
        """An answer of each process. The first error counts: the other ranks may wait for the one that has failed."""
        replies: dict[Connection, Any] = {}
        deadline = time.monotonic() + _LIMIT
        while missing := [pipe for pipe in self._pipes if pipe not in replies]:
            ready = wait(missing, max(0.0, deadline - time.monotonic()))
            if not ready:
                raise RuntimeError(f"{self.contestant.name}: no answer after {_LIMIT} s, see {self.scratch}")
            for pipe in ready:
                assert isinstance(pipe, Connection)
                try:
                    replies[pipe] = pipe.recv()
                except (EOFError, ConnectionResetError):
                    replies[pipe] = f"a process has ended without a word, see {self.scratch}"
                if isinstance(replies[pipe], str):
                    raise RuntimeError(f"{self.contestant.name}: {replies[pipe]}")
        return [replies[pipe] for pipe in self._pipes]

    def _signal(self, number: int) -> None:
        for process in self._processes:
            if process.exitcode is None:
                os.kill(process.pid, number)


@contextlib.contextmanager
def _all_ended(seats: list[_Seated]) -> Iterator[None]:
    """However the block ends, no process is left; after an error they are not asked."""
    try:
        yield
    except BaseException:
        for seated in seats:
            seated.kill()
        raise
    for seated in seats:
        seated.end()


def _process(enter: Callable[[Connection, Seat], None], pipe: Connection, seat: Seat) -> None:
    """A process of a contestant; it dies with its parent, and its chatter goes to a file."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    log = os.open(seat.scratch / f"rank{seat.rank}.log", os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(log, stream)
    try:
        enter(pipe, seat)
    except Exception as error:
        traceback.print_exc()
        pipe.send(f"{type(error).__name__}: {error}"[:400])


def serve(pipe: Connection, work: Callable[[int], object]) -> None:
    """Do as many steps as the parent asks for, again and again."""
    pipe.send(None)
    while steps := pipe.recv():
        began = time.process_time()
        work(steps)
        pipe.send(Turn(time.process_time() - began, peak=peak_bytes()))


def peak_bytes() -> int:
    """The largest resident size that this process has had."""
    return int(status_kb("VmHWM")) << 10


def status_kb(key: str, process: int | str = "self") -> int:
    """A line of a process's /proc status, in KiB."""
    text = Path(f"/proc/{process}/status").read_text(encoding="utf-8")
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith(f"{key}:"))


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
