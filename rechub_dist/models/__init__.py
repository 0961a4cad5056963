"""The models, discovered by listing the folders: `from rechub_dist.models import DeepFM`.

A model is one file in `recall/`, `ranking/` or `multitask/`, named after its class in lower case.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from typing import Any

from rechub_dist.models.base import Model, RecallModel

FAMILIES = ("recall", "ranking", "multitask")


@cache
def catalogue() -> dict[str, type[Model]]:
    """Every model class by name, family by family."""
    found: dict[str, type[Model]] = {}
    for family in FAMILIES:
        package = importlib.import_module(f"{__name__}.{family}")
        for info in sorted(pkgutil.iter_modules(package.__path__), key=lambda module: module.name):
            module = importlib.import_module(f"{package.__name__}.{info.name}")
            for value in vars(module).values():
                if isinstance(value, type) and issubclass(value, Model) and value.__module__ == module.__name__:
                    found[value.__name__] = value
    return found


def family(model: type[Model]) -> str:
    """The family of a model: the name of its folder."""
    return model.__module__.split(".")[-2]


def __getattr__(name: str) -> Any:
    if not name.startswith("_") and name in catalogue():
        return catalogue()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *catalogue()])


__all__ = ["FAMILIES", "Model", "RecallModel", "catalogue", "family"]
