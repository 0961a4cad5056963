"""All-gather of rows whose number differs between ranks, with gradients and without."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def all_rows(
    rows: Tensor, group: dist.ProcessGroup | None = None, sizes: Sequence[int] | None = None
) -> tuple[Tensor, Sequence[int]]:
    """All ranks' rows [n_r, ...] in rank order, the same on every rank: [sum of n_r, ...], and each n_r. Collective.

    The numbers of rows may differ between ranks and be 0. Without `sizes` (each n_r) they are gathered first, which the
    host waits for. Not differentiable: see `gather_rows`.
    """
    if sizes is None:
        size = torch.tensor([len(rows)], device=rows.device)
        counts = [torch.empty_like(size) for _ in range(dist.get_world_size(group))]
        dist.all_gather(counts, size, group=group)
        sizes = torch.cat(counts).tolist()
    padded = rows.new_zeros(max(sizes), *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([part[:n] for part, n in zip(parts, sizes, strict=True)]), sizes


def gather_rows(rows: Tensor, sizes: Sequence[int] | None = None) -> Tensor:
    """The rows of `all_rows`, differentiable: the gradient of a rank's rows is the sum over all ranks' losses.

    Collective, forward and backward. Without a process group, or with one rank, returns `rows`.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return rows
    gathered: Tensor = _GatherRows.apply(rows, sizes)
    return gathered


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: Sequence[int] | None) -> Tensor:
        gathered, ctx.sizes = all_rows(rows, sizes=sizes)
        return gathered

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].contiguous().clone()
        dist.all_reduce(total)
        start = sum(ctx.sizes[: dist.get_rank()])
        return total[start : start + ctx.sizes[dist.get_rank()]], None
