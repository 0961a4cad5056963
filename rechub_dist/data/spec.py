"""What the reader has to deliver: derived from the model, the objective and the layout of their tables."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Final

import numpy as np
from numpy.typing import NDArray

from rechub_dist.embedded import LookupFeature
from rechub_dist.features import (
    CatalogueFeature,
    CrossFeature,
    DenseFeature,
    Label,
    NegativeFeature,
    SequenceFeature,
    SparseFeature,
    StoredFeature,
    TimeGapFeature,
)

WEIGHTED: Final = "weighted"  # the collection of pooled tables of which some feature has weights


@dataclass(frozen=True)
class BatchSpec:
    """The columns to read and the shape of the batches to build from them.

    Attributes:
        features: the id features to deliver, and those that others of them are made from.
        dense: the dense features, side by side in `Batch.dense` in this order.
        labels: one column of `Batch.labels` each, in this order.
        weight: the column of row weights, or None.
        keys: columns whose values are delivered as they are, for metrics that group by them.
        collections: the jagged collections of `Batch.jagged`: the names of their features in the key order of their
            KeyedJaggedTensor. A feature may stand in several.
        aligned: groups of features that have equally many ids in each row, position by position.
        cumulative: for negatives that are not uniform, the running sum of the ids' weights, float64 [rows of table].
        idle: drawn features and catalogues that get no ids here: training needs them, evaluation does not.
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

    @cached_property
    def stored(self) -> tuple[StoredFeature, ...]:
        """The features whose ids stand in a column."""
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
        """The features with a column, in the order of the collections' keys: so that keys are neighbours in a block."""
        features = {f.name: f for f in self.stored}
        keys = [key for names in self.collections.values() for key in names]
        return tuple(features[name] for name in dict.fromkeys([*keys, *features]) if name in features)

    @cached_property
    def float_rows(self) -> int:
        """How many floats a row has: dense values, labels, and the weight if there is one."""
        return sum(dense.dim for dense in self.dense) + len(self.labels) + bool(self.weight)
