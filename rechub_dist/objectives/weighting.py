"""How the losses of several labels are weighted against each other, where that is not fixed by the run file.

Whatever the weights follow from is of the global batch, so that all ranks have the same ones.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from rechub_dist.config import PointwiseConfig
from rechub_dist.errors import UserError
from rechub_dist.features import Label

Array = NDArray[np.float64]
_PAIRS = 1000  # steps of the search for the shortest vector: each is exact for two tasks
_LEAST = 1e-3  # of a weight of GradNorm, whose steps could make it negative


class TaskWeighting(nn.Module):
    """From each label's loss to the loss that is trained on."""

    @abstractmethod
    def used(self) -> Tensor | None:
        """The weights, [T], that the labels' losses have, or had in the last step; None where there was none."""

    def forward(self, parts: Tensor, share: Tensor) -> Tensor:
        """This rank's part of the loss, a scalar. Collective.

        Args:
            parts: its parts of the labels' losses, [T]: a label's loss is the sum over ranks.
            share: of the global batch's rows, by weight, that are this rank's.
        """
        raise NotImplementedError


class Uncertainty(TaskWeighting):
    """sum_t e^{-s_t} L_t + s_t / 2, s_t = log sigma_t^2 learnt, half of L_t for a regression.

    Kendall et al. 2018, section 3.2. The loss may become negative.
    """

    def __init__(self, config: PointwiseConfig, labels: tuple[Label, ...], shared: Sequence[nn.Parameter]) -> None:  # noqa: ARG002
        super().__init__()
        self.log_variances = nn.Parameter(torch.zeros(len(labels)))
        self._scales = tuple(0.5 if label.type == "regression" else 1.0 for label in labels)

    def used(self) -> Tensor:
        """The factors of the labels' losses, without a regression's half."""
        return self.log_variances.detach().neg().exp()

    def forward(self, parts: Tensor, share: Tensor) -> Tensor:
        scaled = [scale * part for scale, part in zip(self._scales, parts, strict=True)]
        return weighted(self.log_variances.neg().exp(), scaled) + share * self.log_variances.sum() / 2


class OfGradients(TaskWeighting):
    """Weights that follow from each loss's gradient in the dense parameters that all tasks share.

    Tables are no part of it: their gradients exist only where the kernel applies them, within the backward pass. They,
    and each task's own parameters, are trained on the weighted sum that comes of it, like what is shared.

    Raises:
        UserError: the model names no such parameters.
    """

    def __init__(self, config: PointwiseConfig, labels: tuple[Label, ...], shared: Sequence[nn.Parameter]) -> None:  # noqa: ARG002
        super().__init__()
        self._shared = self._chosen([parameter for parameter in shared if parameter.requires_grad])
        if not self._shared:
            raise UserError(
                f"objective.task_weighting: {config.task_weighting} follows the gradients of dense parameters that all "
                f"tasks share, and this model names none; choose fixed or uncertainty, or give a model of your own "
                f"shared_parameters"
            )
        self._used: Tensor | None = None

    def used(self) -> Tensor | None:
        """Those of the last step, in which they were found."""
        return self._used

    def _chosen(self, shared: list[nn.Parameter]) -> list[nn.Parameter]:
        return shared

    def forward(self, parts: Tensor, share: Tensor) -> Tensor:  # noqa: ARG002
        self._used = self.weigh(parts.detach(), self._gradients(parts))
        return weighted(self._used, parts)

    @abstractmethod
    def weigh(self, parts: Tensor, gradients: Tensor) -> Tensor:
        """The weights of this step, [T], from the losses' gradients over all ranks, [T, P]. Collective."""

    def _gradients(self, parts: Tensor) -> Tensor:
        """Of each label's loss over all ranks, [T, P]: T backward passes, down to what is shared."""
        rows = []
        for part in parts:
            found = torch.autograd.grad(part, self._shared, retain_graph=True, materialize_grads=True)
            rows.append(torch.cat([gradient.flatten() for gradient in found]))
        return _summed(torch.stack(rows))


class GradNorm(OfGradients):
    """Weights w_t such that the gradients of w_t L_t in the last shared layer have like norms, larger for tasks that
    learn more slowly  (Chen et al. 2018, algorithm 1).

    The norm of task t is to be the mean norm times (r_t)^alpha, r_t its loss relative to its first one, divided by the
    mean of these. After each step w moves by a gradient step of `gradnorm_lr` towards that, and is scaled to the sum T.
    """

    weight: Tensor
    first: Tensor

    def __init__(self, config: PointwiseConfig, labels: tuple[Label, ...], shared: Sequence[nn.Parameter]) -> None:
        super().__init__(config, labels, shared)
        self._alpha, self._lr = config.gradnorm_alpha, config.gradnorm_lr
        self.register_buffer("weight", torch.ones(len(labels)))
        self.register_buffer("first", torch.zeros(len(labels)))  # the losses of the first step; 0 before it

    def _chosen(self, shared: list[nn.Parameter]) -> list[nn.Parameter]:
        return [parameter for parameter in shared if parameter.dim() > 1][-1:]

    @torch.no_grad()
    def weigh(self, parts: Tensor, gradients: Tensor) -> Tensor:
        used = self.weight.clone()
        losses = _summed(parts.clone()).to(used.dtype)
        self.first.copy_(torch.where(self.first == 0, losses, self.first))
        rates = losses / self.first.clamp(min=torch.finfo(losses.dtype).tiny)
        norms = gradients.norm(dim=1)
        wanted = (used * norms).mean() * (rates / rates.mean()) ** self._alpha
        moved = (used - self._lr * norms * torch.sign(used * norms - wanted)).clamp(min=_LEAST)
        self.weight.copy_(moved * len(moved) / moved.sum())
        return used


class Pareto(OfGradients):
    """Weights of sum 1 for which the weighted sum of the gradients is shortest: all tasks gain, as far as any step can
    have them all gain  (MGDA: Désidéri 2012; Sener & Koltun 2018, section 3.2).
    """

    def weigh(self, parts: Tensor, gradients: Tensor) -> Tensor:
        return _of_products(gradients, shortest).to(parts)


class GradientSurgery(OfGradients):
    """The sum of the gradients, each without what conflicts with another: where two have a negative inner product, the
    projection on the other one is taken out  (PCGrad: Yu et al. 2020, algorithm 1).

    That is again a weighted sum of them. The paper takes the others in random order; here they come in the labels'
    order, from the next one on, which is the same for two labels.
    """

    def weigh(self, parts: Tensor, gradients: Tensor) -> Tensor:
        return _of_products(gradients, without_conflicts).to(parts)


WEIGHTINGS: dict[str, type[TaskWeighting]] = {
    "uncertainty": Uncertainty,
    "gradnorm": GradNorm,
    "pareto": Pareto,
    "pcgrad": GradientSurgery,
}


def make_weighting(
    config: PointwiseConfig, labels: tuple[Label, ...], shared: Sequence[nn.Parameter]
) -> TaskWeighting | None:
    """What `config.task_weighting` names; None where weights are fixed.

    Args:
        shared: the dense parameters that all tasks share, from input to output.

    Raises:
        UserError: fixed weights are given as well, there is one label alone, or nothing is shared.
    """
    name = config.task_weighting
    if name == "fixed":
        return None
    if config.task_weights:
        raise UserError(
            f"objective.task_weights: are for task_weighting: fixed, and {name} finds its own; leave one out"
        )
    if len(labels) < 2:
        raise UserError(f"objective.task_weighting: {name} weighs several labels, and this run has one; leave it out")
    return WEIGHTINGS[name](config, labels, shared)


def shortest(products: Array) -> Array:
    """The weights of sum 1, none negative, of the shortest weighted sum of vectors, from their products, [T, T]."""
    weights = np.full(len(products), 1 / len(products))
    for _ in range(_PAIRS):
        slopes = products @ weights
        to, away = int(slopes.argmin()), int(np.where(weights > 0, slopes, -np.inf).argmax())
        gain = slopes[away] - slopes[to]
        bend = products[to, to] + products[away, away] - 2 * products[to, away]
        if not gain > 1e-12 * abs(products).max() or not bend > 0:
            break
        step = min(weights[away], gain / bend)
        weights[to] += step
        weights[away] -= step
    return weights


def without_conflicts(products: Array) -> Array:
    """The weights, [T], of the sum of vectors without what conflicts, from their inner products, [T, T]."""
    count = len(products)
    total = np.zeros(count)
    for i in range(count):
        own = np.zeros(count)
        own[i] = 1.0
        for j in ((i + n) % count for n in range(1, count)):
            product = own @ products[:, j]
            if product < 0:
                own[j] -= product / products[j, j]
        total += own
    return total


def _of_products(gradients: Tensor, solve: Callable[[Array], Array]) -> Tensor:
    """Weights, float64 [T], from the gradients' inner products, for which the host waits; 1 where one is not finite."""
    gradients = gradients.double()
    products = (gradients @ gradients.T).cpu().numpy()
    if not np.isfinite(products).all():  # as is the loss then, which the non-finite guard sees
        return torch.ones(len(products), dtype=torch.float64)
    return torch.from_numpy(solve(products))


def weighted(weights: Iterable[Tensor | float], parts: Iterable[Tensor]) -> Tensor:
    """The weighted sum of the labels' losses, a scalar."""
    terms = [weight * part for weight, part in zip(weights, parts, strict=True)]
    return sum(terms[1:], terms[0])


def _summed(values: Tensor) -> Tensor:
    """The sum over ranks, in place."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values)
    return values
