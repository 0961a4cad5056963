"""Capsules: what a history's behaviours are routed to, one capsule an interest."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rechub_dist.layers.arguments import check_layers
from rechub_dist.layers.masking import zero_padding


class DynamicRouting(nn.Module):
    """Behaviour-to-interest routing (MIND, "Multi-Interest Extractor Layer"): the capsules u_j of behaviours e_i.

        w_i = softmax over the live interests of b_i
        z_j = sum_i w_ij S e_i
        u_j = squash(z_j)
        b_ij = b_ij + u_j^T S e_i,    before the next iteration

    S is shared by all behaviours and interests. A row of n behaviours has max(1, min(K, floor(log2 n))) live interests,
    the first ones; the capsules of the others are zero.

    What makes interests differ is where b starts: with equal b_i all would be the same. The paper draws it from a
    Gaussian for each user anew. Here it is drawn once, from N(0, 1), a number for each position of a history and each
    interest, and kept with the weights, so that evaluation is what training was, and always gives the same.

    Gradients flow through all iterations.

    Args:
        width: of behaviours and capsules.
        num_interests: K, the most interests that a row has.
        iterations: times that the capsules are computed.
        max_length: the longest history.
    """

    start: Tensor
    least: Tensor

    def __init__(self, width: int, num_interests: int, iterations: int, max_length: int) -> None:
        super().__init__()
        check_layers("num_interests", num_interests)
        check_layers("routing_iterations", iterations)
        self.iterations = iterations
        self.bilinear = nn.Linear(width, width, bias=False)
        self.register_buffer("start", torch.randn(max_length, num_interests))
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
        capsules = self._capsules(logits, mapped, live)
        for _ in range(self.iterations - 1):
            logits = logits + mapped @ capsules.transpose(1, 2)
            capsules = self._capsules(logits, mapped, live)
        return capsules, live

    def live(self, lengths: Tensor) -> Tensor:
        """The live interests, bool [B, K], of histories of these lengths, int64 [B]."""
        return lengths[:, None] >= self.least

    def weights(self, logits: Tensor, live: Tensor) -> Tensor:
        """How each behaviour is shared out among the interests, which is 1 in all: [B, L, K] from logits [B, L, K]."""
        # The least number and not -inf, which would make NaN of the gradient.
        return logits.masked_fill(~live[:, None], torch.finfo(logits.dtype).min).softmax(dim=2)

    def _capsules(self, logits: Tensor, mapped: Tensor, live: Tensor) -> Tensor:
        return squash(self.weights(logits, live).transpose(1, 2) @ mapped)


def squash(z: Tensor) -> Tensor:
    """|z|^2 / (1 + |z|^2) z / |z|, of a length below 1: [..., D] -> [..., D]; zeros for zeros, with a gradient of 0."""
    norm = torch.linalg.vector_norm(z, dim=-1, keepdim=True)
    return norm / (1 + norm.square()) * z
