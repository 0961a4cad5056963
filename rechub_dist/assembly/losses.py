"""The losses of a run's labels, as its file names them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rechub_dist.assembly.arguments import arguments_of
from rechub_dist.assembly.code import POINTWISE, named_loss
from rechub_dist.config import PointwiseConfig, RunConfig
from rechub_dist.errors import UserError, nearest
from rechub_dist.features import Label
from rechub_dist.objectives.label_losses import LOSSES, LabelLoss, made_of

_TENSORS = ("logits", "values", "labels")


def label_losses(config: RunConfig, chosen: PointwiseConfig, labels: tuple[Label, ...]) -> dict[str, LabelLoss]:
    """The loss of each label that `chosen` names one for, its arguments filled in.

    Raises:
        UserError: a loss that no label has the type for, arguments that it does not take, or a label that there is not.
    """
    found: dict[str, LabelLoss] = {}
    own = named_loss(config, chosen, POINTWISE)
    if own is not None:
        found = {label.name: own for label in labels}
    elif chosen.loss is not None:
        there = [label for label in labels if chosen.loss in LOSSES[label.type]]
        if not there:
            raise UserError(f"objective.loss: {_unlike(chosen.loss, labels)}")
        found = {label.name: _ours("objective", label, chosen.loss, chosen.loss_arguments) for label in there}
    by_name = {label.name: label for label in labels}
    for name, one in chosen.label_losses.items():
        where = f"objective.label_losses.{name}"
        if name not in by_name:
            raise UserError(f"objective.label_losses: no label {name!r}: {nearest(name, by_name)}")
        if one.loss not in LOSSES[by_name[name].type]:
            raise UserError(f"{where}.loss: {_unlike(one.loss, (by_name[name],))}")
        found[name] = _ours(where, by_name[name], one.loss, one.loss_arguments)
    return found


def _ours(where: str, label: Label, name: str, given: Mapping[str, Any]) -> LabelLoss:
    loss, where = LOSSES[label.type][name], f"{where}.loss_arguments"
    arguments = arguments_of(where, loss, given, others=_TENSORS)
    weights = arguments.get("class_weights")
    if weights is not None and len(weights) != label.classes:
        raise UserError(
            f"{where}.class_weights: {len(weights)} weights for label {label.name!r} of {label.classes} classes; give "
            "one for each class, in their order"
        )
    return made_of(loss, arguments)


def _unlike(loss: str, labels: tuple[Label, ...]) -> str:
    kind = next(kind for kind, losses in LOSSES.items() if loss in losses)
    there = ", ".join(f"{label.name} ({label.type})" for label in labels)
    return f"{loss} is a loss of labels of type {kind}, got {there}; choose {' or '.join(LOSSES[labels[0].type])}"
