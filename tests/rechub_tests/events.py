"""Events as torch's profiler has them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Range:
    start: float
    end: float


@dataclass
class Event:
    name: str
    time_range: Range
    thread: int = 1


def event(name: str, start: float, end: float, thread: int = 1) -> Event:
    """One of a thread; times in microseconds."""
    return Event(name, Range(start, end), thread)
