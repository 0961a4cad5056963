"""Batch normalisation over the global batch; unlike SyncBatchNorm, on CPU as well, and on ranks without rows."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class GlobalBatchNorm1d(nn.BatchNorm1d):
    """`nn.BatchNorm1d` over inputs [N, C], with statistics over the rows of all ranks."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Normalise [N, C]; N may differ between ranks and be 0. Collective in training, forward and backward."""
        if not self.training:
            return super().forward(input)
        stats = torch.cat([input.sum(0), input.square().sum(0), input.new_full((1,), len(input))])
        stats = _AllReduceSum.apply(stats)
        count = stats[-1].detach().clamp(min=1)
        mean = stats[: self.num_features] / count
        variance = (stats[self.num_features : -1] / count - mean.square()).clamp(min=0)
        if self.running_mean is not None and self.running_var is not None:
            # A single row has no variance: the running statistics are used, and not updated.
            enough = count > 1
            with torch.no_grad():
                self._update_running(mean, variance, count, enough)
            mean = torch.where(enough, mean, self.running_mean)
            variance = torch.where(enough, variance, self.running_var)
        output = (input - mean) * torch.rsqrt(variance + self.eps)
        return output if self.weight is None else output * self.weight + self.bias

    def _update_running(self, mean: Tensor, variance: Tensor, count: Tensor, enough: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(enough)
        momentum = self.momentum if self.momentum is not None else 1 / self.num_batches_tracked.clamp(min=1)
        weight = momentum * enough
        self.running_mean.lerp_(mean, weight)
        self.running_var.lerp_(variance * count / (count - 1).clamp(min=1), weight)


def globalize(module: nn.Module) -> None:
    """Make every `nn.BatchNorm1d` in `module` a global one, in place; parameters and buffers are kept."""
    for child in module.modules():
        if type(child) is nn.BatchNorm1d:
            child.__class__ = GlobalBatchNorm1d


class _AllReduceSum(torch.autograd.Function):
    """Sum over ranks. Every rank's loss depends on every rank's input, so gradients are summed as well."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:  # noqa: ARG004
        total = value.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:  # noqa: ARG004
        total = grads[0].contiguous().clone()
        dist.all_reduce(total)
        return total
