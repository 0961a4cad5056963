"""Training from Python: in a notebook or a script, as often as one likes in one process."""

from __future__ import annotations

import logging
import os
import signal
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from rechub_dist.builds import require_builds
from rechub_dist.config import RunConfig, changed, run_from
from rechub_dist.data.run_file import load_run, resolve_dataset
from rechub_dist.distributed.process import quiet_libraries, stop_signals
from rechub_dist.inference.run import Run, as_settings, load, random_state_kept
from rechub_dist.reporting.logs import LOGGER
from rechub_dist.reporting.summary import Summary
from rechub_dist.training.trainer import run as run_training

_LOUD = ("torchrec", "torch", "fbgemm_gpu")  # whose loggers `quiet_libraries` turns down


@dataclass(frozen=True)
class Finished:
    """A run that `train` has come to the end of, or that was stopped (`summary.preempted`)."""

    config: RunConfig
    summary: Summary

    @property
    def output_dir(self) -> Path:
        """Where its records and checkpoints are."""
        return self.config.output_dir

    def load(self, device: Literal["auto", "cpu", "cuda"] = "cpu") -> Run:
        """Its best weights, ready to predict; as `rechub_dist.load`."""
        return load(self.config.output_dir, device)


def train(
    run: RunConfig | str | Path | Mapping[str, Any],
    overrides: Mapping[str, Any] | None = None,
    *,
    take_over: bool = False,
) -> Finished:
    """Train as `rechub-dist train` does, in this process; go on where the output folder holds a checkpoint of the run.

    Without torchrun this process is the only rank; a script under torchrun calls it on every rank. Ctrl-C (in a
    notebook: interrupt) saves and returns; the same call goes on. Afterwards there is no process group, and signal
    handlers, logging, warnings, random state and torch's threads are what they were; what remains is the limit of open
    files, which is raised as far as it may be, and that freed memory is kept for the next run.

    Args:
        run: the path of a run file, its content as a dict, or a configuration. Relative paths in a dict are taken as
            below the working directory.
        overrides: dotted keys with other values: `{"train.epochs": 3}`.
        take_over: take the folders from a run that holds them; that one ends.

    Raises:
        UserError: one line that names what is wrong in the run, the schema or the data, and the fix.
    """
    require_builds()
    config = _config(run, overrides)
    with _left_as_it_was(), random_state_kept():
        quiet_libraries()
        return Finished(config, run_training(config, take_over=take_over))


def _config(run: RunConfig | str | Path | Mapping[str, Any], overrides: Mapping[str, Any] | None) -> RunConfig:
    if isinstance(run, str | Path):
        return load_run(Path(run), as_settings(overrides))
    if isinstance(run, Mapping):
        run = run_from(run, as_settings(overrides))
    elif overrides:
        run = changed(run, overrides, "overrides")
    return resolve_dataset(run, base=Path())


@contextmanager
def _left_as_it_was() -> Iterator[None]:
    """A run has its process to itself: it handles signals, and logs to its folder. Put back what was there before."""
    root, threads, environment = logging.getLogger(), torch.get_num_threads(), set(os.environ)
    captured = getattr(logging, "_warnings_showwarning", None) is not None
    raises = logging.raiseExceptions
    loggers = {name: logging.getLogger(name) for name in (None, LOGGER.name, *_LOUD)}
    logs = [(logger, logger.level, logger.handlers, logger.propagate) for logger in loggers.values()]
    root.handlers = []  # a run closes those that it finds
    in_main = threading.current_thread() is threading.main_thread()
    signals = {number: signal.getsignal(number) for number in stop_signals()} if in_main else {}
    try:
        with warnings.catch_warnings():
            try:
                yield
            finally:
                if not captured:
                    logging.captureWarnings(False)
    finally:
        for handler in root.handlers:
            handler.close()
        for logger, level, handlers, propagate in logs:
            logger.setLevel(level)
            logger.handlers, logger.propagate = handlers, propagate
        logging.raiseExceptions = raises
        for number, action in signals.items():
            if action is not None:  # None: not Python's own, and so not a run's either
                signal.signal(number, action)
        for name in set(os.environ) - environment:  # that say where this run's device is to leave its record
            del os.environ[name]
        torch.set_num_threads(threads)
