"""Checkpoints: one folder per step, visible only when complete, loaded on any number of ranks under any sharding."""

from rechub_dist.checkpoint.checkpoints import Checkpoints, open_checkpoints
from rechub_dist.checkpoint.folder import saved_steps
from rechub_dist.checkpoint.position import Position
from rechub_dist.reporting.saves import Save

__all__ = ["Checkpoints", "Position", "Save", "open_checkpoints", "saved_steps"]
