"""How fast an import is beside pandas and bare SQL that make the same tables, and how much memory it takes.

    python benchmarks/imports.py                      # three sizes, interleaved rounds
    python benchmarks/imports.py --sizes 1000000 --rounds 5
    python benchmarks/imports.py --memory-sizes 1000000,3000000,10000000 --rounds 0

The sources are generated: a log of 7 columns as CSV, 50 rows a user, and tables of users and items. The plan joins
both, splits by time, makes histories of 50 items, and has 10 features besides. Each run is a process of its own: its
time is without the start of Python and the imports of packages, its memory the most that the process ever held, and
`disk` the most that its folder held meanwhile. A run's tables are compared with the others' before its time counts.

Rounds are interleaved and the order in a round turns, so that what else the machine does hits all alike; a ratio is the
median of the rounds' ratios, beside the smallest and the largest.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Annotated, NamedTuple

import typer
from rich.console import Console
from rich.table import Table as Screen

MB = 1 << 20


class Run(NamedTuple):
    """One run: seconds, and bytes of memory and of disk at the peak."""

    seconds: float
    cpu: float
    memory: int
    disk: int


def size_of(folder: Path) -> int:
    """The bytes on disk below a folder, whose files come and go."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(root, name)).st_blocks * 512
            except OSError:
                continue
    return total


def run(name: str, source: Path, scratch: Path, memory: int, threads: int) -> tuple[Run, str]:
    """Run a contestant in a process of its own; returns what it took, and the digest of its tables."""
    out = scratch / "out"
    arguments = [sys.executable, __file__, "--one", name, str(source), str(out), str(memory), str(threads)]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
    disk, ended = 0, threading.Event()

    def watch() -> None:
        nonlocal disk
        while not ended.wait(0.5):
            disk = max(disk, size_of(scratch))

    watcher = threading.Thread(target=watch)
    watcher.start()
    text, _ = process.communicate()
    ended.set()
    watcher.join()
    shutil.rmtree(out, ignore_errors=True)
    if process.returncode:
        raise SystemExit(f"{name} failed")
    found = json.loads(text)
    return Run(found["seconds"], found["cpu"], found["memory"], disk), found["digest"]


def one(name: str, source: str, out: str, memory: str, threads: str) -> None:
    """Run a contestant here, and print what it took as JSON."""
    import import_peers  # noqa: PLC0415 - slow to import, which counts for none

    began, cpu = time.perf_counter(), time.process_time()
    import_peers.CONTESTANTS[name](Path(source), Path(out), int(memory), int(threads))
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    digest = repr(import_peers.digest(Path(out)))
    print(json.dumps({"seconds": seconds, "cpu": cpu, "memory": peak, "digest": digest}))


def spread(ratios: list[float]) -> str:
    """The median, and the range."""
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def main(
    sizes: Annotated[str, typer.Option(help="Rows of the logs, with commas.")] = "300000,1000000,3000000",
    memory_sizes: Annotated[str, typer.Option(help="Rows of logs that the import alone reads.")] = "",
    rounds: Annotated[int, typer.Option(min=0, help="Interleaved rounds.")] = 3,
    memory: Annotated[int, typer.Option(help="MB that the databases may use.")] = 2048,
    threads: Annotated[int, typer.Option(help="Threads of all contestants.")] = 2,
    contestants: Annotated[str, typer.Option(help="With commas; the first is compared with the others.")] = (
        "import,sql,pandas"
    ),
    folder: Annotated[Path | None, typer.Option(help="Where data is generated and removed afterwards.")] = None,
) -> None:
    """Time an import, and measure its memory."""
    from import_peers import generate  # noqa: PLC0415 - slow to import, which counts for none

    names = contestants.split(",")
    with tempfile.TemporaryDirectory(dir=folder) as base:
        jobs = [(int(n), names, rounds) for n in sizes.split(",") if rounds]
        jobs += [(int(n), names[:1], 1) for n in memory_sizes.split(",") if n]
        screen = Screen("rows", "CSV MB", "contestant", "s", "cpu s", "rows/s", "import takes", "MB", "disk MB")
        for rows, who, times in jobs:
            source, scratch = Path(base) / str(rows), Path(base) / "scratch"
            scratch.mkdir()
            generate(source, rows)
            csv = sum(file.stat().st_size for file in source.glob("*.csv"))
            found: dict[str, list[Run]] = {name: [] for name in who}
            digests: dict[str, str] = {}
            for number in range(times):
                turn = number % len(who)
                for name in who[turn:] + who[:turn]:
                    took, digests[name] = run(name, source, scratch, memory * MB, threads)
                    found[name].append(took)
            different = [name for name in who if digests[name] != digests[who[0]]]
            if different:
                raise SystemExit(f"the tables differ: {digests}")
            for name in who:
                seconds = statistics.median(r.seconds for r in found[name])
                ratios = [mine.seconds / r.seconds for mine, r in zip(found[who[0]], found[name], strict=True)]
                screen.add_row(
                    f"{rows:,}", f"{csv / 1e6:,.0f}", name, f"{seconds:.1f}",
                    f"{statistics.median(r.cpu for r in found[name]):.1f}", f"{rows / seconds:,.0f}",
                    "" if name == who[0] else spread(ratios),
                    f"{max(r.memory for r in found[name]) / MB:,.0f}", f"{max(r.disk for r in found[name]) / MB:,.0f}",
                )  # fmt: skip
            shutil.rmtree(source)
            shutil.rmtree(scratch)
        Console(width=120).print(screen)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        one(*sys.argv[2:])
    else:
        typer.run(main)
