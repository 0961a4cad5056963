"""One loss a label and row: by default cross-entropy or squared error."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from rechub_dist.config import PointwiseConfig
from rechub_dist.embedded import Output
from rechub_dist.features import Label
from rechub_dist.objectives.base import TaskObjective, one_a_row
from rechub_dist.objectives.label_losses import LabelLoss, default_loss


class PointwiseObjective(TaskObjective):
    """Binary cross-entropy of a classification label's logit, the squared error of a regression label's value.

    What the model returns as `Output.aux` is added with the weight `aux_weight`.

    Args:
        losses: by label, in place of these, functions of its logits [B] and labels [B] that return a loss a row, [B].
            B may be 0. Predictions stay what they are: probabilities of classification labels.
    """

    def __init__(
        self,
        config: PointwiseConfig,
        labels: tuple[Label, ...],
        losses: Mapping[str, LabelLoss] | None = None,
    ) -> None:
        super().__init__(labels, config.task_weights)
        self.aux_weight = config.aux_weight
        given = losses or {}
        self._own = nn.ModuleList(loss for loss in given.values() if isinstance(loss, nn.Module))  # for `to`
        self._losses = tuple(given.get(label.name) or default_loss(label.type) for label in labels)

    def losses(self, output: Output, labels: Tensor) -> Tensor:
        """The weighted sum of each row's losses, [B]."""
        assert output.logits is not None
        terms = [self.aux_weight * loss for loss in output.aux.values()]
        for t, (loss, weight) in enumerate(zip(self._losses, self.task_weights, strict=True)):
            logits = output.logits[:, t]
            terms.append(weight * one_a_row(loss(logits, labels[:, t]), logits, "objective.loss"))
        return sum(terms[1:], terms[0])

    def predictions(self, output: Output) -> dict[str, Tensor]:
        """Of each label: the probability, or the value of a regression."""
        assert output.logits is not None
        logits = output.logits.float().unbind(dim=1)
        return {
            label.name: logit.sigmoid() if label.type == "classification" else logit
            for label, logit in zip(self.labels, logits, strict=True)
        }
