"""What a run says about its own settings."""

from __future__ import annotations

from typing import Any

import pytest

from rechub_dist.training.advice import Course, advice, too_short


def course(aucs: list[float], best: int, *, epoch: int = 2, stopped: bool = False, ne: float = 0.9) -> Course:
    records: list[dict[str, Any]] = [
        {"step": step, "auc": value, "normalized_entropy": ne} for step, value in enumerate(aucs, 1)
    ]
    return Course(len(aucs), epoch, best, stopped, records, "auc")


def test_few_steps_are_told_before_the_first() -> None:
    assert too_short(300, 4096, 10**6) is None
    note = too_short(36, 4096, 70_000)
    assert note is not None
    assert "only 36 step(s)" in note
    assert "now 4,096; 512 makes at least 100 steps an epoch" in note
    assert too_short(20, 32, 200) == "note: only 20 step(s): few to learn from; more train.epochs may help"


def test_a_good_run_hears_nothing() -> None:
    assert advice(course([0.6, 0.7, 0.8, 0.79, 0.78], best=3, stopped=True)) == []
    assert advice(course([], best=0)) == []


def test_one_that_still_improves() -> None:
    (note,) = advice(course([0.6, 0.7, 0.8], best=3))
    assert "still improving" in note


def test_one_that_has_learned_nothing() -> None:
    (note,) = advice(course([0.5, 0.51, 0.5, 0.5], best=2, epoch=1, stopped=True, ne=1.02))
    assert note.startswith("note: normalized_entropy is 1.020: predicting the mean would do no worse")
    records: list[dict[str, Any]] = [{"step": 1, "a/auc": 0.5, "a/normalized_entropy": 1.5}]
    first, _ = advice(Course(1, 1, 1, False, records, "a/auc"))
    assert "predicting the mean of a would" in first


@pytest.mark.parametrize(("aucs", "told"), [([0.8, 0.7, 0.6, 0.5], True), ([0.8, 0.7], False)])
def test_one_that_overfits_at_once(aucs: list[float], told: bool) -> None:
    notes = advice(course(aucs, best=1, stopped=True))
    assert any("it overfits" in note for note in notes) is told
