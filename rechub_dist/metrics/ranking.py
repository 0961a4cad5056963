"""Ranking metrics of one target a row against the whole catalogue."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rechub_dist.embedded import Jagged

_SCORES_AT_ONCE = 1 << 24  # elements of the largest temporary


@dataclass(frozen=True)
class Catalogue:
    """Items' vectors, or one rank's part of them.

    Attributes:
        vectors: float [n, D].
        place: int64 [N], for each id of the catalogue its row in `vectors`; -1 where it is not here.
    """

    vectors: Tensor
    place: Tensor

    @staticmethod
    def whole(vectors: Tensor) -> Catalogue:
        """All items, by id."""
        return Catalogue(vectors, torch.arange(len(vectors), device=vectors.device))

    def only(self, ids: Tensor) -> Catalogue:
        """The same without all other items; their ids stay those of the table."""
        wanted = torch.zeros_like(self.place, dtype=torch.bool)
        wanted[ids.to(wanted.device)] = True
        if bool(wanted.all()):
            return self
        held = (wanted & (self.place >= 0)).nonzero()[:, 0]
        place = torch.full_like(self.place, -1)
        place[held] = torch.arange(len(held), device=place.device)
        return Catalogue(self.vectors[self.place[held]], place)


def target_ranks(
    user: Tensor,
    user_mask: Tensor,
    catalogue: Catalogue,
    target: Tensor,
    seen: Jagged | None = None,
    among: Tensor | None = None,
    total: Callable[[Tensor], Tensor] = lambda part: part,
) -> Tensor:
    """The place of each row's target among the catalogue's items, 0 for the best: float32 [B].

    An item's score is the largest inner product with one of the user's live vectors. A tie counts half a place for
    each tied competitor. Nothing is gained by a score that is no number: a target's NaN, or a user without a live
    vector, ranks last, and a competitor's NaN ranks ahead.

    Args:
        user: float [B, Q, D].
        user_mask: bool [B, Q], the live vectors.
        catalogue: the items; of several parts each rank passes its own, and the same rows.
        target: int64 [B], ids.
        seen: ids that are no competitors of a row; its target stays what it is.
        among: int64 [B, S], the only competitors; default all items.
        total: adds up a tensor over the ranks that hold parts of the catalogue.

    Raises:
        ValueError: for an id that the catalogue does not hold.
    """
    items, here = len(catalogue.place), len(catalogue.vectors)
    _check_ids("target", target, items)
    if seen is not None:
        _check_ids("seen", seen.values, items)
    chunk = max(1, _SCORES_AT_ONCE // max(1, user.shape[1] * items))
    ranks = [torch.empty(0, device=user.device)]
    start = 0  # of the chunk's seen ids
    for row in range(0, user.shape[0], chunk):
        rows = slice(row, row + chunk)
        n = len(target[rows])
        scores = _scores(user[rows], user_mask[rows], catalogue.vectors)
        competes = torch.zeros(n, here, dtype=torch.bool, device=user.device)
        if among is None:
            competes[:] = True
        else:
            _set(
                competes,
                torch.arange(n, device=user.device)[:, None].expand_as(among[rows]),
                among[rows],
                catalogue,
                True,
            )
        if seen is not None:
            start = _set_seen(competes, seen, rows, start, catalogue, False)
        place = catalogue.place[target[rows]]
        mine = (place >= 0).nonzero()[:, 0]
        competes[mine, place[mine]] = False
        own = torch.zeros(n, dtype=scores.dtype, device=user.device)
        own[mine] = scores[mine, place[mine]]
        ranks.append(total(_places(scores, total(own), competes)))
    return torch.cat(ranks)


def top_items(
    user: Tensor, user_mask: Tensor, catalogue: Catalogue, k: int, seen: Jagged | None = None
) -> tuple[Tensor, Tensor]:
    """The ids, int64 [B, k], and scores, float [B, k], of the best items that the catalogue holds here, best first.

    Places that no item takes have score -inf and id -1: of a user without a live vector, and of a small catalogue.

    Args:
        user: float [B, Q, D].
        user_mask: bool [B, Q], the live vectors.
        catalogue: the items, or a part of them.
        k: at least 1.
        seen: ids to leave out of each row.
    """
    items, here = len(catalogue.place), len(catalogue.vectors)
    held = torch.full((here,), -1, device=user.device)
    ids = (catalogue.place >= 0).nonzero()[:, 0]
    held[catalogue.place[ids]] = ids
    chunk = max(1, _SCORES_AT_ONCE // max(1, user.shape[1] * items))
    found = torch.full((len(user), k), -1, device=user.device)
    best = torch.full((len(user), k), -torch.inf, dtype=user.dtype, device=user.device)
    start = 0
    for row in range(0, len(user), chunk):
        rows = slice(row, row + chunk)
        scores = _scores(user[rows], user_mask[rows], catalogue.vectors).nan_to_num(-torch.inf)
        if seen is not None:
            start = _set_seen(scores, seen, rows, start, catalogue, -torch.inf)
        values, places = scores.topk(min(k, here), dim=1)
        best[rows, : values.shape[1]] = values
        found[rows, : values.shape[1]] = held[places].masked_fill(values == -torch.inf, -1)
    return found, best


def best_of_parts(ids: Tensor, scores: Tensor, parts: int, k: int) -> tuple[Tensor, Tensor]:
    """The best of what `top_items` has found in each part of the catalogue for the same B rows, one below the other.

    Returns:
        Ids and scores, [B, k] each, the best first, of [parts * B, k'].
    """
    ids, scores = (found.view(parts, -1, found.shape[1]).transpose(0, 1).flatten(1) for found in (ids, scores))
    best, places = scores.topk(min(k, scores.shape[1]), dim=1)
    return ids.gather(1, places), best


def ranking_metrics(ranks: Tensor, ks: Sequence[int] = (10,)) -> dict[str, float]:
    """Means over rows of `hit_rate@k`, `recall@k`, `ndcg@k` and `mrr@k` from 0-based `ranks` [B]; NaN without rows.

    With one target a row recall@k equals hit_rate@k, and the ideal DCG is 1. A NaN rank is a miss.
    """
    ranks = ranks.double()
    metrics: dict[str, float] = {}
    for k in ks:
        if k < 1:
            raise ValueError(f"k is {k}: it must be at least 1")
        metrics[f"hit_rate@{k}"] = hit_rate(ranks, k)
        metrics[f"recall@{k}"] = metrics[f"hit_rate@{k}"]
        metrics[f"ndcg@{k}"] = ndcg(ranks, k)
        metrics[f"mrr@{k}"] = reciprocal_rank(ranks, k)
    return metrics


def hit_rate(ranks: Tensor, k: int) -> float:
    """The share of float64 `ranks` [B] below k."""
    return float((ranks < k).double().mean())


def ndcg(ranks: Tensor, k: int) -> float:
    """The mean of 1 / log2(rank + 2) over float64 `ranks` [B], where those from k on give 0."""
    return float((1 / torch.log2(ranks + 2)).where(ranks < k, 0.0).mean())


def reciprocal_rank(ranks: Tensor, k: int) -> float:
    """The mean of 1 / (rank + 1) over float64 `ranks` [B], where those from k on give 0."""
    return float((1 / (ranks + 1)).where(ranks < k, 0.0).mean())


def _scores(user: Tensor, user_mask: Tensor, catalogue: Tensor) -> Tensor:
    """[b, N]: the best over live vectors, NaN for a user who has none."""
    scores = user.flatten(0, 1) @ catalogue.T
    scores = scores.view(*user.shape[:2], -1).masked_fill(~user_mask[..., None], -torch.inf).amax(dim=1)
    return scores.masked_fill(~user_mask.any(dim=1)[:, None], torch.nan)


def _places(scores: Tensor, own: Tensor, competes: Tensor) -> Tensor:
    """How many of the competitors, bool [b, n], with scores [b, n] are ahead of scores [b]: float32 [b]."""
    ahead = ~(scores <= own[:, None])  # so a NaN on either side counts against the target
    tied = scores == own[:, None]
    return (ahead & competes).sum(dim=1).float() + 0.5 * (tied & competes).sum(dim=1).float()


def _set(matrix: Tensor, rows: Tensor, ids: Tensor, catalogue: Catalogue, value: float) -> None:
    """Set (row, id) pairs of [b, n], those whose item is here."""
    place = catalogue.place[ids]
    here = place >= 0
    matrix[rows[here], place[here]] = value


def _set_seen(matrix: Tensor, seen: Jagged, rows: slice, start: int, catalogue: Catalogue, value: float) -> int:
    """Set what a chunk's rows have seen, whose ids begin at `start`; returns where those of the next chunk begin."""
    lengths = seen.lengths[rows].long()
    stop = start + int(lengths.sum())
    owner = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
    _set(matrix, owner, seen.values[start:stop], catalogue, value)
    return stop


def _check_ids(name: str, ids: Tensor, items: int) -> None:
    wrong = ids[(ids < 0) | (ids >= items)]
    if len(wrong):
        raise ValueError(f"{name} id {int(wrong[0])} is outside the catalogue of {items} items")
