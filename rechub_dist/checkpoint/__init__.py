"""Checkpoints: complete or invisible, independent of ranks and placement, with everything a run goes on from."""

from rechub_dist.checkpoint.checkpoints import Checkpoints, Save, open_checkpoints
from rechub_dist.checkpoint.folder import saved_steps
from rechub_dist.checkpoint.position import Position

__all__ = ["Checkpoints", "Position", "Save", "open_checkpoints", "saved_steps"]
