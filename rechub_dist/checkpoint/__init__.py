"""Checkpoints: a folder a step, visible only when complete, loaded on any number of ranks under any sharding."""

from rechub_dist.checkpoint.checkpoints import Checkpoints, Position, Save
from rechub_dist.checkpoint.folder import saved_steps

__all__ = ["Checkpoints", "Position", "Save", "saved_steps"]
