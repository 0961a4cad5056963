"""Training throughput of DeepFM, side by side: rechub_dist, the barest TorchRec loop, and torch-rechub.

    python benchmarks/train.py [--rounds 5] [--steps 200] [--rows 1024000] [--cache FOLDER] [--only AB]

The task is a synthetic one of Criteo's shape: 13 dense features, 26 sparse ones of 100,000 ids each (a power law),
embeddings of width 16, an MLP of 256 and 128, global batches of 4096, on two cores.

A  rechub_dist end to end, two ranks of one thread: Parquet, full shuffle, control all-reduce, progress and logs; tables
   sharded table-wise, row-wise Adagrad for them, Adam for the rest. No evaluation or checkpoint falls into the time.
B  the barest TorchRec loop of the same mathematics, placement and optimizers, two ranks of one thread, on batches that
   lie in memory as KeyedJaggedTensors: what A would reach if reading and bookkeeping cost nothing.
C  torch-rechub's DeepFM as it is used: its DataGenerator's loader over arrays in memory, its CTRTrainer, Adam over
   everything, one process of two threads. Its model has batch norms and no first-order tables.
D  the same model and trainer as C, on batches that lie in memory.

C and D need torch-rechub (pip install --no-deps torch-rechub==0.9.0, and pandas) and are left out without it.

All are set up once and then take turns of `--turn` steps (C, D: fewer), A B C D A B C D ...; a contestant is stopped by
SIGSTOP while it is not its turn, reading ahead included. A round is `--steps` steps of A and B: with the default sizes
one epoch of A, so that each round holds all that an epoch costs. Ratios are taken within rounds. Where other programs
run, the clock says little, and samples per CPU second say more. Linux only.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import multiprocessing
import os
import signal
import socket
import statistics
import tempfile
import time
import traceback
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from contestants import BATCH, DENSE, RANKS, SPARSE, VOCABULARY, Place, Turn, rechub_dist, torch_rechub, torchrec_loop

TITLES = {
    "A": "rechub_dist, from Parquet",
    "B": "TorchRec alone, from memory",
    "C": "torch-rechub, its loader",
    "D": "torch-rechub, from memory",
}


def main(
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    steps: Annotated[int, typer.Option(min=1, help="Steps of A and B in a round.")] = 200,
    turn: Annotated[int, typer.Option(min=1, help="Steps of A and B in a turn.")] = 50,
    rows: Annotated[int, typer.Option(min=100_000, help="Rows of the data set; 8 in 10 train.")] = 1_024_000,
    cache: Annotated[Path | None, typer.Option(help="Where data sets are kept.")] = None,
    only: Annotated[str, typer.Option(help="Contestants.")] = "ABCD",
    warmup: Annotated[int, typer.Option(min=1, help="Steps of A and B before the first round.")] = 20,
) -> None:
    """Measure, and print the table."""
    console = Console()
    if not console.is_terminal:
        console.width = 120
    data = _prepare(cache or Path(tempfile.gettempdir()) / "rechub-bench", rows)
    kinds = [kind for kind in TITLES if kind in only]
    if set(kinds) & {"C", "D"} and importlib.util.find_spec("torch_rechub") is None:
        console.print("torch-rechub is not installed: C and D are left out")
        kinds = [kind for kind in kinds if kind in "AB"]
    if not kinds:
        raise typer.BadParameter(f"{only!r} names none of A, B, C and D", param_hint="--only")
    # a step of C and D takes several times as long, and has no cycle that a round should cover
    sizes = {"A": turn, "B": turn, "C": max(1, turn // 10), "D": max(1, turn // 10)}
    contestants = [Contestant(kind, sizes[kind]) for kind in kinds]
    with tempfile.TemporaryDirectory() as scratch:
        try:
            for one in contestants:
                one.start(Place(data, Path(scratch), _port(), min(steps, rows * 8 // 10 // BATCH)))
                one.turn(warmup if one.kind in "AB" else 2)
                one.seconds = one.foreign = 0.0
            for number in range(rounds):
                turns: dict[str, list[Any]] = {kind: [] for kind in kinds}
                for _ in range(max(1, steps // turn)):
                    for one in contestants:
                        turns[one.kind].append(one.turn(one.steps))
                for one in contestants:
                    one.end_round(turns[one.kind])
                rates = ", ".join(f"{one.kind} {one.rates[-1]:,.0f}" for one in contestants)
                console.print(f"round {number + 1}/{rounds}: {rates} samples/s", highlight=False)
        finally:
            for one in contestants:
                one.end()
    _show(console, contestants)


@dataclass
class Contestant:
    """The processes of a contestant, stopped unless it is their turn, and what they have come to by rounds."""

    kind: str
    steps: int  # of a turn
    processes: list[Any] = field(default_factory=list)
    pipes: list[Connection] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)  # samples/s
    cpu: list[float] = field(default_factory=list)  # CPU seconds for a million samples
    waited: list[float] = field(default_factory=list)  # share of the time spent waiting for data
    seconds: float = 0.0  # of all turns
    foreign: float = 0.0  # CPU seconds of other programs meanwhile

    def start(self, place: Place) -> None:
        """Set everything up; returns when that is done."""
        context = multiprocessing.get_context("spawn")
        ranks = RANKS if self.kind in "AB" else 1
        os.environ["OMP_NUM_THREADS"] = str(RANKS // ranks)
        os.environ["OMP_WAIT_POLICY"] = "passive"  # threads that spin cost C and D dearly where other programs run
        for rank in range(ranks):
            mine, theirs = context.Pipe()
            process = context.Process(target=_child, args=(self.kind, theirs, rank, place), daemon=True)
            process.start()
            theirs.close()
            self.processes.append(process)
            self.pipes.append(mine)
        self._replies()
        self._signal(signal.SIGSTOP)

    def turn(self, steps: int) -> tuple[float, list[Turn]]:
        """Let it train; returns the seconds it took, and what the processes tell."""
        began, busy = time.perf_counter(), _busy()
        self._signal(signal.SIGCONT)
        for pipe in self.pipes:
            pipe.send(steps)
        told = self._replies()
        seconds = time.perf_counter() - began
        self._signal(signal.SIGSTOP)
        self.seconds += seconds
        self.foreign += max(0.0, _busy() - busy - sum(turn.cpu for turn in told))
        return seconds, told

    def end_round(self, turns: list[tuple[float, list[Turn]]]) -> None:
        """Sum up a round's turns."""
        seconds = sum(s for s, _ in turns)
        samples = BATCH * self.steps * len(turns)
        told = [turn for _, of_ranks in turns for turn in of_ranks]
        self.rates.append(samples / seconds)
        self.cpu.append(sum(turn.cpu for turn in told) / samples * 1e6)
        self.waited.append(sum(turn.waited for turn in told) / seconds / len(self.pipes))

    def end(self) -> None:
        """Ask the processes to end, and make sure of it."""
        self._signal(signal.SIGCONT)
        for pipe in self.pipes:
            with contextlib.suppress(OSError):
                pipe.send(0)
        for process in self.processes:
            process.join(10)
            process.kill()
            process.join()

    def _replies(self) -> list[Any]:
        try:
            replies = [pipe.recv() for pipe in self.pipes]
        except EOFError:
            replies = ["a process has ended without a word"]
        if errors := [reply for reply in replies if isinstance(reply, str)]:
            raise SystemExit(f"{self.kind}, {TITLES[self.kind]}: {errors[0]}")
        return replies

    def _signal(self, number: int) -> None:
        for process in self.processes:
            if process.exitcode is None:
                os.kill(process.pid, number)


def _child(kind: str, pipe: Connection, rank: int, place: Place) -> None:
    """A process of a contestant; it dies with its parent, and its chatter goes to a file."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    log = os.open(place.scratch / f"{kind}{rank}.log", os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(log, stream)
    try:
        if kind == "A":
            rechub_dist(pipe, rank, place)
        elif kind == "B":
            torchrec_loop(pipe, rank, place)
        else:
            torch_rechub(pipe, place, loader=kind == "C")
    except Exception:
        pipe.send(traceback.format_exc())


def _busy() -> float:
    """CPU seconds that the whole machine has worked."""
    user, nice, system, _idle, _iowait, irq, softirq = map(int, Path("/proc/stat").read_text().split()[1:8])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def _port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _prepare(cache: Path, rows: int) -> Path:
    """The data set, made at first use."""
    from rechub_dist.data.prepare.synthetic import synthesize  # noqa: PLC0415

    folder = cache / f"deepfm-{DENSE}-{SPARSE}x{VOCABULARY}-{rows}"
    if not (folder / "dataset.yaml").exists():
        cache.mkdir(parents=True, exist_ok=True)
        synthesize(folder, rows, dense=DENSE, sparse=SPARSE, vocabulary=VOCABULARY)
    return folder


def _show(console: Console, contestants: list[Contestant]) -> None:
    first = contestants[0]
    table = Table(title=f"DeepFM training, global batch {BATCH}", title_justify="left")
    table.add_column("contestant")
    for heading in ("samples/s", f"{first.kind}/x", "CPU s for 1M", f"{first.kind}/x by CPU"):
        table.add_column(heading, justify="right")
    for one in contestants:
        by_clock = [a / x for a, x in zip(first.rates, one.rates, strict=True)]
        by_cpu = [x / a for a, x in zip(first.cpu, one.cpu, strict=True)]
        cells = (_spread(one.rates, ",.0f"), _spread(by_clock), _spread(one.cpu, ".1f"), _spread(by_cpu))
        table.add_row(f"{one.kind} {TITLES[one.kind]}", *cells)
    console.print(table)
    if first.kind == "A":
        console.print(f"A waited for data {_spread([100 * share for share in first.waited], '.1f')} % of its time")
    cores = os.cpu_count() or 1
    foreign = sum(one.foreign for one in contestants) / sum(one.seconds for one in contestants) / cores
    console.print(
        f"median (min-max) of {len(first.rates)} rounds; torch {torch.__version__}, {cores} cores, of which other "
        f"programs took {foreign:.0%}{'; trust CPU seconds rather than the clock' if foreign > 0.1 else ''}"
    )


def _spread(values: list[float], form: str = ".2f") -> str:
    low, middle, high = (format(v, form) for v in (min(values), statistics.median(values), max(values)))
    return f"{middle} ({low}-{high})"


if __name__ == "__main__":
    typer.run(main)
