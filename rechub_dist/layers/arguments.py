"""Checks of constructor arguments that several models share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from rechub_dist.features import MAX_CLASSES

MAX_WIDTH: Final = 1 << 24  # of a layer
MAX_LAYERS: Final = 1000


def check_choice(parameter: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse a value of `parameter` that is none of `choices`."""
    if value not in choices:
        raise ValueError(f"{parameter} is {value!r}: use one of {', '.join(choices)}")


def check_positive(parameter: str, value: int, most: int = MAX_WIDTH) -> None:
    """Refuse a value of `parameter` below 1 or above `most`."""
    if value < 1:
        raise ValueError(f"{parameter} is {value}: it must be at least 1")
    if value > most:
        raise ValueError(f"{parameter} is {value}: it must be at most {most:,}")


def check_layers(parameter: str, value: int) -> None:
    """Refuse a number of layers, or of networks side by side, below 1 or above 1000."""
    check_positive(parameter, value, MAX_LAYERS)


def check_widths(parameter: str, widths: Sequence[int]) -> None:
    """Refuse layers of a width below 1 or above `MAX_WIDTH`, and more of them than 1000."""
    if len(widths) > MAX_LAYERS:
        raise ValueError(f"{parameter} has {len(widths)} layers: at most {MAX_LAYERS} can be given")
    if any(units < 1 for units in widths):
        raise ValueError(f"{parameter} are {list(widths)}: every width must be at least 1")
    if any(units > MAX_WIDTH for units in widths):
        raise ValueError(f"{parameter} are {list(widths)}: every width must be at most {MAX_WIDTH:,}")


def check_outputs(outputs: Sequence[int] | None, labels: int) -> tuple[int, ...]:
    """The number of outputs of each label, 1 where none is said; refuse those that there cannot be."""
    if outputs is None:
        return (1,) * labels
    if len(outputs) != labels:
        raise ValueError(f"outputs are {list(outputs)}: give one number for each label, {labels}")
    if not all(1 <= count <= MAX_CLASSES for count in outputs):
        raise ValueError(f"outputs are {list(outputs)}: each must be at least 1 and at most {MAX_CLASSES:,}")
    return tuple(outputs)


def check_rate(parameter: str, value: float) -> None:
    """Refuse a dropout rate outside [0, 1)."""
    if not 0 <= value < 1:
        raise ValueError(f"{parameter} is {value}: it must be at least 0 and less than 1")


def check_least(parameter: str, value: float, least: float) -> None:
    """Refuse a value of `parameter` below `least`, and one that is no number."""
    if not least <= value < math.inf:
        raise ValueError(f"{parameter} is {value}: it must be at least {least:g}")
