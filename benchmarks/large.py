"""Tables near the machine's memory: train on two ranks, save, be killed, resume, export; and what memory that takes.

    python benchmarks/large.py --gb 12 --folder /tmp/large

DeepFM with 26 tables of equal size, row-wise Adagrad, on generated data. Memory is the proportional set size (PSS) of
all processes of a command, summed, five times a second: memory that processes share counts once, the page cache not at
all. A run is killed by SIGKILL once its first checkpoint is complete and the second is being written. Writes large.json
into the folder; the data and the runs are removed at the end, unless --keep.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer
import yaml
from rich.console import Console
from rich.table import Table

from rechub_dist.checkpoint import saved_steps
from rechub_dist.reporting.records import read_records

TABLES, DIM, BATCH, EVERY, STEPS = 26, 16, 4096, 20, 60
BYTES_PER_ROW = 4 * DIM + 4 + 4 + 4  # of the vector and the linear weight, each with its state; 12 more in memory
COMMAND = [sys.executable, "-m", "rechub_dist"]


@dataclass
class Measured:
    """A command: its wall time, and the largest sums of its processes' memory."""

    seconds: float
    peak_bytes: int
    output: str


class Watched:
    """A command whose memory is sampled until it ends, with that of its descendants."""

    def __init__(self, arguments: list[str], log: Path) -> None:
        self._began = time.monotonic()
        self._log = log
        with log.open("w") as sink:
            self.process = subprocess.Popen([*COMMAND, *arguments], stdout=sink, stderr=subprocess.STDOUT)
        self._peak = 0
        self._sampler = threading.Thread(target=self._sample, daemon=True)
        self._sampler.start()

    def _sample(self) -> None:
        while self.process.poll() is None:
            self._peak = max(self._peak, sum(map(_pss, _family(self.process.pid))))
            time.sleep(0.2)

    def kill(self) -> None:
        """SIGKILL to all of them."""
        for process in _family(self.process.pid):
            os.kill(process, signal.SIGKILL)

    def end(self, *, expected: int) -> Measured:
        """Wait for its end; exits with its output if the exit status is another than expected."""
        status = self.process.wait()
        self._sampler.join()
        text = self._log.read_text()
        if status != expected:
            sys.exit(f"{' '.join(map(str, self.process.args))} ended with {status}, not {expected}:\n{text[-3000:]}")
        return Measured(time.monotonic() - self._began, self._peak, text)


def _family(process: int) -> list[int]:
    """A process and its descendants."""
    children: dict[int, list[int]] = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(file.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has ended
            continue
        children.setdefault(parent, []).append(int(file.parent.name))
    found = [process]
    for one in found:
        found += children.get(one, [])
    return found


def _pss(process: int) -> int:
    """Bytes of its anonymous memory and its share of shared memory."""
    try:
        text = Path(f"/proc/{process}/smaps_rollup").read_text()
    except OSError:
        return 0
    parts = dict(re.findall(r"^(Pss_Anon|Pss_Shmem): +(\d+) kB", text, re.MULTILINE))
    return sum(int(value) for value in parts.values()) << 10


def main(
    folder: Annotated[Path, typer.Option(help="For data, runs and the record; must not exist.")] = Path("/tmp/large"),
    gb: Annotated[float, typer.Option(help="Size of weights and optimizer states, 10^9 bytes.")] = 12.0,
    ranks: Annotated[int, typer.Option(min=1)] = 2,
    copy_gb: Annotated[float | None, typer.Option(help="checkpoint.copy_gb; default: the run's default.")] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Keep data and runs.")] = False,
) -> None:
    """Train, kill, resume, export; print and write what each took."""
    folder.mkdir(parents=True)
    rows = int(gb * 1e9 / TABLES / BYTES_PER_ROW)
    data, out, bundle = folder / "data", folder / "run", folder / "bundle"
    found: dict[str, Measured] = {}

    def run(name: str, *arguments: str, then: Callable[[Watched], int] | None = None) -> None:
        print(f"{name} ...", flush=True)
        watched = Watched(list(arguments), folder / f"{name}.log")
        found[name] = watched.end(expected=then(watched) if then else 0)

    size = ("--dense", "13", "--sparse", str(TABLES), "--vocabulary", str(rows), "--skew", "1.05")
    run("synthesize", "data", "synthesize", "--out", str(data), "--rows", str(BATCH * STEPS * 5 // 4), *size)
    run_file = folder / "run.yaml"
    run_file.write_text(yaml.safe_dump(_run(data, out, copy_gb), sort_keys=False))
    train = ("train", str(run_file), "--nproc", str(ranks))
    run("killed", *train, then=lambda watched: _kill_in_second_save(watched, out / "checkpoints"))
    left = saved_steps(out / "checkpoints")
    run("resumed", *train)
    run("export", "export", str(out), "--out", str(bundle), "--no-check")
    saves = [one for one in read_records(out) if one["split"] == "checkpoint"]
    record = {
        "rows_of_a_table": rows,
        "state_bytes": saves[-1]["bytes"],
        "ranks": ranks,
        "left_by_the_kill": left,
        "steps": saves[-1]["step"],
        "saves": [{key: one[key] for key in ("step", "seconds", "blocked_seconds")} for one in saves],
        **{name: {k: v for k, v in asdict(one).items() if k != "output"} for name, one in found.items()},
    }
    (folder / "large.json").write_text(json.dumps(record, indent=1))
    _show(found, saves, left)
    if not keep:
        for path in (data, out, bundle):
            shutil.rmtree(path)


def _run(data: Path, out: Path, copy_gb: float | None) -> dict[str, object]:
    return {
        "version": 2,
        "output_dir": str(out),
        "data": {"root": str(data), "batch_size": BATCH, "valid": None, "test": None},
        "model": {
            "name": "DeepFM",
            "features": [f"sparse_{i}" for i in range(TABLES)] + [f"dense_{i}" for i in range(13)],
            "hidden_units": [64, 32],
            "dropout_rates": 0.0,
            "embedding_dim": DIM,
        },
        "embedding": {"sharding": "table_wise"},
        "checkpoint": {"every_steps": EVERY, "keep_last": 1, **({} if copy_gb is None else {"copy_gb": copy_gb})},
        "train": {"max_steps": STEPS},
    }


def _kill_in_second_save(watched: Watched, checkpoints: Path) -> int:
    while watched.process.poll() is None:
        first, second = (checkpoints / f"step-{step:010d}" for step in (EVERY, 2 * EVERY))
        if (first / "manifest.json").exists() and second.exists():
            watched.kill()
            break
        time.sleep(0.1)
    return -signal.SIGKILL


def _show(found: dict[str, Measured], saves: list[dict[str, float]], left: list[int]) -> None:
    table = Table("", "seconds", "peak memory, GB", title=f"{saves[-1]['bytes'] / 1e9:.2f} GB of weights and states")
    for name, one in found.items():
        table.add_row(name, f"{one.seconds:.0f}", f"{one.peak_bytes / 1e9:.2f}")
    console = Console()
    console.print(table)
    console.print(
        f"after the kill there were checkpoints of steps {left}; the run ended at step {saves[-1]['step']:.0f}"
    )
    for one in saves:
        console.print(
            f"save of step {one['step']}: {one['seconds']:.1f} s, training waited {one['blocked_seconds']:.1f} s"
        )


if __name__ == "__main__":
    typer.run(main)
