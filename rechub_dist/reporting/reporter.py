"""Progress bar, `metrics.jsonl` and TensorBoard of a run. Only the main rank's reporter is not quiet."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TextIO

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch.utils.tensorboard import SummaryWriter

from rechub_dist.reporting.logs import LOGGER
from rechub_dist.reporting.metrics import Metrics
from rechub_dist.reporting.records import RECORDS
from rechub_dist.reporting.saves import Save
from rechub_dist.reporting.strict_json import finite
from rechub_dist.skips import Skipped

_WARNINGS = 10  # skipped pieces of files that are reported one by one


class Reporter:
    """Writes the records of a run below `folder` and shows progress.

    On a terminal, and in a notebook with ipywidgets, progress is a bar; elsewhere a line every `line_seconds`.

    Args:
        folder: the output folder; None writes no records.
        quiet: write and show nothing except to the log and `metrics`; for ranks other than the main rank.
        start_step: the step that a resumed run starts at; records of later steps are dropped.
        line_seconds: seconds between progress lines.
        json_lines: show nothing on the console, since the log goes to stderr.
        metrics: Prometheus metrics to update on every rank.
        records: queue that receives each record of `metrics.jsonl`.
    """

    def __init__(
        self,
        folder: Path | None,
        *,
        quiet: bool,
        start_step: int = 0,
        line_seconds: float = 10.0,
        json_lines: bool = False,
        metrics: Metrics | None = None,
        records: SimpleQueue[dict[str, Any]] | None = None,
    ) -> None:
        self.quiet = quiet
        self.console = Console(stderr=True, quiet=quiet or json_lines)
        self._metrics = metrics
        self._records = records
        self._folder = folder
        self._warnings = 0
        self._warned = False
        self._line_seconds = line_seconds
        self._last_line = time.monotonic()
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._file: TextIO | None = None
        self._board: SummaryWriter | None = None
        if not quiet and folder is not None:
            _forget_after(folder / RECORDS, start_step)
            self._open(folder, purge=start_step + 1 if start_step else None)

    def _open(self, folder: Path, purge: int | None = None) -> None:
        self._file = (folder / RECORDS).open("a", encoding="utf-8")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=purge)

    def _open_anew(self, folder: Path, file: TextIO) -> None:
        """Recreate the files if somebody deleted them, since writing to a deleted file raises no error."""
        with suppress(OSError):
            if os.path.samestat(os.stat(folder / RECORDS), os.fstat(file.fileno())):
                return
        self.say(f"warning: {folder / 'metrics.jsonl'} was deleted: it is created again, the records so far are lost")
        file.close()
        folder.mkdir(parents=True, exist_ok=True)
        self._open(folder)

    def record(self, split: str, step: int, epoch: int, values: Mapping[str, float]) -> None:
        """Write a line of `metrics.jsonl`, and a TensorBoard scalar `<split>/<name>` for each value."""
        if self._metrics is not None:
            self._metrics.record(split, step, values)
        if self._file is None or self._board is None or self._folder is None:
            return
        with self._or_warn():
            self._open_anew(self._folder, self._file)
        entry = finite({"step": step, "epoch": epoch, "split": split, **values})
        if self._records is not None:
            self._records.put(entry)
        with self._or_warn():
            self._file.write(json.dumps(entry) + "\n")
            self._file.flush()
        with self._or_warn():
            for name, value in values.items():
                self._board.add_scalar(f"{split}/{name}", value, step)

    def skipped(self, split: str, step: int, skips: Iterable[Skipped]) -> None:
        """Write a line of `skipped.jsonl` for each skipped piece of a file, and a warning for the first ones."""
        for skip in skips if not self.quiet else ():
            if self._folder is not None:
                with self._or_warn(), (self._folder / "skipped.jsonl").open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"step": step, "split": split, **skip._asdict()}) + "\n")
            self._warnings += 1
            if self._warnings <= _WARNINGS:
                rows = "the file" if skip.rows is None else f"{skip.rows:,} rows"
                self.say(f"skipped {rows} of {split}: {skip.message}")
            if self._warnings == _WARNINGS:
                self.say("more are listed in skipped.jsonl in the output folder")

    def saved(self, save: Save, epoch: int) -> None:
        """Report the result of a save: a record with split `checkpoint`, or a warning."""
        if save.error is not None:
            self.say(f"warning: {save.error}; training continues, older checkpoints are unchanged")
            return
        if save.warning is not None:
            self.say(f"warning: {save.warning}")
        values = {"seconds": save.seconds, "bytes": save.bytes, "blocked_seconds": save.blocked_seconds}
        self.record("checkpoint", save.step, epoch, values)
        self.say(
            f"step {save.step}: saved {save.bytes / 1e6:,.1f} MB in {save.seconds:.2f} s, training waited "
            f"{save.blocked_seconds:.2f} s"
        )

    def histogram(self, name: str, values: np.ndarray, step: int) -> None:
        """Write a TensorBoard histogram."""
        if self._board is not None and len(values):
            with self._or_warn():
                self._board.add_histogram(name, values, step)

    def start(self, what: str, total: int, done: int = 0) -> None:
        """Begin a progress bar of `total` steps, of which `done` are completed."""
        if self.quiet:
            return
        self.finish()
        self._what, self._total, self._began = what, total, time.monotonic()
        self._first = done
        if self.console.is_terminal or (self.console.is_jupyter and find_spec("ipywidgets") is not None):
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
                TimeRemainingColumn(),
            )
            self._progress = Progress(*columns, console=self.console, transient=True)
            self._progress.start()
            self._task = self._progress.add_task(what, total=total, completed=done, note="")

    def advance(self, done: int, note: str = "") -> None:
        """Set the completed steps of the bar to `done`, with `note` beside it."""
        if self.quiet:
            return
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=done, note=note)
        elif time.monotonic() - self._last_line >= self._line_seconds:
            self._last_line = time.monotonic()
            rate = (done - self._first) / max(1e-9, self._last_line - self._began)
            eta = f", ETA {(self._total - done) / rate:.0f} s" if rate > 0 else ""
            self.say(f"{self._what} {done}/{self._total}{', ' if note else ''}{note}{eta}")

    def finish(self) -> None:
        """End the bar."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def say(self, message: str) -> None:
        """Print a line to stderr, and write it to the rank's log."""
        LOGGER.info(message)
        self.console.print(message, highlight=False, markup=False, soft_wrap=True)

    @contextmanager
    def _or_warn(self) -> Iterator[None]:
        """Turn write errors (full or lost disk) into a single warning, so that they cost records but not the run."""
        try:
            yield
        except OSError as error:
            if not self._warned:
                self._warned = True
                reason = error.strerror or error
                self.say(f"warning: {self._folder} cannot be written: {reason}; training continues, records are lost")

    def close(self) -> None:
        """Flush and close everything."""
        self.finish()
        with self._or_warn():
            if self._file is not None:
                self._file.close()
        with self._or_warn():
            if self._board is not None:
                self._board.close()
        if self._metrics is not None:
            self._metrics.close()


def show_summary(console: Console, title: str, rows: Mapping[str, Any]) -> None:
    """Print a two-column table."""
    table = Table(title=title, show_header=False, title_justify="left")
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")  # paths must be complete, to be copied
    for name, value in rows.items():
        table.add_row(name, f"{value:.5f}" if isinstance(value, float) else str(value))
    console.print(table)


def short(values: Mapping[str, float]) -> str:
    """Format as `name value` pairs on one line."""
    return ", ".join(f"{name} {value:.5g}" for name, value in values.items())


def _forget_after(metrics: Path, step: int) -> None:
    """Drop the records of steps that a resumed run repeats, and of the test split, which is evaluated last."""
    if not metrics.exists():
        return
    lines = metrics.read_text(encoding="utf-8", errors="replace").splitlines()
    kept = [line for line in lines if _kept(line, step)]
    if len(kept) < len(lines):
        temporary = metrics.with_suffix(".tmp")
        temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        temporary.replace(metrics)


def _kept(line: str, step: int) -> bool:
    try:
        record = json.loads(line)
        return record["step"] <= step and record["split"] != "test"
    except (ValueError, TypeError, KeyError):
        return False  # a line cut short by a kill
