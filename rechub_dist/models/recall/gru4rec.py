"""GRU4Rec: a GRU over a session predicts the next item at every position."""

from __future__ import annotations

import math
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rechub_dist.embedded import Embedded, Lookup, Output
from rechub_dist.features import RowsOf, SequenceFeature, SparseFeature
from rechub_dist.layers.arguments import check_layers, check_positive, check_rate
from rechub_dist.layers.inputs import history_and_item
from rechub_dist.layers.masking import following, last, zero_padding
from rechub_dist.models.base import RecallModel


class GRU4Rec(RecallModel):
    """state_t = GRU(e_0 .. e_t); an item's score is <state_t, e_item>  (Hidasi et al. 2016, section 3).

    Items are scored by the embeddings that the GRU reads, the "constrained embedding" of the second paper, Hidasi &
    Karatzoglou 2018, Recurrent Neural Networks with Top-k Gains, which also introduced the loss; the authors' code adds
    a bias per item, which an inner product cannot represent. If `hidden_size` differs from `embedding_dim`, a linear
    map without bias projects the state to the embeddings' width.

    The papers train on several sessions in parallel, one step of each at a time; here a row is a session, or a part of
    one, with all its steps, and the state starts at zero.

    The settings that the authors published with their code for the loss bpr_max have an ELU of the scores (`elu`), a
    dropout after every GRU layer (`hidden_dropout_rate`), negatives in_batch_and_sampled with popularity to a power
    (`objective.sampling`), and Adagrad: docs/models.md.

    Args:
        item_num: rows of the item table.
        hidden_size: width of the GRU's states.
        num_layers: GRU layers, each over the states of the one before.
        dropout_rate: of the embeddings that the GRU reads, and of the states between its layers.
        embedding_dim: width of the items.
        history: the items in time order; a name makes a feature over the table of `item`.
        item: the item that follows the history; a name makes a feature over the table of `history`. If both are
            names, the table is called "item".
        max_length: the longest history, if `history` is a name.
        hidden_dropout_rate: of the states of every layer, the last one's before they score included, as in the authors'
            code (dropout_p_hidden), so that `dropout_rate` is that of the embeddings alone (dropout_p_embed); None:
            `dropout_rate` between layers, none after the last.
        elu: training scores s below 0 become elu (e^s - 1), which bounds them (final_act "elu-1"); None: they stay.
            Rankings are the same, as it grows with s.
    """

    table_width = "embedding_dim"
    paper = "Hidasi et al. 2016, Session-based Recommendations with Recurrent Neural Networks"
    loss = "bpr_max"
    negatives = "in_batch"
    every_position = True

    def __init__(
        self,
        item_num: Annotated[int, RowsOf("history")],
        hidden_size: int,
        num_layers: int,
        dropout_rate: float,
        embedding_dim: int,
        *,
        history: SequenceFeature | str = "history",
        item: SparseFeature | str = "item",
        max_length: int = 50,
        hidden_dropout_rate: float | None = None,
        elu: float | None = None,
    ) -> None:
        super().__init__()
        check_positive("hidden_size", hidden_size)
        check_layers("num_layers", num_layers)
        check_positive("embedding_dim", embedding_dim)
        check_rate("dropout_rate", dropout_rate)
        if hidden_dropout_rate is not None:
            check_rate("hidden_dropout_rate", hidden_dropout_rate)
        if elu is not None and not 0 < elu < math.inf:
            raise ValueError(f"elu is {elu}: it must be a number above 0")
        self.history_lookup, self.item_lookup = history_and_item(history, item, item_num, max_length, embedding_dim)
        self.dropout = nn.Dropout(dropout_rate)
        self.hidden_dropout = nn.Dropout(hidden_dropout_rate or 0.0)
        self.elu = elu
        rate = dropout_rate if hidden_dropout_rate is None else hidden_dropout_rate
        between = rate if num_layers > 1 else 0.0  # of which a single layer has none, and torch warns
        self.gru = nn.GRU(embedding_dim, hidden_size, num_layers, batch_first=True, dropout=between)
        same = hidden_size == embedding_dim
        self.project = nn.Identity() if same else nn.Linear(hidden_size, embedding_dim, bias=False)

    def lookups(self) -> tuple[Lookup, ...]:
        return (self.history_lookup, self.item_lookup)

    def item_lookups(self) -> tuple[Lookup, ...]:
        return (self.item_lookup,)

    def forward(self, embedded: Embedded) -> Output:
        """The state at every position, `user` [B, L, D], and the next item, `item` [B, L, D].

        `user_mask` [B, L] is True at real positions. item[:, t] is the history's next item, or the row's `item` for
        the last real position.
        """
        history = embedded.sequences[self.history_lookup.name]
        target = following(history.values, history.lengths, self.item(embedded))
        return Output(user=self.project(self._states(embedded)), user_mask=history.mask, item=target)

    def user(self, embedded: Embedded) -> tuple[Tensor, Tensor]:
        """The state after the whole history, [B, 1, D]; zeros for an empty one."""
        lengths = embedded.sequences[self.history_lookup.name].lengths
        state = self.project(last(self._states(embedded), lengths))[:, None]
        return state, torch.ones_like(state[..., 0], dtype=torch.bool)

    def item(self, embedded: Embedded) -> Tensor:
        """The item's raw embedding, [B, D]."""
        return embedded.vectors[self.item_lookup.name]

    def _states(self, embedded: Embedded) -> Tensor:
        """The states [B, L, H]. Padding is at the end, so it does not affect the states of real positions."""
        history = embedded.sequences[self.history_lookup.name]
        states: Tensor = self.gru(self.dropout(zero_padding(history.values, history.mask)))[0]
        return self.hidden_dropout(states) if self.hidden_dropout.p else states

    def score(self, user: Tensor, items: Tensor) -> Tensor:
        """Inner products, through `elu`."""
        return self._final(super().score(user, items))

    def score_own(self, user: Tensor, items: Tensor) -> Tensor:
        """The same for items of a user's own."""
        return self._final(super().score_own(user, items))

    def _final(self, scores: Tensor) -> Tensor:
        return scores if self.elu is None else F.elu(scores, self.elu)
