"""Checkpoints: a folder a step, visible only when complete, loaded on any number of ranks under any sharding."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException, FileSystemReader, FileSystemWriter

from rechub_dist.distributed.runtime import Runtime
from rechub_dist.distributed.state import State
from rechub_dist.errors import UserError, one_line

_STEP = re.compile(r"step-(\d{10})")


@dataclass(frozen=True)
class Position:
    """Where a run stands: applied steps in all, and the best evaluation so far.

    The data position follows from the step: the epoch is step // steps an epoch.
    """

    step: int = 0
    best_step: int | None = None
    best_metrics: dict[str, float] = field(default_factory=dict)
    evaluations_since_best: int = 0
    stopped_early: bool = False
    unevaluated: bool = False  # saved before the evaluation that is due at this step


class Checkpoints:
    """The checkpoints of one output folder.

    A checkpoint is written beside its place and moved there when every rank's part, the run's identity and a list of
    file sizes are on disk. All methods are collective.
    """

    def __init__(self, folder: Path, runtime: Runtime, keep_last: int) -> None:
        self.folder = folder
        self._runtime = runtime
        self._keep_last = keep_last

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, oldest first."""
        return saved_steps(self.folder)

    def save(self, state: State, position: Position, identity: dict[str, Any], config: str) -> None:
        """Save, then remove checkpoints beyond `keep_last`, the best excepted.

        Raises:
            UserError: nothing could be written (a full disk, say); older checkpoints are untouched.
        """
        target = self._path(position.step)
        partial = self.folder / f".{target.name}.partial"
        self._on_main(lambda: _fresh(partial))
        try:
            dcp.save(state.entries, storage_writer=FileSystemWriter(partial, single_file_per_rank=True))
        except CheckpointException as error:
            self._on_main(lambda: shutil.rmtree(partial, ignore_errors=True))
            raise UserError(f"{target}: cannot be saved: {_cause(error)}") from error

        def publish() -> None:
            run = {"position": asdict(position), "identity": identity, "config": config}
            _write(partial / "run.json", json.dumps(run, indent=1))
            sizes = {file.name: file.stat().st_size for file in sorted(partial.iterdir())}
            _write(partial / "manifest.json", json.dumps(sizes, indent=1))
            shutil.rmtree(target, ignore_errors=True)
            partial.rename(target)
            _sync(self.folder)
            self._retain(position)

        self._on_main(publish)

    def load(self, state: State, identity: Callable[[int], dict[str, Any]]) -> Position | None:
        """Load the newest good checkpoint of the run in place; None if there is none at all.

        `identity` gives the run's identity at a step: that of data which grows depends on how far the run is.

        A damaged checkpoint is refused by name, on stderr, and the one before it is taken.

        Raises:
            UserError: the checkpoint is of another run (lists the keys that differ), or every one is damaged.
        """
        damaged = []
        for step in reversed(self.steps()):
            path = self._path(step)
            run = self._on_main(lambda p=path: read_run(p))  # type: ignore[misc]
            if isinstance(run, str):
                damaged.append(run)
            else:
                self._same_run(run["identity"], identity(run["position"]["step"]), path)
                error = load_state(path, state)
                if error is None:
                    return Position(**run["position"])
                damaged.append(error)
            if self._runtime.is_main:
                print(f"warning: {damaged[-1]}; trying the checkpoint before it", file=sys.stderr, flush=True)
        if damaged:
            raise UserError(f"{self.folder}: no checkpoint can be read: {damaged[0]}; remove the folder to start anew")
        return None

    def load_best(self, state: State) -> int:
        """Load the best checkpoint in place, or the newest where none is best; returns its step.

        Raises:
            UserError: there is none, or it is damaged.
        """
        steps = self.steps()
        if not steps:
            raise UserError(f"{self.folder}: holds no checkpoint; train the run first")
        run = self._on_main(lambda: read_run(self._path(steps[-1])))
        if isinstance(run, str):
            raise UserError(run)
        best = run["position"]["best_step"]
        step = int(best) if best is not None else steps[-1]
        self.load_weights(state, step)
        return step

    def load_weights(self, state: State, step: int) -> None:
        """Load one step's checkpoint in place.

        Raises:
            UserError: it is damaged.
        """
        path = self._path(step)
        run = self._on_main(lambda: read_run(path))
        error = run if isinstance(run, str) else load_state(path, state)
        if error is not None:
            raise UserError(error)

    def _same_run(self, saved: dict[str, Any], identity: dict[str, Any], path: Path) -> None:
        differing = differences(saved, identity)
        if differing:
            raise UserError(
                f"{path.parent.parent} holds another run; these differ (saved -> wanted): {'; '.join(differing)}. "
                f"Choose another output_dir, or remove that folder"
            )

    def _retain(self, position: Position) -> None:
        keep = {*self.steps()[-self._keep_last :], position.best_step}
        for step in self.steps():
            if step not in keep:
                # Renamed first: half a deleted checkpoint must not look like a damaged one.
                doomed = self.folder / f".{self._path(step).name}.deleted"
                self._path(step).rename(doomed)
                shutil.rmtree(doomed)

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:010d}"

    def _on_main(self, work: Callable[[], Any]) -> Any:
        """Do file work on the main rank, and give its result or error to all."""

        def guarded() -> Any:
            try:
                return work()
            except OSError as error:
                raise UserError(f"{error.filename or self.folder}: {error.strerror}") from error

        return self._runtime.from_main(guarded)


def saved_steps(folder: Path) -> list[int]:
    """The steps that have a checkpoint below `folder`, oldest first."""
    found = (_STEP.fullmatch(path.name) for path in folder.glob("step-*"))
    return sorted(int(match.group(1)) for match in found if match)


def read_run(path: Path) -> dict[str, Any] | str:
    """A checkpoint's run record, or what is wrong with the checkpoint: every file must be there at its full size."""
    try:
        sizes = json.loads((path / "manifest.json").read_text())
        for name, size in sizes.items():
            actual = (path / name).stat().st_size
            if actual != size:
                return f"checkpoint {path} is damaged: {name} has {actual} bytes instead of {size}"
        return json.loads((path / "run.json").read_text())
    except (OSError, ValueError) as error:
        return f"checkpoint {path} is damaged: {error}"


def load_state(path: Path, state: State) -> str | None:
    """Load a checkpoint's tensors in place; returns what is wrong instead of raising. Collective."""
    try:
        dcp.load(state.entries, storage_reader=FileSystemReader(path))
    except CheckpointException as error:
        return f"checkpoint {path} cannot be read: {_cause(error)}"
    state.commit()
    return None


def differences(saved: Any, wanted: Any, path: str = "") -> list[str]:
    """The keys at which two trees differ, each with both values."""
    if isinstance(saved, dict) and isinstance(wanted, dict):
        keys = list(dict.fromkeys([*saved, *wanted]))
        return [
            line for key in keys for line in differences(saved.get(key), wanted.get(key), f"{path}.{key}".lstrip("."))
        ]
    return [] if saved == wanted else [f"{path} {json.dumps(saved)} -> {json.dumps(wanted)}"]


def _cause(error: CheckpointException) -> str:
    for failure in error.failures.values():
        exception = failure[0] if isinstance(failure, tuple) else failure
        return one_line(exception)[:300]
    return one_line(error)[:300]


def _fresh(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
