"""What there is to tell of a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Save:
    """What came of a save.

    Attributes:
        seconds: from the call to the moment at which the checkpoint was complete.
        blocked_seconds: for which training waited, on this rank.
        bytes: of all ranks' files.
        error: why there is no checkpoint.
        warning: what went wrong besides.
    """

    step: int
    seconds: float
    blocked_seconds: float
    bytes: int
    error: str | None = None
    warning: str | None = None
