"""The files and folders that a run file names: which keys name them, and a walk over what they hold."""

from __future__ import annotations

import operator
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

from pydantic import BaseModel

T = TypeVar("T")


class Location(NamedTuple):
    """A file or folder of a run.

    Attributes:
        key: of the run file.
        address: as it stands there, path or address.
        below_root: whether it lies below `data.root` where it is relative.
        written: whether ranks write there, and make it where it is missing.
        path_only: whether an address will not do.
    """

    key: str
    address: str
    below_root: bool = False
    written: bool = False
    path_only: bool = False


_SPLITS = ("train", "valid", "test", "items")
# By key, * for an index or a name.
_KEYS: Final[dict[str, dict[str, bool]]] = {
    "output_dir": {"written": True, "path_only": True},
    "code": {"path_only": True},
    "data.root": {},
    **{f"data.{split}{more}": {"below_root": True} for split in _SPLITS for more in ("", ".path", ".*", ".*.path")},
    "data.mix.*.path": {"below_root": True},
    "data.dataset.features.*.vocabulary": {"below_root": True},
    "data.features.*.vocabulary": {"below_root": True},
    "embedding.plan": {"path_only": True},
    "objective.sampling.path": {},
    "warm_start.from": {},
    "warm_start.embeddings.*.file": {},
    "checkpoint.folder": {"written": True},
}


def with_locations(config: T, change: Callable[[Location], str]) -> T:
    """The same configuration with the address of every location that it names changed."""
    return _changed(config, "", change)


def _changed(value: Any, key: str, change: Callable[[Location], str]) -> Any:
    if isinstance(value, str | Path):
        kind = next((kind for pattern, kind in _KEYS.items() if fnmatchcase(key, pattern)), None)
        return value if kind is None else type(value)(change(Location(key, str(value), **kind)))
    start = f"{key}." if key else ""
    if isinstance(value, BaseModel):
        fields = type(value).model_fields
        old = {name: getattr(value, name) for name in fields}
        new = {name: _changed(old[name], f"{start}{fields[name].alias or name}", change) for name in fields}
        differs = {name: new[name] for name in fields if new[name] is not old[name]}
        return value.model_copy(update=differs) if differs else value
    if isinstance(value, tuple):
        items = [_changed(item, f"{start}{number}", change) for number, item in enumerate(value)]
        return value if all(map(operator.is_, items, value)) else tuple(items)
    if isinstance(value, dict):
        tree = {name: _changed(item, f"{start}{name}", change) for name, item in value.items()}
        return value if all(tree[name] is value[name] for name in tree) else tree
    return value
