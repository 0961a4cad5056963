"""Losses of one label: from its logits [B], or a regression's values, and the labels [B] to one loss a row, [B].

Those of a label of C classes have logits [B, C], and labels 0 .. C - 1. B may be 0. `LOSSES` says which are for which
type of label; keyword arguments are those of a run file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from rechub_dist.config.section import MAX_FLOAT
from rechub_dist.metrics.catalogue import LabelType

LabelLoss = Callable[[Tensor, Tensor], Tensor]
Positive = Annotated[float, Field(gt=0, le=MAX_FLOAT)]
Share = Annotated[float, Field(ge=0, le=1)]


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    positive_weight: Positive = 1.0,
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0,
) -> Tensor:
    """-w y log p - (1 - y) log(1 - p), w = `positive_weight`.

    With `label_smoothing` e, y is the label times 1 - e, plus e / 2 (Szegedy et al. 2016, section 7).
    """
    if label_smoothing:
        labels = labels * (1 - label_smoothing) + label_smoothing / 2
    if positive_weight == 1:
        return F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    return positive_weight * labels * F.softplus(-logits) + (1 - labels) * F.softplus(logits)


def focal(
    logits: Tensor,
    labels: Tensor,
    *,
    gamma: Annotated[float, Field(ge=0, le=100)] = 2.0,
    alpha: Share | None = 0.25,
) -> Tensor:
    """-alpha_y (1 - p_y)^gamma log p_y, p_y the probability of the row's own label (Lin et al. 2017, equation 5).

    `alpha` is the weight of positives, 1 - `alpha` that of negatives; None weighs both by 1.
    """
    miss = F.softplus(torch.where(labels > 0, -logits, logits))  # -log p_y
    hit = F.softplus(torch.where(labels > 0, logits, -logits))  # -log(1 - p_y)
    loss = torch.exp(-gamma * hit) * miss
    return loss if alpha is None else loss * (alpha * labels + (1 - alpha) * (1 - labels))


def squared_error(values: Tensor, labels: Tensor) -> Tensor:
    """(x - y)^2."""
    return F.mse_loss(values, labels, reduction="none")


def huber(values: Tensor, labels: Tensor, *, delta: Positive = 1.0) -> Tensor:
    """(x - y)^2 / 2 where |x - y| <= `delta`, else `delta` (|x - y| - `delta` / 2)  (Huber 1964)."""
    return F.huber_loss(values, labels, reduction="none", delta=delta)


class Softmax(nn.Module):
    """-w_y log p_y, p = softmax(logits), w = `class_weights`, by default 1.

    With `label_smoothing` e, 1 - e of that, plus -e / C times the sum over classes of w_c log p_c (Szegedy et al. 2016,
    section 7).
    """

    weights: Tensor | None

    def __init__(
        self,
        *,
        class_weights: list[Positive] | None = None,
        label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0,
    ) -> None:
        super().__init__()
        weights = None if class_weights is None else torch.tensor(class_weights)
        self.register_buffer(
            "weights", weights, persistent=False
        )  # copied at each step, it would have a GPU waited for
        self.smoothing = label_smoothing

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        weights = None if self.weights is None else self.weights.to(logits)
        return F.cross_entropy(logits, labels.long(), weights, reduction="none", label_smoothing=self.smoothing)


# By the labels' type, functions, or classes whose instances are such functions; the first is the default.
LOSSES: dict[LabelType, dict[str, Callable[..., Any]]] = {
    "classification": {"cross_entropy": cross_entropy, "focal": focal},
    "regression": {"squared_error": squared_error, "huber": huber},
    "multiclass": {"softmax": Softmax},
}


def default_loss(kind: LabelType) -> LabelLoss:
    """The loss of labels of a type that a run names none for."""
    return made_of(next(iter(LOSSES[kind].values())), {})


def made_of(loss: Callable[..., Any], arguments: Mapping[str, Any]) -> LabelLoss:
    """One of `LOSSES` with its arguments filled in."""
    if isinstance(loss, type):
        made: LabelLoss = loss(**arguments)
        return made
    return partial(loss, **arguments) if arguments else loss
