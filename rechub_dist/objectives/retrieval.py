"""Training of recall models: positives against negatives of several kinds."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from rechub_dist.batch import Batch
from rechub_dist.config import PointwiseConfig, RetrievalConfig
from rechub_dist.distributed.collectives import gather_rows
from rechub_dist.embedded import Embedded, Lookup, Output, Sequence, to_padded
from rechub_dist.features import Label
from rechub_dist.layers.masking import following, places
from rechub_dist.models.base import RecallModel
from rechub_dist.objectives import losses
from rechub_dist.objectives.base import Objective, TaskObjective, one_a_row, row_weights
from rechub_dist.objectives.negatives import NEGATIVES, Negatives
from rechub_dist.objectives.pointwise import PointwiseObjective
from rechub_dist.objectives.ranking import Ranking
from rechub_dist.objectives.temperature import Temperature

RowLoss = Callable[[Tensor, Tensor, Tensor], Tensor]


class RetrievalObjective(Objective):
    """Mean over positions of the loss of a positive against its negatives, plus the losses of auxiliary tasks.

    A position is a real one of `Output.user`: every one of a history, or the row's. Its negatives are its own or the
    global batch's (`Negatives`); for these, vectors are gathered from all ranks, and gradients go back to all of them.
    An item is never its own negative: candidates with the positive's id do not count (accidental hits).

    Args:
        config: what it leaves open is the model's to say.
        model: stays outside: it is no submodule of the objective.
        labels: of auxiliary tasks.
        loss: in place of `config.loss`, a function of the positive's scores [M], the negatives' scores [M, C] and which
            of them count, bool [M, C], that returns a loss a position, [M]. M may be 0.

    Raises:
        UserError: a source of negatives or a loss that the model cannot be trained with.
    """

    terms = 3

    def __init__(
        self, config: RetrievalConfig, model: RecallModel, labels: tuple[Label, ...], loss: RowLoss | None = None
    ) -> None:
        super().__init__()
        self.loss = config.loss or model.loss
        self._margin = config.margin or model.margin
        self._temperature = None if config.temperature is None else Temperature(config, model.temperature)
        ranking = Ranking.by(model)
        self._ranking = ranking = ranking if self._temperature is None else ranking.scaled(self._temperature)
        self._learned = ranking.history if model.every_position else None  # what follows in it is learnt as well
        self._negatives = Negatives(config, ranking, self._learned, config.negatives or model.negatives, self.loss)
        self._brought = tuple(lookup.name for lookup in self.lookups())  # candidates besides positives
        self._tasks: PointwiseObjective | None = None
        if labels:
            self._tasks = PointwiseObjective(PointwiseConfig(task_weights=config.task_weights), labels)
        self._of_scores = self._own(loss) if loss is not None else self._named(config)

    @property
    def tasks(self) -> TaskObjective | None:
        """The auxiliary tasks."""
        return self._tasks

    @property
    def ranking(self) -> Ranking:
        """The model's items."""
        return self._ranking

    @property
    def negatives(self) -> Negatives:
        """What a positive is compared with."""
        return self._negatives

    def lookups(self) -> tuple[Lookup, ...]:
        """Those of the negatives."""
        return self.negatives.lookups()

    def settings(self) -> dict[str, Any]:
        """Loss, negatives, correction and margin; the weights of auxiliary tasks."""
        own: dict[str, Any] = {
            "loss": self.loss,
            "negatives": self.negatives.source,
            "log_q": self.negatives.log_q,
            "margin": self._margin,
            "task_weights": {},
        }
        return own if self.tasks is None else own | self.tasks.settings()

    def watched(self) -> dict[str, float]:
        """The temperature, where it is learnt."""
        learnt = None if self._temperature is None else self._temperature.learnt
        return {} if learnt is None else {"temperature": learnt}

    def predictions(self, output: Output) -> dict[str, Tensor]:
        """Those of the auxiliary tasks."""
        return {} if self.tasks is None else self.tasks.predictions(output)

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
        if self._temperature is not None:
            user = user * self._temperature()
        ids = self._positive_ids(batch)  # [M]
        if self.negatives.shared:
            loss = self._shared_loss(user, positive, ids, embedded, batch)
        else:
            scores, counts = self._own_scores(user, ids, embedded, batch)
            loss = self._of_scores(self.ranking.score_own(user, positive), scores, counts)
        weights = row_weights(batch).index_select(0, place // output.user_mask.shape[1])
        total = (loss * weights).sum() / _at_least_tiny(batch.weight_sums[0], loss)
        if self.tasks is not None:
            tasks = (self.tasks.losses(output, batch.labels) * row_weights(batch)).sum()
            total = total + tasks / _at_least_tiny(batch.weight_sums[1], loss)
        return total

    # positions

    def _positions(self, batch: Batch) -> Tensor:
        """The number of positions of each row, [B]."""
        if self._learned is None:
            return torch.ones(batch.rows, device=batch.labels.device)
        return batch.feature(self._learned.name).lengths()[: batch.rows]

    def _total(self, batch: Batch) -> int:
        """The number of positions, M, which follows from shapes."""
        return batch.rows if self._learned is None else len(batch.feature(self._learned.name).values())

    def _positive_ids(self, batch: Batch) -> Tensor:
        """The positives' ids, int64 [M]."""
        last = batch.feature(self.ranking.item.feature.name).values()
        if self._learned is None:
            return last
        history, longest = (
            batch.feature(self._learned.name),
            batch.longest.get(self._learned.name),
        )
        ids = to_padded(history.values()[:, None], history.lengths()[: batch.rows], longest)
        next_ids = following(ids.values, ids.lengths, last[:, None])
        return next_ids.flatten().index_select(0, places(ids.mask, ids.total))

    # candidates

    def _own_scores(self, user: Tensor, ids: Tensor, embedded: Embedded, batch: Batch) -> tuple[Tensor, Tensor]:
        """Scores of each position's own drawn items, and which of them count: [M, K] each."""
        count = self.negatives.count
        drawn = embedded.sequences[NEGATIVES]  # [B, positions * K, D], a position's draws side by side
        vectors = self._items(_real(drawn)).unflatten(0, (len(user), count))
        drawn_ids = batch.feature(NEGATIVES).values().view(len(user), count)
        return self.ranking.score_own(user, vectors), drawn_ids != ids[:, None]

    def _shared_loss(self, user: Tensor, positive: Tensor, ids: Tensor, embedded: Embedded, batch: Batch) -> Tensor:
        """The loss of each position, [M], against the global batch's candidates."""
        vectors, candidates, repeated = self._candidates(positive, ids, embedded, batch)  # [C, D], [C] ascending
        scores = self.ranking.score(user, vectors)  # [M, C]
        among = self.loss == "softmax" and self.negatives.source != "sampled"  # the positives are among the candidates
        if (offset := self._offset(candidates, repeated if among else None, batch)) is not None:
            scores = scores + offset.to(scores.dtype)
        if among:
            return F.cross_entropy(scores, torch.searchsorted(candidates, ids), reduction="none")
        own = self.ranking.score_own(user, positive)
        if self.negatives.log_q:
            own = own - self._log_q(ids, batch).to(own.dtype)
        counts = candidates != ids[:, None]
        return self._of_scores(own, scores, counts if repeated is None else counts & ~repeated)

    def _offset(self, candidates: Tensor, repeated: Tensor | None, batch: Batch) -> Tensor | None:
        """What is added to the scores of each candidate, [C]: one pass over them, and none backwards."""
        if not self.negatives.log_q and repeated is None:
            return None
        offset = -self._log_q(candidates, batch) if self.negatives.log_q else torch.zeros_like(candidates).double()
        return offset if repeated is None else offset.masked_fill(repeated, -torch.inf)

    def _candidates(
        self, positive: Tensor, ids: Tensor, embedded: Embedded, batch: Batch
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The vectors [C, D] of the distinct items that the ranks bring, and their ids, ascending.

        How many distinct ones several ranks bring together only the device knows. Rather than to wait for a GPU, an
        item that two of them bring stands there twice: then the last is bool [C], True at what is there already.
        """
        vectors = [positive] if self.negatives.in_batch else []
        vectors += [self._items(_real(embedded.sequences[name])) for name in self._brought]
        sizes = batch.candidates
        local, first = _distinct(self._own_candidates(ids, batch), None if sizes is None else sizes[_rank()])
        gathered = gather_rows(torch.cat(vectors).index_select(0, first), sizes)
        together = gather_rows(local, sizes)
        count = None
        if sizes is not None and (len(sizes) == 1 or self.negatives.source == "full"):
            count = sum(sizes)  # of a catalogue each rank has its own part
        if sizes is None or count is not None or counts_at_once(together):
            found, first = _distinct(together, count)
            return gathered.index_select(0, first), found, None
        found, place = together.sort(stable=True)
        return gathered.index_select(0, place), found, ~_new(found)

    def _own_candidates(self, positives: Tensor, batch: Batch) -> Tensor:
        """The ids of this rank's candidates, int64 [n], of which some may stand there several times."""
        own = [positives] if self.negatives.in_batch else []
        return torch.cat([*own, *(batch.feature(name).values() for name in self._brought)])

    def prepare(self, batch: Batch) -> None:
        """Count the distinct candidates."""
        if self.negatives.shared:
            positives = self._positive_ids(batch) if self.negatives.in_batch else torch.empty(0, dtype=torch.int64)
            batch.candidates = (len(np.unique(self._own_candidates(positives, batch).numpy())),)

    def _items(self, vectors: Tensor) -> Tensor:
        """Item vectors of raw embeddings, [n, D] each."""
        return self.ranking.vectors(Embedded(vectors={self.ranking.item.name: vectors}))

    def _log_q(self, ids: Tensor, batch: Batch) -> Tensor:
        """The logarithm of each item's chance to be among the global batch's candidates, float64 [n]."""
        assert batch.weight_sums is not None
        return self.negatives.log_chance(ids, batch.weight_sums[2])

    # losses

    def _named(self, config: RetrievalConfig) -> RowLoss:
        of_loss: dict[str, RowLoss] = {
            "bce": losses.bce,
            "gbce": partial(
                losses.gbce,
                items=self.ranking.item.table.rows,
                t=config.gbce_t,
                reduction=config.gbce_reduction,
            ),
            "softmax": losses.softmax,
            "bpr": losses.bpr,
            "bpr_max": partial(losses.bpr_max, regularization=config.regularization),
            "top1_max": losses.top1_max,
            "hinge": partial(losses.hinge, margin=self._margin),
        }
        return of_loss[self.loss]

    @staticmethod
    def _own(loss: RowLoss) -> RowLoss:
        def checked(positive: Tensor, negative: Tensor, counts: Tensor) -> Tensor:
            return one_a_row(loss(positive, negative, counts), positive, "objective.loss")

        return checked


def _real(sequence: Sequence) -> Tensor:
    """The vectors at real positions, row after row."""
    return sequence.values.flatten(0, 1).index_select(0, places(sequence.mask, sequence.total))


def counts_at_once(ids: Tensor) -> bool:
    """Whether the host knows how many of them are distinct without waiting for a device."""
    return ids.device.type == "cpu"


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
