"""Checks that the columns of a data set have the types that a `BatchSpec` needs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import pyarrow as pa

from rechub_dist.data.columns.derived_types import derived_schema
from rechub_dist.data.columns.strings import is_string
from rechub_dist.data.columns.vocabulary import vocabulary_of
from rechub_dist.data.parquet.kinds import is_integer, is_list, is_number, is_time, values_family
from rechub_dist.data.spec import BatchSpec
from rechub_dist.derived import Derived
from rechub_dist.errors import UserError, nearest
from rechub_dist.features import SequenceFeature, SparseFeature, StoredFeature


def column_uses(spec: BatchSpec) -> list[str]:
    """The columns that `spec` reads, in the order of their use by `open_window`, each as often as it is used."""
    names: list[str | None] = []
    for feature in spec.in_key_order:
        names += [feature.source, feature.weights if isinstance(feature, SparseFeature) else None]
    for gap in spec.time_gaps:
        names += [gap.times, gap.now]
    names += [dense.source for dense in spec.dense]
    names += [label.source for label in spec.labels]
    return [name for name in (*names, spec.weight, *spec.keys) if name is not None]


def column_names(spec: BatchSpec) -> list[str]:
    """The columns that `spec` reads, each once."""
    return list(dict.fromkeys(column_uses(spec)))


class Reading(NamedTuple):
    """How the columns that a spec reads come out of rows which hold only some of them.

    Attributes:
        computed: the derived columns to compute, in their order.
        inputs: the columns of the rows that these are computed from, each once.
        uses: the columns of the rows in the order of their use, each as often as it is used: `inputs`, then those that
            `open_window` reads.
    """

    computed: tuple[Derived, ...]
    inputs: tuple[str, ...]
    uses: list[str]


def reading(spec: BatchSpec, there: Iterable[str]) -> Reading:
    """How the columns that `spec` reads come out of rows with the columns `there`: those are read, others computed."""
    there, uses = set(there), column_uses(spec)
    wanted = {name for name in uses if name not in there}
    computed: list[Derived] = []
    for one in reversed(spec.derived):  # what reads others comes after them
        if wanted & set(one.outputs):
            computed.insert(0, one)
            wanted |= {name for name in one.inputs if name not in there}
    made = {name for one in computed for name in one.outputs} - there
    inputs = tuple(name for name in dict.fromkeys(name for one in computed for name in one.inputs) if name not in made)
    return Reading(tuple(computed), inputs, [*inputs, *(name for name in uses if name not in made)])


def file_columns(schema: pa.Schema, spec: BatchSpec, where: str) -> dict[str, str]:
    """Check a file as `check_schema` does, and return the same of the columns that are read of it.

    Files for which this returns the same are consistent: equal values become equal ids and times, and the same columns
    of theirs are computed.
    """
    check_schema(schema, spec, where)
    return {name: values_family(schema.field(name).type) for name in reading(spec, schema.names).uses}


def check_schema(schema: pa.Schema, spec: BatchSpec, where: str) -> dict[str, str]:
    """Check that every column that `spec` reads exists, or can be computed, and has a suitable type.

    Returns:
        By column, the family of its values: `number`, `string`, `timestamp`, or `null` for a column of nulls only,
        which fits wherever values may be missing.

    Raises:
        UserError: naming `where`, the column and the types that fit.
    """
    computed = reading(spec, schema.names).computed
    _check_values(computed, spec, where)
    schema = derived_schema(schema, computed, where)
    types: dict[str, pa.DataType] = dict(zip(schema.names, schema.types, strict=True))
    names = column_names(spec)
    for name in names:
        if name not in types:
            raise UserError(f"{where}: there is no column {name!r}; {nearest(name, types)}")
        if schema.names.count(name) > 1:
            raise UserError(f"{where}: {schema.names.count(name)} columns are named {name!r}; rename all but one")

    for column, kind, fits, user, wanted in _needs(types, spec):
        if not fits:
            raise UserError(f"{where}: column {column!r} is {kind}, but {user} needs {wanted}")
    return {name: values_family(types[name]) for name in names}


def _check_values(computed: tuple[Derived, ...], spec: BatchSpec, where: str) -> None:
    """Raise UserError if a column is to be computed from ids, whose values it would need."""
    ids = {feature.source: feature.name for feature in spec.stored if feature.encoded}
    for one in computed:
        for name in one.inputs:
            if name in ids:
                raise UserError(
                    f"{where}: column {name!r} holds ids (feature {ids[name]!r} is encoded), but derived column "
                    f"{one.name!r} is computed from its values; write {one.name!r} into the files, too"
                )


def _needs(types: dict[str, pa.DataType], spec: BatchSpec) -> Iterator[tuple[str, pa.DataType, bool, str, str]]:
    """For each use of a column: the column, its type, whether that fits, what uses it, and the types that fit."""
    for feature in spec.stored:
        kind = types[feature.source]
        fits, one, several = _fits_ids(_values(kind), feature)
        if isinstance(feature, SequenceFeature):
            user, wanted = f"sequence feature {feature.name!r}", f"a list of {several}"
            fits = fits and _holds_lists(kind)
        else:
            user, wanted = f"sparse feature {feature.name!r}", f"{one} or a list of {several}"
        yield feature.source, kind, fits, user, wanted
        if isinstance(feature, SparseFeature) and feature.weights:
            of, kind = kind, types[feature.weights]
            fits = (_holds_lists(kind) if is_list(of) else not is_list(kind)) and _are_numbers(_values(kind))
            wanted = "a list of numbers" if is_list(of) else "a number"
            yield feature.weights, kind, fits, f"the weight column of feature {feature.name!r}", wanted
    for gap in spec.time_gaps:
        kind, now = types[gap.times], types[gap.now]
        user, then = f"time gap feature {gap.name!r}", _values(kind)
        fits = _holds_lists(kind) and (is_time(then) or pa.types.is_null(then))
        yield gap.times, kind, fits, user, "a list of numbers or timestamps"
        fits = (is_time(now) and values_family(now) == values_family(then)) or pa.types.is_null(now)
        fits = fits or (is_time(now) and pa.types.is_null(then))
        yield gap.now, now, fits, user, f"the type of the elements of column {gap.times!r}, {then}"
    for dense in spec.dense:
        kind = types[dense.source]
        if dense.dim == 1:
            fits = not is_list(kind) and _are_numbers(kind)
        else:
            fits = _holds_lists(kind) and _are_numbers(_values(kind))
            fits = fits and not (pa.types.is_fixed_size_list(kind) and kind.list_size != dense.dim)
        wanted = "a number" if dense.dim == 1 else f"a list of {dense.dim} numbers"
        yield dense.source, kind, fits, f"dense feature {dense.name!r}", wanted
    for label in spec.labels:
        kind = types[label.source]
        wanted = "a number or a boolean"
        if label.classes is not None:
            wanted = f"an integer from 0 to {label.classes - 1}; write the number of each value's class into the files"
        yield label.source, kind, _are_numbers(kind), f"label {label.name!r}", wanted
    if spec.weight:
        kind = types[spec.weight]
        yield spec.weight, kind, _are_numbers(kind), "the row weight", "a number"
    for key in spec.keys:
        kind = types[key]
        yield key, kind, is_integer(kind) or is_string(kind), "a metric's group", "integers or strings"


def _fits_ids(kind: pa.DataType, feature: StoredFeature) -> tuple[bool, str, str]:
    """Whether ids of the feature may have this type; and the types that fit, in words, for one id and for several."""
    vocabulary, null = vocabulary_of(feature), pa.types.is_null(kind)
    if vocabulary is not None:
        what = "a string" if vocabulary.strings else "an integer"
        fits = is_string(kind) if vocabulary.strings else is_integer(kind)
        return fits or null, f"{what} as in its vocabulary {vocabulary.path}", f"{what.split()[1]}s"
    if feature.hash:
        return is_integer(kind) or is_string(kind) or null, "an integer, a string", "integers or strings"
    hint = "; for strings, set hash: true or name a vocabulary" if is_string(kind) else ""
    if hint and feature.encoded:
        hint = "; for strings, leave encoded out: they are looked up in the vocabulary as they are read"
    return is_integer(kind) or null, "an integer", f"integers{hint}"


def _values(kind: pa.DataType) -> pa.DataType:
    """The type of a column's values, or of the elements of its lists."""
    return kind.value_type if is_list(kind) else kind


def _holds_lists(kind: pa.DataType) -> bool:
    """Whether a column holds lists, or only nulls."""
    return is_list(kind) or bool(pa.types.is_null(kind))


def _are_numbers(kind: pa.DataType) -> bool:
    return is_number(kind) or bool(pa.types.is_null(kind))
