"""A folder in which a mistake is made: a small data set, a run file over it, and a run that was trained."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

ONE, BOTH = (1,), (1, 2)  # numbers of ranks
TRAIN = ["train", "run.yaml"]
LONGEST = 500  # characters of a line
_SECONDS = 240  # after which a command hangs
# Lines on stderr that may come before the one that counts: what a run says as it goes on.
_PROGRESS = re.compile(r"warning: |DeepFM: |epoch \d|step \d|warm start from |table ")

SCHEMA: dict[str, Any] = {
    "name": "small",
    "tables": {"item": {"rows": 30}},
    "features": {
        "user": {"kind": "sparse", "rows": 40},
        "item": {"kind": "sparse", "table": "item"},
        "history": {"kind": "sequence", "table": "item", "max_length": 4},
        "age": {"kind": "dense"},
    },
    "labels": {"click": {}},
}
RUN: dict[str, Any] = {
    "output_dir": "out",
    "device": "cpu",
    "data": {"root": "data", "batch_size": 32, "labels": ["click"]},
    "model": {
        "name": "DeepFM",
        "features": ["user", "item", "age"],
        "hidden_units": [4],
        "dropout_rates": 0,
        "embedding_dim": 4,
    },
    "train": {"epochs": 1},
    "checkpoint": {"every_steps": 2},
    "distributed": {"threads": 1},
}


class Scene:
    """A folder of its own, with `data/` and `run.yaml`; commands run in it, so that all paths are relative."""

    def __init__(self, folder: Path, trained: Path | None) -> None:
        self.folder = folder
        self._trained = trained
        folder.mkdir(parents=True)
        write_data(folder / "data")
        self.write("run.yaml", RUN)

    def __truediv__(self, name: str) -> Path:
        return self.folder / name

    def write(self, name: str, tree: Any) -> Path:
        """Write a file: text and bytes as they are, else YAML; its folder is made."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = tree if isinstance(tree, str | bytes) else yaml.safe_dump(tree, sort_keys=False)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    def run(self, **sections: Any) -> list[str]:
        """Write the run file, sections merged over the usual ones; the command that trains it."""
        tree = dict(RUN)
        for name, section in sections.items():
            tree[name] = {**RUN.get(name, {}), **section} if isinstance(section, dict) else section
        self.write("run.yaml", tree)
        return TRAIN

    def schema(self, **changes: Any) -> list[str]:
        """Write the schema with features added or changed (None removes one); the command that trains on it."""
        features = {**SCHEMA["features"], **changes}
        found = {name: feature for name, feature in features.items() if feature is not None}
        self.write("data/dataset.yaml", {**SCHEMA, "features": found})
        return TRAIN

    def last(self, split: str = "train") -> Path:
        """The last file of a split, so that a late rank meets it."""
        return sorted((self / f"data/{split}").glob("*.parquet"))[-1]

    def column(self, name: str, values: Any, split: str = "train") -> list[str]:
        """Put `values` in place of a column of the split's last file; the command that trains on it."""
        path = self.last(split)
        table = pq.read_table(path)
        pq.write_table(table.set_column(table.column_names.index(name), name, pa.array(values)), path)
        return TRAIN

    def without(self, name: str, split: str = "train") -> None:
        """Leave a column out of the split's last file."""
        pq.write_table(pq.read_table(self.last(split)).drop_columns([name]), self.last(split))

    def spoil(self, name: str, count: int) -> None:
        """Write other bytes over the first pages of a Parquet file."""
        content = bytearray((self / name).read_bytes())
        content[4 : 4 + count] = b"\xff" * count
        self.write(name, bytes(content))

    def trained(self) -> Path:
        """The output folder of a run that was trained, as `out`."""
        assert self._trained is not None
        return shutil.copytree(self._trained, self / "out", symlinks=True)

    def checkpoints(self) -> list[Path]:
        """The checkpoints of a trained run, oldest first."""
        return sorted((self.trained() / "checkpoints").glob("step-*"))


def write_data(root: Path) -> None:
    """90 rows to train on in three files, 30 each to validate and to test."""
    for split, files in (("train", 3), ("valid", 1), ("test", 1)):
        (root / split).mkdir(parents=True)
        for part in range(files):
            rows = range(30 * part, 30 * part + 30)
            table = pa.table(
                {
                    "user": [row * 7 % 40 for row in rows],
                    "item": [row * 11 % 30 for row in rows],
                    "history": [[row % 30, row * 3 % 30] for row in rows],
                    "age": [row / 90 for row in rows],
                    "click": [row % 3 % 2 for row in rows],
                }
            )
            pq.write_table(table, root / split / f"part-{part}.parquet", row_group_size=15)
    (root / "dataset.yaml").write_text(yaml.safe_dump(SCHEMA, sort_keys=False))


@dataclass(frozen=True)
class Mistake:
    """A mistake: what it is, what makes it in a scene and returns the command, and the numbers of ranks to try."""

    what: str
    make: Callable[[Scene], list[str]]
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class Outcome:
    """What came of a mistake: the line of the error, the exit code, and why that is not as it should be, if so."""

    what: str
    ranks: int
    line: str
    code: int | None
    seconds: float
    fault: str | None


class Section:
    """Mistakes of one kind, in the order in which they are added."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.mistakes: list[Mistake] = []

    def mistake(self, what: str, ranks: tuple[int, ...] = (1,)) -> Callable[[Any], Any]:
        """Add the function that is decorated, which makes the mistake and returns the command."""

        def add(make: Callable[[Scene], list[str]]) -> Callable[[Scene], list[str]]:
            self.mistakes.append(Mistake(what, make, ranks))
            return make

        return add

    def table(self, *rows: tuple[str, tuple[int, ...], Callable[[Scene], object]]) -> None:
        """Add mistakes of one expression: what each is called, its ranks, and what makes it.

        An expression that gives a command ends in that one, any other in training.
        """
        for what, ranks, change in rows:

            def make(scene: Scene, change: Callable[[Scene], object] = change) -> list[str]:
                found = change(scene)
                return found if isinstance(found, list) else TRAIN

            self.mistakes.append(Mistake(what, make, ranks))

    def settings(self, ranks: tuple[int, ...], *overrides: tuple[str, ...]) -> None:
        """Add mistakes that are made by `--set` alone; each is called by what it sets."""
        for given in overrides:
            options = [part for item in given for part in ("--set", item)]
            self.mistake(f"`{' '.join(given)}`", ranks)(lambda _, options=options: [*TRAIN, *options])


def outcome(mistake: Mistake, ranks: int, folder: Path, trained: Path | None) -> Outcome:
    """Make a mistake in a folder of its own, by a real command, and judge what comes of it."""
    scene = Scene(folder, trained)
    arguments = mistake.make(scene)
    command = [sys.executable, "-m", "rechub_dist", *arguments, *(["--nproc", str(ranks)] if ranks > 1 else [])]
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder.parent / "cache")}
    began = time.monotonic()
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return Outcome(mistake.what, ranks, "", None, _SECONDS, f"it has not ended after {_SECONDS} s")
    finally:
        _let_remove(folder)
    seconds = time.monotonic() - began
    lines = [line for line in done.stderr.splitlines() if line.strip() and not _PROGRESS.match(line)]
    line = _shortened(lines[-1], folder) if lines else ""
    return Outcome(mistake.what, ranks, line, done.returncode, seconds, _fault(done, lines, line))


def _fault(done: subprocess.CompletedProcess[str], lines: list[str], line: str) -> str | None:
    if "Traceback" in done.stdout + done.stderr:
        return f"a traceback: {done.stderr[-2000:]}"
    if done.returncode != 2:
        return f"exit code {done.returncode}: {done.stderr[-2000:]}"
    if len(lines) != 1 or not line.startswith("error: "):
        return f"{len(lines)} lines: {lines}"
    return f"{len(line)} characters" if len(line) > LONGEST else None


def _shortened(line: str, folder: Path) -> str:
    """A line with paths relative to where the command ran."""
    return line.replace(f"{os.path.realpath(folder)}/", "").replace(f"{folder}/", "")


def _let_remove(folder: Path) -> None:
    """Give back the rights that a mistake has taken."""
    for path, _, _ in os.walk(folder):
        os.chmod(path, 0o700)
