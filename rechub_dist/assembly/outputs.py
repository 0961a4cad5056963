"""How many numbers a model gives for each of a run's labels: one, or one for each class of a label of several."""

from __future__ import annotations

import typing
from collections.abc import Sequence
from typing import Annotated, Any

from rechub_dist.assembly.arguments import hints_of
from rechub_dist.errors import UserError
from rechub_dist.features import Label, OfLabels
from rechub_dist.models import Model, catalogue


def outputs_for(labels: Sequence[Label], cls: type[Model]) -> dict[str, list[int]]:
    """The argument of a model's constructor by which it has the outputs that the labels need, if one has several."""
    name = _parameter(cls) if any(label.classes is not None for label in labels) else None
    return {} if name is None else {name: [label.outputs for label in labels]}


def check_outputs(name: str, model: Model, labels: Sequence[Label]) -> None:
    """Refuse a model that has other outputs than its labels, as many as it has tasks, need.

    Raises:
        UserError: naming the label, and models that can have them.
    """
    found = model.label_outputs or (1,) * len(labels)
    wrong = next((label for label, count in zip(labels, found, strict=True) if label.outputs != count), None)
    if wrong is None:
        return
    parameter = _parameter(type(model))
    if parameter is None and wrong.classes is not None:
        able = ", ".join(one for one, cls in catalogue().items() if _parameter(cls) is not None)
        raise UserError(
            f"data.labels: {wrong.name!r} has {wrong.classes} classes, and {name} gives one number for a label; choose "
            f"{able}, or a model of your own with label_outputs"
        )
    raise UserError(
        f"model.{parameter or 'name'}: {name} has {list(found)} outputs, and the labels "
        f"{', '.join(label.name for label in labels)} need {[label.outputs for label in labels]}; make them alike, or "
        "leave that to the labels"
    )


def _parameter(cls: type[Model]) -> str | None:
    """The parameter of its constructor that `OfLabels` marks."""
    return next((name for name, hint in hints_of("model", cls).items() if _is_marked(hint)), None)


def _is_marked(hint: Any) -> bool:
    marks = typing.get_args(hint)[1:] if typing.get_origin(hint) is Annotated else ()
    return any(isinstance(mark, OfLabels) for mark in marks)
