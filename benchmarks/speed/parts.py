"""The parts of the suite, in their order."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from speed.bench import Bench


@dataclass(frozen=True)
class Part:
    """What is measured together.

    Attributes:
        title: for the page.
        does: `module:function` in this folder, called with a `Bench`.
        setup, each: minutes that it takes to be set up, and that a round takes, on two cores.
    """

    title: str
    does: str
    setup: float
    each: float

    def minutes(self, rounds: int) -> float:
        """About how long it takes."""
        return self.setup + self.each * rounds

    def measure(self, bench: Bench) -> None:
        """Measure it, into the record."""
        module, _, name = self.does.partition(":")
        getattr(importlib.import_module(f"speed.{module}"), name)(bench)


PARTS = {
    "a": Part("DeepFM end to end from Parquet", "training:deepfm_end_to_end", 2.5, 0.65),
    "b": Part("Further models beside loops by hand", "training:models_beside_loops", 2.5, 0.7),
    "c": Part("As tables grow", "training:table_sizes", 2.0, 0.3),
    "d": Part("Ranks, and what they send to each other", "training:ranks_and_bytes", 3.0, 0.5),
    "e": Part("200 sparse features", "training:many_features", 1.0, 0.2),
    "f": Part("Evaluation, prediction and ranking", "scoring:evaluation_and_prediction", 1.0, 0.55),
    "g": Part("Starting", "commands:starting", 0.3, 0.25),
    "h": Part("Checkpoints", "commands:checkpoints", 0.7, 0.2),
    "i": Part("Memory beside the plan", "commands:memory", 0.8, 0.1),
    "j": Part("Serving", "commands:serving", 1.0, 0.35),
    "r": Part("The reader beside bare decoding", "scoring:reading", 1.0, 0.3),
    "s": Part("The simulation beside real ranks", "modelled:simulation_beside_ranks", 3.0, 0.8),
    "t": Part("What was tried", "training:what_was_tried", 3.5, 0.9),
    "p": Part("Where time goes", "commands:profile", 0.7, 0.0),
}
