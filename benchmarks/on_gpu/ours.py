"""rechub_dist end to end, from Parquet: samples/s and where the time goes; and a profile of some steps."""

from __future__ import annotations

import contextlib
import json
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import yaml
from torch.profiler import ProfilerActivity

from on_gpu.common import DENSE, DENSE_LR, DIM, HIDDEN, SPARSE, TABLE_LR, Sampler, Setting
from on_gpu.trace import summary
from rechub_dist.data.run_file import load_run
from rechub_dist.distributed.runtime import runtime
from rechub_dist.training.feed import Feed
from rechub_dist.training.trainer import Trainer

CASES = [  # the most telling first: the time may be short
    ("DeepFM", 32768, "auto"),
    ("DCNv2", 32768, "auto"),
    ("DeepFM", 8192, "auto"),
    ("DCNv2", 8192, "auto"),
    ("DeepFM", 8192, "base"),
    ("DeepFM", 32768, "base"),
]
SMALL_CASES = [("DeepFM", 512, "auto"), ("DCNv2", 512, "sparse_dist")]


def throughput(setting: Setting) -> None:
    """Training as a user starts it, without evaluation and checkpoints."""
    for model, size, kind in SMALL_CASES if setting.small else CASES:
        with setting.guarded("throughput", model=model, batch=size, pipeline=kind):
            _measure(setting, model, size, kind)


def _measure(setting: Setting, model: str, size: int, kind: str) -> None:
    steps = 24 if setting.small else 360 if size < 20_000 else 140
    path = _run_file(setting, f"{model}-{size}-{kind}", model, size, steps, kind)
    feed, read = Timed(Feed.__next__), Timed(next)

    def next_batch(self: Feed) -> Any:
        return feed(self)

    if setting.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with runtime(setting.device, 120) as rt, mock.patch.object(Feed, "__next__", next_batch):
        began = time.perf_counter()
        trainer = Trainer(load_run(path), rt)
        set_up = time.perf_counter() - began
        trainer.passes.reader = _Reader(trainer.passes.reader, read)  # type: ignore[attr-defined]
        with Sampler(setting.device) as sampler:
            trainer.fit()
        trainer.checkpoints.close(60)
        trainer.report.close()
    peak = round(torch.cuda.max_memory_allocated() / 2**30, 2) if setting.device == "cuda" else None
    lines = (setting.out / "work" / path.stem / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [record for record in map(json.loads, lines) if record["split"] == "train"]
    rates = [record["samples_per_second"] for record in records][2:]  # the first ones warm up
    setting.tell(
        "throughput",
        model=model,
        dim=DIM,
        batch=size,
        pipeline=kind,
        samples_per_s=round(statistics.median(rates)),
        spread=[round(min(rates)), round(max(rates))],
        waiting_share=round(read.seconds / sampler.seconds, 3),  # for the reader
        feed_share=round(feed.seconds / sampler.seconds, 3),  # and for all that a batch takes before its step
        set_up_s=round(set_up, 1),
        fit_s=round(sampler.seconds, 1),
        peak_gb=peak,
        last_loss=records[-1]["loss"],
        **sampler.told(),
    )


def profile(setting: Setting) -> None:
    """torch.profiler over some steps: kernels by stream and name, overlap, copies, and what the host waits for."""
    size, warm, steps = (512, 5, 5) if setting.small else (8192, 30, 20)
    path = _run_file(setting, "profile", "DeepFM", size, warm + steps, "sparse_dist")
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if setting.device == "cuda" else [])]
    profiler = torch.profiler.profile(activities=activities)
    seen: dict[str, Any] = {}

    with runtime(setting.device, 120) as rt:
        trainer = Trainer(load_run(path), rt)
        stage, pipeline = trainer.parts.train_module.stage, trainer.loop.pipeline
        progress = pipeline.progress

        def counted(batches: Any, step: int) -> Any:
            if step == warm:
                setting.wait()
                profiler.start()
                seen["began"] = time.perf_counter()
            value = progress(batches, step)
            if step == warm + steps - 1:
                setting.wait()
                seen["seconds"] = time.perf_counter() - seen["began"]
                profiler.stop()
            seen["pipelined"] = len(getattr(getattr(pipeline, "inner", None), "_pipelined_modules", []))
            return value

        pipeline.progress = counted  # type: ignore[method-assign]
        trainer.fit()
        trainer.checkpoints.close(60)
        trainer.report.close()
    trace = setting.out / "trace.json"
    profiler.export_chrome_trace(str(trace))
    collections = len(stage.pooled) + len(stage.unpooled)
    modules = {"pipelined_modules": seen["pipelined"], "collections": collections}
    found = summary(json.loads(trace.read_text(encoding="utf-8"))["traceEvents"], steps, seen["seconds"])
    setting.tell("profile", ok=seen["pipelined"] == collections, batch=size, **modules, **found)


class Timed:
    """Seconds spent in `function`."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function, self.seconds = function, 0.0

    def __call__(self, *args: Any) -> Any:
        """Call it."""
        began = time.perf_counter()
        try:
            return self._function(*args)
        finally:
            self.seconds += time.perf_counter() - began


class _Reader:
    """A reader that tells how long its batches are waited for."""

    def __init__(self, reader: Any, timed: Timed) -> None:
        self._reader, self._timed = reader, timed

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reader, name)

    def batches(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        with contextlib.closing(self._reader.batches(*args, **kwargs)) as batches:
            while (batch := self._timed(batches, None)) is not None:
                yield batch


def _run_file(setting: Setting, name: str, model: str, batch: int, steps: int, pipeline: str) -> Path:
    """The run file, as a user would write it; nothing is left of an earlier run."""
    work = setting.out / "work"
    tree: dict[str, Any] = {
        "output_dir": str(work / name),
        "device": setting.device,
        "data": {"root": str(setting.data), "valid": None, "test": None, "batch_size": batch},
        "model": {"name": model, "features": SPARSE + DENSE, "hidden_units": HIDDEN, "dropout_rates": 0.0},
        "embedding": {
            "dim": DIM,
            "sharding": "table_wise",
            "optimizer": {"name": "rowwise_adagrad", "lr": TABLE_LR},
        },
        "optimizer": {"name": "adam", "lr": DENSE_LR},
        "train": {"epochs": 1000, "max_steps": steps, "log_every": max(1, steps // 12)},
        "checkpoint": {"every_steps": 10**9},
        "monitor": {"profile_every": None},
        "distributed": {"pipeline": pipeline},
    }
    if model == "DeepFM":
        tree["model"]["embedding_dim"] = DIM
        del tree["embedding"]["dim"]
    else:
        tree["model"]["cross_num"] = 3
    shutil.rmtree(tree["output_dir"], ignore_errors=True)
    path = work / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path
