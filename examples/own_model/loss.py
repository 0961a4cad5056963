"""Focal loss: rows that are predicted well count less (Lin et al. 2017)."""

import torch
import torch.nn.functional as F
from torch import Tensor


def focal(logits: Tensor, labels: Tensor, *, gamma: float = 2.0) -> Tensor:
    """(1 - p)^gamma * -log p, p the probability of the row's own label: a loss a row, [B]."""
    loss = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    return (1 - torch.exp(-loss)) ** gamma * loss
