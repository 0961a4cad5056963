"""Batch normalisation over the global batch; unlike SyncBatchNorm, on CPU as well, and on ranks without rows."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rechub_dist.distributed.collectives import all_rows


class GlobalBatchNorm1d(nn.BatchNorm1d):
    """`nn.BatchNorm1d` over inputs [N, C], with statistics over the rows of all ranks."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Normalise [N, C]; N may differ between ranks and be 0. Collective in training, forward and backward."""
        if not self.training:
            return super().forward(input)
        count, mean, variance = _moments(input.detach())
        enough = count > 1
        if self.running_mean is not None and self.running_var is not None:
            # A single row has no variance: the running statistics are used, and not updated.
            with torch.no_grad():
                self._update_running(mean, variance, count, enough)
            mean = torch.where(enough, mean, self.running_mean)
            variance = torch.where(enough, variance, self.running_var)
        scale = torch.rsqrt(variance + self.eps)
        output: Tensor = _Normalize.apply(input, mean, scale, enough / count)
        return output if self.weight is None else torch.addcmul(self.bias, output, self.weight)

    def _update_running(self, mean: Tensor, variance: Tensor, count: Tensor, enough: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(enough)
        momentum = self.momentum if self.momentum is not None else 1 / self.num_batches_tracked.clamp(min=1)
        weight = momentum * enough
        self.running_mean.lerp_(mean, weight)
        self.running_var.lerp_(variance * count / (count - 1).clamp(min=1), weight)


def _moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows (at least 1), mean and variance over all ranks: float [], [C] and [C], from [N, C]. Collective.

    Each rank's sum of squares is about its own mean, and these are put together as Chan et al. do (1983, Algorithms for
    computing the sample variance): the mean of squares less the square of the mean leaves nothing of a small variance.
    """
    mean = x.sum(0) / max(1, len(x))
    own = torch.cat([x.new_full((1,), len(x)), mean, (x - mean).square().sum(0)])
    every, _ = all_rows(own[None], sizes=[1] * dist.get_world_size())
    counts, means, squares = every.split([1, *mean.shape, *mean.shape], dim=1)
    count = counts.sum().clamp(min=1)
    mean = (counts * means).sum(0) / count
    variance = (squares + counts * (means - mean).square()).sum(0) / count
    # An infinite one would make all outputs 0, now and by the running statistics: a loss that is NaN gets noticed.
    return count, mean, variance.masked_fill(variance.isinf(), torch.nan)


def globalize(module: nn.Module) -> None:
    """Make every `nn.BatchNorm1d` in `module` a global one, in place; parameters and buffers are kept."""
    for child in module.modules():
        if type(child) is nn.BatchNorm1d:
            child.__class__ = GlobalBatchNorm1d


class _Normalize(torch.autograd.Function):
    """(x - mean) * scale, [N, C], whose mean and scale, [C], are those of the rows of all ranks.

    `share` is 1 / the number of these rows, or 0 where mean and scale do not depend on them: each rank's loss depends
    on every rank's rows, through both.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, mean: Tensor, scale: Tensor, share: Tensor) -> Tensor:
        output = (x - mean).mul_(scale)
        ctx.save_for_backward(output, scale, share)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        output, scale, share = ctx.saved_tensors
        [grad] = grads
        sums = torch.cat([grad.sum(0), (grad * output).sum(0)])
        dist.all_reduce(sums)
        of_mean, of_scale = (sums * share).chunk(2)
        return grad.sub(torch.addcmul(of_mean, output, of_scale)).mul_(scale), None, None, None
