"""Ranking metrics of one target a row against the whole catalogue."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rechub_dist.embedded import Jagged

_SCORES_AT_ONCE = 1 << 24  # elements of the largest temporary


def target_ranks(
    user: Tensor, user_mask: Tensor, catalogue: Tensor, target: Tensor, seen: Jagged | None = None
) -> Tensor:
    """The place of each row's target among the catalogue's items, 0 for the best: float32 [B].

    An item's score is the largest inner product with one of the user's live vectors. A tie counts half a place for
    each tied competitor. Nothing is gained by a score that is no number: a target's NaN, or a user without a live
    vector, ranks last, and a competitor's NaN ranks ahead.

    Args:
        user: float [B, Q, D].
        user_mask: bool [B, Q], the live vectors.
        catalogue: float [N, D], items by id.
        target: int64 [B], ids.
        seen: ids that are no competitors of a row; its target stays what it is.

    Raises:
        ValueError: for an id that the catalogue does not hold.
    """
    items = catalogue.shape[0]
    _check_ids("target", target, items)
    if seen is not None:
        _check_ids("seen", seen.values, items)
    chunk = max(1, _SCORES_AT_ONCE // max(1, user.shape[1] * items))
    ranks = [torch.empty(0, device=user.device)]
    start = 0  # of the chunk's seen ids
    for row in range(0, user.shape[0], chunk):
        rows = slice(row, row + chunk)
        competitors = torch.ones(len(target[rows]), items, dtype=torch.bool, device=user.device)
        if seen is not None:
            lengths = seen.lengths[rows].long()
            stop = start + int(lengths.sum())
            owner = torch.repeat_interleave(torch.arange(len(lengths), device=user.device), lengths)
            competitors[owner, seen.values[start:stop]] = False
            start = stop
        competitors.scatter_(1, target[rows, None], False)
        ranks.append(_ranks(_scores(user[rows], user_mask[rows], catalogue), target[rows], competitors))
    return torch.cat(ranks)


def ranking_metrics(ranks: Tensor, ks: Sequence[int] = (10,)) -> dict[str, float]:
    """Means over rows of `hit_rate@k`, `ndcg@k` and `mrr@k` from 0-based `ranks` [B]; NaN without rows.

    With one target a row recall@k equals hit_rate@k, and the ideal DCG is 1. A NaN rank is a miss.
    """
    ranks = ranks.double()
    metrics: dict[str, float] = {}
    for k in ks:
        if k < 1:
            raise ValueError(f"k is {k}: it must be at least 1")
        hit = ranks < k
        metrics[f"hit_rate@{k}"] = float(hit.double().mean())
        metrics[f"ndcg@{k}"] = float((1 / torch.log2(ranks + 2)).where(hit, 0.0).mean())
        metrics[f"mrr@{k}"] = float((1 / (ranks + 1)).where(hit, 0.0).mean())
    return metrics


def _scores(user: Tensor, user_mask: Tensor, catalogue: Tensor) -> Tensor:
    """[b, N]: the best over live vectors, NaN for a user who has none."""
    scores = user.flatten(0, 1) @ catalogue.T
    scores = scores.view(*user.shape[:2], -1).masked_fill(~user_mask[..., None], -torch.inf).amax(dim=1)
    return scores.masked_fill(~user_mask.any(dim=1)[:, None], torch.nan)


def _ranks(scores: Tensor, target: Tensor, competitors: Tensor) -> Tensor:
    """From scores [b, N] and who competes, bool [b, N]: float32 [b]."""
    own = scores.gather(1, target[:, None])
    ahead = ~(scores <= own)  # so a NaN on either side counts against the target
    tied = scores == own
    return (ahead & competitors).sum(dim=1).float() + 0.5 * (tied & competitors).sum(dim=1).float()


def _check_ids(name: str, ids: Tensor, items: int) -> None:
    wrong = ids[(ids < 0) | (ids >= items)]
    if len(wrong):
        raise ValueError(f"{name} id {int(wrong[0])} is outside the catalogue of {items} items")
