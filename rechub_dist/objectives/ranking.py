"""What a recall model ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from rechub_dist.embedded import Embedded, Lookup
from rechub_dist.features import DenseFeature, LookupFeature
from rechub_dist.models.base import RecallModel


@dataclass(frozen=True)
class Ranking:
    """Items, ranked for a user by the largest inner product of their vector with one of the user's.

    Attributes:
        lookups, dense: what an item's vector is made of; the first lookup is that of its id.
        history: the items that a user has seen, as the model reads them; None where it reads none.
        user: from what was looked up to user vectors [B, Q, D], and which of them are live, bool [B, Q].
        vectors: from what was looked up of n items to their vectors, [n, D].
        score, score_own: training scores, of the same items for all users, and of a user's own (`RecallModel`).
    """

    lookups: tuple[Lookup, ...]
    dense: tuple[DenseFeature, ...]
    history: LookupFeature | None
    user: Callable[[Embedded], tuple[Tensor, Tensor]]
    vectors: Callable[[Embedded], Tensor]
    score: Callable[[Tensor, Tensor], Tensor]
    score_own: Callable[[Tensor, Tensor], Tensor]

    @classmethod
    def by(cls, model: RecallModel) -> Ranking:
        """What this model ranks. Its methods are kept, it is not: the objective must not have it as a submodule."""
        return cls(
            model.item_lookups(),
            model.item_dense_features(),
            model.history(),
            model.user,
            model.item,
            model.score,
            model.score_own,
        )

    def scaled(self, scale: Callable[[], Tensor | float]) -> Ranking:
        """The same, with all scores multiplied by `scale()`, a scalar."""

        def user(embedded: Embedded) -> tuple[Tensor, Tensor]:
            vectors, live = self.user(embedded)
            return vectors * scale(), live

        return replace(self, user=user)

    @property
    def item(self) -> Lookup:
        """The lookup of an item's id."""
        return self.lookups[0]

    @property
    def ids_alone(self) -> bool:
        """Whether an item's vector comes from its id alone."""
        return len(self.lookups) == 1 and not self.dense
