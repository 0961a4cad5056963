"""Errors that a user can fix: one line that names the problem and the fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Final

from rechub_dist.redaction import redacted

LONGEST: Final = 500  # characters of a message; what is cut out of a longer one is its middle
_OF_A_VALUE: Final = 120
_NAMES: Final = 12  # that are listed where none is near
_CUT: Final = " ... "


class UserError(ValueError):
    """Bad input. The command line prints the message as one line and exits with 2.

    Whatever stands in the values that a message quotes, it is one line of `LONGEST` characters at most, without
    characters that steer a terminal, and without secrets.

    Attributes:
        on_all_ranks: whether every rank of the run raises it, as they have agreed on it: the main one prints it.
    """

    on_all_ranks = False

    def __init__(self, message: object = "") -> None:
        super().__init__(shortened(printable(redacted(str(message))), LONGEST))


def printable(text: str) -> str:
    r"""The text with what is not to be printed, line breaks included, as Python's escapes: `\x1b`, `\n`."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def shortened(text: str, longest: int) -> str:
    """The text, without its middle where it is longer than `longest` characters."""
    if len(text) <= longest:
        return text
    end = (longest - len(_CUT)) // 2
    return text[: longest - len(_CUT) - end] + _CUT + text[-end:]


def shown(value: object) -> str:
    """A value as a message quotes it: as Python writes it, in at most 120 characters."""
    if isinstance(value, str | bytes):
        value = value[: 10 * _OF_A_VALUE]  # as long as it may be: it is cut anyhow
    try:
        return shortened(printable(repr(value)), _OF_A_VALUE)
    except (ValueError, RecursionError):  # an integer of thousands of digits, or a value within itself
        return f"a {type(value).__name__} too large to print"


def one_line(error: object) -> str:
    """Collapse an error's message to one line."""
    return " ".join(str(error).split())


def nearest(name: str, valid: Iterable[str]) -> str:
    """A clause that suggests what was meant, whatever its case: `did you mean 'x'?`, else the valid names."""
    names, name = sorted(valid), name[:_OF_A_VALUE]
    folded = {known.casefold(): known for known in reversed(names)}
    close = [folded[name.casefold()]] if name.casefold() in folded else difflib.get_close_matches(name, names, n=1)
    close = close or [folded[near] for near in difflib.get_close_matches(name.casefold(), folded, n=1)]
    if close:
        return f"did you mean {shown(close[0])}?"
    if not names:
        return "there are none"
    more = f" and {len(names) - _NAMES} more" if len(names) > _NAMES + 1 else ""
    return f"valid: {', '.join(names[:_NAMES] if more else names)}{more}"
