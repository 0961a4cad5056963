"""The steps of an import that do not depend on where its rows lie: in one database, or in many."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Final

from rechub_dist.data.columns.frequencies import vocabulary_name
from rechub_dist.data.importing.engine import Engine, quoted
from rechub_dist.data.importing.facts import MAX_FLOAT32
from rechub_dist.data.importing.fitted import Fitted, derived_of, needed_columns, of_histories, stored_columns
from rechub_dist.data.importing.histories import Lists, add_histories, add_now, list_kinds
from rechub_dist.data.importing.negatives import needed_for_negatives
from rechub_dist.data.importing.plan import SPLITS, Plan, plan_text
from rechub_dist.data.importing.rows import ROWS, SPLIT, WEIGHT, Shape, join_sources
from rechub_dist.data.importing.write import Output, derived_rows
from rechub_dist.data.parquet.pages import write_parquet
from rechub_dist.data.prepare.writer import VOCABULARIES, write_schema
from rechub_dist.derived import Derived
from rechub_dist.errors import UserError
from rechub_dist.features import Label

PLAN_FILE: Final = "plan.yaml"
FACTS_FILE: Final = "import.json"
_MARK: Final = {b"rechub_dist": b"vocabulary"}


@dataclass
class Imported:
    """What has been imported.

    Attributes:
        root: the folder.
        plan: by which.
        read: rows of the log.
        rows: by split.
        drawn: negatives among them.
        unused: rows that are only parts of histories.
        labels: by split and label, the mean.
        vocabularies: by table, the values that have ids.
        unknown: by split and column, the share of values that are missing or have no id of their own.
    """

    root: Path
    plan: Plan
    read: int
    rows: dict[str, int] = field(default_factory=dict)
    drawn: int = 0
    unused: int = 0
    labels: dict[str, dict[str, float]] = field(default_factory=dict)
    vocabularies: dict[str, int] = field(default_factory=dict)
    unknown: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def facts(self) -> dict[str, Any]:
        """All but folder and plan, as `import.json` holds it."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("root", "plan")}


@dataclass(frozen=True)
class Recipe:
    """What the plan means for its sources.

    Attributes:
        plan: the plan.
        shape: what its expressions and columns are.
        needed: the columns of the log and its tables that ROWS has.
        early, late: derived columns that need no history, and those that do.
    """

    plan: Plan
    shape: Shape
    needed: tuple[str, ...]
    early: tuple[Derived, ...]
    late: tuple[Derived, ...]


def recipe_of(plan: Plan, engine: Engine, *, empty: bool = False) -> Recipe:
    """Look at the sources, make the views of them, and check the plan against them; `empty`: the log may have no rows.

    Raises:
        UserError: a source, key or expression is wrong.
    """
    derived = derived_of(plan)
    shape = join_sources(plan, engine, empty=empty)
    needed = dict.fromkeys([*needed_columns(plan, shape, derived), *needed_for_negatives(plan)])
    late = of_histories(plan, derived)
    return Recipe(plan, shape, tuple(needed), tuple(one for one in derived if one not in late), late)


def complete_rows(recipe: Recipe, engine: Engine) -> dict[str, Lists]:
    """Add to ROWS what is made of a user's own rows: rows of `now`, histories, derived columns.

    Returns:
        The histories' columns.
    """
    derived_rows(engine, recipe.early)
    if recipe.plan.now:
        add_now(recipe.plan, engine)
    lists = add_histories(recipe.plan, engine)
    derived_rows(engine, recipe.late, lists)
    return lists


def row_kinds(plan: Plan, engine: Engine) -> dict[str, str]:
    """The types of the columns of ROWS and of the histories, in the database's words."""
    kinds = engine.columns(ROWS)
    return kinds | list_kinds(plan, kinds)


def output_of(plan: Plan, fitted: Fitted) -> Output:
    """What is written of a row, with histories still to be added."""
    columns = stored_columns(fitted.schema)
    kept = [*plan.keep, *([plan.time] if plan.time is not None else [])]  # by the time, splits can be compared
    columns += [name for name in dict.fromkeys([*plan.labels, *kept]) if name not in columns]
    columns += [WEIGHT] if plan.weight is not None else []
    bins = tuple(one for one in fitted.schema.derived if one.name not in plan.derive)
    return Output(tuple(columns), bins, fitted.lookup())


@dataclass
class Tally:
    """What is known of the values of a label, or of the weight.

    Attributes:
        wrong: rows without a value that can be one.
        binary: whether all others are 0 or 1.
        classes: if all others are integers from 0 up, 1 more than the largest, else infinite.
        sums: by split, the number of values and their sum.
    """

    wrong: int = 0
    binary: bool = True
    classes: float = 0
    sums: dict[str, tuple[int, float]] = field(default_factory=dict)

    def __add__(self, other: Tally) -> Tally:
        sums = dict(self.sums)
        for split, (count, total) in other.sums.items():
            before = sums.get(split, (0, 0.0))
            sums[split] = (before[0] + count, before[1] + total)
        classes = max(self.classes, other.classes)
        return Tally(self.wrong + other.wrong, self.binary and other.binary, classes, sums)


def tallies_of(plan: Plan, engine: Engine) -> dict[str, Tally]:
    """The tally of each label, and of the weight."""
    found = {}
    for name in plan.labels:
        column = quoted(name)
        wrong, binary, classes = engine.run(
            f"select count(*) filter ({column} is null or not abs({column}::DOUBLE) <= {MAX_FLOAT32!r}), "
            f"coalesce(bool_and({column} in (0, 1)), true), "
            f"case when bool_and({column} >= 0 and {column} = floor({column})) then 1 + max({column})::DOUBLE end "
            f"from {ROWS} where {SPLIT} is not null"
        )[0]
        sums = engine.run(
            f"select {SPLIT}, count({column}), sum({column}::DOUBLE) from {ROWS} where {SPLIT} < {len(SPLITS)} "
            f"group by 1 having count({column}) > 0 order by 1"
        )
        by_split = {SPLITS[split]: (count, total) for split, count, total in sums}
        found[name] = Tally(wrong, binary, math.inf if classes is None else classes, by_split)
    if plan.weight is not None:
        wrong = engine.value(
            f"select count(*) from {ROWS} where {SPLIT} is not null and "
            f"not coalesce({WEIGHT} >= 0 and {WEIGHT} <= {MAX_FLOAT32!r}, false)"
        )
        found[WEIGHT] = Tally(wrong)
    return found


def label_means(tallies: dict[str, Tally]) -> dict[str, dict[str, float]]:
    """By split and label, the mean."""
    found: dict[str, dict[str, float]] = {}
    for split in SPLITS:
        for name, tally in tallies.items():
            if split in tally.sums:
                count, total = tally.sums[split]
                found.setdefault(split, {})[name] = total / count
    return found


def labels_of(recipe: Recipe, tallies: dict[str, Tally]) -> tuple[Label, ...]:
    """The labels of the schema.

    Raises:
        UserError: a label or weight is missing or cannot be one in some row.
    """
    found = []
    if WEIGHT in tallies and (wrong := tallies[WEIGHT].wrong):
        raise UserError(f"weight: {wrong:,} rows have a weight that is missing, negative or not finite; use 0 for none")
    for name in recipe.plan.labels:
        tally = tallies[name]
        if tally.wrong:
            raise UserError(
                f"labels.{name}: {tally.wrong:,} rows have no value; leave them out with filter, or write "
                "coalesce(..., 0)"
            )
        label = recipe.shape.labels[name] or Label(name, type="classification" if tally.binary else "regression")
        if label.type == "classification" and not tally.binary:
            raise UserError(
                f"labels.{name}: it has other values than 0 and 1; compare it, or set type: regression, or type: "
                "multiclass and classes"
            )
        if label.classes is not None and tally.classes > label.classes:
            raise UserError(
                f"labels.{name}: it has other values than the integers 0 .. {label.classes - 1} of {label.classes} "
                f"classes; {_classes_that_fit(tally)}"
            )
        found.append(label)
    return tuple(found)


def _classes_that_fit(tally: Tally) -> str:
    if math.isfinite(tally.classes):
        return f"set classes: {tally.classes:.0f}, or subtract what they begin with"
    return "number them from 0 with case, floor or a subtraction"


def write_descriptions(folder: Path, found: Imported, fitted: Fitted, labels: Iterable[Label]) -> None:
    """Write all but the rows: vocabularies, dataset.yaml, the plan, and what was imported."""
    found.vocabularies = {name: table.num_rows for name, table in fitted.vocabularies.items()}
    if fitted.vocabularies:
        (folder / VOCABULARIES).mkdir()
    for name, table in fitted.vocabularies.items():
        write_parquet(table.replace_schema_metadata(_MARK), folder / VOCABULARIES / vocabulary_name(name))
    weight = WEIGHT if found.plan.weight is not None else None
    write_schema(folder, found.plan.name, replace(fitted.schema, labels=tuple(labels), weight=weight))
    (folder / PLAN_FILE).write_text(plan_text(found.plan), encoding="utf-8")
    (folder / FACTS_FILE).write_text(json.dumps(found.facts, indent=1), encoding="utf-8")
