"""What a metric is: fed batch by batch, merged over ranks, then computed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from rechub_dist.distributed.runtime import Runtime
from rechub_dist.metrics.direction import Direction

Rows_contra = TypeVar("Rows_contra", contravariant=True)


class Metric(Protocol[Rows_contra]):
    """One number of all rows of an evaluation, over all ranks.

    A metric of predicted labels takes `Scored` rows, one of recommended items takes `Ranked` rows. Its constructor's
    parameters are the keys that may stand beside its name in the run file, checked by their annotations.

    Attributes:
        direction: what makes a value the better one.
        group: the column of the data whose values `Scored.keys` has to hold; None for most.
    """

    direction: Direction
    group: str | None

    def update(self, rows: Rows_contra) -> None:
        """Take some rows of this rank; any number of times, also not at all. Local.

        Raises:
            UserError: rows that cannot be measured.
        """

    def merge(self, ranks: Runtime) -> None:
        """Make the state that of the rows of all ranks, the same on each. Collective; once, after all updates.

        Raises:
            UserError: on all ranks alike.
        """

    def compute(self) -> float:
        """The value, NaN where the rows cannot tell. Local, after `merge`."""


@dataclass(frozen=True)
class Scored:
    """N rows that a model has scored for one label.

    Attributes:
        predictions: probabilities of a classification label, values of a regression label, float [N]; the
            probabilities of each class of a label of C classes, [N, C].
        targets: what they are to be, 0 or 1 for classification, the class of several; float [N].
        weights: each row counts so many times; float [N], not negative.
        keys: by column that a metric groups by, the rows' own values as Arrow holds them, int64 or large_string [N].
    """

    predictions: NDArray[np.floating]
    targets: NDArray[np.floating]
    weights: NDArray[np.floating]
    keys: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Ranked:
    """N rows whose item was ranked among the catalogue's. Every rank holds the rows of all ranks.

    Attributes:
        places: of each row's item, 0 for the best; float32 [N], NaN for a miss.
        targets: the rows' items; int64 [N].
        top: the best items, best first; int64 [N, k], -1 where there is none; None where no metric asks for them.
        items: the number of the catalogue's items.
    """

    places: Tensor
    targets: Tensor
    top: Tensor | None
    items: int
