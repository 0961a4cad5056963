"""Training from Python, in a notebook or a script, any number of times in one process."""

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
from rechub_dist.config.code import module_of, named_code
from rechub_dist.data.run_file import load_run, resolve_dataset
from rechub_dist.distributed.process import quiet_libraries, stop_signals
from rechub_dist.inference.run import Run, as_settings, load, random_state_kept
from rechub_dist.reporting.logs import LOGGER
from rechub_dist.reporting.summary import Summary
from rechub_dist.training.trainer import run as run_training

_LOUD = ("torchrec", "torch", "fbgemm_gpu")  # loggers that `quiet_libraries` silences


@dataclass(frozen=True)
class Finished:
    """A run that `train` finished, or that was stopped (`summary.preempted`)."""

    config: RunConfig
    summary: Summary

    @property
    def output_dir(self) -> Path:
        """The output folder, with records and checkpoints."""
        return self.config.output_dir

    def load(self, device: Literal["auto", "cpu", "cuda"] = "cpu") -> Run:
        """Load its best weights for prediction, as `rechub_dist.load`, with the code that its own run names."""
        modules = [module_of(name) for name in named_code(self.config.model_dump()).values()]
        settings = [] if self.config.code is None else [f"code={self.config.code}"]
        return load(self.config.output_dir, device, settings=settings, allowed_code=modules)


def train(
    run: RunConfig | str | Path | Mapping[str, Any],
    overrides: Mapping[str, Any] | None = None,
    *,
    take_over: bool = False,
) -> Finished:
    """Train in this process as `rechub-dist train` does; resume if the output folder has a checkpoint of the run.

    Collective: under torchrun, call on every rank; otherwise this process is the only rank. Ctrl-C (in a notebook:
    interrupt) saves and returns; the same call resumes. Afterwards there is no process group, and signal handlers,
    logging, warnings, random state and torch's threads are restored. Two things remain: the raised limit of open files,
    and freed memory that is kept for the next run.

    Args:
        run: the path of a run file, its content as a dict, or a configuration. Relative paths in a dict are resolved
            against the working directory.
        overrides: values for dotted keys: `{"train.epochs": 3}`.
        take_over: take the output folders over from a running run, which then ends.

    Raises:
        UserError: a mistake in the run, the schema or the data; one line that names it and the fix.
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
    """Restore the process's signal handlers, logging, warnings and threads, which a run replaces."""
    root, threads, environment = logging.getLogger(), torch.get_num_threads(), set(os.environ)
    captured = getattr(logging, "_warnings_showwarning", None) is not None
    raises = logging.raiseExceptions
    loggers = {name: logging.getLogger(name) for name in (None, LOGGER.name, *_LOUD)}
    logs = [(logger, logger.level, logger.handlers, logger.propagate) for logger in loggers.values()]
    root.handlers = []  # a run closes the handlers it finds
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
            if action is not None:  # None: not installed from Python, and so not changed by a run
                signal.signal(number, action)
        for name in set(os.environ) - environment:  # variables that name this run's flight recorder files
            del os.environ[name]
        torch.set_num_threads(threads)
