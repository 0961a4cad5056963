"""Capsules: what a history's behaviours are routed to, one capsule an interest."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rechub_dist.layers.arguments import check_layers, check_least
from rechub_dist.layers.masking import zero_padding


class DynamicRouting(nn.Module):
    """Behaviour-to-interest routing (MIND, "Multi-Interest Extractor Layer"): the capsules u_j of behaviours e_i.

        w_i = softmax over the live interests of b_i
        z_j = sum_i w_ij S e_i
        u_j = squash(z_j)
        b_ij = b_ij + u_j^T S e_i,    before the next iteration; with a `scale`: scale cos(z_j, S e_i)

    S is shared by all behaviours and interests. A row of n behaviours has max(1, min(K, floor(log2 n))) live interests,
    the first ones; the capsules of the others are zero.

    What makes interests differ is where b starts: with equal b_i all would be the same. The paper draws it from a
    Gaussian for each user anew. Here it is drawn once, a number for each position of a history and each interest, and
    kept with the weights, so that evaluation is what training was, and always gives the same.

    Args:
        width: of behaviours and capsules.
        num_interests: K, the most interests that a row has.
        iterations: times that the capsules are computed.
        max_length: the longest history.
        squash_power: of a capsule's length, `squash`.
        scale: replaces b by scaled cosines, as EasyRec does, so that behaviours are shared out as decidedly however
            long their vectors are; None: the paper's sum of inner products.
        start_std: standard deviation of where b starts.
        bilinear_std: S starts from N(0, bilinear_std^2); None: uniformly, like any linear layer.
        last_gradient: gradients flow through the last iteration alone, the weights w being constants, as in ComiRec
            and EasyRec; otherwise through all.
    """

    start: Tensor
    least: Tensor

    def __init__(
        self,
        width: int,
        num_interests: int,
        iterations: int,
        max_length: int,
        *,
        squash_power: float = 1.0,
        scale: float | None = None,
        start_std: float = 1.0,
        bilinear_std: float | None = None,
        last_gradient: bool = False,
    ) -> None:
        super().__init__()
        check_layers("num_interests", num_interests)
        check_layers("routing_iterations", iterations)
        # Below 1/2 short capsules would grow without bound relative to z, and so would their gradients.
        check_least("squash_power", squash_power, 0.5)
        for name, value in {"routing_scale": scale, "start_std": start_std, "bilinear_std": bilinear_std}.items():
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} is {value}: it must be a number above 0")
        self.iterations = iterations
        self.squash_power, self.scale, self.last_gradient = squash_power, scale, last_gradient
        self.bilinear = nn.Linear(width, width, bias=False)
        if bilinear_std is not None:
            nn.init.normal_(self.bilinear.weight, std=bilinear_std)
        self.register_buffer("start", start_std * torch.randn(max_length, num_interests))
        # The length from which on interest j is live: floor(log2 n) > j where n >= 2^(j + 1); the first always is.
        least = [0, *(1 << min(j + 1, 62) for j in range(1, num_interests))]  # no length has more than 62 bits
        self.register_buffer("least", torch.tensor(least), persistent=False)

    def forward(self, behaviors: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Capsules [B, K, D] and which of them are live, bool [B, K], from behaviours [B, L, D] and lengths [B]."""
        length = behaviors.shape[1]
        if length > len(self.start):
            raise ValueError(
                f"a history has {length} items, but its max_length is {len(self.start)}: cut it, or raise max_length"
            )
        mask = torch.arange(length, device=lengths.device) < lengths[:, None]
        mapped = self.bilinear(zero_padding(behaviors, mask))  # [B, L, D]; zero where padded, which has no part in z
        live = self.live(lengths)
        logits = self.start[:length].expand(behaviors.shape[0], -1, -1)  # [B, L, K]
        routed = mapped.detach() if self.last_gradient else mapped
        for _ in range(self.iterations - 1):
            logits = self._next(logits, routed, self._sums(logits, routed, live))
        return squash(self._sums(logits, mapped, live), self.squash_power), live

    def live(self, lengths: Tensor) -> Tensor:
        """The live interests, bool [B, K], of histories of these lengths, int64 [B]."""
        return lengths[:, None] >= self.least

    def weights(self, logits: Tensor, live: Tensor) -> Tensor:
        """How each behaviour is shared out among the interests, which is 1 in all: [B, L, K] from logits [B, L, K]."""
        # The least number and not -inf, which would make NaN of the gradient.
        return logits.masked_fill(~live[:, None], torch.finfo(logits.dtype).min).softmax(dim=2)

    def _sums(self, logits: Tensor, mapped: Tensor, live: Tensor) -> Tensor:
        """z, [B, K, D]."""
        return self.weights(logits, live).transpose(1, 2) @ mapped

    def _next(self, logits: Tensor, mapped: Tensor, sums: Tensor) -> Tensor:
        """b of the next iteration, [B, L, K]."""
        if self.scale is None:
            return logits + mapped @ squash(sums, self.squash_power).transpose(1, 2)
        return self.scale * F.normalize(mapped, dim=2) @ F.normalize(sums, dim=2).transpose(1, 2)


def squash(z: Tensor, power: float = 1.0) -> Tensor:
    """(|z|^2 / (1 + |z|^2))^power z / |z|, of a length below 1: [..., D] -> [..., D]; zeros for zeros.

    The paper's power is 1. A smaller one, at least 1/2, shortens short vectors less: 1/2 is z / sqrt(1 + |z|^2).
    """
    norm = torch.linalg.vector_norm(z, dim=-1, keepdim=True)
    if power == 1:
        return norm / (1 + norm.square()) * z
    # |z|^(2 power - 1) has an infinite derivative at 0, where what it multiplies is 0.
    least = torch.finfo(z.dtype).tiny ** 0.25
    return norm.clamp(min=least) ** (2 * power - 1) / (1 + norm.square()) ** power * z
