"""The training position of a run, as stored in its checkpoints."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, cast

from rechub_dist.checkpoint.manifest import SavedPosition, SavedRun
from rechub_dist.config import stored_tree


@dataclass(frozen=True)
class Position:
    """The training position: steps completed, and the best evaluation so far.

    The position in the data follows from the step: the epoch is step // (steps per epoch).
    """

    step: int = 0
    best_step: int | None = None
    best_metrics: dict[str, float] = field(default_factory=dict)
    best_mode: str = "max"  # direction by which best_step was chosen
    evaluations_since_best: int = 0
    stopped_early: bool = False
    unevaluated: bool = False  # saved before the evaluation due at this step
    plateaus: dict[str, dict[str, int]] = field(default_factory=dict)  # state of plateau schedules, by section

    def saved(self) -> SavedPosition:
        """As a manifest has it: without what only some runs have, where it is empty."""
        return cast(SavedPosition, {key: value for key, value in asdict(self).items() if key != "plateaus" or value})


def position_of(run: SavedRun) -> Position:
    """The position that a manifest's record of a run has."""
    saved: dict[str, Any] = {**run["position"]}
    if "best_mode" not in saved:  # from before metrics knew their direction: the configuration said it
        train = stored_tree(run["config"], "config").get("train")
        saved["best_mode"] = (isinstance(train, dict) and train.get("best_mode")) or "max"
    return Position(**saved)
