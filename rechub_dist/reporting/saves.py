"""The result of saving a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Save:
    """The result of a save.

    Attributes:
        step: the step that was saved.
        seconds: from the call until the checkpoint was complete.
        blocked_seconds: time that training waited, on this rank.
        bytes: size of all ranks' files.
        error: why there is no checkpoint, else None.
        warning: what else went wrong, else None.
    """

    step: int
    seconds: float
    blocked_seconds: float
    bytes: int
    error: str | None = None
    warning: str | None = None
