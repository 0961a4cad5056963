"""From a model's feature list to its lookups and its flat input."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from rechub_dist.embedded import Embedded, Lookup
from rechub_dist.features import DenseFeature, Feature, IdFeature, Pooling, SequenceFeature, Table, TimeGapFeature


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
    def of(features: Sequence[Feature], width: int | None = None, parameter: str = "embedding_dim") -> Fields:
        """Sort `features` into id features and dense ones, each in the order given.

        Args:
            features: any mix; sparse features pool as they say, sequences by their mean.
            width: the tables' width where the model sets it; None takes the widths from the tables.
            parameter: the model's name for `width`, for messages.

        Raises:
            ValueError: for no feature, one that is listed twice, or a table of another width or of none.
        """
        if not features:
            raise ValueError("features is empty: give at least one feature")
        check_distinct(features)
        lookups = tuple(
            Lookup(feature.name, feature, sized(feature.table, width, parameter), pooling_of(feature))
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
            raise ValueError(
                f"{feature!r} is not a feature: pass SparseFeature, DenseFeature, ... objects"
            )
        if feature.name in seen:
            raise ValueError(f"feature {feature.name!r} is listed twice: leave one out")
        seen.add(feature.name)
