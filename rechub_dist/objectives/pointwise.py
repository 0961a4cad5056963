"""One loss a label and row: cross-entropy or squared error."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from rechub_dist.batch import Batch
from rechub_dist.config import PointwiseConfig
from rechub_dist.embedded import Output
from rechub_dist.features import Label
from rechub_dist.objectives.base import Scores, TaskObjective, row_weights


class PointwiseObjective(TaskObjective):
    """Binary cross-entropy of a classification label's logit, the squared error of a regression label's value.

    What the model returns as `Output.aux` is added with the weight `aux_weight`.
    """

    def __init__(self, config: PointwiseConfig, labels: tuple[Label, ...]) -> None:
        super().__init__(labels, config.task_weights)
        self.aux_weight = config.aux_weight

    def losses(self, output: Output, labels: Tensor) -> Tensor:
        """The weighted sum of each row's losses, [B]."""
        assert output.logits is not None
        terms = [self.aux_weight * loss for loss in output.aux.values()]
        for t, (label, weight) in enumerate(zip(self.labels, self.task_weights, strict=True)):
            loss = F.binary_cross_entropy_with_logits if label.type == "classification" else F.mse_loss
            terms.append(weight * loss(output.logits[:, t], labels[:, t], reduction="none"))
        return sum(terms[1:], terms[0])

    def scores(self, output: Output, batch: Batch) -> dict[str, Scores]:
        """Of each label."""
        assert output.logits is not None
        weights = row_weights(batch)
        found = {}
        for t, label in enumerate(self.labels):
            logit = output.logits[:, t].float()
            predictions = logit.sigmoid() if label.type == "classification" else logit
            found[label.name] = Scores(predictions, batch.labels[:, t], weights)
        return found
