"""Features and tables: how the columns of a data set are described. Needs nothing but the standard library.

A *table* is an embedding matrix. A *feature* is a column of the data set; sparse and sequence features read a table,
and several features may share one (a target item and the history of items, for example).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Annotated, Final, Literal

from rechub_dist.derived import Derived, check_derived

Pooling = Literal["sum", "mean"]
IdPolicy = Literal["error", "drop", "unknown"]
MAX_ROWS: Final = 1 << 40  # of a table
MAX_DIM: Final = 1 << 16  # of a table, and of a dense feature
MAX_LENGTH: Final = 1 << 24  # of a history, and of what a row may have of anything
MAX_CLASSES: Final = 10_000  # of a label


@dataclass(frozen=True)
class RowsOf:
    """Marks an integer parameter of a model's constructor: `item_num: Annotated[int, RowsOf("history")]`.

    A run file may omit it: it is then the number of rows of the table that the feature given as `history` reads.
    """

    parameter: str


@dataclass(frozen=True)
class OfLabels:
    """Marks the parameter of a model's constructor that says how many outputs each of its labels has.

    A run file omits it: it is then `Label.outputs` of the run's labels, where one has several.
    """


Outputs = Annotated[list[int] | None, OfLabels()]


@dataclass(frozen=True)
class Table:
    """An embedding table of `rows` vectors of width `dim`.

    With `dim=None` the width is the model's own `embedding_dim` (or `hidden_size`), else the run's `embedding.dim`.
    Weights are initialised from N(0, init_std^2), with zeros where `init_std=0`.

    Raises:
        ValueError: a name, size or `init_std` that no table can have.
    """

    name: str
    rows: int
    dim: int | None = None
    init_std: float = 0.01

    def __post_init__(self) -> None:
        if not self.name or "/" in self.name:
            raise ValueError(
                f"table name {self.name!r} must be non-empty and without '/': declare the table under another name "
                "(tables: {NAME: {rows: ...}}), and give the feature table: NAME"
            )
        _check_range(f"table {self.name!r}: rows", self.rows, MAX_ROWS)
        if self.dim is not None:
            _check_range(f"table {self.name!r}: dim", self.dim, MAX_DIM)
        if self.init_std < 0:
            raise ValueError(f"table {self.name!r}: init_std is {self.init_std}, must not be negative")
        if not self.init_std <= 1e38:
            raise ValueError(f"table {self.name!r}: init_std is {self.init_std}, must be a number of 32 bits")

    @property
    def stored_dim(self) -> int:
        """The width in memory, `dim` padded with zero columns to a multiple of 4, as fused kernels require.

        It is the same for every placement, since row-wise Adagrad averages over it. Checkpoints hold `dim` columns.

        Raises:
            ValueError: the table has no width yet.
        """
        if self.dim is None:
            raise ValueError(f"table {self.name!r} has no width: give it a dim, or set the run's embedding.dim")
        return -(-self.dim // 4) * 4

    @property
    def linear(self) -> Table:
        """The table of first-order (wide) weights of the same ids: one scalar per id, initially zero."""
        return Table(f"{self.name}.linear", self.rows, dim=1, init_std=0.0)


@dataclass(frozen=True)
class DenseFeature:
    """`dim` float values per row (a scalar column, or a fixed-size list column when `dim` > 1).

    `missing="fill"` replaces missing values by `fill`, in the column's own unit; `missing="error"` rejects the row
    group. NaN counts as missing. `transform="log"` then makes it sign(x) * log(1 + |x|), and what the model gets is
    (x - mean) / std of that.

    Raises:
        ValueError: a width or number that cannot be.
    """

    name: str
    column: str | None = None
    dim: int = 1
    transform: Literal["none", "log"] = "none"
    missing: Literal["error", "fill"] = "error"
    fill: float = 0.0
    mean: float = 0.0
    std: float = 1.0
    kind: Literal["dense"] = "dense"

    def __post_init__(self) -> None:
        _check_range(f"feature {self.name!r}: dim", self.dim, MAX_DIM)
        for key in ("fill", "mean", "std"):
            if not math.isfinite(value := getattr(self, key)):
                raise ValueError(f"feature {self.name!r}: {key} is {value}, must be a finite number")
        if self.std <= 0:
            raise ValueError(f"feature {self.name!r}: std is {self.std}, must be above 0")

    @property
    def source(self) -> str:
        """The name of the column in the data set."""
        return self.name if self.column is None else self.column


@dataclass(frozen=True)
class SparseFeature:
    """Ids into `table`: one per row, or several (a list column), pooled to one vector per row.

    An integer column holds the ids themselves, unless they are hashed or looked up in a vocabulary; a string column
    needs one of the two. Either may be dictionary-encoded.

    Args:
        table: the table that the ids index; ids are 0 .. table.rows - 1.
        pooling: how the vectors of several ids are combined; an empty list gives the zero vector.
        hash: hash any integer or string into the table instead of requiring an id in range.
        out_of_range: what to do with an id outside the table, or a value that is not in the vocabulary: `error`
            rejects the file by name, `drop` removes the id, `unknown` replaces it by `unknown_id`.
        missing: the same for a null id. A null list counts as empty.
        weights: a column with a non-negative weight for each id, in lists of the same lengths. Vectors are multiplied
            by them before they are summed; a mean divides by their sum.
        vocabulary: a Parquet file with columns `value` and `id`, in which the column's values are looked up.
        encoded: the data set's files hold the ids of the vocabulary already, as integers; only rows from elsewhere,
            given to a trained model, hold values, which are read by the feature with `encoded=False`.

    Raises:
        ValueError: `hash` and `vocabulary` together, `encoded` without one, or an `unknown_id` outside the table.
    """

    name: str
    table: Table
    column: str | None = None
    weights: str | None = None
    pooling: Pooling = "sum"
    hash: bool = False
    out_of_range: IdPolicy = "error"
    missing: IdPolicy = "error"
    unknown_id: int = 0
    vocabulary: str | None = None
    encoded: bool = False
    kind: Literal["sparse"] = "sparse"

    def __post_init__(self) -> None:
        _check_ids(self)

    @property
    def source(self) -> str:
        """The name of the column in the data set."""
        return self.name if self.column is None else self.column


@dataclass(frozen=True)
class SequenceFeature:
    """An ordered list of ids into `table`, looked up without pooling.

    At most `max_length` ids per row are kept: the last (`keep="last"`, the newest of a history in time order) or the
    first. Ids and their policies are as in `SparseFeature`. Raises ValueError as it does, and for `max_length` below 1.
    """

    name: str
    table: Table
    max_length: int
    column: str | None = None
    keep: Literal["first", "last"] = "last"
    hash: bool = False
    out_of_range: IdPolicy = "error"
    missing: IdPolicy = "error"
    unknown_id: int = 0
    vocabulary: str | None = None
    encoded: bool = False
    kind: Literal["sequence"] = "sequence"

    def __post_init__(self) -> None:
        _check_range(f"feature {self.name!r}: max_length", self.max_length, MAX_LENGTH)
        _check_ids(self)

    @property
    def source(self) -> str:
        """The name of the column in the data set."""
        return self.name if self.column is None else self.column


@dataclass(frozen=True)
class CrossFeature:
    """The combinations of the ids of `inputs`, hashed into a table of `buckets` rows of the cross's own.

    A row has one id per combination: one where every input has one id, none where an input has none.

    Args:
        inputs: two or more different features.
        buckets: rows of the table; combinations that share a bucket share a vector.
        dim: the table's width, as in `Table`; not needed for first-order (wide) weights.
        pooling: how the vectors of several combinations are combined.

    Raises:
        ValueError: fewer than two different inputs, or a table that cannot be.
    """

    name: str
    inputs: tuple[SparseFeature, ...]
    buckets: int
    dim: int | None = None
    init_std: float = 0.01
    pooling: Pooling = "sum"
    kind: Literal["cross"] = "cross"

    def __post_init__(self) -> None:
        if len({feature.name for feature in self.inputs}) < max(2, len(self.inputs)):
            names = [feature.name for feature in self.inputs]
            raise ValueError(f"feature {self.name!r}: inputs are {names}, must be two or more different features")
        _ = self.table  # checks buckets, dim and init_std

    @property
    def table(self) -> Table:
        """The table of the combinations."""
        return Table(self.name, self.buckets, self.dim, self.init_std)


@dataclass(frozen=True)
class TimeGapFeature:
    """How long before the row's own time each behaviour of its history was, in buckets: one id per behaviour.

    The bucket of a gap is the number of `boundaries` that it reaches, so there are len(boundaries) + 1; they index a
    table of the feature's own. A behaviour after the row's time is an error, since it would leak the future.

    Args:
        times: the column with the behaviours' times, lists aligned with the history.
        now: the column with the row's time, in the same unit (numbers or timestamps).
        boundaries: ascending gaps in the columns' unit; in seconds for timestamps.
        max_length, keep: those of the history.

    Raises:
        ValueError: `max_length` below 1, or boundaries that do not ascend.
    """

    name: str
    times: str
    now: str
    boundaries: tuple[float, ...]
    max_length: int
    keep: Literal["first", "last"] = "last"
    dim: int | None = None
    init_std: float = 0.01
    kind: Literal["time_gap"] = "time_gap"

    def __post_init__(self) -> None:
        _check_range(f"feature {self.name!r}: max_length", self.max_length, MAX_LENGTH)
        if not self.boundaries or any(not a < b for a, b in zip(self.boundaries, self.boundaries[1:], strict=False)):
            raise ValueError(
                f"feature {self.name!r}: boundaries are {list(self.boundaries)}, must be ascending numbers"
            )
        _ = self.table

    @property
    def table(self) -> Table:
        """The table of the buckets."""
        return Table(self.name, len(self.boundaries) + 1, self.dim, self.init_std)


@dataclass(frozen=True)
class NegativeFeature:
    """Negative ids, drawn from `table` while the batch is collated; no column holds them.

    A row gets `count` ids for each id of the feature `like` (as cut to `max_length`). The draws depend on (seed, epoch,
    the row's position in the epoch) alone. With `uniform` the ids that the row has in any of the features `exclude` are
    never drawn; otherwise ids are drawn by the weights that the reader gets for this feature.

    Raises:
        ValueError: `count` below 1.
    """

    name: str
    table: Table
    like: str
    count: int = 1
    exclude: tuple[str, ...] = ()
    uniform: bool = True
    kind: Literal["negative"] = "negative"

    def __post_init__(self) -> None:
        _check_range(f"feature {self.name!r}: count", self.count, MAX_LENGTH)


@dataclass(frozen=True)
class CatalogueFeature:
    """All ids of `table`, once in each global batch: spread evenly over its rows, in order."""

    name: str
    table: Table
    kind: Literal["catalogue"] = "catalogue"


StoredFeature = SparseFeature | SequenceFeature  # its ids are in a column
IdFeature = StoredFeature | CrossFeature | TimeGapFeature
LookupFeature = IdFeature | NegativeFeature | CatalogueFeature  # what a table is read by
Feature = DenseFeature | IdFeature


def with_width(feature: Feature, dim: int) -> Feature:
    """The feature with `dim` as the width of its table where that has none; likewise for a cross's inputs."""
    if isinstance(feature, DenseFeature):
        return feature
    if isinstance(feature, CrossFeature):
        inputs = tuple(replace(source, table=_with_dim(source.table, dim)) for source in feature.inputs)
        return replace(feature, inputs=inputs, dim=feature.dim or dim)
    if isinstance(feature, TimeGapFeature):
        return replace(feature, dim=feature.dim or dim)
    return replace(feature, table=_with_dim(feature.table, dim))


def _with_dim(table: Table, dim: int) -> Table:
    return replace(table, dim=table.dim or dim)


@dataclass(frozen=True)
class Label:
    """A target column of any numeric or boolean type; nulls are an error.

    Classification labels must be 0 or 1, those of type multiclass one of the integers 0 .. `classes` - 1.

    Raises:
        ValueError: `classes` beside another type than multiclass, or none beside that, or fewer than 2.
    """

    name: str
    column: str | None = None
    type: Literal["classification", "regression", "multiclass"] = "classification"
    classes: int | None = None

    def __post_init__(self) -> None:
        if self.type != "multiclass":
            if self.classes is not None:
                raise ValueError(f"classes are those of type: multiclass, and this label is of type {self.type}")
        elif self.classes is None:
            raise ValueError("type: multiclass needs classes, the number of values 0, 1, 2 .. that the label may have")
        elif not 2 <= self.classes <= MAX_CLASSES:
            raise ValueError(f"classes is {self.classes}, must be at least 2 and at most {MAX_CLASSES:,}")

    @property
    def outputs(self) -> int:
        """How many numbers a model gives for it: one logit a class, else one logit or value."""
        return self.classes or 1

    @property
    def source(self) -> str:
        """The name of the column in the data set."""
        return self.name if self.column is None else self.column


@dataclass(frozen=True)
class FeatureSchema:
    """The features and labels of a data set, the column of row weights, if there is one, and derived columns.

    A derived column that the files hold is read; one that they do not hold is computed when a row is read.

    Raises:
        ValueError: two features or labels share a name, or different tables do; or as `check_derived`.
    """

    features: tuple[Feature, ...]
    labels: tuple[Label, ...] = ()
    weight: str | None = None
    derived: tuple[Derived, ...] = ()

    def __post_init__(self) -> None:
        check_derived(self.derived)
        tables: dict[str, Table] = {}
        names: set[str] = set()
        for feature in (*self.features, *self.labels):
            if feature.name in names:
                raise ValueError(f"feature {feature.name!r} is declared twice")
            names.add(feature.name)
            if isinstance(feature, IdFeature):
                known = tables.setdefault(feature.table.name, feature.table)
                if known != feature.table:
                    keys = ("rows", "dim", "init_std")
                    differ = [key for key in keys if getattr(known, key) != getattr(feature.table, key)]
                    raise ValueError(
                        f"table {known.name!r} is declared twice, differently: feature {feature.name!r} gives it other "
                        f"{' and '.join(differ)}; declare it once, in tables"
                    )

    def __getitem__(self, name: str) -> Feature:
        for feature in self.features:
            if feature.name == name:
                return feature
        raise KeyError(name)


def _check_range(what: str, value: int, most: int) -> None:
    if value < 1:
        raise ValueError(f"{what} is {value}, must be at least 1")
    if value > most:
        raise ValueError(f"{what} is {value}, must be at most {most:,}")


def _check_ids(feature: SparseFeature | SequenceFeature) -> None:
    if feature.hash and feature.vocabulary is not None:
        raise ValueError(f"feature {feature.name!r}: has both hash and vocabulary; give one of them")
    if feature.encoded and feature.vocabulary is None:
        raise ValueError(f"feature {feature.name!r}: encoded needs the vocabulary that the ids are of; name it")
    if not 0 <= feature.unknown_id < feature.table.rows:
        raise ValueError(
            f"feature {feature.name!r}: unknown_id {feature.unknown_id} is outside its table {feature.table.name!r} "
            f"of {feature.table.rows} rows"
        )
