"""One loss a label and row: cross-entropy or squared error."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from rechub_dist.config import PointwiseConfig
from rechub_dist.embedded import Output
from rechub_dist.features import Label
from rechub_dist.objectives.base import TaskObjective, one_a_row


class PointwiseObjective(TaskObjective):
    """Binary cross-entropy of a classification label's logit, the squared error of a regression label's value.

    What the model returns as `Output.aux` is added with the weight `aux_weight`.

    Args:
        loss: in place of both, a function of a label's logits [B] and its labels [B] that returns a loss a row, [B].
            B may be 0. Predictions stay what they are: probabilities of classification labels.
    """

    def __init__(
        self,
        config: PointwiseConfig,
        labels: tuple[Label, ...],
        loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__(labels, config.task_weights)
        self.aux_weight = config.aux_weight
        self.loss = loss

    def losses(self, output: Output, labels: Tensor) -> Tensor:
        """The weighted sum of each row's losses, [B]."""
        assert output.logits is not None
        terms = [self.aux_weight * loss for loss in output.aux.values()]
        for t, (label, weight) in enumerate(zip(self.labels, self.task_weights, strict=True)):
            logits, wanted = output.logits[:, t], labels[:, t]
            if self.loss is not None:
                terms.append(weight * one_a_row(self.loss(logits, wanted), logits, "objective.loss"))
                continue
            loss = F.binary_cross_entropy_with_logits if label.type == "classification" else F.mse_loss
            terms.append(weight * loss(logits, wanted, reduction="none"))
        return sum(terms[1:], terms[0])

    def predictions(self, output: Output) -> dict[str, Tensor]:
        """Of each label: the probability, or the value of a regression."""
        assert output.logits is not None
        logits = output.logits.float().unbind(dim=1)
        return {
            label.name: logit.sigmoid() if label.type == "classification" else logit
            for label, logit in zip(self.labels, logits, strict=True)
        }
