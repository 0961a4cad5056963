"""From a model's feature list to its lookups and its flat input."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from rechub_dist.embedded import Embedded, Lookup
from rechub_dist.features import (
    DenseFeature,
    Feature,
    IdFeature,
    NegativeFeature,
    Pooling,
    SequenceFeature,
    SparseFeature,
    StoredFeature,
    Table,
    TimeGapFeature,
)


@dataclass(frozen=True)
class Fields:
    """The features of a flat input: one pooled vector for each id feature, then the dense values.

    Attributes:
        lookups: the pooled lookups, named after their features.
        dense: the dense features.
    """

    lookups: tuple[Lookup, ...]
    dense: tuple[DenseFeature, ...]

    @staticmethod
    def of(
        features: Sequence[Feature],
        width: int | None = None,
        parameter: str = "embedding_dim",
        *,
        keep_dim: bool = False,
    ) -> Fields:
        """Sort `features` into id features and dense ones, each in the order given.

        Args:
            features: any mix; sparse features pool as they say, sequences by their mean.
            width: the tables' width where the model sets it; None takes the widths from the tables.
            parameter: the model's name for `width`, for messages.
            keep_dim: a table that has a width keeps it, and `width` is for those that have none.

        Raises:
            ValueError: for no feature, one that is listed twice, or a table of another width or of none.
        """
        if not features:
            raise ValueError("features is empty: give at least one feature")
        check_distinct(features)
        lookups = tuple(
            Lookup(
                feature.name,
                feature,
                sized(feature.table, (feature.table.dim or width) if keep_dim else width, parameter),
                pooling_of(feature),
            )
            for feature in features
            if isinstance(feature, IdFeature)
        )
        return Fields(lookups, tuple(feature for feature in features if isinstance(feature, DenseFeature)))

    @property
    def names(self) -> list[str]:
        """Names of the pooled lookups."""
        return [lookup.name for lookup in self.lookups]

    @property
    def dense_names(self) -> list[str]:
        """Names of the dense features."""
        return [feature.name for feature in self.dense]

    @property
    def dense_width(self) -> int:
        """Width of the dense values side by side."""
        return sum(feature.dim for feature in self.dense)

    @property
    def width(self) -> int:
        """Width of `concat`."""
        return sum(lookup.dim for lookup in self.lookups) + self.dense_width

    def concat(self, embedded: Embedded) -> Tensor:
        """The pooled vectors and the dense values side by side: [B, width]."""
        return embedded.concat(self.names, self.dense_names)


def pooling_of(feature: IdFeature) -> Pooling:
    """How a feature becomes one vector: a sparse one or a cross as it says, a sequence by its mean."""
    return "mean" if isinstance(feature, SequenceFeature | TimeGapFeature) else feature.pooling


def unpooled(
    features: Iterable[SequenceFeature | TimeGapFeature | NegativeFeature],
    width: int | None = None,
    parameter: str = "embedding_dim",
) -> tuple[Lookup, ...]:
    """Lookups of single vectors, one a feature; widths as in `sized`."""
    return tuple(Lookup(f.name, f, sized(f.table, width, parameter), None) for f in features)


def history_and_item(
    history: SequenceFeature | str,
    item: SparseFeature | str,
    item_num: int,
    max_length: int,
    width: int,
    parameter: str = "embedding_dim",
) -> tuple[Lookup, Lookup]:
    """Lookups of a history, one vector an item, and of the item that follows it, over one table of items.

    Args:
        history: a name makes a feature of at most `max_length` items over the table of `item`.
        item: a name makes a feature over the table of `history`. Where both are names, the table is called "item".
        item_num: the table's rows.
        max_length: for a history given by its name; a feature has its own.
        width: the table's width, the model's argument `parameter`.

    Raises:
        ValueError: two features of one name or over two tables, or a table of another size.
    """
    given = [feature.table for feature in (history, item) if not isinstance(feature, str)]
    table = given[0] if given else Table("item", item_num, init_std=0.02)
    if isinstance(history, str):
        history = SequenceFeature(history, table, max_length=max_length)
    if isinstance(item, str):
        item = SparseFeature(item, table)
    if history.name == item.name:
        raise ValueError(f"history and item are both named {item.name!r}: give them different names")
    check_same_table("history", history, "item", item)
    if table.rows != item_num:
        raise ValueError(f"item_num is {item_num}, but table {table.name!r} has {table.rows} rows: make them equal")
    table = sized(table, width, parameter)
    return Lookup(history.name, history, table, None), Lookup(item.name, item, table, "sum")


def sized(table: Table, width: int | None, parameter: str = "embedding_dim") -> Table:
    """`table` with its width: the model's `width` (its argument `parameter`), or, where that is None, the table's own.

    Raises:
        ValueError: where the two differ, or neither is given.
    """
    if width is None:
        if table.dim is None:
            raise ValueError(f"table {table.name!r} has no width: give the table a dim, or set the run's embedding.dim")
        return table
    if table.dim not in (None, width):
        raise ValueError(
            f"table {table.name!r} has dim {table.dim}, but the model's {parameter} is {width}: make them equal, or "
            f"leave the table's dim out"
        )
    return replace(table, dim=width)


def check_distinct(features: Iterable[Feature]) -> None:
    """Refuse what is no feature, and a feature that is listed twice."""
    seen: set[str] = set()
    for feature in features:
        if not isinstance(feature, Feature):
            raise ValueError(f"{feature!r} is not a feature: pass SparseFeature, DenseFeature, ... objects")
        if feature.name in seen:
            raise ValueError(f"feature {feature.name!r} is listed twice: leave one out")
        seen.add(feature.name)


def check_sides(user_features: Sequence[Feature], item_features: Sequence[Feature]) -> None:
    """Two towers have features each, no two of one name, and an item's first one is its id."""
    for side, features in (("user_features", user_features), ("item_features", item_features)):
        if not features:
            raise ValueError(f"{side} is empty: give at least one feature")
        check_distinct(features)
    item = item_features[0]
    if not isinstance(item, SparseFeature):
        raise ValueError(
            f"item_features starts with {item.name!r}, which is {item.kind}: put the item's id first, a SparseFeature"
        )
    names = {feature.name for feature in item_features}
    for feature in user_features:
        if feature.name in names:
            raise ValueError(
                f"feature {feature.name!r} is in user_features and in item_features: leave it out of one, since what "
                f"both towers see says nothing of how well a user and an item match"
            )


def check_pairs(behavior_features: Sequence[SequenceFeature], target_features: Sequence[SparseFeature]) -> None:
    """Each behaviour feature has its target feature, over the same table, and all are cut alike."""
    if not behavior_features or len(behavior_features) != len(target_features):
        raise ValueError(
            f"{len(behavior_features)} behavior_features and {len(target_features)} target_features: give at least one "
            f"behaviour feature, and for each the target feature that it is matched with"
        )
    for behavior, target in zip(behavior_features, target_features, strict=True):
        if not isinstance(behavior, SequenceFeature):
            raise ValueError(f"behaviour feature {behavior.name!r} is {behavior.kind}: make it a SequenceFeature")
        if not isinstance(target, SparseFeature):
            raise ValueError(f"target feature {target.name!r} is {target.kind}: make it a SparseFeature")
        check_same_table("behaviour feature", behavior, "its target feature", target)
    check_cut(behavior_features)


def check_same_table(role: str, feature: StoredFeature, other_role: str, other: StoredFeature) -> None:
    """Refuse two features that belong together and read different tables."""
    if feature.table != other.table:
        raise ValueError(
            f"{role} {feature.name!r} reads table {feature.table.name!r} and {other_role} {other.name!r} reads "
            f"{other.table.name!r}: make both read the same table"
        )


def check_cut(features: Sequence[SequenceFeature | TimeGapFeature]) -> None:
    """Features that belong together position by position keep the same part of their lists."""
    first = features[0]
    for other in features[1:]:
        if (other.keep, other.max_length) != (first.keep, first.max_length):
            raise ValueError(
                f"features {first.name!r} and {other.name!r} keep the {first.keep} {first.max_length} and the "
                f"{other.keep} {other.max_length} behaviours: give both the same max_length and keep"
            )
