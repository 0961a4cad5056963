"""The plan of an import: what the columns of a user's own tables are, and what becomes of them.

A row of the *log* is a row of training. Tables of users, items or anything else are joined to it by a key.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

import yaml
from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag, model_validator

from rechub_dist.config.run import override
from rechub_dist.config.section import MAX_COUNT, MAX_ROWS, Section
from rechub_dist.config.strict_yaml import read_yaml
from rechub_dist.features import MAX_DIM, MAX_LENGTH, Label
from rechub_dist.typed import validated

# A column's type in a plan, and in DuckDB.
TYPES: Final = {
    "integer": "BIGINT",
    "float": "DOUBLE",
    "string": "VARCHAR",
    "boolean": "BOOLEAN",
    "timestamp": "TIMESTAMP",
    "date": "DATE",
    "integers": "BIGINT[]",
    "floats": "DOUBLE[]",
    "strings": "VARCHAR[]",
}
TypeName = Literal[
    "integer", "float", "string", "boolean", "timestamp", "date", "integers", "floats", "strings"
]  # the keys of TYPES
NUMBERS: Final = ("TINYINT", "SMALLINT", "INTEGER", "BIGINT", "UTINYINT", "USMALLINT", "UINTEGER", "UBIGINT", "HUGEINT")
SPLITS: Final = ("train", "valid", "test")
NOW: Final = "now"  # a row for each user, with the history up to the user's last event
RESERVED: Final = "_rechub_"  # begins the names of our own columns

Share = Annotated[float, Field(ge=0, lt=1)]


def _expression(text: str) -> str:
    if not text.strip():
        raise ValueError("write an SQL expression, such as rating >= 4")
    return text


Expression = Annotated[str, AfterValidator(_expression)]  # of SQL, over the columns of a row
# A time as the column writes it, or a number in its unit.
Time = Annotated[str, BeforeValidator(lambda time: str(time) if isinstance(time, int | float) else time)]
Names = Annotated[tuple[str, ...], Field(min_length=1)]


class ExplodePlan(Section):
    """Rows that hold a whole session become rows of its elements, in their order."""

    column: str = Field(description="the column of lists; it holds one element then")
    row: str = Field(description="a column to add: the number of the row that an element comes from")
    place: str = Field(description="a column to add: the element's place in the list, from 0 on")


class Source(Section):
    """Files of one kind."""

    path: Names | None = Field(None, description="files, folders or patterns; of the log, the command's SOURCE")
    format: Literal["csv", "json", "parquet"] | None = Field(
        None, description="default: by the file's name; csv is any delimited text, json one object a line"
    )
    delimiter: str | None = Field(None, min_length=1, max_length=4, description="csv; default: as the file looks")
    header: bool | None = Field(None, description="csv: the first line names the columns; default: as it looks")
    quote: str = Field('"', max_length=1, description="csv; empty for none")
    encoding: Literal["utf-8", "utf-16", "latin-1"] = Field("utf-8", description="csv")
    columns: dict[str, TypeName] | None = Field(
        None, description="the columns' types; without a header also their names, in order"
    )
    nulls: tuple[str, ...] = Field(("",), description="csv: texts that mean that a value is missing")
    empty: tuple[str, ...] = Field(
        (), description="csv: columns of strings in which an empty field is an empty string, a value like any other"
    )
    times: str | None = Field(None, description="csv: how times are written, such as %d/%m/%Y %H:%M:%S")
    file_column: str | None = Field(None, description="a column to add, with the name of a row's file")
    explode: ExplodePlan | None = Field(None, description="a row for each element of a column of lists")

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.header is False and not self.columns:
            raise ValueError("columns are needed without a header: their names and types, in order")
        _own_names(self.columns or {}, "columns")
        return self


class JoinedTable(Source):
    """A table that is joined to the log by a key; a log row without an entry gets nulls."""

    key: str = Field(description="the table's column with the key, unique")
    log_key: str | None = Field(None, description="the log's column with the key; default: the same name")
    take: Names | None = Field(None, description="the columns to join; default: all")


class SplitPlan(Section):
    """Which rows are train, valid and test."""

    by: Literal["random", "user", "time", "leave-last-out", "position", "column"] = Field(
        "random",
        description="random: by a hash of `key`, so that a row stays where it is as data grows; user: whole users, by "
        "a hash; time: the newest rows are test; leave-last-out: each user's last row is test, the one before valid; "
        "position: the last rows of the files are test, those before valid; column: a column says train, valid or test",
    )
    valid: Share = Field(0.1, description="share of the rows; for random, user, time and position")
    test: Share = Field(0.1, description="share of the rows")
    valid_from: Time | None = Field(None, description="time: when valid begins, instead of shares")
    test_from: Time | None = Field(None, description="time: when test begins; with valid_from")
    rows_from: Time | None = Field(None, description="time: rows before it are no rows of training, only histories")
    key: tuple[str, ...] = Field((), description="random: columns whose rows stay together; default: each row alone")
    column: str | None = Field(None, description="column: its name")

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.valid + self.test >= 1:
            raise ValueError(f"valid {self.valid:g} and test {self.test:g} leave nothing to train on")
        if (self.valid_from is None) != (self.test_from is None):
            raise ValueError("valid_from and test_from go together")
        for name, by in (("valid_from", "time"), ("key", "random"), ("column", "column")):
            if getattr(self, name) and self.by != by:
                raise ValueError(f"{name} is for by: {by}, not by: {self.by}")
        if self.by == "column" and self.column is None:
            raise ValueError("by: column needs the column's name")
        return self


class HistoryPlan(Section):
    """What a row's user did strictly before the row, in time order."""

    column: str = Field(description="the log's column that makes up the history, such as the item's id")
    max_length: int = Field(50, ge=1, le=MAX_LENGTH, description="the newest so many are kept")
    where: Expression | None = Field(None, description="only events for which this SQL expression is true")
    also: dict[str, str] = Field(
        default_factory=dict, description="further lists of the same events: name -> the log's column (times: the time)"
    )


class NegativesPlan(Section):
    """Rows that are drawn: the same user and time with an item that the user has no row with."""

    per_row: int = Field(ge=1, le=1000, description="of each row for which `where` is true")
    where: Expression | None = Field(
        None, description="default: of every row; it may read labels, and columns that the plan reads elsewhere too"
    )
    by: Literal["uniform", "frequency"] = Field("uniform", description="how train's items are drawn")
    copied: tuple[str, ...] = Field((), description="further log columns with the row's values; others are null")
    splits: tuple[Literal["train", "valid", "test"], ...] = Field(SPLITS, description="those that get drawn rows")


class TablePlan(Section):
    """A table of embeddings."""

    dim: int | None = Field(None, ge=1, le=MAX_DIM, description="width of the vectors; default: the model's")
    init_std: float | None = Field(None, ge=0, description="deviation of the initial weights; default: 0.01")
    min_count: int | None = Field(None, ge=1, le=MAX_COUNT, description="rarer values are unknown: id 0")
    max_size: int | None = Field(None, ge=1, le=MAX_ROWS, description="only so many values, the most frequent")
    scatter: bool | None = Field(
        None,
        description="spread frequent values over the ids, so that ranks of a table that is sharded by rows have equal "
        "work; default: from 1,000,000 values on",
    )


class SparsePlan(Section):
    """One id, or a list of ids that are pooled."""

    kind: Literal["sparse"] = Field(description="sparse")
    column: str | None = Field(None, description="the column that is read; default: the feature's name")
    table: str | None = Field(None, description="features that mean the same share a table; default: one of its own")
    hash: int | None = Field(None, ge=1, le=MAX_ROWS, description="hash into so many rows, without a vocabulary")
    bins: tuple[float, ...] | None = Field(None, description="of a number: ascending boundaries")
    quantiles: int | None = Field(None, ge=2, le=10_000, description="of a number: so many bins of equal counts")
    pooling: Literal["sum", "mean"] = Field("sum", description="how the vectors of a list's ids become one")
    weights: str | None = Field(None, description="a column of lists, with a weight for each id")

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        given = [name for name in ("hash", "bins", "quantiles") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)}: give one of them")
        if given and self.table:
            raise ValueError(f"{given[0]} has a table of its own: leave table out")
        return self


class DensePlan(Section):
    """A number, or a list of `dim` numbers."""

    kind: Literal["dense"] = Field(description="dense")
    column: str | None = Field(None, description="the column that is read; default: the feature's name")
    dim: int = Field(1, ge=1, le=MAX_DIM, description="how many numbers; above 1 the column holds lists of so many")
    transform: Literal["none", "log"] = Field("none", description="log: sign(x) * log(1 + |x|)")
    standardize: bool = Field(
        True, description="to mean 0 and deviation 1 over train, after the transform; not of lists"
    )
    fill: float | Literal["mean", "error"] = Field(
        "mean", description="stands for a missing value, in the column's unit; error: none may miss"
    )


class SequencePlan(Section):
    """A list of ids in order: a history, or a column of lists."""

    kind: Literal["sequence"] = Field(description="sequence")
    column: str | None = Field(None, description="the column that is read; default: the feature's name")
    table: str | None = Field(None, description="default: of a history, that of the feature it is made of")
    max_length: int | None = Field(
        None, ge=1, le=MAX_LENGTH, description="default: the history's, else the longest of train, 50 at most"
    )
    keep: Literal["first", "last"] = Field("last", description="which ids of a longer list are kept")


class OtherPlan(Section):
    """A cross or a time gap, with the keys that it has in dataset.yaml."""

    kind: Literal["cross", "time_gap"] = Field(description="cross or time_gap")
    inputs: Names | None = Field(None, description="cross: the sparse features whose combinations are hashed")
    buckets: int | None = Field(None, description="cross: rows of its table")
    times: str | None = Field(None, description="time_gap: the column of lists of times, such as a history's")
    now: str | None = Field(None, description="time_gap: the column of the row's time")
    boundaries: tuple[float, ...] | None = Field(
        None, description="time_gap: ascending, in the unit of the times; in seconds for timestamps"
    )
    max_length: int | None = Field(None, description="time_gap: that of the history")
    keep: Literal["first", "last"] | None = Field(None, description="time_gap: that of the history")
    dim: int | None = Field(None, description="width of its vectors")
    pooling: Literal["sum", "mean"] | None = Field(None, description="cross: how several vectors become one")


FeaturePlan = Annotated[SparsePlan | DensePlan | SequencePlan | OtherPlan, Field(discriminator="kind")]


class LabelPlan(Section):
    """A label by an expression."""

    expression: Expression = Field(description="SQL over the columns of a row")
    type: Literal["classification", "regression", "multiclass"] | None = Field(
        None, description="default: classification if all values are true and false or 0 and 1, else regression"
    )
    classes: int | None = Field(None, description="multiclass: their number C; the values are 0, 1 .. C - 1")

    @model_validator(mode="after")
    def _whole(self) -> Self:
        Label("label", type=self.type or "classification", classes=self.classes)
        return self


# By its shape, so that a mistake in a mapping is told as the mapping's.
AnyLabel = Annotated[
    Annotated[Expression, Tag("sql")] | Annotated[LabelPlan, Tag("mapping")],
    Discriminator(lambda value: "mapping" if isinstance(value, dict | LabelPlan) else "sql"),
]


class Plan(Section):
    """The whole plan."""

    name: str = Field("data", description="of the data set; an import is replaced by one of its name alone")
    log: Source = Field(default_factory=Source, description="the rows")
    tables: dict[str, JoinedTable] = Field(default_factory=dict, description="joined to the log")
    columns: dict[str, Expression] = Field(
        default_factory=dict, description="columns to add, by SQL; a caller of a trained model must bring these"
    )
    filter: Expression | None = Field(None, description="only rows for which this SQL expression is true")
    unique: tuple[str, ...] = Field(
        (), description="of rows that are equal in these columns, the first in the files is kept, after the filter"
    )
    user: str | None = Field(None, description="the column of users")
    item: str | None = Field(None, description="the column of items")
    time: str | None = Field(None, description="the column of times: numbers, dates or timestamps")
    k_core: dict[str, Annotated[int, Field(ge=1)]] = Field(
        default_factory=dict, description="column -> how many rows a value needs; dropped repeatedly until all have"
    )
    split: SplitPlan = Field(default_factory=SplitPlan, description="which rows are train, valid and test")
    labels: dict[str, AnyLabel] = Field(
        default_factory=dict, description="by name, SQL, or expression and type; window functions may occur"
    )
    weight: Expression | None = Field(None, description="a row's weight; window functions may occur")
    histories: dict[str, HistoryPlan] = Field(
        default_factory=dict, description="by name, columns of lists: what the user did strictly before the row"
    )
    negatives: NegativesPlan | None = Field(None, description="rows that are drawn")
    derive: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="columns computed alike here and for a caller's row, as in dataset.yaml"
    )
    min_count: int = Field(1, ge=1, le=MAX_COUNT, description="of values in vocabularies; rarer ones are unknown: id 0")
    embeddings: dict[str, TablePlan] = Field(default_factory=dict, description="tables of embeddings, by name")
    features: dict[str, FeaturePlan] = Field(min_length=1, description="by name: what a model may read")
    keep: tuple[str, ...] = Field((), description="columns to write that are no features, such as a group's key")
    items: bool = Field(False, description="write items/: each item with its id and the item's columns")
    now: bool = Field(False, description="write now/: a row for each user, with the history up to the last event")
    order: Literal["random", "stored", "time"] = Field(
        "random", description="of the rows of a split; stored: as in the files"
    )
    seed: int = Field(0, ge=0, le=MAX_COUNT, description="of what is drawn: splits, order, negatives")

    @model_validator(mode="after")
    def _whole(self) -> Self:
        by = self.split.by
        needs = (
            (bool(self.histories), "histories", ("user", "time")),
            (by == "time" or self.order == "time", "time, as split or order,", ("time",)),
            (by == "user", "split by user", ("user",)),
            (by == "leave-last-out", "split by leave-last-out", ("user", "time")),
            (self.split.rows_from is not None, "split.rows_from", ("time",)),
            (self.negatives is not None, "negatives", ("user", "item")),
            (self.items, "items", ("item",)),
            (self.now, "now", ("user", "time")),
        )
        for name in (name for is_needed, _, names in needs if is_needed for name in names):
            if getattr(self, name) is None:
                what = next(what for is_needed, what, names in needs if is_needed and name in names)
                raise ValueError(f"{what} needs {name}: the name of its column")
        for where, made in (
            ("columns", self.columns), ("labels", self.labels), ("histories", self.histories), ("derive", self.derive)
        ):  # fmt: skip
            _own_names(made, where)
        for name, history in self.histories.items():
            if name in history.also:
                raise ValueError(f"histories.{name}.also: {name} is the history itself; choose another name")
        for name in self.features:
            if name in self.labels:
                raise ValueError(f"labels.{name}: there is a feature of that name; rename one")
        return self


def _own_names(names: Any, where: str) -> None:
    for name in names:
        if not name or name.startswith(RESERVED):
            raise ValueError(f"{where}: a column may not be called {name!r}")


def read_plan(path: Path, overrides: Iterable[str] = ()) -> Plan:
    """The plan in a file, with `section.key=value` overrides applied.

    Raises:
        UserError: it cannot be read, or a key or value is wrong; names it.
    """
    tree = read_yaml(path)
    for one in overrides:
        override(tree, one)
    return plan_of(tree, str(path))


def plan_of(tree: Any, where: str = "plan") -> Plan:
    """The plan that a tree of mappings describes. Raises UserError."""
    if isinstance(tree, dict):
        tree = {**tree, **{name: _listed(tree[name]) for name in ("log", "tables") if name in tree}}
    return validated(where, Plan, tree)


def _listed(section: Any) -> Any:
    """A source, or a mapping of sources, whose path may be written without a list."""
    if not isinstance(section, dict):
        return section
    if isinstance(section.get("path"), str):
        return {**section, "path": [section["path"]]}
    return {key: _listed(value) if key != "columns" else value for key, value in section.items()}


def plan_text(plan: Plan) -> str:
    """The plan as YAML, without what has its default."""
    tree = plan.model_dump(mode="json", exclude_defaults=True)
    text: str = yaml.safe_dump(tree, default_flow_style=None, sort_keys=False, width=120, allow_unicode=True)
    return text
