"""Which dense parameters are trained, and with which settings: the rules of `optimizer`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from rechub_dist.config import DenseRule, OptimizerConfig
from rechub_dist.errors import UserError, nearest

Maker = Callable[[list[Any]], torch.optim.Optimizer]  # of an optimizer, from parameters or groups of them


def freeze(model: nn.Module, config: OptimizerConfig) -> None:
    """Exclude the parameters that a rule freezes from gradients, before DDP sees them.

    Raises:
        UserError: a rule matches no parameter.
    """
    named = dict(model.named_parameters())
    for rule in config.rules:
        if not any(fnmatchcase(name, rule.parameters) for name in named):
            parts = (f"{name[:place]}.*" for name in named for place, sign in enumerate(name) if sign == ".")
            near = nearest(rule.parameters, {*named, *parts})
            raise UserError(f"optimizer.rules: {rule.parameters!r} matches no dense parameter: {near}")
    for name, parameter in named.items():
        if (found := _rule(name, config.rules)) is not None and found.frozen:
            parameter.requires_grad_(False)


def parameter_groups(parameters: Mapping[str, nn.Parameter], config: OptimizerConfig) -> list[dict[str, Any]]:
    """The trained parameters in groups of equal settings, as torch's optimizers take them.

    A group has only the settings that differ from those of the optimizer as a whole.
    """
    groups: dict[tuple[tuple[str, float], ...], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        if not parameter.requires_grad:
            continue
        rule = _rule(name, config.rules)
        own = {key: value for key in ("lr", "weight_decay") if (value := getattr(rule, key, None)) is not None}
        if config.weight_decay_of == "matrices" and parameter.dim() < 2:
            own["weight_decay"] = 0.0
        groups.setdefault(tuple(own.items()), []).append(parameter)
    return [{"params": members, **dict(settings)} for settings, members in groups.items()]


def _rule(name: str, rules: Iterable[DenseRule]) -> DenseRule | None:
    return next((rule for rule in rules if fnmatchcase(name, rule.parameters)), None)
