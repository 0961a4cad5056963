"""What a run came to, and how it is shown at the end."""

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
    """What a run came to.

    Attributes:
        preempted: a signal stopped it; the same command goes on from the checkpoint.
        valid, test: metrics of the best (or, without a valid split, the last) weights.
        samples_per_second: training rows over all ranks, evaluations and checkpoints not counted; None if this call
            trained nothing.
    """

    step: int
    best_step: int | None
    preempted: bool
    valid: dict[str, float]
    test: dict[str, float]
    samples_per_second: float | None


def show_training(console: Console, config: RunConfig, summary: Summary) -> None:
    """A table of what a finished run came to, and where it left things."""
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
    """What a perfect model would score on the test split, where the data set's generator knows."""
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
