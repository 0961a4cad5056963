"""The figures of a data set's profile, which `profile` fills in; they can be written as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from rechub_dist.data.tools.roles import Roles
from rechub_dist.reporting.strict_json import finite


@dataclass(frozen=True)
class Run:
    """The planned run, for how well its order would shuffle the rows: `data.batch_size`, ranks, `data.max_streams`."""

    batch_size: int = 8192
    ranks: int = 1
    max_streams: int = 64


@dataclass
class SplitProfile:
    """A split: `rows` has it, `read` were profiled; sizes in bytes.

    `shuffle` has the figures of `layout_quality` for the run, `warning` what `layout_warning` says of them.
    """

    name: str
    path: str
    rows: int
    read: int
    run: Run
    files: int = 0
    bytes: int = 0
    row_groups: int = 0
    row_group_rows: tuple[int, int] | None = None
    shuffle: dict[str, Any] | None = None
    warning: str | None = None


@dataclass
class Lengths:
    """The lengths of lists; a null list counts as empty in `empty`, a share of the rows, and in nothing else."""

    low: int
    median: float
    p95: float
    high: int
    mean: float
    empty: float


@dataclass
class Part:
    """A column in one split.

    Attributes:
        type: Arrow's.
        rows, nulls, nans, infinities: numbers of rows; `nans` and `infinities` of lists are those of elements.
        distinct: of values, for lists of elements; NaN and null are none.
        about: whether `distinct` is an estimate.
        low, high: the smallest and the largest finite number; times as text.
        mean: of finite numbers; of booleans, the share that is true.
        elements, element_nulls: of lists.
        lengths: of lists; None without any.
        bins: for each bin of the column's histogram, the number of values.
    """

    type: str
    rows: int
    nulls: int = 0
    nans: int = 0
    infinities: int = 0
    distinct: int = 0
    about: bool = False
    low: Any = None
    high: Any = None
    mean: float | None = None
    elements: int | None = None
    element_nulls: int | None = None
    lengths: Lengths | None = None
    bins: list[int] = field(default_factory=list)


@dataclass
class Histogram:
    """Bins of equal width of `values`, `lengths` of lists or `times` (seconds since 1970).

    Attributes:
        of: which of them.
        scale: `linear`, or `log`: of equal width in sign(x) * log(1 + |x|), for values most of which would be in one
            bin; or `each`: a bin for each integer from the first edge on.
        edges: one more than bins, except for `each`; a bin has its lower edge, and the last one both.
    """

    of: str
    scale: str
    edges: list[float]


@dataclass
class Top:
    """A frequent value: `counts` and `shares` by split, of its rows, or of a list's elements that are not null.

    `original` is the value whose id it is, where the column holds ids of a vocabulary.
    """

    value: Any
    counts: dict[str, int]
    shares: dict[str, float | None]
    original: Any = None


@dataclass
class ColumnProfile:
    """A column.

    Attributes:
        kind: integer, float, decimal, bool, text, binary, time, list, null or other.
        uses: what it is in dataset.yaml.
        parts: by split, without those that lack it.
        top: the values with the largest share in any split.
        chosen_about: whether other values might be more frequent than those in `top`; their counts are exact even so.
    """

    name: str
    kind: str
    uses: tuple[str, ...]
    parts: dict[str, Part]
    histogram: Histogram | None = None
    top: list[Top] = field(default_factory=list)
    chosen_about: bool = False


@dataclass
class LabelProfile:
    """A label: by split, the mean, the positive rate if all values are 0 and 1, and the rows of each value if few."""

    name: str
    mean: dict[str, float | None]
    positive_rate: dict[str, float | None] | None
    values: list[Top] | None


@dataclass
class Overlap:
    """How many of a split's distinct users (or items) and of their rows are in train; cold shares are of the rest.

    Shares are None without any. Rows are those with a value; with a list column, elements.
    """

    split: str
    distinct: int
    known: int
    rows: int
    known_rows: int
    cold: float | None
    cold_rows: float | None


@dataclass
class Profile:
    """All figures.

    Attributes:
        path: as given, without secrets.
        sampled: whether not all rows were read; then cold shares are larger than those of all rows.
        roles: which columns are users, items, times, labels and histories, and why.
        times: by split, (first, last) value of the time column, as text.
        overlaps: `user` and `item`: for each split but train.
        notes: what a reader of the figures should know.
    """

    path: str
    sampled: bool
    splits: list[SplitProfile]
    roles: Roles
    columns: list[ColumnProfile]
    labels: list[LabelProfile]
    times: dict[str, tuple[str, str] | None]
    overlaps: dict[str, list[Overlap]]
    notes: list[str]

    def tree(self) -> dict[str, Any]:
        """As objects of JSON; numbers that are not finite are None."""
        return dict(finite(asdict(self)))


def share_text(value: float | None) -> str:
    """A share of 1 as a person reads it: 12.3%, and <0.1% for what is not none; - without a share."""
    if value is None:
        return "-"
    if 0 < value < 0.001:
        return "<0.1%"
    return ">99.9%" if 0.999 < value < 1 else f"{value:.1%}"


def number_text(value: Any, digits: int = 6) -> str:
    """A number as a person reads it, with as many digits of a fraction; text as it is; - without a value.

    A large fraction is shown as a whole number, but not one of ten digits or more.
    """
    if value is None:
        return "-"
    if isinstance(value, bool | str):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if 10**digits <= abs(value) < 1e9 else f"{value:,.{digits}g}"
