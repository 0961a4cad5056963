"""The columns that a bundle reads of a request: their types in JSON and in Arrow, and an example row."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from functools import reduce
from operator import or_
from typing import Annotated, Any, Final, Literal

import pyarrow as pa
from pydantic import Field

from rechub_dist.data.columns.fit import column_names, reading
from rechub_dist.data.columns.vocabulary import vocabulary_of
from rechub_dist.data.spec import BatchSpec
from rechub_dist.derived import Derived
from rechub_dist.errors import UserError
from rechub_dist.features import SequenceFeature, SparseFeature, StoredFeature

Shape = Literal["one", "list", "either"]
Kinds = frozenset[str]
INTEGERS: Final[Kinds] = frozenset({"integer"})
STRINGS: Final[Kinds] = frozenset({"string"})
VALUES: Final[Kinds] = INTEGERS | STRINGS
NUMBERS: Final[Kinds] = frozenset({"integer", "number", "boolean"})
TIMES: Final[Kinds] = frozenset({"integer", "number", "time"})
_HINTS: Final[dict[str, Any]] = {
    "integer": Annotated[int, Field(ge=-(2**63), lt=2**64)],
    "number": Annotated[float, Field(allow_inf_nan=False)],
    "boolean": bool,
    "string": str,
    "time": datetime,
}
_WORDS: Final = {  # one and several; what is left out is said by another kind
    VALUES: ("an integer or a string", "integers or strings"),
    INTEGERS: ("an integer", "integers"),
    STRINGS: ("a string", "strings"),
    TIMES: ("a number or an ISO 8601 time", "numbers or ISO 8601 times"),
}
_NOW: Final = 1_700_000_000  # seconds since 1970, of example rows
_PER_SECOND: Final = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}


@dataclass(frozen=True)
class Column:
    """A column of a request.

    Attributes:
        name: of the column.
        kinds: of its values, or of the elements of its lists.
        shape: whether a row has one value or a list of them.
        null: whether a row may have none.
        example: a value that scores.
        length: of the lists, where that is fixed.
        needed: whether it must be given: not if it is derived from others, or others are derived from it.
    """

    name: str
    kinds: Kinds
    shape: Shape
    null: bool
    example: Any
    length: int | None = None
    needed: bool = True

    @property
    def wanted(self) -> str:
        """The values that fit, in words."""
        one, several = _WORDS.get(self.kinds, ("a number", "numbers"))
        lists = f"a list of {several}" if self.length is None else f"a list of {self.length} {several}"
        found = {"one": one, "list": lists, "either": f"{one}, or a list of {several}"}[self.shape]
        return f"{found}, or null" if self.null else found

    @property
    def hint(self) -> Any:
        """The values that fit, as an annotation."""
        one = reduce(or_, (_HINTS[kind] for kind in _HINTS if kind in self.kinds))
        whole = Field(min_length=self.length, max_length=self.length, fail_fast=True)
        # nulls in lists go by the feature's policy, as values do, and are told by the reader
        lists = Annotated[list[one | None], whole]  # type: ignore[valid-type]
        found = {"one": one, "list": lists, "either": one | lists}[self.shape]
        return found | None if self.null else found

    def type_of(self, value: Any, *, unsigned: bool) -> pa.DataType:
        """The Arrow type of a column in which this value occurs; of one without values, if it is None.

        `unsigned`: integers are those of uint64, rather than int64.
        """
        is_list = isinstance(value, list) or (value is None and self.shape == "list")
        first = next((one for one in value if one is not None), None) if isinstance(value, list) else value
        kind: pa.DataType
        if isinstance(first, datetime):
            kind = pa.timestamp("us", None if first.tzinfo is None else "UTC")
        elif isinstance(first, str) or (first is None and self.kinds == STRINGS):
            kind = pa.string()
        elif "boolean" in self.kinds or isinstance(first, float):
            kind = pa.float64()
        else:
            kind = pa.uint64() if unsigned else pa.int64()
        return pa.list_(kind) if is_list else kind


def columns_of(spec: BatchSpec) -> dict[str, Column]:
    """The columns that rows may have for a spec, by name, among them those that others are derived from.

    Raises:
        UserError: a column is read in two ways that contradict each other.
    """
    computed = reading(spec, ()).computed
    found: dict[str, Column] = {}
    for column in (*_read(spec), *(column for one in computed for column in _inputs(one, spec))):
        known = found.get(column.name)
        found[column.name] = column if known is None else _both(known, column)
    derived = {name for one in computed for name in one.outputs}
    only_inputs = {name for one in computed for name in one.inputs} - set(column_names(spec))
    return {name: replace(c, needed=name not in derived | only_inputs) for name, c in found.items()}


def example_row(columns: dict[str, Column], spec: BatchSpec, *, derived: bool) -> dict[str, Any]:
    """A row; with `derived` it has derived columns themselves, else those that they are derived from."""
    computed = {name for one in reading(spec, ()).computed for name in one.outputs}
    names = column_names(spec) if derived else reading(spec, set(columns) - computed).uses
    return {name: columns[name].example for name in dict.fromkeys(names)}


def _read(spec: BatchSpec) -> Iterator[Column]:
    """The columns that features read."""
    for feature in spec.stored:
        value, kinds = _value_of(feature)
        if isinstance(feature, SequenceFeature):
            yield Column(feature.source, kinds, "list", True, [value, value])
        else:
            yield Column(feature.source, kinds, "either", feature.missing != "error", value)
        if isinstance(feature, SparseFeature) and feature.weights:
            yield Column(feature.weights, NUMBERS, "either", False, 0.5)
    for gap in spec.time_gaps:
        yield Column(gap.times, TIMES, "list", True, [_NOW - 7200, _NOW - 60])
        yield Column(gap.now, TIMES, "one", False, _NOW)
    for dense in spec.dense:
        value = dense.mean if dense.transform == "none" else 1.0
        null = dense.missing == "fill"
        if dense.dim == 1:
            yield Column(dense.source, NUMBERS, "one", null, value)
        else:
            yield Column(dense.source, NUMBERS, "list", null, [value] * dense.dim, dense.dim)


def _value_of(feature: StoredFeature) -> tuple[Any, Kinds]:
    """A value of a feature that becomes an id, and the kinds of its values."""
    vocabulary = vocabulary_of(feature)
    if vocabulary is None:
        return 0, VALUES if feature.hash else INTEGERS
    first = vocabulary.values[int(vocabulary.ids.argmin())].as_py() if len(vocabulary.ids) else None
    return (first or "", STRINGS) if vocabulary.strings else (first or 0, INTEGERS)


def _inputs(one: Derived, spec: BatchSpec) -> Iterator[Column]:
    """The columns that a derived column is computed from; any may be null."""
    word = next((_value_of(feature)[0] for feature in spec.stored if feature.source == one.name), "a")
    between = getattr(one, "between", "")
    now = _NOW * _PER_SECOND[getattr(one, "unit", "s")]
    uses: dict[str, tuple[tuple[Kinds, Shape, Any], ...]] = {
        "split": ((STRINGS, "one", str(word)),),
        "key_values": ((STRINGS, "one", f"{word}{between}0.5"),),
        "hour": ((TIMES, "one", now),),
        "weekday": ((TIMES, "one", now),),
        "age": ((TIMES, "one", now), (TIMES, "one", now)),
        "bucket": ((NUMBERS, "one", 1.0),),
        "ratio": ((NUMBERS, "one", 1.0), (NUMBERS, "one", 2.0)),
        "overlap": ((VALUES, "either", ["a"]), (VALUES, "list", ["a"])),
        "lookup": ((VALUES, "either", ["a"]), (VALUES, "list", ["a"]), (NUMBERS, "list", [1.0])),
    }
    for name, (kinds, shape, example) in zip(one.inputs, uses[one.kind], strict=True):
        yield Column(name, kinds, shape, True, example)


def _both(one: Column, other: Column) -> Column:
    """What fits two uses of a column.

    Raises:
        UserError: nothing does.
    """
    kinds, shapes = one.kinds & other.kinds, {one.shape, other.shape} - {"either"}
    if not kinds or len(shapes) > 1:
        raise UserError(f"column {one.name!r} is read as {one.wanted}, and as {other.wanted}; export the bundle again")
    shape = next(iter(shapes), one.shape)
    narrow = one if (one.kinds, one.shape) == (kinds, shape) else other
    return Column(one.name, kinds, shape, one.null and other.null, narrow.example, one.length or other.length)
