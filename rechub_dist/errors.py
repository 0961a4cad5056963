"""Errors that a user can fix: one line that names the problem and the fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from rechub_dist.redaction import redacted


class UserError(ValueError):
    """Bad input. The command line prints the message as one line and exits with 2. Its secrets are hidden."""

    def __init__(self, message: object = "") -> None:
        super().__init__(redacted(str(message)))


def one_line(error: object) -> str:
    """Collapse an error's message to one line."""
    return " ".join(str(error).split())


def nearest(name: str, valid: Iterable[str]) -> str:
    """A hint for an unknown name: `did you mean 'x'?`, or the valid names."""
    names = sorted(valid)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"valid: {', '.join(names)}" if names else "there are none"
