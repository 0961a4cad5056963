"""Conversions after a click, learnt over all impressions."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from rechub_dist.batch import Batch
from rechub_dist.config import EntireSpaceConfig
from rechub_dist.embedded import Output
from rechub_dist.errors import UserError
from rechub_dist.features import Label
from rechub_dist.objectives.base import TaskObjective, row_weights

LN2 = math.log(2)


class EntireSpaceObjective(TaskObjective):
    """BCE(click, pCTR) + BCE(click and conversion, pCTR * pCVR), for each conversion (ESMM, Ma et al. 2018, 2.3).

    The first label is the click, each other one a conversion; the first logit is that of pCTR, the others are those of
    pCVR, the chance of a conversion given a click. pCVR has no loss of its own, so that nothing is learnt from clicked
    impressions alone.

    `predictions` are of the click, for each conversion the click together with it (pCTR * pCVR), and as
    `<conversion>_given_click` pCVR on the clicked rows.
    """

    def __init__(self, config: EntireSpaceConfig, labels: tuple[Label, ...]) -> None:
        super().__init__(labels, config.task_weights)
        if len(labels) < 2 or any(label.type != "classification" for label in labels):
            raise UserError(
                "data.labels: entire_space takes a click label and at least one conversion label after it, all of type "
                f"classification, got {', '.join(f'{label.name} ({label.type})' for label in labels)}"
            )
        self.scored |= {f"{label.name}_given_click": label.type for label in labels[1:]}

    def losses(self, output: Output, labels: Tensor) -> Tensor:
        """The weighted sum of each row's losses, [B]."""
        click, *conversions = _columns(output)
        clicked = labels[:, 0]
        total = self.task_weights[0] * F.binary_cross_entropy_with_logits(click, clicked, reduction="none")
        for t, conversion in enumerate(conversions, start=1):
            both, log_p = clicked * labels[:, t], F.logsigmoid(click) + F.logsigmoid(conversion)
            log_not = _log_not_both(click, conversion, log_p)
            total = total - self.task_weights[t] * (both * log_p + (1 - both) * log_not)
        return total

    def predictions(self, output: Output) -> dict[str, Tensor]:
        """Of the click, of each click with conversion, and of each conversion given a click."""
        click, *conversions = (logit.float().sigmoid() for logit in _columns(output))
        found = {self.labels[0].name: click}
        for label, conversion in zip(self.labels[1:], conversions, strict=True):
            found[label.name] = click * conversion
            found[f"{label.name}_given_click"] = conversion
        return found

    def targets(self, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        """A conversion without a click is none; given a click, the other rows do not count."""
        clicked, weights = batch.labels[:, 0], row_weights(batch)
        found = {self.labels[0].name: (clicked, weights)}
        for t, label in enumerate(self.labels[1:], start=1):
            converted = batch.labels[:, t]
            found[label.name] = clicked * converted, weights
            found[f"{label.name}_given_click"] = converted, weights * clicked
        return found


def _log_not_both(a: Tensor, b: Tensor, log_p: Tensor) -> Tensor:
    """log(1 - s(a) s(b)) where log_p = log(s(a) s(b)), without a difference of nearly equal numbers.

    A small product is subtracted from 1; for a large one, 1 - s(a) s(b) = (e^-a + e^-b + e^-(a + b)) s(a) s(b).
    """
    large = torch.stack([-a, -b, -a - b]).logsumexp(dim=0) + log_p
    small = torch.log1p(-log_p.clamp(max=-LN2).exp())
    return torch.where(log_p < -LN2, small, large)


def _columns(output: Output) -> tuple[Tensor, ...]:
    assert output.logits is not None
    return output.logits.unbind(dim=1)
