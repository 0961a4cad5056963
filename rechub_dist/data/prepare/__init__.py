"""Prepares public data sets for training: one module per data set, found by listing this folder.

A preparation is a module with `NAME`, `SUMMARY` (one line) and `prepare(source, out)`. It reads the data set's
published files from the folder `source` and writes a *prepared folder*: `train/`, `valid/` and `test/` with Parquet
shards, whose ids are dense from 0, and `dataset.yaml`, the schema (see `writer`). Further parameters of `prepare` are
options, with defaults. `synthetic` generates such a folder from a seed alone.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from rechub_dist.errors import UserError, nearest


@dataclass(frozen=True)
class Preparation:
    """A public data set that can be prepared: `prepare(source, out, **options)`."""

    name: str
    summary: str
    prepare: Callable[..., None]

    @property
    def options(self) -> tuple[str, ...]:
        """The names of its options."""
        return tuple(inspect.signature(self.prepare).parameters)[2:]


@cache
def preparations() -> dict[str, Preparation]:
    """All preparations by name."""
    found: dict[str, Preparation] = {}
    for info in sorted(pkgutil.iter_modules(__path__), key=lambda module: module.name):
        module = importlib.import_module(f"{__name__}.{info.name}")
        if hasattr(module, "NAME"):
            found[module.NAME] = Preparation(module.NAME, module.SUMMARY, module.prepare)
    return found


def preparation(name: str) -> Preparation:
    """The preparation called `name`.

    Raises:
        UserError: there is none.
    """
    found = preparations()
    if name not in found:
        raise UserError(f"unknown data set {name!r}: {nearest(name, found)}")
    return found[name]
