"""What a positive is compared with, and how likely each item is to be among it."""

from __future__ import annotations

import io
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rechub_dist.config import RetrievalConfig, StorageConfig
from rechub_dist.data.parquet.storage import read_bytes
from rechub_dist.embedded import Lookup
from rechub_dist.errors import UserError, one_line
from rechub_dist.features import CatalogueFeature, LookupFeature, NegativeFeature
from rechub_dist.objectives.ranking import Ranking

NEGATIVES: Final = "negatives"
CATALOGUE: Final = "catalogue"


class Negatives:
    """The negatives of an objective.

    - `sampled`: `num_negatives` drawn items for each position of its own;
    - shared: what the global batch holds, each item once: the positives of all ranks (`in_batch`), drawn items, or
      the whole catalogue (`full`).

    With `log_q` a shared candidate's score in a softmax is lowered by the logarithm of its chance to be among the
    candidates: 1 - (1 - p)^n (1 - s)^m, p its share of the positives in train, n the global batch's positions, s its
    chance in a draw, m the draws. So items are not punished for being popular (Yi et al. 2019, section 4).

    Attributes:
        source: one of `RetrievalConfig.negatives`.
        shared: whether each position is compared with all candidates of the global batch.
        draws, in_batch: whether drawn items, and other positions' positives, are among them.
        learned_history: the sequence whose every position has a positive; None where only the row's item is one.

    Raises:
        UserError: a source that the model cannot be trained with, or a correction that does not apply.
    """

    def __init__(
        self, config: RetrievalConfig, ranking: Ranking, learned_history: LookupFeature | None, source: str, loss: str
    ) -> None:
        self.source = source
        self.item = ranking.item
        self.learned_history = learned_history
        self._history = ranking.history
        self._sampling, self.count = config.sampling, config.num_negatives
        if source != "in_batch" and not ranking.ids_alone:
            raise UserError(
                f"objective.negatives: {source} draws ids of {self.item.feature.name!r} alone, but the model's items "
                f"have further features; use in_batch, or one item feature"
            )
        self.shared = source != "sampled" or config.share_negatives
        self.draws = source in ("sampled", "in_batch_and_sampled")
        self.in_batch = source in ("in_batch", "in_batch_and_sampled")
        self._uniform = config.sampling.name == "uniform"
        self.log_q = config.log_q
        if self.log_q is None:
            self.log_q = loss == "softmax" and (self.in_batch or (self.shared and self.draws and not self._uniform))
        if self.log_q and not (loss == "softmax" and self.shared and source != "full"):
            raise UserError("objective.log_q: corrects a softmax over shared candidates, sampled or in_batch")
        self.positive_share: Tensor | None = None
        self.draw_share: Tensor | None = None

    def lookups(self) -> tuple[Lookup, ...]:
        """Drawn negatives, or the whole catalogue, from the item's table."""
        table = self.item.table
        if self.source == "full":
            return (Lookup(CATALOGUE, CatalogueFeature(CATALOGUE, table), table, pooling=None),)
        if not self.draws:
            return ()
        like = self.item.feature if self.shared or self.learned_history is None else self.learned_history
        seen = () if self._history is None or self.shared else (self._history.name,)
        feature = NegativeFeature(
            NEGATIVES,
            table,
            like=like.name,
            count=self.count,
            exclude=(*seen, self.item.feature.name) if self._uniform and not self.shared else (),
            uniform=self._uniform,
        )
        return (Lookup(NEGATIVES, feature, table, pooling=None),)

    @property
    def needs_counts(self) -> bool:
        """Whether `set_counts` is to be called before training."""
        return bool(self.log_q) or (self.draws and self._sampling.name == "popularity")

    def set_counts(self, counts: Tensor) -> None:
        """Take how often each item is a positive in train, [items]."""
        self.positive_share = counts.double() / counts.sum().clamp(min=1)

    def draw_weights(self, storage: StorageConfig) -> NDArray[np.float64] | None:
        """The weight of each item in a draw, float64 [items]; None where draws are uniform or there are none.

        Raises:
            UserError: a file of weights that cannot be read or does not fit.
        """
        rows = self.item.table.rows
        if not self.draws or self._uniform:
            self.draw_share = torch.full((rows,), 1 / rows, dtype=torch.float64)
            return None
        if self._sampling.name == "popularity":
            assert self.positive_share is not None
            weights = self.positive_share.cpu().numpy() ** self._sampling.power
        else:
            weights = _read_weights(str(self._sampling.path), storage, rows)
        self.draw_share = torch.from_numpy(weights / weights.sum())
        return weights

    def log_chance(self, ids: Tensor, positions: Tensor) -> Tensor:
        """The logarithm of each item's chance to be among the global batch's candidates, float64 [n].

        Args:
            ids: int64 [n].
            positions: the number of the global batch's positions, float64 [].
        """
        assert self.positive_share is not None and self.draw_share is not None  # noqa: PT018
        log_absent = torch.zeros(len(ids), dtype=torch.float64, device=ids.device)
        # moved to the device once
        self.positive_share, self.draw_share = self.positive_share.to(ids.device), self.draw_share.to(ids.device)
        if self.in_batch:
            share = self.positive_share[ids]
            log_absent = log_absent + positions * torch.log1p(-share.clamp(max=1 - 1e-12))
        if self.draws:
            share = self.draw_share[ids]
            log_absent = log_absent + positions * self.count * torch.log1p(-share.clamp(max=1 - 1e-12))
        # Every candidate has a chance above 0; the bound is for rounding.
        return torch.log(-torch.expm1(log_absent).clamp(max=-1e-12))


def _read_weights(path: str, storage: StorageConfig, rows: int) -> NDArray[np.float64]:
    held = read_bytes(path, storage)
    if held is None:
        raise UserError(f"objective.sampling.path: no such file: {path}; check the path")
    try:
        weights = np.asarray(np.load(io.BytesIO(held), allow_pickle=False), np.float64)
    except Exception as error:  # whatever NumPy's parser of Python literals raises
        raise UserError(
            f"objective.sampling.path: {path} cannot be read as a .npy array ({one_line(error)[:100]}); write it by "
            f"numpy.save"
        ) from error
    if weights.shape != (rows,) or not (weights >= 0).all() or not 0 < weights.sum() < np.inf:
        raise UserError(
            f"objective.sampling.path: {path} holds an array {list(weights.shape)}; {rows} weights, one an item, are "
            f"needed, none negative and not all 0"
        )
    return weights
