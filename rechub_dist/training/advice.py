"""What a run's own records say about its settings: too short, nothing learned, still improving, overfitting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

FEW_STEPS: Final = 300  # fewer optimizer steps than this are rarely enough for any table


@dataclass(frozen=True)
class Course:
    """How a run went.

    Attributes:
        steps: done.
        epoch_steps: steps of an epoch.
        best_step: step of the best evaluation.
        stopped_early: whether it ended because evaluations got no better.
        evaluations: the `valid` records, in their order.
        metric: the metric by which the best is chosen.
    """

    steps: int
    epoch_steps: int
    best_step: int | None
    stopped_early: bool
    evaluations: Sequence[Mapping[str, Any]]
    metric: str


def too_short(steps: int, batch_size: int, rows: int) -> str | None:
    """A note before the first step, for a run of few steps; None for others.

    Args:
        steps: of the run.
        batch_size: rows of a step.
        rows: of an epoch.
    """
    if steps >= FEW_STEPS:
        return None
    smaller = max(32, 1 << max(0, (rows // 100).bit_length() - 1))
    batch = f"a smaller data.batch_size (now {batch_size:,}; {smaller} makes at least 100 steps an epoch)"
    more = f"{batch} or more train.epochs" if smaller < batch_size else "more train.epochs"
    return f"note: only {steps:,} step(s): few to learn from; {more} may help"


def advice(course: Course) -> list[str]:
    """Notes at the end of a run, the most serious first."""
    best = next((one for one in course.evaluations if one["step"] == course.best_step), None)
    if best is None:
        return []
    found = [_nothing_learned(name, value) for name, value in best.items() if _is_above_one(name, value)]
    last = course.evaluations[-1]
    if best is last and not course.stopped_early:
        found.append(
            f"note: the best {course.metric} is that of the last step: it was still improving; more train.epochs may "
            "help"
        )
    there, then = best.get(course.metric), last.get(course.metric)
    if best["step"] <= course.epoch_steps < last["step"] and there is not None and then is not None:
        found.append(
            f"note: the best {course.metric} was within the first epoch (step {course.best_step}): {there:.4g}, and "
            f"{then:.4g} at the end: it overfits; try dropout, a smaller embedding width, lower "
            "embedding.optimizer.lr, and train.eval_every to catch the best step"
        )
    return found


def _is_above_one(name: str, value: Any) -> bool:
    return name.rpartition("/")[2] == "normalized_entropy" and isinstance(value, float) and value >= 1


def _nothing_learned(name: str, value: float) -> str:
    label = name.rpartition("/")[0]
    mean = f"the mean of {label}" if label else "the mean"
    return (
        f"note: {name} is {value:.3f}: predicting {mean} would do no worse, so nothing has been learned, or scores are "
        "overconfident; try lower learning rates or more steps, and look for features that are empty (rechub-dist data "
        "inspect)"
    )
