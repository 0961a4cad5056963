"""What a part is given: rounds, folders, its record, and contests that fit them."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rechub_dist.reporting.records import read_records
from speed import bare, ours, rechub
from speed.machine import ROOT
from speed.record import Figure, Record, ratio
from speed.shapes import RANKS, Shape, Tree
from speed.turns import Contest, Contestant, Pace, contest

OURS, BARE = "rechub_dist, from Parquet", "TorchRec alone, from memory"
IN_MEMORY = 200  # batches that contestants hold which do not read


@dataclass
class Bench:
    """A part's surroundings."""

    record: Record
    out: Path
    scratch: Path
    _contests: int = 0
    _foreign: float = 0.0
    _busy: str = ""

    @property
    def smoke(self) -> bool:
        """Whether sizes are those that only show that it works."""
        return self.record.smoke

    @property
    def rounds(self) -> int:
        """Rounds of each contest."""
        return self.record.rounds

    @property
    def cache(self) -> Path:
        """Where data sets are kept."""
        return self.out / "data"

    def say(self, line: str) -> None:
        """Print it, for who watches or reads the log."""
        print(line, flush=True)

    def add(self, *figures: Figure) -> None:
        """Record figures, at once: what is measured is kept, whatever comes after it."""
        self.record.figures += figures
        self.record.write(self.out / "records")

    def note(self, sentence: str) -> None:
        """Record a sentence for the page."""
        if sentence not in self.record.notes:
            self.record.notes.append(sentence)

    def sized(self, shape: Shape) -> Shape:
        """The shape, in small where that is wanted, with its data set ready for all ranks."""
        found = shape.small() if self.smoke else shape
        began = time.monotonic()
        found.data.prepare(self.cache)
        self.say(f"  {found.name}: data after {time.monotonic() - began:.0f} s")
        return found

    def pace(self, seconds: float = 2.0) -> Pace:
        """Rounds of two turns each of `seconds`."""
        return Pace(self.rounds, 1, 0.1, 4) if self.smoke else Pace(self.rounds, 2, seconds)

    def contest(self, group: str | None, contestants: list[Contestant], pace: Pace | None = None) -> Contest:
        """Let them take turns; their samples/s are recorded in the table `group`, if there is one."""
        self._contests += 1
        scratch = self.scratch / f"contest-{self._contests}"
        found = contest(contestants, pace or self.pace(), scratch, self.say)
        for number, one in enumerate(contestants):
            records = read_records(scratch / f"contestant-{number}" / "run")
            found.losses[one.name] = {one["step"]: one["loss"] for one in records if one["split"] == "train"}
        shutil.rmtree(scratch, ignore_errors=True)
        if group is not None:
            self.add(*(Figure(group, name, "samples/s", result.rates) for name, result in found.results.items()))
        if found.foreign > max(0.05, self._foreign):
            self.record.notes = [note for note in self.record.notes if note != self._busy]
            self._foreign = found.foreign
            self._busy = f"Other programs took up to {found.foreign:.0%} of the cores: trust CPU time, not the clock."
            self.note(self._busy)
        return found

    def compare(
        self, group: str, found: Contest, one: str, other: str, target: float | None = None, *, cpu: bool = True
    ) -> None:
        """Record the ratio of two contestants' rates, and by CPU time, which other programs hardly change."""
        name = f"{one} / {other}"
        self.add(ratio(group, name, found[one].rates, found[other].rates, target))
        if cpu:
            self.add(ratio(group, f"{name}, by CPU time", found[other].cpu, found[one].cpu))

    def ours(
        self,
        shape: Shape,
        name: str = OURS,
        changes: Tree | None = None,
        *,
        ranks: int = RANKS,
        threads: int = 1,
        env: dict[str, str] | None = None,
        change: Callable[[], None] | None = None,
    ) -> Contestant:
        """The product's trainer."""
        given = {"shape": shape, "cache": self.cache, "changes": changes or {}}
        enter = partial(ours.train, **given) if change is None else partial(ours.train_changed, **given, change=change)
        return Contestant(name, enter, shape.batch, ranks, threads, env or {})

    def bare(self, shape: Shape, name: str = BARE, *, ranks: int = RANKS) -> Contestant:
        """The barest TorchRec loop."""
        batches = min(IN_MEMORY, shape.data.rows * 8 // 10 // shape.batch)
        enter = partial(bare.loop, shape=shape, cache=self.cache, batches=batches)
        return Contestant(name, enter, shape.batch, ranks)

    def rechub(self, shape: Shape, name: str, *, loader: bool) -> Contestant:
        """torch-rechub, in one process of as many threads as others have ranks; a step of it takes several times as
        long.
        """
        batches = min(IN_MEMORY, shape.data.rows * 8 // 10 // shape.batch)
        enter = partial(rechub.loop, shape=shape, cache=self.cache, batches=batches, loader=loader)
        return Contestant(name, enter, shape.batch, ranks=1, threads=RANKS, warmup=2)

    def folder(self) -> Path:
        """A new folder that goes with the part."""
        return Path(tempfile.mkdtemp(dir=self.scratch))


def command(*arguments: str, cwd: Path | None = None, limit: float = 900) -> str:
    """What a command of this Python prints.

    Raises:
        RuntimeError: it has failed; with its last line.
    """
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=False, cwd=cwd or ROOT, timeout=limit
    )
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["it has printed nothing"]
        raise RuntimeError(f"{' '.join(arguments[:4])} ...: exit code {done.returncode}: {lines[-1]}")
    return done.stdout
