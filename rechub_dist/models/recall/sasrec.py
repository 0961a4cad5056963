"""SASRec: self-attention over a history predicts the next item at every position."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rechub_dist.embedded import Embedded, Lookup, Output
from rechub_dist.features import RowsOf, SequenceFeature, SparseFeature
from rechub_dist.layers.arguments import check_choice, check_layers, check_positive, check_rate
from rechub_dist.layers.attention import CausalSelfAttention
from rechub_dist.layers.inputs import history_and_item
from rechub_dist.layers.masking import following, last, zero_padding
from rechub_dist.models.base import RecallModel

BlockKind = Literal["paper", "authors"]
Positions = Literal["oldest", "newest"]


class SASRec(RecallModel):
    """state_t = Transformer(sqrt(d) e_0 + p_0 .. sqrt(d) e_t + p_t); an item's score is <state_t, e_item>.

    Blocks are x + Dropout(g(LayerNorm(x))), with g causal self-attention and then a point-wise network of width d
    (section III-B); a LayerNorm ends the stack. The scale sqrt(d) of the inputs and
    the eps of the norms are those of the authors' code. Items are scored by their raw embeddings.

    The authors' code has another block (`block="authors"`): n = LayerNorm(x), y = n + g(n, x), with queries from the
    normalised n, keys and values from x as it is, all with biases, and m = LayerNorm(y), m + Dropout(network(m)). What
    is added to is normalised, so nothing passes through the stack as it came.

    Positions count from the oldest item that is kept (0) to the newest. A state then depends only on its prefix: the
    state trained at position t is the one that serving computes for a history of t + 1 items. Counted from the newest
    (`positions="newest"`), as by the left padding of the authors' code, the newest item always has the position
    max_len - 1, and each new item shifts the positions of all earlier ones: in training the prefixes of a history then
    have other positions than when they are served.

    Args:
        item_num: rows of the item table.
        max_len: the longest history.
        num_heads: attention heads, a divisor of `hidden_size`.
        num_layers: blocks.
        hidden_size: width d of items and states.
        dropout_rate: of the inputs and the blocks' outputs (section III-E).
        history: the items in time order; a name makes a feature over the table of `item`.
        item: the item that follows the history; a name makes a feature over the table of `history`. If both are
            names, the table is called "item".
        attention_dropout_rate: dropout of the attention weights, in the authors' code `dropout_rate`, in the paper
            none; with it the fused attention kernel cannot be used, and a step takes about twice as long on CPU.
        block: "paper", or "authors" for that of their code.
        positions: where positions are counted from: "oldest", or "newest" as in the authors' code.
    """

    table_width = "hidden_size"
    paper = "Kang & McAuley 2018, Self-Attentive Sequential Recommendation"
    loss = "bce"
    negatives = "sampled"
    every_position = True

    def __init__(
        self,
        item_num: Annotated[int, RowsOf("history")],
        max_len: int,
        num_heads: int,
        num_layers: int,
        hidden_size: int,
        dropout_rate: float,
        *,
        history: SequenceFeature | str = "history",
        item: SparseFeature | str = "item",
        attention_dropout_rate: float = 0.0,
        block: BlockKind = "paper",
        positions: Positions = "oldest",
    ) -> None:
        super().__init__()
        check_positive("max_len", max_len)
        check_choice("block", block, get_args(BlockKind))
        check_choice("positions", positions, get_args(Positions))
        check_layers("num_layers", num_layers)
        check_positive("hidden_size", hidden_size)
        check_rate("dropout_rate", dropout_rate)
        check_rate("attention_dropout_rate", attention_dropout_rate)
        self.history_lookup, self.item_lookup = history_and_item(
            history, item, item_num, max_len, hidden_size, "hidden_size"
        )
        if isinstance(history, SequenceFeature) and history.max_length > max_len:
            raise ValueError(
                f"history {history.name!r} has max_length {history.max_length}, but max_len is {max_len}: lower the "
                f"one or raise the other"
            )

        self.max_len = max_len
        self.scale = math.sqrt(hidden_size)
        self.positions = nn.Parameter(torch.empty(max_len, hidden_size))
        self.dropout = nn.Dropout(dropout_rate)
        self.from_newest = positions == "newest"
        of_kind = _AuthorsBlock if block == "authors" else _Block
        self.blocks = nn.ModuleList(
            of_kind(hidden_size, num_heads, dropout_rate, attention_dropout_rate) for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(hidden_size, eps=1e-8)
        nn.init.normal_(self.positions, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

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
        return Output(user=self._states(embedded), user_mask=history.mask, item=target)

    def user(self, embedded: Embedded) -> tuple[Tensor, Tensor]:
        """The state after the whole history, [B, 1, D]; zeros for an empty one."""
        lengths = embedded.sequences[self.history_lookup.name].lengths
        state = last(self._states(embedded), lengths)[:, None]
        return state, torch.ones_like(state[..., 0], dtype=torch.bool)

    def item(self, embedded: Embedded) -> Tensor:
        """The item's raw embedding, [B, D]."""
        return embedded.vectors[self.item_lookup.name]

    def _states(self, embedded: Embedded) -> Tensor:
        """The states [B, L, D]; those at padded positions are finite but meaningless."""
        history = embedded.sequences[self.history_lookup.name]
        length = history.values.shape[1]
        if length > self.max_len:
            raise ValueError(f"a history has {length} items, but max_len is {self.max_len}: cut it, or raise max_len")
        positions = self.positions[:length]
        if self.from_newest:
            first = self.max_len - history.lengths[:, None]
            index = (first + torch.arange(length, device=first.device)).clamp(max=self.max_len - 1)  # [B, L]
            positions = F.embedding(index, self.positions)
        x = self.dropout(self.scale * history.values + positions)
        x = zero_padding(x, history.mask)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class _Block(nn.Module):
    """The paper's block: [B, L, D] -> [B, L, D]."""

    biases: ClassVar[bool] = False

    def __init__(self, width: int, num_heads: int, dropout_rate: float, attention_dropout_rate: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width, eps=1e-8)
        self.attention = CausalSelfAttention(width, num_heads, attention_dropout_rate, bias=self.biases)
        self.network_norm = nn.LayerNorm(width, eps=1e-8)
        self.network = nn.Sequential(
            nn.Linear(width, width), nn.ReLU(), nn.Dropout(dropout_rate), nn.Linear(width, width)
        )
        self.dropout = nn.Dropout(dropout_rate)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x)))
        return x + self.dropout(self.network(self.network_norm(x)))


class _AuthorsBlock(_Block):
    """The block of the authors' code: [B, L, D] -> [B, L, D]."""

    biases = True

    def forward(self, x: Tensor) -> Tensor:
        queries = self.attention_norm(x)
        x = self.network_norm(queries + self.attention(queries, x))
        return x + self.dropout(self.network(x))
