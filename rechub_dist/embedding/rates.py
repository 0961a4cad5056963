"""Learning rates over a run: warm-up, the decay of a schedule, and changes in mid-run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from rechub_dist.config import ScheduleConfig
from rechub_dist.config.optimization import REDUCTIONS
from rechub_dist.errors import UserError

Plateaus = dict[str, dict[str, int]]  # by section: reductions so far, evaluations without improvement since


def schedule_factor(schedule: ScheduleConfig, step: int, run_steps: int | None = None, reductions: float = 0) -> float:
    """The learning rate of (0-based) `step` relative to the base rate.

    Args:
        run_steps: the run's length, if it is known: what is left of it after warm-up is the decay, by default.
        reductions: how often `plateau` has reduced the rate.

    Raises:
        UserError: `decay_steps` is needed, and neither given nor known.
    """
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    since, final = step - schedule.warmup_steps, schedule.final
    if schedule.name == "constant":
        return 1.0
    if schedule.name in REDUCTIONS:
        if schedule.name != "plateau":
            times = since / (schedule.period or 1)
            reductions = times if schedule.name == "exponential" else math.floor(times)
        return max(final, schedule.gamma**reductions)
    done = min(1.0, since / decay_steps(schedule, run_steps))
    if schedule.name == "one_cycle" and done < schedule.pct_start:
        start = 1 / schedule.div_factor
        return start + (1 - start) * (1 - _shape("cosine", done / schedule.pct_start))
    if schedule.name == "one_cycle":
        done = (done - schedule.pct_start) / (1 - schedule.pct_start)
    return final + (1 - final) * _shape(schedule.name, done, schedule.power)


def _shape(name: str, done: float, power: float = 1.0) -> float:
    """A decay from 1 to 0 over its share `done`."""
    return (1 - done) ** power if name in ("linear", "polynomial") else (1 + math.cos(math.pi * done)) / 2


def decay_steps(schedule: ScheduleConfig, run_steps: int | None) -> int:
    """The steps of the decay: as given, else what the run has left after warm-up. Raises UserError as above."""
    if schedule.decay_steps is not None:
        return schedule.decay_steps
    if run_steps is None:
        raise UserError(
            f"schedule: {schedule.name} needs decay_steps, the steps until the end of the decay; only for a run whose "
            f"length is known it defaults to what that has left after warm-up"
        )
    return max(1, run_steps - schedule.warmup_steps)


@dataclass(frozen=True)
class Rates:
    """The learning rates of a run, relative to the base rates.

    Attributes:
        dense, tables: the schedules.
        changes: further factors of both, by the (0-based) step from which each applies, until the next one.
        run_steps: the run's length; None where it is not known.

    Raises:
        UserError: as `schedule_factor`.
    """

    dense: ScheduleConfig
    tables: ScheduleConfig
    changes: Mapping[int, float] = field(default_factory=dict)
    run_steps: int | None = None

    def __post_init__(self) -> None:
        for schedule in self._by_section.values():
            schedule_factor(schedule, schedule.warmup_steps, self.run_steps)  # the first step that needs decay_steps

    @property
    def _by_section(self) -> dict[str, ScheduleConfig]:
        return {"optimizer": self.dense, "embedding": self.tables}

    def factors(self, step: int, plateaus: Plateaus) -> tuple[float, float]:
        """Those of the dense parameters and of the tables at (0-based) `step`."""
        begun = [first for first in self.changes if first <= step]
        change = self.changes[max(begun)] if begun else 1.0
        dense, tables = (
            change * schedule_factor(schedule, step, self.run_steps, plateaus.get(section, {}).get("reductions", 0))
            for section, schedule in self._by_section.items()
        )
        return dense, tables

    def evaluated(self, plateaus: Plateaus, *, improved: bool) -> Plateaus:
        """The state of the plateau schedules after one more evaluation."""
        found = {}
        for section, schedule in self._by_section.items():
            if schedule.name == "plateau":
                before = plateaus.get(section, {"reductions": 0, "waited": 0})
                reductions, waited = before["reductions"], 0 if improved else before["waited"] + 1
                if waited == schedule.patience:
                    reductions, waited = reductions + 1, 0
                found[section] = {"reductions": reductions, "waited": waited}
        return found
