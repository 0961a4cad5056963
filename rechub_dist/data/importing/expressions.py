"""What an SQL expression of a plan may be: one value of each row, computed from that row.

DuckDB's own parser tells what a text is, before any of it runs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Final

_MANY: Final = ("unnest", "generate_series", "range_table", "json_each")  # functions that make several rows of one
_REFUSED: Final = {
    "SUBQUERY": "a subquery reads other rows; join a table instead (tables)",
    "WINDOW": "a window function sees other rows, later ones too; use histories, or write the column into the files "
    "(labels and weight may have window functions)",
    "STAR": "write the columns' names instead of *",
    "PARAMETER": "a ? or $ stands for nothing here; quote a text with '...'",
}
_WHOLE: Final[dict[str, object]] = {
    "modifiers": [], "where_clause": None, "group_expressions": [], "having": None, "sample": None, "qualify": None
}  # fmt: skip


def why_not(parsed: str, *, windows: bool) -> str | None:
    """What is wrong with an expression; None if nothing is.

    Args:
        parsed: of `select (EXPRESSION)`, what DuckDB's `json_serialize_sql` returns.
        windows: whether it may look at other rows, by window functions; what a model is to know must not, since rows
            come later than others.
    """
    tree: dict[str, Any] = json.loads(parsed)
    if tree["error"]:
        return str(tree.get("error_message", "it is no expression")).strip()
    node = tree["statements"][0]["node"] if len(tree["statements"]) == 1 else {}
    if (
        node.get("type") != "SELECT_NODE"
        or len(node["select_list"]) != 1
        or node["from_table"]["type"] != "EMPTY"
        or any(node.get(key) != value for key, value in _WHOLE.items())
    ):
        return "that is not one expression; check its parentheses"
    for part in _parts(node["select_list"]):
        kind, name = part["class"], str(part.get("function_name", "")).lower()
        if kind in _REFUSED and not (kind == "WINDOW" and windows):
            return _REFUSED[kind]
        if name in _MANY:
            return f"{name} makes several rows of one"
    return None


def columns_of(parsed: str) -> set[str]:
    """The names of the columns that an expression reads; `parsed` as in `why_not`."""
    columns = (part for part in _parts(json.loads(parsed)) if part["class"] == "COLUMN_REF")
    return {str(column["column_names"][-1]) for column in columns}


def _parts(tree: Any) -> Iterator[dict[str, Any]]:
    """The parts of a parsed expression."""
    if isinstance(tree, dict):
        if isinstance(tree.get("class"), str):
            yield tree
        for value in tree.values():
            yield from _parts(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from _parts(value)
