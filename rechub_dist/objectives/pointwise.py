"""One loss a label and row: cross-entropy or squared error."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rechub_dist.batch import Batch
from rechub_dist.config import PointwiseConfig
from rechub_dist.embedded import Embedded, Output
from rechub_dist.errors import UserError, nearest
from rechub_dist.features import Label
from rechub_dist.objectives.base import Objective


class PointwiseObjective(Objective):
    """Sum over labels of weight * mean loss; the mean is over the rows' weights of the global batch.

    Classification labels take binary cross-entropy of the logit, regression labels the squared error.

    Raises:
        UserError: no label, or a task weight for a label that is not trained.
    """

    def __init__(self, config: PointwiseConfig, labels: tuple[Label, ...]) -> None:
        super().__init__()
        if not labels:
            raise UserError("data.labels: a pointwise objective needs at least one label")
        names = [label.name for label in labels]
        for name in config.task_weights:
            if name not in names:
                raise UserError(f"objective.task_weights: no label {name!r}: {nearest(name, names)}")
        self.labels = labels
        self.task_weights = tuple(config.task_weights.get(name, 1.0) for name in names)
        self.classification = tuple(label.type == "classification" for label in labels)

    def weight_sums(self, batch: Batch) -> Tensor:
        """The sum of row weights, float64 [1]."""
        if batch.weights is None:
            return torch.tensor([float(batch.rows)], dtype=torch.float64)
        return batch.weights.sum(dtype=torch.float64)[None]

    def forward(self, output: Output, embedded: Embedded, batch: Batch) -> Tensor:  # noqa: ARG002
        """This rank's part of the loss."""
        logits = _logits(output, len(self.labels))
        assert batch.weight_sums is not None
        loss = logits.new_zeros(())
        for t, (weight, classification) in enumerate(zip(self.task_weights, self.classification, strict=True)):
            term = F.binary_cross_entropy_with_logits if classification else F.mse_loss
            loss = loss + weight * (term(logits[:, t], batch.labels[:, t], reduction="none") * _weights(batch)).sum()
        return loss / batch.weight_sums[0].clamp(min=torch.finfo(torch.float32).tiny).to(loss.dtype)

    def predict(self, output: Output) -> Tensor:
        """Probabilities (classification) or values (regression), float32 [B, T]."""
        logits = _logits(output, len(self.labels))
        columns = [
            logits[:, t].sigmoid() if classification else logits[:, t]
            for t, classification in enumerate(self.classification)
        ]
        return torch.stack(columns, dim=1).float()


def _weights(batch: Batch) -> Tensor | float:
    return 1.0 if batch.weights is None else batch.weights


def _logits(output: Output, tasks: int) -> Tensor:
    if output.logits is None:
        raise UserError("objective: pointwise needs a model with logits; a recall model takes objective: retrieval")
    if output.logits.shape[1] != tasks:
        raise UserError(
            f"data.labels: {tasks} labels, but the model gives {output.logits.shape[1]} logits; name as many labels as "
            f"the model has tasks"
        )
    return output.logits
