"""Training of recall models: positives against negatives of several kinds."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from rechub_dist.batch import Batch
from rechub_dist.config import EvaluationConfig, MetricConfig, PointwiseConfig, RetrievalConfig
from rechub_dist.config.evaluation import DEFAULT
from rechub_dist.distributed.collectives import gather_rows
from rechub_dist.embedded import Embedded, Lookup, LookupFeature, Output, Sequence, to_padded
from rechub_dist.errors import UserError
from rechub_dist.features import CatalogueFeature, Label, NegativeFeature
from rechub_dist.layers.masking import following, places
from rechub_dist.metrics.catalogue import check_wanted, is_ranking, rankings_at
from rechub_dist.metrics.direction import Direction
from rechub_dist.metrics.recommended import RankingMetric
from rechub_dist.models.base import RecallModel
from rechub_dist.objectives import losses
from rechub_dist.objectives.base import Objective, row_weights
from rechub_dist.objectives.pointwise import PointwiseObjective

NEGATIVES = "negatives"
CATALOGUE = "catalogue"
SAMPLED = "sampled_"  # before the names of metrics among drawn items


class RetrievalObjective(Objective):
    """Mean over positions of the loss of a positive against its negatives, plus the losses of auxiliary tasks.

    A position is a real one of `Output.user`: every one of a history, or the row's. Its negatives are

    - `sampled`: `num_negatives` drawn items of its own;
    - shared: what the global batch holds, each item once: the positives of all ranks (`in_batch`), drawn items, or
      the whole catalogue (`full`). Vectors are gathered from all ranks, and gradients go back to all of them.

    An item is never its own negative: candidates with the positive's id do not count (accidental hits).

    With `log_q` a shared candidate's score in a softmax is lowered by the logarithm of its chance to be among the
    candidates: 1 - (1 - p)^n (1 - s)^m, p its share of the positives in train, n the global batch's positions, s its
    chance in a draw, m the draws. So items are not punished for being popular (Yi et al. 2019, section 4).

    Raises:
        UserError: a source of negatives or a loss that the model cannot be trained with.
    """

    terms = 3

    def __init__(self, config: RetrievalConfig, model: RecallModel, labels: tuple[Label, ...]) -> None:
        super().__init__()
        self.config = config
        self.loss = config.loss or model.loss
        self.source = config.negatives or model.negatives
        self.item_lookups = model.item_lookups()
        self.item = self.item_lookups[0]
        self.item_dense = model.item_dense_features()
        self.history: LookupFeature | None = model.history()
        self.learned_history = self.history if model.every_position else None  # what follows in it is learnt as well
        self.margin = config.margin or model.margin
        self.tasks: PointwiseObjective | None = None
        if labels:
            self.tasks = PointwiseObjective(PointwiseConfig(task_weights=config.task_weights), labels)
        self._item_vectors = model.item  # a bound method: the model is no submodule of the objective
        if self.source != "in_batch" and not self.ids_alone:
            raise UserError(
                f"objective.negatives: {self.source} draws ids of {self.item.feature.name!r} alone, but the model's "
                f"items have further features; use in_batch, or one item feature"
            )
        self.shared = self.source != "sampled" or config.share_negatives
        self.draws = self.source in ("sampled", "in_batch_and_sampled")
        self.in_batch = self.source in ("in_batch", "in_batch_and_sampled")
        self.log_q = (self.loss == "softmax" and self.in_batch) or (
            self.shared and self.draws and config.sampling.name != "uniform"
        )
        if config.log_q is not None:
            self.log_q = config.log_q
        if self.log_q and not (self.loss == "softmax" and self.shared and self.source != "full"):
            raise UserError("objective.log_q: corrects a softmax over shared candidates, sampled or in_batch")
        self.uniform = config.sampling.name == "uniform"
        self.positive_share: Tensor | None = None
        self.draw_share: Tensor | None = None
        self._brought = tuple(lookup.name for lookup in self.lookups())  # candidates besides positives

    @property
    def ids_alone(self) -> bool:
        """Whether an item's vector comes from its id alone."""
        return len(self.item_lookups) == 1 and not self.item_dense

    def lookups(self) -> tuple[Lookup, ...]:
        """Drawn negatives, or the whole catalogue, from the item's table."""
        table = self.item.table
        if self.source == "full":
            return (Lookup(CATALOGUE, CatalogueFeature(CATALOGUE, table), table, pooling=None),)
        if not self.draws:
            return ()
        like = self.item.feature if self.shared or self.learned_history is None else self.learned_history
        seen = () if self.history is None or self.shared else (self.history.name,)
        feature = NegativeFeature(
            NEGATIVES,
            table,
            like=like.name,
            count=self.config.num_negatives,
            exclude=(*seen, self.item.feature.name) if self.uniform and not self.shared else (),
            uniform=self.uniform,
        )
        return (Lookup(NEGATIVES, feature, table, pooling=None),)

    def metrics(self, evaluation: EvaluationConfig) -> dict[str, Direction]:
        """Those of the ranking, among drawn items as well where that is asked for, and of the auxiliary tasks."""
        kinds = () if self.tasks is None else self.tasks.scored.values()
        check_wanted(evaluation.wanted, kinds, rankings=True)
        rankings = self.rankings(evaluation)
        found = {name: metric.direction for name, metric in rankings.items()}
        if evaluation.sampled_items is not None:
            found |= {f"{SAMPLED}{name}": metric.direction for name, metric in rankings.items() if not metric.depth}
        return found if self.tasks is None else found | self.tasks.task_metrics(self.of_tasks(evaluation))

    def group_keys(self, evaluation: EvaluationConfig) -> tuple[str, ...]:
        """The columns that metrics of the auxiliary tasks group by."""
        self.metrics(evaluation)
        return () if self.tasks is None else self.tasks.task_keys(self.of_tasks(evaluation))

    def rankings(self, evaluation: EvaluationConfig) -> dict[str, RankingMetric]:
        """New metrics of the ranking, by the names that they are reported by."""
        tasks = self.of_tasks(evaluation)
        wanted = [item for item in evaluation.wanted if item.name == DEFAULT or item not in tasks]
        return rankings_at(wanted, evaluation.top_k)

    def of_tasks(self, evaluation: EvaluationConfig) -> list[MetricConfig]:
        """What is wanted of the auxiliary tasks; all else is wanted of the ranking."""
        return [] if self.tasks is None else [item for item in evaluation.wanted if not is_ranking(item)]

    @property
    def needs_counts(self) -> bool:
        """Whether `set_counts` is to be called before training."""
        return self.log_q or (self.draws and self.config.sampling.name == "popularity")

    def set_counts(self, counts: Tensor) -> None:
        """Take how often each item is a positive in train, [items]."""
        self.positive_share = counts.double() / counts.sum().clamp(min=1)

    def draw_weights(self) -> NDArray[np.float64] | None:
        """The weight of each item in a draw, float64 [items]; None where draws are uniform or there are none.

        Raises:
            UserError: a file of weights that cannot be read or does not fit.
        """
        rows, sampling = self.item.table.rows, self.config.sampling
        if not self.draws or sampling.name == "uniform":
            self.draw_share = torch.full((rows,), 1 / rows, dtype=torch.float64)
            return None
        if sampling.name == "popularity":
            assert self.positive_share is not None
            weights = self.positive_share.cpu().numpy() ** sampling.power
        else:
            weights = _read_weights(str(sampling.path), rows)
        self.draw_share = torch.from_numpy(weights / weights.sum())
        return weights

    def weight_sums(self, batch: Batch) -> Tensor:
        """The weighted number of positions, the sum of row weights and the number of positions, float64 [3]."""
        weights, positions = row_weights(batch).double(), self._positions(batch)
        return torch.stack([(weights * positions).sum(), weights.sum(), positions.sum().double()])

    def forward(self, output: Output, embedded: Embedded, batch: Batch) -> Tensor:
        """This rank's part of the loss."""
        assert output.user is not None and output.item is not None  # noqa: PT018
        assert output.user_mask is not None
        assert batch.weight_sums is not None
        place = places(output.user_mask, self._total(batch))  # [M]
        user, positive = (side.flatten(0, 1).index_select(0, place) for side in (output.user, output.item))  # [M, D]
        ids = self._positive_ids(batch)  # [M]
        if self.shared:
            loss = self._shared_loss(user, positive, ids, embedded, batch)
        else:
            scores, counts = self._own_scores(user, ids, embedded, batch)
            loss = self._of_scores((user * positive).sum(dim=1), scores, counts)
        weights = row_weights(batch).index_select(0, place // output.user_mask.shape[1])
        total = (loss * weights).sum() / _at_least_tiny(batch.weight_sums[0], loss)
        if self.tasks is not None:
            tasks = (self.tasks.losses(output, batch.labels) * row_weights(batch)).sum()
            total = total + tasks / _at_least_tiny(batch.weight_sums[1], loss)
        return total

    # positions

    def _positions(self, batch: Batch) -> Tensor:
        """The number of positions of each row, [B]."""
        if self.learned_history is None:
            return torch.ones(batch.rows, device=batch.labels.device)
        return batch.feature(self.learned_history.name).lengths()[: batch.rows]

    def _total(self, batch: Batch) -> int:
        """The number of positions, M, which follows from shapes."""
        return batch.rows if self.learned_history is None else len(batch.feature(self.learned_history.name).values())

    def _positive_ids(self, batch: Batch) -> Tensor:
        """The positives' ids, int64 [M]."""
        last = batch.feature(self.item.feature.name).values()
        if self.learned_history is None:
            return last
        history, longest = batch.feature(self.learned_history.name), batch.longest.get(self.learned_history.name)
        ids = to_padded(history.values()[:, None], history.lengths()[: batch.rows], longest)
        next_ids = following(ids.values, ids.lengths, last[:, None])
        return next_ids.flatten().index_select(0, places(ids.mask, ids.total))

    # candidates

    def _own_scores(self, user: Tensor, ids: Tensor, embedded: Embedded, batch: Batch) -> tuple[Tensor, Tensor]:
        """Scores of each position's own drawn items, and which of them count: [M, K] each."""
        count = self.config.num_negatives
        drawn = embedded.sequences[NEGATIVES]  # [B, positions * K, D], a position's draws side by side
        vectors = self._items(_real(drawn)).view(len(user), count, user.shape[1])
        drawn_ids = batch.feature(NEGATIVES).values().view(len(user), count)
        return torch.einsum("md,mkd->mk", user, vectors), drawn_ids != ids[:, None]

    def _shared_loss(self, user: Tensor, positive: Tensor, ids: Tensor, embedded: Embedded, batch: Batch) -> Tensor:
        """The loss of each position, [M], against the global batch's candidates."""
        vectors, candidates, repeated = self._candidates(positive, ids, embedded, batch)  # [C, D], [C] ascending
        scores = user @ vectors.T  # [M, C]
        if self.log_q:
            scores = scores - self._log_q(candidates, batch).to(scores.dtype)
        if self.loss == "softmax" and self.source != "sampled":  # the positives are among the candidates
            if repeated is not None:
                scores = scores.masked_fill(repeated, -torch.inf)
            return F.cross_entropy(scores, torch.searchsorted(candidates, ids), reduction="none")
        own = (user * positive).sum(dim=1)
        if self.log_q:
            own = own - self._log_q(ids, batch).to(own.dtype)
        counts = candidates != ids[:, None]
        return self._of_scores(own, scores, counts if repeated is None else counts & ~repeated)

    def _candidates(
        self, positive: Tensor, ids: Tensor, embedded: Embedded, batch: Batch
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The vectors [C, D] of the distinct items that the ranks bring, and their ids, ascending.

        How many distinct ones several ranks bring together only a GPU would know. Rather than to wait for it, an item
        that two of them bring stands there twice: then the last is bool [C], True at what is there already.
        """
        vectors = [positive] if self.in_batch else []
        vectors += [self._items(_real(embedded.sequences[name])) for name in self._brought]
        sizes = batch.candidates
        local, first = _distinct(self._own_candidates(ids, batch), None if sizes is None else sizes[_rank()])
        gathered = gather_rows(torch.cat(vectors)[first], sizes)
        together = gather_rows(local, sizes)
        if sizes is None or len(sizes) == 1 or self.source == "full":  # of a catalogue each rank has its own part
            found, first = _distinct(together, None if sizes is None else sum(sizes))
            return gathered[first], found, None
        found, place = together.sort(stable=True)
        return gathered[place], found, ~_new(found)

    def _own_candidates(self, positives: Tensor, batch: Batch) -> Tensor:
        """The ids of this rank's candidates, int64 [n], of which some may stand there several times."""
        own = [positives] if self.in_batch else []
        return torch.cat([*own, *(batch.feature(name).values() for name in self._brought)])

    def prepare(self, batch: Batch) -> None:
        """Count the distinct candidates."""
        if self.shared:
            positives = self._positive_ids(batch) if self.in_batch else torch.empty(0, dtype=torch.int64)
            batch.candidates = (len(np.unique(self._own_candidates(positives, batch).numpy())),)

    def _items(self, vectors: Tensor) -> Tensor:
        """Item vectors of raw embeddings, [n, D] each."""
        return self._item_vectors(Embedded(vectors={self.item.name: vectors}))

    def _log_q(self, ids: Tensor, batch: Batch) -> Tensor:
        """The logarithm of each item's chance to be among the global batch's candidates, float64 [n]."""
        assert self.positive_share is not None and self.draw_share is not None  # noqa: PT018
        assert batch.weight_sums is not None
        log_absent = torch.zeros(len(ids), dtype=torch.float64, device=ids.device)
        positions = batch.weight_sums[2]
        # moved to the device once
        self.positive_share, self.draw_share = self.positive_share.to(ids.device), self.draw_share.to(ids.device)
        if self.in_batch:
            share = self.positive_share[ids]
            log_absent = log_absent + positions * torch.log1p(-share.clamp(max=1 - 1e-12))
        if self.draws:
            share = self.draw_share[ids]
            log_absent = log_absent + positions * self.config.num_negatives * torch.log1p(-share.clamp(max=1 - 1e-12))
        # Every candidate has a chance above 0; the bound is for rounding.
        return torch.log(-torch.expm1(log_absent).clamp(max=-1e-12))

    def _of_scores(self, positive: Tensor, negative: Tensor, counts: Tensor) -> Tensor:
        of_loss: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
            "bce": losses.bce,
            "gbce": partial(losses.gbce, items=self.item.table.rows, t=self.config.gbce_t),
            "softmax": losses.softmax,
            "bpr": losses.bpr,
            "bpr_max": partial(losses.bpr_max, regularization=self.config.regularization),
            "top1_max": losses.top1_max,
            "hinge": partial(losses.hinge, margin=self.margin),
        }
        return of_loss[self.loss](positive, negative, counts)


def _real(sequence: Sequence) -> Tensor:
    """The vectors at real positions, row after row."""
    return sequence.values.flatten(0, 1).index_select(0, places(sequence.mask, sequence.total))


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _new(ordered: Tensor) -> Tensor:
    """Which of some ids in order are another one than that before them."""
    return F.pad(ordered[1:] != ordered[:-1], (1, 0), value=True)[: len(ordered)]


def _distinct(ids: Tensor, count: int | None) -> tuple[Tensor, Tensor]:
    """The distinct ids, ascending, and where each stands first.

    `count` is how many there are; where that is None they are counted, for which the host waits for a GPU.
    """
    if count is not None:
        ordered, place = ids.sort(stable=True)
        start = places(_new(ordered), count)
        return ordered[start], place[start]
    found, inverse = torch.unique(ids, return_inverse=True)
    place = torch.arange(len(ids), device=ids.device)
    first = torch.full_like(found, len(ids)).scatter_reduce(0, inverse, place, "amin")
    return found, first


def _at_least_tiny(total: Tensor, loss: Tensor) -> Tensor:
    return total.clamp(min=torch.finfo(torch.float32).tiny).to(loss.dtype)


def _read_weights(path: str, rows: int) -> NDArray[np.float64]:
    try:
        weights = np.asarray(np.load(path, allow_pickle=False), np.float64)
    except (OSError, ValueError) as error:
        raise UserError(f"objective.sampling.path: {path} cannot be read as a .npy array: {error}") from error
    if weights.shape != (rows,) or not (weights >= 0).all() or not 0 < weights.sum() < np.inf:
        raise UserError(
            f"objective.sampling.path: {path} holds an array {list(weights.shape)}; {rows} weights, one an item, are "
            f"needed, none negative and not all 0"
        )
    return weights
