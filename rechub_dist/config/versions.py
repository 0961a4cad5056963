"""What a run file means by a key that it leaves out: defaults are frozen by version.

`version: N` in a run file names the defaults that it was written for; without it they are the first ones, so that a
file and a stored configuration mean tomorrow what they mean today. Whoever changes a default raises `VERSION` and puts
the old value into `FORMER`; it is filled in where a file of an older version has no such key.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

VERSION = 1

# version: {path: the default up to this version, where the next one has another}. A path is a key of each section on
# the way, `data.shuffle_rows` for one. Sections with defaults alone are made where they are missing; others stand with
# what is to be found in them: `objective[retrieval]` and `model[DSSM]` with that name, `features.*[sparse]` with that
# kind, `optimizer?` where there is one. `*` is each entry of a list or mapping.
FORMER: dict[int, dict[str, Any]] = {}

# Keys of sections that have been renamed: the former name is still accepted, and not documented.
RENAMED = {"data.max_lanes": "data.max_streams"}


def with_current_keys(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A run's tree with the current names of its keys.

    Raises:
        ValueError: a key has two values, one under its former name and one under the current one.
    """
    found = dict(tree)
    for former, current in RENAMED.items():
        section, _, old = former.partition(".")
        new = current.removeprefix(f"{section}.")
        node = found.get(section)
        if not isinstance(node, dict) or old not in node:
            continue
        if node.get(new, node[old]) != node[old]:
            raise ValueError(f"{former} is {node[old]!r}, {current} {node[new]!r}; write {current} alone")
        found[section] = {new if key == old else key: value for key, value in node.items()}
    return found


def with_former_defaults(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A run's tree with the defaults of its version written out, where today's are others.

    Raises:
        ValueError: its version is none of those there have been.
    """
    version = tree.get("version", 1)
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise ValueError(f"version: the first is 1, got {version!r}")
    if version > VERSION:
        raise ValueError(
            f"version: {version} is of a newer rechub_dist, this one knows defaults up to version {VERSION}; upgrade it"
        )
    found = _copy(dict(tree))
    for number in range(version, VERSION):
        for path, value in FORMER.get(number, {}).items():
            _fill(found, path.split("."), value)
    return found


def _fill(node: Any, path: list[str], value: Any) -> None:
    head, *rest = path
    name, _, tag = head.removesuffix("?").removesuffix("]").partition("[")
    inside: Iterable[Any]
    if name == "*":
        inside = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    elif not rest:
        if isinstance(node, dict):
            node.setdefault(name, value)
        return
    elif isinstance(node, dict):
        there = tag or head.endswith("?") or rest[0].startswith("*")
        inside = [node.get(name)] if there else [node.setdefault(name, {})]
    else:
        return
    for child in inside:
        if isinstance(child, dict | list) and (not tag or _is(child, tag)):
            _fill(child, rest, value)


def _is(node: Any, tag: str) -> bool:
    return isinstance(node, dict) and tag in (node.get("name"), node.get("kind"))


def _copy(node: Any) -> Any:
    if isinstance(node, dict):
        return {key: _copy(value) for key, value in node.items()}
    return [_copy(value) for value in node] if isinstance(node, list) else node
