"""What is due at which step of a run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from rechub_dist.config import RunConfig, TrainConfig
from rechub_dist.data.passes import Pass, Passes


class Due(NamedTuple):
    """What is due when a run has done `step` steps."""

    step: int
    pass_ends: bool
    run_ends: bool
    evaluate: bool
    save: bool


def steps_of(train: TrainConfig, passes: Passes) -> int:
    """Steps of a run over the passes that are known."""
    return min(passes.steps, train.max_steps or passes.steps)


class Schedule:
    """The cadence of evaluations and checkpoints, over the passes as far as they are known.

    Args:
        validates: whether there is a split to evaluate on.
    """

    def __init__(self, config: RunConfig, passes: Passes, *, validates: bool) -> None:
        self._train = config.train
        self._save_every = config.checkpoint.every_steps
        self._passes = passes
        self._validates = validates

    @property
    def steps(self) -> int:
        """Steps of the run."""
        return steps_of(self._train, self._passes)

    def ahead(self, step: int) -> Iterator[Due]:
        """The steps after `step`, to the end of its pass, at which something happens besides training."""
        current = self._passes.current(step)
        end = min(current.end, self.steps)
        every = [n for n in (self._train.eval_every, self._save_every) if n]
        while step < end:
            step = min([end, *((step // n + 1) * n for n in every)])
            yield self.at(step, current)

    def at(self, step: int, current: Pass) -> Due:
        """What is due at `step`, which lies in the pass `current` or at its end."""
        pass_ends, run_ends = step == current.end, step == self.steps
        if self._train.eval_every:
            evaluate = step % self._train.eval_every == 0
        else:
            evaluate = pass_ends and (current.number + 1) % self._train.eval_epochs == 0
        evaluate = self._validates and (evaluate or run_ends)
        save = step % self._save_every == 0 if self._save_every else pass_ends
        # Before an evaluation: one that fails costs no step.
        return Due(step, pass_ends, run_ends, evaluate, save or evaluate or run_ends)
