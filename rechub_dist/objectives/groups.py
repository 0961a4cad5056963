"""Losses that compare the rows of a group, over all ranks: a group's rows count together wherever they are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from rechub_dist.batch import Batch
from rechub_dist.config.objectives import GroupLossConfig
from rechub_dist.distributed.collectives import all_rows, gather_rows
from rechub_dist.metrics.grouped import key_words
from rechub_dist.objectives.base import row_weights


@dataclass(frozen=True)
class Groups:
    """The global batch's rows, grouped.

    Attributes:
        codes: each row's group, int64 [N], from 0.
        first, rows: of this rank's rows among the N.
        labels, weights: float32 [N, T] and [N].
        logits: float [N, T]; gradients go back to the ranks that they are of.
    """

    codes: Tensor
    first: int
    rows: int
    labels: Tensor
    weights: Tensor
    logits: Tensor

    @classmethod
    def gathered(cls, column: str, logits: Tensor, batch: Batch) -> Groups:
        """Those of all ranks' rows, grouped by a column of `Batch.keys`; strings by their 64-bit hash. Collective."""
        words = key_words(batch.keys[column]) if batch.rows else torch.empty(0, dtype=torch.int64).numpy()
        keys = torch.from_numpy(words.copy()).to(logits.device)
        told = torch.cat([batch.labels, row_weights(batch)[:, None]], dim=1)
        if not dist.is_initialized() or dist.get_world_size() == 1:
            first = 0
        else:
            keys, sizes = all_rows(keys)
            told, _ = all_rows(told, sizes=sizes)
            logits, first = gather_rows(logits, sizes), sum(sizes[: dist.get_rank()])
        return cls(_numbered(keys), first, batch.rows, told[:, :-1], told[:, -1], logits)


class GroupLoss:
    """The mean over positives of a loss against their own group; groups whose rows all have one label are left out.

    - `pairwise`: the mean over the group's negatives of -log s(r+ - r-)  (Rendle et al. 2009; Burges et al. 2005).
    - `listwise`: -log(e^{r+} / sum over the group of e^r)  (Cao et al. 2007, for labels 0 and 1).

    A row counts as many times as its weight says, as a positive and among those that one is compared with.
    """

    def __init__(self, config: GroupLossConfig) -> None:
        self.column = config.group
        self.share = config.share
        self._of_positives = {"pairwise": _pairwise, "listwise": _listwise}[config.loss]

    def __call__(self, groups: Groups, t: int) -> Tensor:
        """This rank's part of the loss of label `t`, a scalar: the loss is its sum over ranks."""
        logits, weights, codes = groups.logits[:, t], groups.weights, groups.codes
        positive = groups.labels[:, t] > 0
        against = _sums(weights * ~positive, codes)[codes]  # what a row's group has of negatives
        counts = positive & (weights > 0) & (against > 0)
        total = (weights * counts).sum()
        own = torch.zeros_like(counts)
        own[groups.first : groups.first + groups.rows] = counts[groups.first : groups.first + groups.rows]
        place = own.nonzero()[:, 0]  # [P]
        losses = self._of_positives(logits, positive, weights, codes, place)
        return (weights[place] * losses).sum() / total.clamp(min=torch.finfo(torch.float32).tiny)


def _pairwise(logits: Tensor, positive: Tensor, weights: Tensor, codes: Tensor, place: Tensor) -> Tensor:
    """Of the positives at `place`, [P]; memory grows with the number of their pairs."""
    order = (2 * codes + positive).argsort(stable=True)  # group by group, negatives first
    sizes, negatives = (_sums(rows, codes) for rows in (torch.ones_like(codes), (~positive).long()))
    count = negatives[codes[place]]  # [P]
    start = (sizes.cumsum(0) - sizes)[codes[place]]
    pair = torch.arange(len(place), device=codes.device).repeat_interleave(count)  # which positive
    nth = torch.arange(len(pair), device=codes.device) - (count.cumsum(0) - count)[pair]
    other = order[start[pair] + nth]
    loss = weights[other] * F.softplus(logits[other] - logits[place[pair]])
    return _sums(loss, pair, len(place)) / _sums(weights[other], pair, len(place))


def _listwise(logits: Tensor, positive: Tensor, weights: Tensor, codes: Tensor, place: Tensor) -> Tensor:  # noqa: ARG001
    """Of the positives at `place`, [P]."""
    logits = logits.masked_fill(weights == 0, -torch.inf)
    highest = torch.full_like(logits, -torch.inf).scatter_reduce(0, codes, logits.detach(), "amax")
    sums = _sums(weights * (logits - highest[codes].nan_to_num(neginf=0.0)).exp(), codes)
    group = codes[place]
    return sums[group].log() + highest[group] - logits[place]


def _numbered(keys: Tensor) -> Tensor:
    """Groups numbered from 0, int64 [N], of rows' keys."""
    ordered, place = keys.sort(stable=True)
    new = F.pad(ordered[1:] != ordered[:-1], (1, 0), value=False)[: len(keys)]
    return torch.empty_like(keys).scatter(0, place, new.long().cumsum(0))


def _sums(values: Tensor, codes: Tensor, count: int | None = None) -> Tensor:
    """The sum of the values of each code, [count]; by default as many as there are values."""
    return values.new_zeros(len(codes) if count is None else count).index_add(0, codes, values)
