"""All pairs of fields at once."""

from __future__ import annotations

import torch
from torch import Tensor


def pairs(left: Tensor, right: Tensor, dim: int = 1) -> tuple[Tensor, Tensor]:
    """left_i and right_j for all pairs i < j of F fields: (0, 1), (0, 2) .. (F - 2, F - 1).

    The last field stands on no pair's left side, so `left` may lack it: [B, F or F - 1, D] and [B, F, D] -> twice
    [B, P, D], P = F (F - 1) / 2. Fields, and so pairs, may stand in another dimension, `dim`.
    """
    fields = right.shape[dim]
    i, j = torch.triu_indices(fields, fields, offset=1, device=right.device)
    # In its backward pass index_select takes about half the time of left[:, i] on CPU.
    return left.index_select(dim, i), right.index_select(dim, j)
