"""The summary of a run, printed at its end."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from rechub_dist.config import RunConfig
from rechub_dist.reporting.reporter import show_summary


@dataclass(frozen=True)
class Summary:
    """The summary of a run.

    Attributes:
        step: the last step.
        best_step: the step of the best evaluation, None without any.
        preempted: it was stopped by a signal; the same command resumes from the checkpoint.
        valid, test: metrics of the best (or, without a valid split, the last) weights.
        samples_per_second: training rows per second over all ranks, without evaluations and checkpoints; None if this
            call trained nothing.
    """

    step: int
    best_step: int | None
    preempted: bool
    valid: dict[str, float]
    test: dict[str, float]
    samples_per_second: float | None


def show_training(console: Console, config: RunConfig, summary: Summary) -> None:
    """Print a table of a finished run's results and output locations."""
    rows: dict[str, Any] = {"steps": summary.step}
    if summary.valid:
        rows["best step"] = summary.best_step
        rows.update({f"valid {name}": value for name, value in summary.valid.items()})
    rows.update({f"test {name}": value for name, value in summary.test.items()})
    rows.update(_truth(Path(config.data.root) / "truth.json", summary.test))
    if summary.samples_per_second is not None:
        rows["training samples/s"] = f"{summary.samples_per_second:,.0f}"
    rows["checkpoints"] = config.checkpoint_folder
    rows["TensorBoard"] = f"tensorboard --logdir {config.output_dir / 'tensorboard'}"
    show_summary(console, config.model.name, rows)


def _truth(path: Path, test: dict[str, float]) -> dict[str, float]:
    """The best reachable test metrics of a synthetic data set, by name; empty for other data."""
    if not test or not path.is_file():
        return {}
    truth = json.loads(path.read_text(encoding="utf-8"))["test"]
    best = {}
    for name in test:
        label, _, metric = name.rpartition("/")
        known = truth.get(label or next(iter(truth)), {})
        if metric in known:
            best[f"best reachable test {name}"] = known[metric]
    return best
