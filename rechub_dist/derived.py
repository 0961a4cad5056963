"""Derived columns: what is computed, row by row, from other columns. Needs nothing but the standard library.

They are declared once, in the section `derive` of dataset.yaml, and computed by one code, `data.columns.derive`, when a
table is prepared, when a file that lacks them is read, and when a row is given to a trained model. Each kind has
`inputs`, the columns that it reads, and `outputs`, the columns that it makes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Literal

Unit = Literal["s", "ms", "us", "ns"]
Span = Literal["second", "minute", "hour", "day"]
Combine = Literal["sum", "mean", "max", "first"]
MAX_UTC_OFFSET: Final = 24.0  # hours


@dataclass(frozen=True)
class _OneColumn:
    """What has one output, of its own name."""

    name: str

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of the columns that it makes."""
        return (self.name,)


@dataclass(frozen=True)
class Split(_OneColumn):
    """The pieces of a string between the separators `by`, list<string>: `"a| b||c"` is `[a, b, c]`.

    Pieces are stripped of white space, and empty ones are dropped; a null string gives a null list.

    Raises:
        ValueError: names that cannot be, or an empty separator.
    """

    column: str
    by: str = "|"
    kind: Literal["split"] = "split"

    def __post_init__(self) -> None:
        _check(self)
        _check_separator(self, "by", self.by)

    @property
    def inputs(self) -> tuple[str, ...]:
        """The columns that it reads."""
        return (self.column,)


@dataclass(frozen=True)
class KeyValues:
    """The keys and weights of a string such as `"drama:0.5, crime:2, old"`, in two columns.

    `name` has the keys, list<string>, and `weights` their weights, list<float32>, in the same order. A piece is divided
    at its last `between`; one without it has weight 1, one without a key is dropped. A null string gives null lists.

    Raises:
        ValueError: names that cannot be, or separators that are empty or equal.
    """

    name: str
    weights: str
    column: str
    by: str = ","
    between: str = ":"
    kind: Literal["key_values"] = "key_values"

    def __post_init__(self) -> None:
        _check(self)
        _check_separator(self, "by", self.by)
        _check_separator(self, "between", self.between)
        if self.by == self.between:
            raise ValueError(f"derived column {self.name!r}: by and between are both {self.by!r}, must differ")

    @property
    def inputs(self) -> tuple[str, ...]:
        """The columns that it reads."""
        return (self.column,)

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of the columns that it makes."""
        return self.name, self.weights


@dataclass(frozen=True)
class Hour(_OneColumn):
    """The hour of a time, 0 .. 23, `utc_offset` hours from UTC.

    The time is a timestamp or a date (without a zone: as if in UTC), or a number of `unit`s since 1970. A null gives a
    null, and so does a number that is not finite.

    Raises:
        ValueError: names that cannot be, or an offset of more than a day.
    """

    column: str
    utc_offset: float = 0.0
    unit: Unit = "s"
    kind: Literal["hour"] = "hour"

    def __post_init__(self) -> None:
        _check(self)
        _check_offset(self, self.utc_offset)

    @property
    def inputs(self) -> tuple[str, ...]:
        """The columns that it reads."""
        return (self.column,)


@dataclass(frozen=True)
class Weekday(_OneColumn):
    """The day of the week of a time, 0 (Monday) .. 6; the rest as in `Hour`."""

    column: str
    utc_offset: float = 0.0
    unit: Unit = "s"
    kind: Literal["weekday"] = "weekday"

    def __post_init__(self) -> None:
        _check(self)
        _check_offset(self, self.utc_offset)

    @property
    def inputs(self) -> tuple[str, ...]:
        """The columns that it reads."""
        return (self.column,)


@dataclass(frozen=True)
class Age(_OneColumn):
    """How long before the time `now` the time `column` was, float64 in units of `per`; null where one of them is.

    Times are as in `Hour`; numbers of both columns count `unit`s. The age is negative where `column` is later.

    Raises:
        ValueError: names that cannot be.
    """

    column: str
    now: str
    per: Span = "day"
    unit: Unit = "s"
    kind: Literal["age"] = "age"

    def __post_init__(self) -> None:
        _check(self)

    @property
    def inputs(self) -> tuple[str, ...]:
        """The columns that it reads."""
        return self.column, self.now


@dataclass(frozen=True)
class Bucket(_OneColumn):
    """How many of the `boundaries` a number reaches, 0 .. len(boundaries); null for a null or NaN.

    Raises:
        ValueError: names that cannot be, or boundaries that do not ascend.
    """

    column: str
    boundaries: tuple[float, ...]
    kind: Literal["bucket"] = "bucket"

    def __post_init__(self) -> None:
        _check(self)
        pairs = zip(self.boundaries, self.boundaries[1:], strict=False)
        finite = all(math.isfinite(boundary) for boundary in self.boundaries)
        if not self.boundaries or not finite or any(not low < high for low, high in pairs):
            raise ValueError(
                f"derived column {self.name!r}: boundaries are {list(self.boundaries)}, must be ascending numbers"
            )

    @property
    def inputs(self) -> tuple[str, ...]:
        """The columns that it reads."""
        return (self.column,)


@dataclass(frozen=True)
class Ratio(_OneColumn):
    """`column` divided by `over`, float64; null where `over` is 0, or one of them is null or NaN.

    Raises:
        ValueError: names that cannot be.
    """

    column: str
    over: str
    kind: Literal["ratio"] = "ratio"

    def __post_init__(self) -> None:
        _check(self)

    @property
    def inputs(self) -> tuple[str, ...]:
        """The columns that it reads."""
        return self.column, self.over


@dataclass(frozen=True)
class Overlap(_OneColumn):
    """How many different elements of `left` (a list, or one value) are in the list `right` of the same row.

    With `share` it is that divided by the number of different elements of `left`, float64, and 0 where that has none.
    Null lists count as empty, and null elements as none: the result is never null.

    Raises:
        ValueError: names that cannot be.
    """

    left: str
    right: str
    share: bool = False
    kind: Literal["overlap"] = "overlap"

    def __post_init__(self) -> None:
        _check(self)

    @property
    def inputs(self) -> tuple[str, ...]:
        """The columns that it reads."""
        return self.left, self.right


@dataclass(frozen=True)
class Lookup(_OneColumn):
    """The values of a row's `keys` (a list, or one value) in the map that the lists `of` and `values` of the row make.

    For example: the user's taste (`of` genres, with `values`) for the genres of the item (`keys`). The values of the
    keys that are found, in the order of the keys, are combined to one float64; `default` where none is found. Where
    `of` has a key twice, its first value counts. Null lists count as empty, null keys and values as absent: the result
    is never null.

    Raises:
        ValueError: names that cannot be, or a `default` that is not finite.
    """

    keys: str
    of: str
    values: str
    default: float = 0.0
    combine: Combine = "sum"
    kind: Literal["lookup"] = "lookup"

    def __post_init__(self) -> None:
        _check(self)
        if not math.isfinite(self.default):
            raise ValueError(f"derived column {self.name!r}: default is {self.default}, must be a finite number")

    @property
    def inputs(self) -> tuple[str, ...]:
        """The columns that it reads."""
        return self.keys, self.of, self.values


Derived = Split | KeyValues | Hour | Weekday | Age | Bucket | Ratio | Overlap | Lookup


def check_derived(derived: Iterable[Derived]) -> None:
    """Check that no two make the same column, and that each reads none that is made after it.

    Raises:
        ValueError: one of these, by name.
    """
    derived = tuple(derived)
    made_by: dict[str, str] = {}
    for one in derived:
        for output in one.outputs:
            if output in made_by:
                raise ValueError(f"derived columns {made_by[output]!r} and {one.name!r} both make column {output!r}")
            made_by[output] = one.name
    before: set[str] = set()
    for one in derived:
        for name in one.inputs:
            if name in made_by and name not in before:
                raise ValueError(
                    f"derived column {one.name!r} reads column {name!r}, which is derived after it: declare "
                    f"{made_by[name]!r} first"
                )
        before.update(one.outputs)


def _check(derived: Derived) -> None:
    """The rules for names."""
    if not all(derived.outputs) or not all(derived.inputs):
        raise ValueError(f"derived column {derived.name!r}: the name of a column is empty")
    if len(set(derived.outputs)) < len(derived.outputs):
        raise ValueError(f"derived column {derived.name!r}: its columns of keys and of weights have the same name")
    for output in derived.outputs:
        if output in derived.inputs:
            raise ValueError(f"derived column {output!r} has the name of the column that it reads; choose another name")


def _check_separator(derived: Split | KeyValues, key: str, separator: str) -> None:
    if not separator:
        raise ValueError(f"derived column {derived.name!r}: {key} is empty, must be a separator")


def _check_offset(derived: Hour | Weekday, hours: float) -> None:
    if not -MAX_UTC_OFFSET <= hours <= MAX_UTC_OFFSET:
        raise ValueError(f"derived column {derived.name!r}: utc_offset is {hours}, must be hours, -24 .. 24")
