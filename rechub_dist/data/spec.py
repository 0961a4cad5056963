"""What the reader delivers, as model, objective and table layout require."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Final

import numpy as np
from numpy.typing import NDArray

from rechub_dist.derived import Derived
from rechub_dist.features import (
    CatalogueFeature,
    CrossFeature,
    DenseFeature,
    Label,
    LookupFeature,
    NegativeFeature,
    SequenceFeature,
    SparseFeature,
    StoredFeature,
    TimeGapFeature,
)

WEIGHTED: Final = "weighted"  # the collection of pooled tables with weighted features


@dataclass(frozen=True)
class BatchSpec:
    """The columns to read, and the layout of the batches to build from them.

    Attributes:
        features: the id features to deliver, and the inputs of crosses among them.
        dense: the dense features, in the order of their columns in `Batch.dense`.
        labels: one column of `Batch.labels` each, in this order.
        weight: the column of row weights, or None.
        keys: columns whose values are delivered unchanged, for metrics and losses that group by them.
        derived: the data set's derived columns; those of them that are read, and that the files lack, are computed.
        collections: the jagged collections of `Batch.jagged`: names of features in the key order of the
            KeyedJaggedTensor. A feature may be in several.
        aligned: groups of features whose ids correspond by position, so that each row has equally many.
        cumulative: for negatives that are not uniform, the running sum of the ids' weights, float64 [rows of table].
        idle: negatives and catalogues that get no ids: training needs them, evaluation does not.
    """

    features: tuple[LookupFeature, ...] = ()
    dense: tuple[DenseFeature, ...] = ()
    labels: tuple[Label, ...] = ()
    weight: str | None = None
    collections: dict[str, tuple[str, ...]] = field(default_factory=dict)
    aligned: tuple[tuple[str, ...], ...] = ()
    cumulative: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    idle: frozenset[str] = frozenset()
    keys: tuple[str, ...] = ()
    derived: tuple[Derived, ...] = ()

    def of_values(self) -> BatchSpec:
        """The same for rows from elsewhere, which hold values where the data set's files hold a vocabulary's ids."""
        return replace(self, features=tuple(_of_values(feature) for feature in self.features))

    @cached_property
    def stored(self) -> tuple[StoredFeature, ...]:
        """The features whose ids are in a column."""
        return tuple(f for f in self.features if isinstance(f, SparseFeature | SequenceFeature))

    @cached_property
    def time_gaps(self) -> tuple[TimeGapFeature, ...]:
        """The features made from two columns of times."""
        return tuple(f for f in self.features if isinstance(f, TimeGapFeature))

    @cached_property
    def crosses(self) -> tuple[CrossFeature, ...]:
        """The features made from the ids of others."""
        return tuple(f for f in self.features if isinstance(f, CrossFeature))

    @cached_property
    def negatives(self) -> tuple[NegativeFeature, ...]:
        """The features that are drawn."""
        return tuple(f for f in self.features if isinstance(f, NegativeFeature))

    @cached_property
    def catalogues(self) -> tuple[CatalogueFeature, ...]:
        """The features that are all ids of a table."""
        return tuple(f for f in self.features if isinstance(f, CatalogueFeature))

    @cached_property
    def weighted(self) -> tuple[SparseFeature, ...]:
        """The features that have a weight for each id."""
        return tuple(f for f in self.features if isinstance(f, SparseFeature) and f.weights)

    @cached_property
    def in_key_order(self) -> tuple[StoredFeature, ...]:
        """`stored` in the order of the collections' keys, so that the keys of a collection are adjacent in a block."""
        features = {f.name: f for f in self.stored}
        keys = [key for names in self.collections.values() for key in names]
        return tuple(features[name] for name in dict.fromkeys([*keys, *features]) if name in features)

    @cached_property
    def float_rows(self) -> int:
        """Number of floats per row: dense values, labels, and the weight if there is one."""
        return sum(dense.dim for dense in self.dense) + len(self.labels) + bool(self.weight)


def _of_values(feature: LookupFeature) -> LookupFeature:
    if isinstance(feature, SparseFeature | SequenceFeature):
        return replace(feature, encoded=False)
    if isinstance(feature, CrossFeature):
        return replace(feature, inputs=tuple(replace(source, encoded=False) for source in feature.inputs))
    return feature
