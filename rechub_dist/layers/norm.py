"""Batch normalisation that also takes a batch of one row, or of none."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


def batch_norm(norm: nn.Module, x: Tensor) -> Tensor:
    """`norm(x)` for x [N, C].

    In training `nn.BatchNorm1d` refuses fewer than two rows, which have no variance; such a batch is normalised by the
    running statistics and leaves them as they are. A module that replaces it (statistics over all ranks) is just
    called.
    """
    if type(norm) is nn.BatchNorm1d and norm.training and x.shape[0] < 2:
        return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
    return norm(x)
