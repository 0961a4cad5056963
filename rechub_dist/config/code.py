"""References of a run file to the user's own code: `package.module:Name`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from rechub_dist.errors import UserError, nearest

_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
_KEYS = (("model", "name"), ("objective", "name"), ("objective", "loss"), ("optimizer", "name"))
_OURS = ("rechub_dist", "torch.optim")  # always available, and imported without permission


def is_code(name: Any) -> bool:
    """Whether a name has the form `package.module:Name`, rather than being one of our short names."""
    return isinstance(name, str) and ":" in name


def check_name(name: str, known: Iterable[str]) -> str:
    """Return `name` if it is a known short name or of the form `package.module:Name`.

    Raises:
        ValueError: it is neither.
    """
    if is_code(name):
        if _NAME.fullmatch(name) is None:
            raise ValueError(f"{name!r} is not the name of a class or function: write package.module:Name")
    elif name not in (valid := tuple(known)):
        near = f"; {nearest(name, valid)}" if valid else ""
        raise ValueError(f"unknown name {name!r} (write your own class or function as package.module:Name){near}")
    return name


def module_of(name: str) -> str:
    """The module of `package.module:Name`."""
    return name.partition(":")[0]


def named_code(tree: Mapping[str, Any]) -> dict[str, str]:
    """The user's own code that a configuration tree (or a run's identity) refers to: key to `package.module:Name`."""
    found: dict[str, Any] = {f"{section}.{key}": (tree.get(section) or {}).get(key) for section, key in _KEYS}
    for number, metric in enumerate((tree.get("evaluation") or {}).get("metrics") or ()):
        found[f"evaluation.metrics.{number}"] = metric.get("name") if isinstance(metric, Mapping) else metric
    tables = tree.get("embedding") or {}
    found |= {"embedding.optimizer.name": (tables.get("optimizer") or {}).get("name")}
    for number, rule in enumerate(tables.get("rules") or ()):
        found[f"embedding.rules.{number}.optimizer.name"] = (rule.get("optimizer") or {}).get("name")
    return {key: name for key, name in found.items() if is_code(name) and not _within(module_of(name), _OURS)}


def only_trains(key: str) -> bool:
    """Whether the code that a key of a configuration names is imported where the run is trained, and only there."""
    return key == "optimizer.name" or key.startswith("embedding.")


def refuse_code(tree: Mapping[str, Any], allowed: Iterable[str], where: str, folder: Any = None) -> None:
    """Refuse a checkpoint that refers to code outside the modules that the user allowed, submodules included.

    Args:
        tree: the checkpoint's configuration.
        allowed: names of modules that may be imported.
        where: the checkpoint, for the error.
        folder: where the code was when the run was trained, for the error.

    Raises:
        UserError: code is not allowed; names the flag that allows it.
    """
    allowed = tuple(allowed)
    named = {key: name for key, name in named_code(tree).items() if not only_trains(key)}
    refused = {key: name for key, name in named.items() if not _within(module_of(name), allowed)}
    if refused:
        flags = dict.fromkeys(f"--allow-code {module_of(name)}" for name in refused.values())
        raise UserError(
            f"{where}: {' and '.join(f'its {key} is {name}' for key, name in refused.items())}, and code that a "
            f"checkpoint names is not imported by default; if you trust it, add {' '.join(flags)}"
            f"{'' if folder is None else f' --set code={folder}'}"
        )


def _within(module: str, packages: Iterable[str]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)
