"""What the reader has to deliver: derived from the model, the objective and the layout of their tables."""

from __future__ import annotations

from dataclasses import dataclass, field

from rechub_dist.features import DenseFeature, Label, NegativeFeature, SequenceFeature, SparseFeature


@dataclass(frozen=True)
class BatchSpec:
    """The columns to read and the shape of the batches to build from them.

    Attributes:
        features: the id features to deliver; the drawn ones (`NegativeFeature`) follow those that they depend on.
        dense: the dense features, side by side in `Batch.dense` in this order.
        labels: one column of `Batch.labels` each, in this order.
        weight: the column of row weights, or None.
        collections: the jagged collections of `Batch.jagged`: the names of their features in the key order of their
            KeyedJaggedTensor. A feature may stand in several.
        aligned: groups of features that have equally many ids in each row, position by position.
    """

    features: tuple[SparseFeature | SequenceFeature | NegativeFeature, ...] = ()
    dense: tuple[DenseFeature, ...] = ()
    labels: tuple[Label, ...] = ()
    weight: str | None = None
    collections: dict[str, tuple[str, ...]] = field(default_factory=dict)
    aligned: tuple[tuple[str, ...], ...] = ()
