"""Bodies of requests -> Arrow tables, with the types of a bundle's columns, within bounds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Final, NotRequired

import numpy as np
import pyarrow as pa
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from rechub_dist.data.spec import BatchSpec
from rechub_dist.errors import UserError, one_line, printable, shortened, shown
from rechub_dist.inference.server.arrow import STREAM, list_lengths, read_stream
from rechub_dist.inference.server.columns import Column, columns_of, example_row

JSON: Final = "application/json"
MOST_COMBINATIONS: Final = 1 << 22  # ids that the crosses of a request may have
_FIRST: Final = Field(fail_fast=True)  # one mistake of a list is enough to tell
_FORMS: Final = '{"rows": [...]} or {"columns": {...}}'


class RequestError(UserError):
    """A request that does not fit; `status` is that of the answer."""

    def __init__(self, message: object, status: int = 422) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Parsed:
    """What a request asks about.

    Attributes:
        rows: the rows, or candidates.
        user: one row of the columns that all candidates have in common, or None.
    """

    rows: pa.Table
    user: pa.Table | None = None


class Reader:
    """Reads the rows of one part of a bundle.

    Args:
        spec: what the bundle reads of a row.
        max_rows: more are refused.
        candidates: whether {"user": ..., "candidates": ...} is a form.
    """

    def __init__(self, spec: BatchSpec, max_rows: int, *, candidates: bool) -> None:
        self.columns = columns_of(spec)
        self._spec, self._max_rows, self._candidates = spec, max_rows, candidates
        self._body = TypeAdapter(self._forms())

    def read(self, body: bytes, media: str) -> Parsed:
        """The rows of a body, of the media type `application/json` or Arrow's.

        Raises:
            RequestError: they do not fit.
        """
        try:
            found = Parsed(read_stream(body)) if media == STREAM else self._json(body)
        except RequestError:
            raise
        except UserError as error:
            raise RequestError(error, 400) from None
        rows = found.rows.num_rows
        if rows > self._max_rows:
            raise RequestError(f"{rows} rows, at most {self._max_rows} are scored at once; send several requests", 413)
        self._check_crosses(found)
        return found

    def example(self, *, derived: bool) -> dict[str, Any]:
        """A row that scores; see `example_row`."""
        return example_row(self.columns, self._spec, derived=derived)

    @cached_property
    def schema(self) -> dict[str, Any]:
        """The JSON schema of a body."""
        return self._body.json_schema(ref_template="{model}")

    def _forms(self) -> Any:
        row = {c.name: c.hint if c.needed else NotRequired[c.hint] for c in self.columns.values()}
        lists = {
            c.name: many if c.needed else NotRequired[many]
            for c in self.columns.values()
            for many in [Annotated[list[c.hint], _FIRST]]  # type: ignore[name-defined]
        }
        forms: dict[str, Any] = {
            "rows": NotRequired[Annotated[list[_typed("Row", row)], _FIRST]],  # type: ignore[misc]
            "columns": NotRequired[_typed("Columns", lists)],
        }
        if self._candidates:
            some = _typed("Some", {c.name: NotRequired[c.hint] for c in self.columns.values()})
            forms["user"] = NotRequired[some]
            forms["candidates"] = NotRequired[Annotated[list[some], _FIRST]]  # type: ignore[valid-type]
        return _typed("Body", forms, extra="forbid")

    def _json(self, body: bytes) -> Parsed:
        try:
            tree = self._body.validate_json(body, strict=True)
        except ValidationError as error:
            raise self._complaint(error) from None
        given = set(tree)
        if given == {"rows"}:
            return Parsed(self._table(tree["rows"]))
        if given == {"columns"}:
            return Parsed(self._of_columns(tree["columns"]))
        if given == {"user", "candidates"}:
            return Parsed(self._table(tree["candidates"], tree["user"]), self._table([tree["user"]]))
        more = ', or {"user": {...}, "candidates": [...]}' if self._candidates else ""
        raise RequestError(f"the body has {', '.join(sorted(given)) or 'nothing'}; give {_FORMS}{more}")

    def _table(self, rows: list[dict[str, Any]], others: Iterable[str] = ()) -> pa.Table:
        """An Arrow table of validated rows; without rows, it has the columns that are not in `others`."""
        names = dict.fromkeys(name for row in rows[:1] for name in row)
        names |= dict.fromkeys(name for row in rows if row.keys() - names.keys() for name in row)
        if not rows:
            names = dict.fromkeys(name for name in self.example(derived=False) if name not in set(others))
        firsts = {name: next((row[name] for row in rows if row.get(name) is not None), None) for name in names}

        def convert(types: dict[str, pa.DataType]) -> pa.Table:
            array = pa.array(rows, pa.struct(types.items()))
            return pa.Table.from_batches([pa.RecordBatch.from_struct_array(array)])

        return self._converted(firsts, convert)

    def _of_columns(self, columns: dict[str, list[Any]]) -> pa.Table:
        lengths = {name: len(values) for name, values in columns.items()}
        if len(set(lengths.values())) > 1:
            (one, first), *rest = lengths.items()
            other, second = next(item for item in rest if item[1] != first)
            raise RequestError(f"columns {one!r} and {other!r} have {first} and {second} rows")
        firsts = {name: next((v for v in values if v is not None), None) for name, values in columns.items()}
        return self._converted(
            firsts, lambda types: pa.table({name: pa.array(columns[name], kind) for name, kind in types.items()})
        )

    def _converted(self, firsts: dict[str, Any], convert: Any) -> pa.Table:
        """What `convert` makes with the types of columns whose first values are known."""
        for unsigned in (False, True):
            types = {name: self.columns[name].type_of(value, unsigned=unsigned) for name, value in firsts.items()}
            try:
                return convert(types)
            except OverflowError as error:
                if unsigned:
                    raise RequestError(
                        f"a column has negative integers and some from 2^63 on: {one_line(error)}"
                    ) from None
            except (pa.ArrowException, ValueError, TypeError) as error:
                mixed = "the rows of a column must be alike, all lists or none, all strings or all numbers"
                raise RequestError(f"{mixed}: {one_line(error)}") from None
        raise AssertionError

    def _complaint(self, error: ValidationError) -> RequestError:
        """One line on the first mistake."""
        found = error.errors(include_url=False, include_context=False)[0]
        place: list[Any] = list(found["loc"])
        if found["type"] == "json_invalid":
            return RequestError(f"the body is no JSON: {one_line(found['msg']).removeprefix('Invalid JSON: ')}", 400)
        name = next((key for key in place[1:] if isinstance(key, str)), None)
        where = shortened(printable(".".join(map(str, self._cut(place)))), 200)
        if found["type"] == "missing":
            return RequestError(f"missing key {where!r}")
        if found["type"] == "extra_forbidden":
            return RequestError(f"unknown key {where!r}; give {_FORMS}")
        column = self.columns.get(name or "")
        if column is None:
            return RequestError(f"{where or 'the body'}: should be {_form_of(place)}, got {_shown(found['input'])}")
        return RequestError(f"{where}: should be {column.wanted}, got {_shown(found['input'])}")

    def _cut(self, place: Sequence[Any]) -> list[Any]:
        """The place without the names of a union's branches, which come after the column."""
        at = next((i for i, key in enumerate(place) if i and key in self.columns and isinstance(key, str)), len(place))
        return [key for i, key in enumerate(place) if i <= at or isinstance(key, int)]

    def _check_crosses(self, found: Parsed) -> None:
        """Refuse rows whose lists of ids have too many combinations."""
        for feature in self._spec.crosses:
            counts = np.ones(max(1, found.rows.num_rows))
            for source in feature.inputs:
                counts = counts * self._most_ids(source.source, found)
            if counts.sum() > MOST_COMBINATIONS + found.rows.num_rows:
                lists = " and ".join(repr(source.source) for source in feature.inputs)
                text = f"feature {feature.name!r} would have {counts.sum():,.0f} combinations; shorten the lists"
                raise RequestError(f"{text} of {lists}", 413)

    def _most_ids(self, name: str, found: Parsed) -> Any:
        """An upper bound of the ids that rows have in a column, or in one that is derived from others."""
        for table in (found.rows, found.user):
            if table is not None and table.column_names.count(name) == 1:
                return list_lengths(table[name])
        sources = [one.inputs for one in self._spec.derived if name in one.outputs]
        if not sources:
            return 1
        return sum(_most_pieces(source, found) for source in sources[0])


def _most_pieces(name: str, found: Parsed) -> int:
    tables = [table for table in (found.rows, found.user) if table is not None and name in table.column_names]
    return max((table.select([name]).nbytes for table in tables), default=1)


def _shown(value: Any) -> str:
    return "null" if value is None else shown(value)


def _form_of(place: list[Any]) -> str:
    if not place:
        return _FORMS
    if place[0] in ("rows", "candidates") and len(place) == 1:
        return "a list of objects, one for each row"
    return "an object of columns"


def _typed(name: str, fields: dict[str, Any], extra: Any = "ignore") -> Any:
    make: Any = TypedDict
    found = make(name, fields)
    found.__pydantic_config__ = ConfigDict(extra=extra)
    return found


def column_facts(column: Column) -> dict[str, Any]:
    """What callers are told of a column."""
    return {"name": column.name, "type": column.wanted, "needed": column.needed, "example": column.example}
