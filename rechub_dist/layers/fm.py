"""The factorization machine's second order."""

from __future__ import annotations

from torch import Tensor


def pair_sum(fields: Tensor) -> Tensor:
    """Sum of <v_i, v_j> over all pairs i < j of fields, in linear time (Rendle 2010, lemma 3.1): [B, F, D] -> [B]."""
    square_of_sum = fields.sum(dim=1).square()
    sum_of_squares = fields.square().sum(dim=1)
    return 0.5 * (square_of_sum - sum_of_squares).sum(dim=1)
