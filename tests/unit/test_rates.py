"""Learning rates: each schedule against torch's, what it needs, and changes in mid-run."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

from rechub_dist.config import ScheduleConfig, run_from
from rechub_dist.embedding.rates import Plateaus, Rates, schedule_factor
from rechub_dist.errors import UserError


def test_schedules() -> None:
    warm = ScheduleConfig(warmup_steps=4)
    assert [schedule_factor(warm, step) for step in (0, 1, 3, 4, 100)] == [0.25, 0.5, 1.0, 1.0, 1.0]
    linear = ScheduleConfig(name="linear", warmup_steps=2, decay_steps=10, final=0.2)
    assert [round(schedule_factor(linear, step), 6) for step in (1, 2, 7, 12, 50)] == [1.0, 1.0, 0.6, 0.2, 0.2]
    cosine = ScheduleConfig(name="cosine", decay_steps=10)
    assert [round(schedule_factor(cosine, step), 6) for step in (0, 5, 10)] == [1.0, 0.5, 0.0]
    step = ScheduleConfig(name="step", warmup_steps=2, period=3, gamma=0.5, final=0.2)
    found = [schedule_factor(step, at) for at in (0, 1, 2, 4, 5, 7, 8, 11)]
    assert found == [0.5, 1, 1, 1, 0.5, 0.5, 0.25, 0.2]


STEPS = 23
TORCH: list[tuple[dict[str, Any], Any]] = [
    ({"name": "linear", "final": 0.3}, lambda o: lr_scheduler.LinearLR(o, 1.0, 0.3, STEPS)),
    ({"name": "cosine", "final": 0.1}, lambda o: lr_scheduler.CosineAnnealingLR(o, STEPS, 0.1 * 0.02)),
    ({"name": "step", "period": 5, "gamma": 0.3}, lambda o: lr_scheduler.StepLR(o, 5, 0.3)),
    ({"name": "exponential", "period": 1, "gamma": 0.9}, lambda o: lr_scheduler.ExponentialLR(o, 0.9)),
    ({"name": "polynomial", "power": 2.5}, lambda o: lr_scheduler.PolynomialLR(o, STEPS, 2.5)),
    (
        {"name": "one_cycle", "decay_steps": STEPS - 1, "pct_start": 8 / 22, "final": 1 / 25e4},
        # torch counts from the last step of the rise, we count fractions of the steps
        lambda o: lr_scheduler.OneCycleLR(o, 0.02, STEPS, pct_start=9 / 23, cycle_momentum=False),
    ),
]


@pytest.mark.parametrize(
    ("settings", "make"), TORCH, ids=lambda value: value["name"] if isinstance(value, dict) else ""
)
def test_equal_to_those_of_torch(settings: dict[str, Any], make: Any) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.02)
    schedule, torchs = ScheduleConfig(**settings), make(optimizer)
    for step in range(STEPS):
        assert 0.02 * schedule_factor(schedule, step, STEPS) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-6)
        optimizer.step()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torchs.step()


def test_plateau_equals_that_of_torch() -> None:
    values = [0.5, 0.6, 0.6, 0.59, 0.61, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.7, 0.1, 0.2]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    torchs = lr_scheduler.ReduceLROnPlateau(optimizer, "max", factor=0.5, patience=1, threshold=0.0)
    rates = Rates(ScheduleConfig(name="plateau", gamma=0.5, patience=2, final=0.01), ScheduleConfig())
    state, best, seen = Plateaus(), 0.0, set()
    for value in values:
        torchs.step(value)
        state = rates.evaluated(state, improved=value > best)
        best = max(best, value)
        assert rates.factors(7, state) == (optimizer.param_groups[0]["lr"], 1.0)
        assert state.keys() == {"optimizer"}
        seen.add(state["optimizer"]["reductions"])
    assert seen == {0, 1, 2, 3, 4, 5}
    for _ in range(9):
        state = rates.evaluated(state, improved=False)
    assert rates.factors(7, state)[0] == 0.01


def test_the_rest_of_the_run_is_the_decay() -> None:
    schedule = ScheduleConfig(name="linear", warmup_steps=4)
    assert [schedule_factor(schedule, step, 14) for step in (3, 4, 9, 14)] == [1.0, 1.0, 0.5, 0.0]
    assert schedule_factor(schedule, 5, 3) == 0  # a run that ends in its warm-up
    with pytest.raises(UserError, match=r"cosine needs decay_steps, .* a run whose length is known"):
        Rates(ScheduleConfig(), ScheduleConfig(name="cosine"))
    Rates(ScheduleConfig(name="step", period=4), ScheduleConfig(name="plateau"))  # which need no length


def test_changes_in_mid_run() -> None:
    rates = Rates(ScheduleConfig(warmup_steps=10), ScheduleConfig(), {6: 0.5, 20: 3.0, 12: 0.25})
    found = [rates.factors(step, {}) for step in (5, 6, 11, 12, 19, 20, 99)]
    assert found == [(0.6, 1), (0.35, 0.5), (0.5, 0.5), (0.25, 0.25), (0.25, 0.25), (3, 3), (3, 3)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": {"schedule": {"name": "exponential"}}}, "exponential needs period"),
        ({"optimizer": {"schedule": {"name": "step", "period": 0}}}, "greater than 0"),
        (
            {"embedding": {"schedule": {"gamma": 0.5}}},
            "gamma is for step, exponential, plateau, not",
        ),
        ({"embedding": {"schedule": {"name": "cosine", "patience": 1}}}, "patience is for plateau, not for cosine"),
        ({"optimizer": {"schedule": {"name": "one_cycle", "warmup_steps": 5}}}, "a warm-up of its own"),
        ({"optimizer": {"schedule": {"name": "plato"}}}, "'plateau'"),
        (
            {"train": {"lr_changes": [{"step": 5, "factor": -1}]}},
            r"lr_changes\.0\.factor: .*greater",
        ),
        ({"train": {"lr_changes": [{"step": 5, "factor": 1}, {"step": 5, "factor": 2}]}}, "the steps must rise"),
    ],
)
def test_what_is_no_schedule(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run_from({"output_dir": "out", "data": {"root": "data"}, "model": {"name": "DeepFM"}, **settings})
