"""Losses of one positive against several negatives.

All take the positive's scores [M], the negatives' scores [M, C] and which of them count, bool [M, C], and return one
loss a row, [M]; a row without a negative that counts has the loss of the positive alone, or 0.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def bce(positive: Tensor, negative: Tensor, mask: Tensor) -> Tensor:
    """-log s(r+) - sum over negatives of log(1 - s(r-))  (SASRec, Kang & McAuley 2018, section III-E)."""
    return F.softplus(-positive) + _kept(F.softplus(negative), mask).sum(dim=1)


def gbce(positive: Tensor, negative: Tensor, mask: Tensor, *, items: int, t: float, reduction: str = "sum") -> Tensor:
    """BCE with log s(r+)^beta, against overconfidence under negative sampling  (gSASRec, Petrov & Macdonald 2023).

    alpha = K / (items - 1), K the number of a row's negatives; beta = alpha (t (1 - 1 / alpha) + 1 / alpha). t = 0 is
    BCE, t = 1 is calibrated to the softmax's probabilities. The paper sums over negatives (`reduction="sum"`); its
    authors' code has the mean over the 1 + K terms ("mean").
    """
    count = mask.sum(dim=1, dtype=positive.dtype)
    alpha = (count / max(1, items - 1)).clamp(max=1)
    beta = alpha * t - t + 1
    loss = beta * F.softplus(-positive) + _kept(F.softplus(negative), mask).sum(dim=1)
    return loss if reduction == "sum" else loss / (1 + count)


def softmax(positive: Tensor, negative: Tensor, mask: Tensor) -> Tensor:
    """-log(e^{r+} / (e^{r+} + sum over negatives of e^{r-}))."""
    candidates = torch.cat([positive[:, None], negative.masked_fill(~mask, -torch.inf)], dim=1)
    return candidates.logsumexp(dim=1) - positive


def bpr(positive: Tensor, negative: Tensor, mask: Tensor) -> Tensor:
    """Mean over negatives of -log s(r+ - r-)  (Rendle et al. 2009)."""
    return _mean(F.softplus(negative - positive[:, None]), mask)


def bpr_max(positive: Tensor, negative: Tensor, mask: Tensor, *, regularization: float) -> Tensor:
    """-log sum_j w_j s(r+ - r_j) + lambda sum_j w_j r_j^2, w = softmax of the negatives' scores.

    Hidasi & Karatzoglou 2018, equation 9.
    """
    log_weights = _log_softmax(negative, mask)
    better = torch.logsumexp(log_weights + F.logsigmoid(positive[:, None] - negative), dim=1)
    penalty = (log_weights.exp() * negative.square()).sum(dim=1)
    return _kept(regularization * penalty - better, mask.any(dim=1))


def top1_max(positive: Tensor, negative: Tensor, mask: Tensor) -> Tensor:
    """sum_j w_j (s(r_j - r+) + s(r_j^2)), w = softmax of the negatives' scores (the same paper, equation 8)."""
    terms = torch.sigmoid(negative - positive[:, None]) + torch.sigmoid(negative.square())
    loss = (_log_softmax(negative, mask).exp() * terms).sum(dim=1)
    return _kept(loss, mask.any(dim=1))


def hinge(positive: Tensor, negative: Tensor, mask: Tensor, *, margin: float) -> Tensor:
    """Mean over negatives of max(0, D+ - D- + margin), D = 1 - score  (Huang et al. 2020, section 2.1).

    Scores of unit vectors make D the cosine distance.
    """
    return _mean((negative - positive[:, None] + margin).clamp(min=0), mask)


def _kept(values: Tensor, mask: Tensor) -> Tensor:
    return values.masked_fill(~mask, 0.0)


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    return _kept(values, mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)


def _log_softmax(scores: Tensor, mask: Tensor) -> Tensor:
    """Over what counts; a very small number elsewhere, not -inf, whose gradient would be NaN."""
    return scores.masked_fill(~mask, torch.finfo(scores.dtype).min / 4).log_softmax(dim=1)
