"""One loss a label and row: by default cross-entropy or squared error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from rechub_dist.batch import Batch
from rechub_dist.config import PointwiseConfig
from rechub_dist.embedded import Embedded, Output
from rechub_dist.errors import UserError
from rechub_dist.features import Label
from rechub_dist.objectives.base import TaskObjective, one_a_row
from rechub_dist.objectives.groups import GroupLoss, Groups
from rechub_dist.objectives.label_losses import LabelLoss, default_loss
from rechub_dist.objectives.weighting import OfGradients, make_weighting, weighted


class PointwiseObjective(TaskObjective):
    """Binary cross-entropy of a classification label's logit, the squared error of a regression label's value, the
    cross-entropy of the softmax of a label of several classes.

    What the model returns as `Output.aux` is added with the weight `aux_weight`. With `config.group_loss` a part of the
    loss of each classification label, or all of it, is one within groups of rows.

    Args:
        losses: by label, in place of these, functions of its logits [B], of C classes [B, C], and labels [B] that
            return a loss a row, [B]. B may be 0. Predictions stay what they are: probabilities, but of regressions.
        shared: the model's parameters that all tasks share (`Model.shared_parameters`); they stay outside.
    """

    def __init__(
        self,
        config: PointwiseConfig,
        labels: tuple[Label, ...],
        losses: Mapping[str, LabelLoss] | None = None,
        shared: Sequence[nn.Parameter] = (),
    ) -> None:
        super().__init__(labels, config.task_weights)
        self.aux_weight = config.aux_weight
        given = losses or {}
        self._own = nn.ModuleList(loss for loss in given.values() if isinstance(loss, nn.Module))  # for `to`
        self._losses = tuple(given.get(label.name) or default_loss(label.type) for label in labels)
        self.weighting = make_weighting(config, labels, shared)
        self._group_loss = None if config.group_loss is None else GroupLoss(config.group_loss)
        if self._group_loss is not None and all(label.type != "classification" for label in labels):
            raise UserError(
                "objective.group_loss: compares rows of label 1 with rows of label 0, and no label is of type "
                "classification; leave it out"
            )

    @property
    def row_keys(self) -> tuple[str, ...]:
        """The column of the groups."""
        return () if self._group_loss is None else (self._group_loss.column,)

    @property
    def whole_batch(self) -> bool:
        """With a loss within groups, or weights that follow gradients, it does."""
        return self._group_loss is not None or isinstance(self.weighting, OfGradients)

    def learned(self) -> dict[str, Tensor]:
        """What the weighting of its labels learns, too."""
        state = {} if self.weighting is None else self.weighting.state_dict()
        return {**super().learned(), **{f"weighting.{name}": value for name, value in state.items()}}

    def watched(self) -> dict[str, float]:
        """The weights of the labels' losses, where they are not fixed."""
        used = None if self.weighting is None else self.weighting.used()
        if used is None:
            return {}
        return {f"weight/{label.name}": w for label, w in zip(self.labels, used.tolist(), strict=True)}

    def losses(self, output: Output, labels: Tensor) -> Tensor:
        """The weighted sum of each row's losses, [B]."""
        terms = [self.aux_weight * loss for loss in output.aux.values()]
        each = self._each(output, labels)
        terms += [weight * loss for weight, loss in zip(self.task_weights, each, strict=True)]
        return sum(terms[1:], terms[0])

    def _each(self, output: Output, labels: Tensor) -> list[Tensor]:
        """Each label's losses of single rows, [B]."""
        columns = zip(self._losses, self._logits(output), labels.unbind(dim=1), strict=True)
        return [one_a_row(loss(logits, wanted), wanted, "objective.loss") for loss, logits, wanted in columns]

    def _logits(self, output: Output) -> list[Tensor]:
        """Each label's logits, [B], of C classes [B, C]."""
        assert output.logits is not None
        parts = output.logits.split([label.outputs for label in self.labels], dim=1)
        return [part if label.classes else part[:, 0] for label, part in zip(self.labels, parts, strict=True)]

    def forward(self, output: Output, embedded: Embedded, batch: Batch) -> Tensor:
        """This rank's part of the loss."""
        if self._group_loss is None and self.weighting is None:
            return super().forward(output, embedded, batch)
        parts = self.parts(output, batch)
        if self.weighting is None:
            total = weighted(self.task_weights, parts)
        else:
            total = self.weighting(parts, self._of_rows(torch.ones_like(batch.labels[:, 0]), batch))
        return total + self._of_rows(self.aux_weight * sum(output.aux.values(), torch.zeros_like(parts[0])), batch)

    def parts(self, output: Output, batch: Batch) -> Tensor:
        """This rank's part of each label's loss, [T]: a label's loss is its sum over ranks."""
        found = [self._of_rows(losses, batch) for losses in self._each(output, batch.labels)]
        if (of_group := self._group_loss) is not None:
            one_each = [logits if logits.dim() == 1 else logits[:, 0] for logits in self._logits(output)]
            groups = Groups.gathered(of_group.column, torch.stack(one_each, dim=1), batch)
            for t, label in enumerate(self.labels):
                if label.type == "classification":
                    found[t] = (1 - of_group.share) * found[t] + of_group.share * of_group(groups, t)
        return torch.stack(found)

    def predictions(self, output: Output) -> dict[str, Tensor]:
        """Of each label: the probability, of several classes that of each, or the value of a regression."""
        found = {}
        for label, logits in zip(self.labels, self._logits(output), strict=True):
            values = logits.float()
            if label.type == "classification":
                values = values.sigmoid()
            elif label.type == "multiclass":
                values = values.softmax(dim=1)
            found[label.name] = values
        return found
