"""Right-padded sequences: [B, L, D] values of which the first `lengths` [B] of each row are real."""

from __future__ import annotations

import torch
from torch import Tensor


def zero_padding(values: Tensor, mask: Tensor) -> Tensor:
    """Zeros where `mask`, bool [B, L], is False, whatever (NaN included) lies there: [B, L, D] -> [B, L, D]."""
    return torch.where(mask[..., None], values, 0)  # in half the time of masked_fill


def places(mask: Tensor, total: int | None) -> Tensor:
    """Where `mask` is True among all its places, row after row: int64 [total].

    `total` is how often it is. Where that is None it is counted, for which the host waits for a GPU.
    """
    flat = mask.flatten()
    found = flat.nonzero() if total is None else flat.nonzero_static(size=total)
    return found[:, 0]


def last(values: Tensor, lengths: Tensor) -> Tensor:
    """The value at the last real position of each row, zeros for a row of length 0: [B, L, D] -> [B, D]."""
    index = (lengths - 1).clamp(min=0)[:, None, None].expand(-1, 1, values.shape[2])
    return values.gather(1, index).squeeze(1).masked_fill((lengths == 0)[:, None], 0.0)


def following(values: Tensor, lengths: Tensor, final: Tensor) -> Tensor:
    """What follows each real position: values[t + 1], and for the last one the row's `final` [B, D].

    [B, L, D] -> [B, L, D], zeros at padded positions.
    """
    position = torch.arange(values.shape[1], device=values.device)
    shifted = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
    shifted = zero_padding(shifted, position < lengths[:, None] - 1)
    at_last = position == lengths[:, None] - 1
    return torch.where(at_last[..., None], final[:, None], shifted)


def newest_first(values: Tensor, lengths: Tensor) -> Tensor:
    """Each row's real values from its last one back to its first, zeros behind them: [B, L, D] -> [B, L, D]."""
    index = lengths[:, None] - 1 - torch.arange(values.shape[1], device=values.device)  # [B, L]
    reversed_values = values.gather(1, index.clamp(min=0)[..., None].expand_as(values))
    return zero_padding(reversed_values, index >= 0)
