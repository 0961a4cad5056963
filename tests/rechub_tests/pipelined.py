"""What a run's pipeline does: which modules it has taken over, and what makes the host wait meanwhile."""

from __future__ import annotations

import contextlib
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import fbgemm_gpu
import torch
import torchrec

import rechub_dist
from rechub_dist.batch import Batch
from rechub_dist.config import RunConfig
from rechub_dist.distributed.external_control import ExternalControl
from rechub_dist.distributed.runtime import device_type, runtime
from rechub_dist.training.feed import Feed
from rechub_dist.training.pipeline import make_pipeline
from rechub_dist.training.trainer import Summary, Trainer
from rechub_tests.runs import config_of

SYNC = "called a synchronizing CUDA operation"  # torch's words
_PACKAGES = {Path(str(module.__file__)).resolve().parent for module in (rechub_dist, torchrec, fbgemm_gpu)}


def train_watched(
    config: RunConfig, around: Callable[[int, Callable[[], Any]], Any], control: ExternalControl | None = None
) -> Summary:
    """Train; `around` gets each (0-based) step's number and what does the step, and does it."""
    with runtime(device_type(config.device), 60) as rt:
        trainer = Trainer(config, rt, control)
        pipeline = trainer.loop.pipeline
        progress = pipeline.progress

        def watched(batches: Iterator[Batch], step: int) -> Any:
            return around(step, lambda: progress(batches, step))

        pipeline.progress = watched  # type: ignore[method-assign]
        try:
            return trainer.fit()
        finally:
            trainer.checkpoints.close(60)
            trainer.report.close()


def pipelined_modules(path: Path) -> tuple[int, int]:
    """How many sharded modules there are, and how many of them the pipeline has taken over; on the run's device."""
    config = config_of(path)
    with runtime(device_type(config.device), 60) as rt:
        trainer = Trainer(config, rt)
        pipeline = make_pipeline("sparse_dist", trainer.module, trainer.optimizers, rt.device)
        feed = Feed(
            iter(trainer.passes.current(0).reader.batches(0)), trainer.parts.train_module.objective, rt, lambda: False
        )
        pipeline.progress(feed, 0)
        stage = trainer.parts.train_module.stage
        trainer.report.close()
        return len(stage.pooled) + len(stage.unpooled), len(pipeline.inner._pipelined_modules)


def syncs_of(path: Path, first: int, last: int) -> dict[str, int]:
    """Train; what makes the host wait for the device from the start of step `first` to the end of step `last`.

    Steps count from 1. What lies between them counts as well: the feed, the loop, reports, other threads. The run must
    not end a pass, evaluate, save or record in between, as those read results.
    """
    recorder = SyncRecorder()
    seen_to = 0

    def watched(step: int, progress: Callable[[], Any]) -> Any:
        nonlocal seen_to
        if step + 1 == first:
            recorder.start()
        found = progress()
        seen_to = step + 1
        if step + 1 == last:
            recorder.stop()
        return found

    try:
        train_watched(config_of(path), watched)
    finally:
        recorder.stop()
    assert seen_to >= last, f"the run has {seen_to} steps"
    return dict(recorder.seen)


class SyncRecorder:
    """Counts torch's warnings of calls that wait for the device, by whose call it is.

    Attributes:
        seen: `file:function` of the innermost caller among rechub_dist, TorchRec and FBGEMM, by how often. What the
            operators of a backward pass warn of is told when it ends, without a place: `backward of file:function`.
    """

    def __init__(self) -> None:
        self.seen: Counter[str] = Counter()
        self._stack = contextlib.ExitStack()

    def start(self) -> None:
        """Count from here on. A run's log puts its own hook for warnings in place, so this has to come after it."""
        self._stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("always")
        warnings.showwarning = self._told
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("warn")
            self._stack.callback(torch.cuda.set_sync_debug_mode, "default")

    def stop(self) -> None:
        """Count no more."""
        self._stack.close()

    def _told(self, message: Warning | str, *_: Any, **__: Any) -> None:
        if SYNC in str(message):
            self.seen[caller(traceback.extract_stack()[:-1])] += 1


def caller(frames: Sequence[traceback.FrameSummary]) -> str:
    """Whose call the innermost of `frames` (the last) serves, as `SyncRecorder.seen` names it."""
    frames = [frame for frame in frames if Path(frame.filename).name != "warnings.py"]
    backward = "backward of " if frames[-1].name == "_engine_run_backward" else ""
    for frame in reversed(frames):
        file = Path(frame.filename).resolve()
        for package in _PACKAGES:
            if file.is_relative_to(package):
                return f"{backward}{file.relative_to(package.parent).as_posix()}:{frame.name}"
    return f"{backward}{frames[-1].filename}:{frames[-1].name}"
