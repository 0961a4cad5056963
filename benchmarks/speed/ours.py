"""rechub_dist as a contestant: its trainer, evaluation and prediction; nothing is put into them but a gate around the
reader.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import yaml

from rechub_dist.assembly.parts import Parts, build
from rechub_dist.assembly.readers import evaluation_reader, prediction_reader
from rechub_dist.assembly.sharded import shard_train_module
from rechub_dist.config import RunConfig
from rechub_dist.data.passes import Epochs
from rechub_dist.data.run_file import load_run
from rechub_dist.distributed.runtime import Runtime, runtime
from rechub_dist.embedding.sharding import draw_tables
from rechub_dist.evaluation.evaluate import evaluate
from rechub_dist.inference.predict import Prediction, predict
from rechub_dist.reporting.reporter import Reporter
from rechub_dist.training.trainer import Trainer
from speed.shapes import Shape, Tree
from speed.turns import Seat, Turn, peak_bytes


def train(pipe: Connection, seat: Seat, shape: Shape, cache: Path, changes: Tree) -> None:
    """The product's own trainer, end to end from Parquet: full shuffle, control all-reduce, progress and logs."""
    with _joined(seat, shape, cache, changes) as (config, rt):
        trainer = Trainer(config, rt)
        passes = trainer.passes
        assert isinstance(passes, Epochs)
        passes.reader = Gate(passes.reader, pipe)  # type: ignore[assignment]
        trainer.fit()


def train_changed(
    pipe: Connection, seat: Seat, shape: Shape, cache: Path, changes: Tree, change: Callable[[], None]
) -> None:
    """As `train`, in a process that `change` has changed first."""
    change()
    train(pipe, seat, shape, cache, changes)


def evaluating(pipe: Connection, seat: Seat, shape: Shape, cache: Path, changes: Tree) -> None:
    """Evaluations of the train split, one after another."""
    with _joined(seat, shape, cache, changes) as (config, rt):
        parts = _with_tables(config, rt)
        reader: Any = Gate(evaluation_reader(config, parts, rt, f"{config.data.root}/train"), pipe)
        while True:
            evaluate(parts, reader, rt)


def predicting(pipe: Connection, seat: Seat, shape: Shape, cache: Path, changes: Tree) -> None:
    """Predictions of the train split, one after another, into files."""
    with _joined(seat, shape, cache, changes) as (config, rt):
        parts, data = _with_tables(config, rt), f"{config.data.root}/train"
        reader: Any = Gate(prediction_reader(config, parts, rt, data), pipe)
        report = Reporter(None, quiet=True)
        for number in range(1_000_000):
            out = seat.scratch / f"predictions-{number}"
            predict(Prediction(data, str(out)), parts, reader, rt, report)


def _with_tables(config: RunConfig, rt: Runtime) -> Parts:
    parts = rt.together(lambda: build(config, device=rt.device.type, world_size=rt.world_size))
    module = shard_train_module(parts, rt, trains=False)
    draw_tables(module, parts.layout, config.seed)
    return parts


@contextlib.contextmanager
def _joined(seat: Seat, shape: Shape, cache: Path, changes: Tree) -> Iterator[tuple[RunConfig, Runtime]]:
    seat.join()
    file = seat.scratch / f"run{seat.rank}.yaml"
    tree = shape.run(cache, seat.scratch / "run", threads=seat.threads, **changes)
    file.write_text(yaml.safe_dump(tree), encoding="utf-8")
    config = load_run(file)
    with runtime("cpu", config.distributed.timeout_seconds, config.distributed.threads) as rt:
        yield config, rt


class Gate:
    """A reader whose batches wait for the parent at the end of a turn; it also measures how long `next` takes."""

    def __init__(self, reader: Any, pipe: Connection) -> None:
        self._reader, self._pipe = reader, pipe
        self._left = 0
        self._began: float | None = None
        self._waited = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reader, name)

    def batches(self, epoch: int, start_step: int = 0) -> Iterator[Any]:
        """Those of the reader."""
        with contextlib.closing(self._reader.batches(epoch, start_step)) as batches:
            while True:
                if not self._left:
                    self._next_turn()
                asked = time.perf_counter()
                batch = next(batches, None)
                self._waited += time.perf_counter() - asked
                if batch is None:
                    return
                self._left -= 1
                yield batch

    def _next_turn(self) -> None:
        told = None
        if self._began is not None:
            told = Turn(time.process_time() - self._began, self._waited, peak_bytes())
        self._pipe.send(told)
        if not (steps := self._pipe.recv()):
            raise SystemExit
        self._left, self._waited, self._began = int(steps), 0.0, time.process_time()
