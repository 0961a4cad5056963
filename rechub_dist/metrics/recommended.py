"""Metrics of rankings of the catalogue: where a row's item stands, and what is recommended at all."""

from __future__ import annotations

import math
from typing import Annotated, Protocol

import torch
from pydantic import Field
from torch import Tensor

from rechub_dist.distributed.runtime import Runtime
from rechub_dist.metrics.binary import ratio
from rechub_dist.metrics.direction import Direction
from rechub_dist.metrics.metric import Metric, Ranked
from rechub_dist.metrics.ranking import hit_rate, ndcg, reciprocal_rank

K = Annotated[int, Field(ge=1)]


class RankingMetric(Metric[Ranked], Protocol):
    """A metric of rankings.

    Attributes:
        depth: how many of the best items `Ranked.top` has to hold; 0 where it is not needed.
    """

    depth: int


class _OfRanked:
    """Every rank is given the rows of all ranks, so that there is nothing to merge."""

    direction: Direction = "max"
    group: str | None = None

    def merge(self, ranks: Runtime) -> None:
        """Nothing."""


class _OfPlaces(_OfRanked):
    depth = 0

    def __init__(self, k: K) -> None:
        self._k = k
        self._places: list[Tensor] = []

    def update(self, rows: Ranked) -> None:
        """Keep the places."""
        self._places.append(rows.places)

    def compute(self) -> float:
        """The mean over rows."""
        # as float64 in the rows' order: the mean does not depend on how they were divided into updates
        places = torch.cat(self._places).cpu() if self._places else torch.empty(0)
        return self._mean(places.double(), self._k)

    def _mean(self, ranks: Tensor, k: int) -> float:
        raise NotImplementedError


class HitRate(_OfPlaces):
    """The share of rows whose item is among the first k."""

    def _mean(self, ranks: Tensor, k: int) -> float:
        return hit_rate(ranks, k)


class RankingRecall(HitRate):
    """The share of the row's items that is among the first k: with one item a row, the hit rate."""


class NDCG(_OfPlaces):
    """1 / log2(place + 1) of the row's item, places counted from 1; 0 beyond k."""

    def _mean(self, ranks: Tensor, k: int) -> float:
        return ndcg(ranks, k)


class MRR(_OfPlaces):
    """1 / place of the row's item, places counted from 1; 0 beyond k."""

    def _mean(self, ranks: Tensor, k: int) -> float:
        return reciprocal_rank(ranks, k)


class MAP(MRR):
    """Mean average precision: with one item a row, the reciprocal rank."""


class _OfTop(_OfRanked):
    """Counts how often each item is among the first k, and how often it is a row's item."""

    def __init__(self, k: K) -> None:
        self.depth = k
        self._shown: Tensor | None = None
        self._wanted: Tensor | None = None

    def update(self, rows: Ranked) -> None:
        """Count items."""
        assert rows.top is not None
        shown = rows.top[:, : self.depth].flatten()
        counts = [torch.bincount(ids, minlength=rows.items) for ids in (shown[shown >= 0], rows.targets)]
        if self._shown is None or self._wanted is None:
            self._shown, self._wanted = counts
        else:
            self._shown, self._wanted = self._shown + counts[0], self._wanted + counts[1]


class Coverage(_OfTop):
    """The share of the catalogue's items that is among the first k of some row."""

    def compute(self) -> float:
        """The share."""
        return math.nan if self._shown is None else float((self._shown > 0).double().mean())


class Popularity(_OfTop):
    """How popular the first k are: the share of the rows whose item they are, on average over all that is shown."""

    direction: Direction = "min"

    def compute(self) -> float:
        """The mean share."""
        if self._shown is None or self._wanted is None:
            return math.nan
        shown, wanted = self._shown.double(), self._wanted.double()
        return ratio(float((shown * wanted).sum()), float(shown.sum() * wanted.sum()))
