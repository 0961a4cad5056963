"""Markdown that reads the same on GitHub and on the site."""

from __future__ import annotations

import re
from collections.abc import Iterable
from html import escape


def row(cells: Iterable[str]) -> str:
    """A row of a table. A bar in code is an entity: a backslash before it would be shown by one of the two."""
    return "| " + " | ".join(re.sub(r"`[^`]*`", _code, cell).replace("|", r"\|") for cell in cells) + " |"


def _code(found: re.Match[str]) -> str:
    code = found[0]
    return code if "|" not in code else f"<code>{escape(code.strip('`'), quote=False).replace('|', '&#124;')}</code>"
