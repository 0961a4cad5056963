"""The record of a part: what was measured, round by round, on which machine and commit; one JSON file a part."""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

FORMAT = 1


@dataclass
class Figure:
    """One quantity.

    Attributes:
        group: the table that it belongs to, such as "26 x 100k rows"; may be empty.
        name: what it is, or whose.
        unit: of the values; "ratio" of a quotient taken within rounds.
        values: one a round.
        target: what the median is to reach; None where nothing was promised.
        at_most: whether the target is an upper bound.
    """

    group: str
    name: str
    unit: str
    values: list[float]
    target: float | None = None
    at_most: bool = False

    @property
    def median(self) -> float:
        """The median over the rounds; NaN where there is none."""
        return statistics.median(self.values) if self.values else math.nan

    @property
    def spread(self) -> tuple[float, float]:
        """The lowest and the highest value."""
        return (min(self.values), max(self.values)) if self.values else (math.nan, math.nan)

    @property
    def met(self) -> bool | None:
        """Whether the median reaches the target; None without one. Without a value it does not."""
        if self.target is None:
            return None
        return self.median <= self.target if self.at_most else self.median >= self.target


def ratio(
    group: str,
    name: str,
    over: Sequence[float],
    under: Sequence[float],
    target: float | None = None,
    *,
    at_most: bool = False,
) -> Figure:
    """The quotients of two contestants' values, round by round.

    Raises:
        ValueError: not as many rounds of both.
    """
    values = [a / b for a, b in zip(over, under, strict=True)]
    return Figure(group, name, "ratio", values, target, at_most)


@dataclass
class Record:
    """What running a part has come to.

    Attributes:
        part, title: its letter and what it measures.
        commit: of the code, as `machine.commit` has it.
        began: date and time in ISO format, UTC.
        seconds: that it took.
        load: the machine's load averages when it began.
        machine: versions and hardware, by name.
        rounds: asked for.
        smoke: whether sizes were those that only show that it works.
        figures: what was measured.
        notes: sentences for the page.
        text: lines to print as they are, such as a profile.
        failed: the last line of a part that failed; it may have figures of what went well.
    """

    part: str
    title: str
    commit: str
    began: str
    seconds: float
    load: list[float]
    machine: dict[str, str]
    rounds: int
    smoke: bool
    figures: list[Figure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    failed: str | None = None

    def write(self, folder: Path) -> None:
        """Write it whole, or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        new = folder / f".{self.part}.json.{os.getpid()}"
        new.write_text(json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n", encoding="utf-8")
        new.replace(folder / f"{self.part}.json")


def read_record(path: Path) -> Record:
    """The record in a file.

    Raises:
        ValueError: the file is not one.
    """
    try:
        tree: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if tree.pop("format") != FORMAT:
            raise ValueError("of another format")
        figures = [Figure(**one) for one in tree.pop("figures")]
        return Record(**tree, figures=figures)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: no record of a benchmark ({error}); remove it") from None


def read_records(folder: Path) -> Iterator[Record]:
    """The records in a folder, by letter; what is no record is passed over."""
    for path in sorted(folder.glob("[a-z].json")):
        with suppress(ValueError):
            yield read_record(path)
