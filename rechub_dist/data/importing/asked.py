"""What the plan's features have to know of train; and whether the columns that they read have fitting types."""

from __future__ import annotations

from collections.abc import Mapping

from rechub_dist.data.importing.facts import Asked
from rechub_dist.data.importing.fitted import column_of, has_vocabulary, known_length, table_of
from rechub_dist.data.importing.histories import list_columns
from rechub_dist.data.importing.plan import DensePlan, Plan, SequencePlan, SparsePlan
from rechub_dist.data.importing.rows import FRACTIONS, is_numeric
from rechub_dist.errors import UserError


def asked_of(plan: Plan, kinds: Mapping[str, str]) -> Asked:
    """What has to be learned from train.

    Args:
        plan: the plan.
        kinds: the types of the columns of ROWS and of the histories.

    Raises:
        UserError: a column's type does not fit its feature.
    """
    counted = _counted(plan, kinds)
    asked = Asked(counted, {table: _count_kind(kinds, columns) for table, columns in counted.items()})
    for name, feature in plan.features.items():
        column = column_of(plan, name)
        if isinstance(feature, DensePlan):
            _check_dense(kinds, name, column, feature)
            if feature.dim == 1:
                asked.moments.append((column, feature.transform))
        elif isinstance(feature, SparsePlan) and (feature.bins or feature.quantiles):
            if not is_numeric(kinds[column]):
                raise UserError(
                    f"features.{name}: column {column!r} is {kinds[column]}; bins and quantiles are of numbers"
                )
            if feature.quantiles is not None:
                asked.quantiles.append((column, feature.quantiles))
        elif isinstance(feature, SequencePlan):
            if not kinds[column].endswith("[]"):
                raise UserError(
                    f"features.{name}: column {column!r} is {kinds[column]}; a sequence needs a list (derive: split)"
                )
            if known_length(plan, column, feature) is None:
                asked.longest.append(column)
    return asked


def _counted(plan: Plan, kinds: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """By table, the columns whose values get ids."""
    columns: dict[str, list[str]] = {}
    for name, feature in plan.features.items():
        if has_vocabulary(feature):
            columns.setdefault(table_of(plan, name), []).append(column_of(plan, name))
    made_of = {out for key, h in plan.histories.items() for out in list_columns(key, h)}
    found = {}
    for table, read in columns.items():
        for column in read:
            _check_ids(kinds, column, table)
        if len({"VARCHAR" in kinds[column] for column in read}) > 1:
            listed = ", ".join(f"{column!r} is {kinds[column]}" for column in read)
            raise UserError(
                f"embeddings.{table}: its features read columns of unlike types: {listed}; give all one type"
            )
        # A history repeats what its source has once; it counts only where nothing else does.
        counted = [column for column in dict.fromkeys(read) if column not in made_of] or list(dict.fromkeys(read))
        found[table] = tuple(counted)
    return found


def _count_kind(kinds: Mapping[str, str], columns: tuple[str, ...]) -> str:
    """The type in which the values of columns are counted together."""
    if "VARCHAR" in kinds[columns[0]]:
        return "VARCHAR"
    unsigned = [kinds[column].startswith("UBIGINT") for column in columns]
    # unsigned and signed integers are counted together in 128 bits
    return "UBIGINT" if all(unsigned) else "HUGEINT" if any(unsigned) else "BIGINT"


def _check_ids(kinds: Mapping[str, str], column: str, table: str) -> None:
    kind = kinds[column].removesuffix("[]")
    if kind in FRACTIONS or kind.startswith("DECIMAL"):
        fix = "give it bins or quantiles, make it dense, or type integer in the source's columns"
    elif kind == "HUGEINT":
        fix = "an id has 64 bits at most; cast it, such as ::BIGINT"
    elif kind == "BOOLEAN":
        fix = "make it dense, or add it to columns as ::int"
    elif kind == "VARCHAR" or is_numeric(kind):
        return
    else:
        fix = "derive hour, weekday or age of a time; other types cannot be ids"
    raise UserError(f"features: column {column!r} is {kind}, which cannot be ids of table {table!r}: {fix}")


def _check_dense(kinds: Mapping[str, str], name: str, column: str, feature: DensePlan) -> None:
    kind = kinds[column]
    wanted = kind.endswith("[]") == (feature.dim > 1)
    if not wanted or not (is_numeric(kind.removesuffix("[]")) or kind == "BOOLEAN"):
        what = "a list of numbers" if feature.dim > 1 else "a number"
        raise UserError(
            f"features.{name}: column {column!r} is {kind}, but a dense feature of dim {feature.dim} needs {what}"
        )
