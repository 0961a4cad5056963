"""Ranking metrics of one target a row against the whole catalogue."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from rechub_dist.embedded import Jagged

_SCORES_AT_ONCE = 1 << 24  # elements of the largest temporary
_ITEMS_AT_ONCE = 1 << 14  # whose scores are looked at while they are in the processor's cache


@dataclass(frozen=True)
class Catalogue:
    """Items' vectors, or one rank's part of them.

    Attributes:
        vectors: float [n, D].
        place: int64 [N], for each id of the catalogue its row in `vectors`; -1 where it is not here.
    """

    vectors: Tensor
    place: Tensor

    @cached_property
    def ids(self) -> Tensor:
        """The id of each row of `vectors`, int64 [n]; -1 where it has none."""
        held = (self.place >= 0).nonzero()[:, 0]
        ids = torch.full((len(self.vectors),), -1, device=self.place.device)
        ids[self.place[held]] = held
        return ids

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
    items = len(catalogue.place)
    _check_ids("target", target, items)
    if seen is not None:
        _check_ids("seen", seen.values, items)
    chunk = max(1, _SCORES_AT_ONCE // max(1, user.shape[1] * items))  # the same on all ranks
    ranks = [torch.empty(0, device=user.device)]
    start = 0  # of the chunk's seen ids
    for row in range(0, user.shape[0], chunk):
        rows = slice(row, row + chunk)
        n = len(target[rows])
        every = torch.arange(n, device=user.device)
        out = every * items + target[rows]  # pairs of a row and an id, as one number: no competitors
        if seen is not None:
            owner, ids, start = _seen_in(seen, rows, start)
            out = torch.cat([out, owner * items + ids]).unique()
        scores = _scores(user[rows], user_mask[rows], catalogue.vectors)
        place = catalogue.place[target[rows]]
        mine = (place >= 0).nonzero()[:, 0]
        own = torch.zeros(n, dtype=scores.dtype, device=user.device)
        own[mine] = scores[mine, place[mine]]
        own = total(own).masked_fill(~user_mask[rows].any(dim=1), torch.nan)
        if among is None:
            places = _ahead(scores, own) - _ahead_of(scores, own, out, catalogue)
        else:
            pairs = (every[:, None] * items + among[rows]).flatten().unique()
            places = _ahead_of(scores, own, pairs[~torch.isin(pairs, out)], catalogue)
        ranks.append(total(places))
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
    block = len(catalogue.vectors) if user.is_cuda else _ITEMS_AT_ONCE  # a GPU would wait for the host at each
    chunk = max(1, _SCORES_AT_ONCE // max(1, user.shape[1] * block))
    found, best = [torch.empty(0, k, dtype=torch.int64, device=user.device)], [user.new_empty(0, k)]
    start = 0
    for row in range(0, len(user), chunk):
        rows = slice(row, row + chunk)
        owner = place = None
        if seen is not None:
            owner, ids, start = _seen_in(seen, rows, start)
            place = catalogue.place[ids]
        values, places = _best(user[rows], user_mask[rows], catalogue.vectors.split(max(1, block)), k, owner, place)
        found.append(catalogue.ids[places].masked_fill(values == -torch.inf, -1))
        best.append(values)
    return torch.cat(found), torch.cat(best)


def _best(
    user: Tensor, user_mask: Tensor, blocks: Sequence[Tensor], k: int, owner: Tensor | None, place: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The k best scores, float [b, k], and the places of their items, int64 [b, k]; none of `owner`'s at `place`."""
    best = torch.full((len(user), k), -torch.inf, dtype=user.dtype, device=user.device)
    places = torch.zeros(len(user), k, dtype=torch.int64, device=user.device)
    first = 0
    for block in blocks:
        scores = _scores(user, user_mask, block)
        if owner is not None and place is not None:
            inside = (place >= first) & (place < first + len(block))
            scores[owner[inside], place[inside] - first] = -torch.inf
        values, where = scores.topk(min(k, len(block)), dim=1)
        if bool(values.isnan().any()):  # which would be the largest of all
            values, where = scores.masked_fill(scores.isnan(), -torch.inf).topk(values.shape[1], dim=1)
        best, order = torch.cat([best, values], dim=1).topk(k, dim=1)
        places = torch.cat([places, where + first], dim=1).gather(1, order)
        first += len(block)
    return best.masked_fill(~user_mask.any(dim=1)[:, None], -torch.inf), places


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


def _scores(user: Tensor, user_mask: Tensor, vectors: Tensor) -> Tensor:
    """[b, n]: the best over live vectors; meaningless for a user who has none."""
    if user.shape[1] == 1:
        return user[:, 0] @ vectors.T
    scores = (user.flatten(0, 1) @ vectors.T).view(*user.shape[:2], -1)
    return scores.masked_fill(~user_mask[..., None], -torch.inf).amax(dim=1)


def _ahead(scores: Tensor, own: Tensor) -> Tensor:
    """How many of the scores [b, n] are ahead of a row's own [b], where a tie counts half: float32 [b].

    A NaN on either side counts against the target.
    """
    if scores.device.type == "cpu":  # block by block, in the processor's cache: one pass over the scores
        ahead, finite = scores.new_zeros(len(own)), scores.new_zeros(len(own))
        for block in scores.split(_ITEMS_AT_ONCE, dim=1):
            apart = own[:, None] - block
            finite += apart.sum(dim=1)
            signs = apart.sign_().sum(dim=1)  # 1 for what is behind, -1 for what is ahead; 0 for a NaN, too
            ahead += 0.5 * (block.shape[1] - signs)
        if bool(finite.isfinite().all()):
            return ahead.float()
    behind_or_tied, tied = (scores <= own[:, None]).sum(dim=1), (scores == own[:, None]).sum(dim=1)
    return (scores.shape[1] - behind_or_tied).float() + 0.5 * tied.float()


def _ahead_of(scores: Tensor, own: Tensor, pairs: Tensor, catalogue: Catalogue) -> Tensor:
    """The same of some pairs alone, as numbers row * N + id, all different: float32 [b]."""
    row, place = pairs // len(catalogue.place), catalogue.place[pairs % len(catalogue.place)]
    row, place = row[place >= 0], place[place >= 0]
    ahead = _ahead(scores[row, place][:, None], own[row])
    return torch.zeros(len(own), device=own.device).index_add(0, row, ahead)


def _seen_in(seen: Jagged, rows: slice, start: int) -> tuple[Tensor, Tensor, int]:
    """What a chunk's rows have seen, whose ids begin at `start`: rows and ids, and where the next chunk's begin."""
    lengths = seen.lengths[rows].long()
    stop = start + int(lengths.sum())
    owner = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
    return owner, seen.values[start:stop], stop


def _check_ids(name: str, ids: Tensor, items: int) -> None:
    wrong = ids[(ids < 0) | (ids >= items)]
    if len(wrong):
        raise ValueError(f"{name} id {int(wrong[0])} is outside the catalogue of {items} items")
