"""NARM: a GRU's last state, and attention over all its states for the session's main purpose."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor, nn

from rechub_dist.embedded import Embedded, Lookup, Output
from rechub_dist.features import RowsOf, SequenceFeature, SparseFeature
from rechub_dist.layers.arguments import check_positive, check_rate
from rechub_dist.layers.attention import AdditiveAttention
from rechub_dist.layers.inputs import history_and_item
from rechub_dist.layers.masking import last, zero_padding
from rechub_dist.models.base import RecallModel


class NARM(RecallModel):
    """score = e_item^T B c, c = [h_t, sum_j a_j h_j], a_j = v^T sigmoid(A_1 h_t + A_2 h_j)  (section 3).

    h_1 .. h_t are a GRU's states over the session. The paper has two encoders, a global one for h_t and a local one for
    the attention; here one GRU serves both, as in the authors' code. The weights a_j are not normalised, as in the
    paper; in the authors' code they are a softmax over the session (`normalize_attention`), and all sigmoids, the GRU's
    included, are piecewise linear ones, which ours are not. The user's vector is B c, so that scores are inner products
    with the items' raw embeddings.

    Args:
        item_num: rows of the item table.
        hidden_size: width of the GRU's states.
        attention_size: rows of A_1 and A_2.
        dropout_rate: of c, and of the embeddings that the GRU reads; the paper's are 0.5 and 0.25.
        embedding_dim: width of the items.
        history: the items in time order; a name makes a feature over the table of `item`.
        item: the item that follows the history; a name makes a feature over the table of `history`. If both are
            names, the table is called "item".
        max_length: the longest history, if `history` is a name.
        embedding_dropout_rate: of the embeddings that the GRU reads; None: `dropout_rate`.
        normalize_attention: softmax of the weights a_j over the session.
    """

    table_width = "embedding_dim"
    paper = "Li et al. 2017, Neural Attentive Session-based Recommendation"
    loss = "softmax"
    negatives = "full"

    def __init__(
        self,
        item_num: Annotated[int, RowsOf("history")],
        hidden_size: int,
        attention_size: int,
        dropout_rate: float,
        embedding_dim: int,
        *,
        history: SequenceFeature | str = "history",
        item: SparseFeature | str = "item",
        max_length: int = 50,
        embedding_dropout_rate: float | None = None,
        normalize_attention: bool = False,
    ) -> None:
        super().__init__()
        check_positive("hidden_size", hidden_size)
        check_positive("attention_size", attention_size)
        check_positive("embedding_dim", embedding_dim)
        check_rate("dropout_rate", dropout_rate)
        of_embeddings = dropout_rate if embedding_dropout_rate is None else embedding_dropout_rate
        check_rate("embedding_dropout_rate", of_embeddings)
        self.history_lookup, self.item_lookup = history_and_item(history, item, item_num, max_length, embedding_dim)
        self.embedding_dropout = nn.Dropout(of_embeddings)
        self.dropout = nn.Dropout(dropout_rate)
        self.gru = nn.GRU(embedding_dim, hidden_size, batch_first=True)
        self.attention = AdditiveAttention(hidden_size, attention_size, normalize=normalize_attention)
        self.project = nn.Linear(2 * hidden_size, embedding_dim, bias=False)

    def lookups(self) -> tuple[Lookup, ...]:
        return (self.history_lookup, self.item_lookup)

    def item_lookups(self) -> tuple[Lookup, ...]:
        return (self.item_lookup,)

    def forward(self, embedded: Embedded) -> Output:
        """`user` and `item`, the item that follows the whole history, both [B, 1, D]."""
        user, mask = self.user(embedded)
        return Output(user=user, user_mask=mask, item=self.item(embedded)[:, None])

    def user(self, embedded: Embedded) -> tuple[Tensor, Tensor]:
        """B c, [B, 1, D]; zeros for an empty history."""
        history = embedded.sequences[self.history_lookup.name]
        mask = history.mask
        states: Tensor = self.gru(self.embedding_dropout(zero_padding(history.values, mask)))[0]  # [B, L, H]
        final = last(states, history.lengths)
        weights = self.attention(states, final, mask)
        purpose = (weights[..., None] * states).sum(dim=1)
        user = self.project(self.dropout(torch.cat([final, purpose], dim=1)))[:, None]
        return user, torch.ones_like(user[..., 0], dtype=torch.bool)

    def item(self, embedded: Embedded) -> Tensor:
        """The item's raw embedding, [B, D]."""
        return embedded.vectors[self.item_lookup.name]
