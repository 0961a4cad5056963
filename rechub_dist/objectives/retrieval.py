"""Next-item losses of recall models."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rechub_dist.batch import Batch
from rechub_dist.config import RetrievalConfig
from rechub_dist.embedded import Embedded, Lookup, Output
from rechub_dist.errors import UserError
from rechub_dist.features import NegativeFeature, SequenceFeature
from rechub_dist.models.base import RecallModel
from rechub_dist.objectives.base import Objective

NEGATIVES = "negatives"


class RetrievalObjective(Objective):
    """Binary cross-entropy at every real position: the next item against `negatives` uniformly drawn ones.

    SASRec, section 3.5 (Kang and McAuley 2018): -log s(r_pos) - sum over negatives log(1 - s(r_neg)), averaged over
    the positions of the global batch. A row's negatives are items that are not in the row.
    """

    def __init__(self, config: RetrievalConfig, model: RecallModel) -> None:
        super().__init__()
        self.config = config
        histories = [lookup for lookup in model.lookups() if isinstance(lookup.feature, SequenceFeature)]
        items = model.item_lookups()
        if len(histories) != 1 or len(items) != 1 or histories[0].table.name != items[0].table.name:
            raise UserError("objective: bce needs a model with one history and one item feature over the same table")
        self.history, self.item = histories[0], items[0]
        self.negatives = Lookup(
            NEGATIVES,
            NegativeFeature(
                NEGATIVES,
                self.item.table,
                like=self.history.feature.name,
                count=config.negatives,
                exclude=(self.history.feature.name, self.item.feature.name),
            ),
            self.item.table,
            pooling=None,
        )

    def lookups(self) -> tuple[Lookup, ...]:
        """The drawn negatives, from the item's table."""
        return (self.negatives,)

    def weight_sums(self, batch: Batch) -> Tensor:
        """The number of real positions, float64 [1]."""
        return batch.feature(self.history.feature.name).lengths().sum(dtype=torch.float64)[None]

    def forward(self, output: Output, embedded: Embedded, batch: Batch) -> Tensor:
        """This rank's part of the loss."""
        assert output.user is not None and output.item is not None  # noqa: PT018
        assert output.user_mask is not None
        assert batch.weight_sums is not None
        user, mask = output.user, output.user_mask
        drawn = embedded.sequences[NEGATIVES].values  # [B, L * count, D], a position's draws side by side
        rows, positions, width = user.shape
        if drawn.shape[1] < positions * self.config.negatives:  # every history here is empty: one masked position
            drawn = drawn.expand(rows, positions * self.config.negatives, width)
        negatives = drawn.view(rows, positions, self.config.negatives, width)
        positive_loss = F.softplus(-(user * output.item).sum(-1))
        negative_loss = F.softplus((user[:, :, None] * negatives).sum(-1)).sum(-1)
        loss = torch.where(mask, positive_loss + negative_loss, 0.0).sum()
        return loss / batch.weight_sums[0].clamp(min=1).to(loss.dtype)
