"""Code of a user's own that a run file names: `package.module:Name`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from rechub_dist.errors import UserError, nearest

_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
_KEYS = (("model", "name"), ("objective", "name"), ("objective", "loss"), ("optimizer", "name"))
_OURS = ("rechub_dist", "torch.optim")  # what is there in any case, and imported without asking


def is_code(name: Any) -> bool:
    """Whether a name is of a class or function in a module, rather than one of our short names."""
    return isinstance(name, str) and ":" in name


def check_name(name: str, known: Iterable[str]) -> str:
    """A short name that is known, or one of the form `package.module:Name`; returns it.

    Raises:
        ValueError: it is neither.
    """
    if is_code(name):
        if _NAME.fullmatch(name) is None:
            raise ValueError(f"{name!r} is no name of a class or function: write package.module:Name")
    elif name not in (valid := tuple(known)):
        near = f"; {nearest(name, valid)}" if valid else ""
        raise ValueError(f"there is no {name!r} (a class or function of your own is package.module:Name){near}")
    return name


def module_of(name: str) -> str:
    """The module of `package.module:Name`."""
    return name.partition(":")[0]


def named_code(tree: Mapping[str, Any]) -> dict[str, str]:
    """The names of code in a configuration's tree (or a run's identity), by key; without what is torch's or ours."""
    found: dict[str, Any] = {f"{section}.{key}": (tree.get(section) or {}).get(key) for section, key in _KEYS}
    for number, metric in enumerate((tree.get("evaluation") or {}).get("metrics") or ()):
        found[f"evaluation.metrics.{number}"] = metric.get("name") if isinstance(metric, Mapping) else metric
    return {key: name for key, name in found.items() if is_code(name) and not _within(module_of(name), _OURS)}


def refuse_code(tree: Mapping[str, Any], allowed: Iterable[str], where: str, folder: Any = None) -> None:
    """Refuse to import what a checkpoint alone names: only modules that the user has named, and what is below them.

    Args:
        tree: the checkpoint's configuration.
        allowed: modules.
        where: the checkpoint.
        folder: where the code lay when the run was trained.

    Raises:
        UserError: names the flag.
    """
    allowed = tuple(allowed)
    named = named_code(tree)
    named.pop("optimizer.name", None)  # is for training alone
    refused = {key: name for key, name in named.items() if not _within(module_of(name), allowed)}
    if refused:
        flags = dict.fromkeys(f"--allow-code {module_of(name)}" for name in refused.values())
        raise UserError(
            f"{where}: {' and '.join(f'its {key} is {name}' for key, name in refused.items())}, and code that a "
            f"checkpoint names is not imported unasked; if you trust it, add {' '.join(flags)}"
            f"{'' if folder is None else f' --set code={folder}'}"
        )


def _within(module: str, packages: Iterable[str]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)
