"""Versioned defaults: keys that a run file omits keep the meaning they had when it was written.

`version: N` in a run file selects the defaults of that version; without it, those of version 1. To change a default,
increment `VERSION` and add the old value to `FORMER`; it is filled in where a file of an older version omits the key.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from rechub_dist.config.section import MAX_SECONDS

VERSION = 2

# version: {path: default in this version}, for each default that the next version changes. A path is a dotted key like
# `data.shuffle_rows`; missing sections on the way are created. A suffix makes a part conditional instead:
# `objective[retrieval]` and `model[DSSM]` match by name, `features.*[sparse]` by kind, `optimizer?` if the section
# exists. `*` stands for each entry of a list or mapping.
FORMER: dict[int, dict[str, Any]] = {
    1: {"model[MIND].readout": "attention"},
}

# Keys of sections that have been renamed: the former name is still accepted, and not documented.
RENAMED = {"data.max_lanes": "data.max_streams"}

# What `.inf` meant, which stored configurations may have and run files may no longer: limits that no number reaches.
_UNLIMITED = {"optimizer": ("clip_norm",), "train": ("max_loss",)}
_TIMED = ("data", "checkpoint", "distributed")  # sections with times, themselves or in their storage


def with_finite_limits(tree: dict[str, Any]) -> dict[str, Any]:
    """The tree of a stored configuration, with null or the longest time in place of infinite limits; changes it."""
    for name, limits in _UNLIMITED.items():
        section = tree.get(name)
        for key in limits:
            if isinstance(section, dict) and section.get(key) == math.inf:
                section[key] = None
    sections = [section for name in _TIMED if isinstance(section := tree.get(name), dict)]
    storages = [storage for section in sections if isinstance(storage := section.get("storage"), dict)]
    for timed in (*sections, *storages):
        for key, value in timed.items():
            if key.endswith("_seconds") and value == math.inf:
                timed[key] = MAX_SECONDS
    return tree


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
    """Return a run's tree with the defaults of its version filled in where they differ from the current ones.

    Raises:
        ValueError: its version is invalid or newer than this package.
    """
    version = tree.get("version", 1)
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise ValueError(f"version: must be an integer from 1 up, got {version!r}")
    if version > VERSION:
        raise ValueError(
            f"version: {version} needs a newer rechub_dist: this one knows versions up to {VERSION}; upgrade it"
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
