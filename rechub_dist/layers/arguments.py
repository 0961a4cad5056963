"""Checks of constructor arguments that several models share."""

from __future__ import annotations


def check_choice(parameter: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse a value of `parameter` that is none of `choices`."""
    if value not in choices:
        raise ValueError(f"{parameter} is {value!r}: use one of {', '.join(choices)}")


def check_positive(parameter: str, value: int) -> None:
    """Refuse a value of `parameter` below 1."""
    if value < 1:
        raise ValueError(f"{parameter} is {value}: it must be at least 1")


def check_rate(parameter: str, value: float) -> None:
    """Refuse a dropout rate outside [0, 1)."""
    if not 0 <= value < 1:
        raise ValueError(f"{parameter} is {value}: it must be at least 0 and less than 1")
