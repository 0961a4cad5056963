"""BST: a transformer over the history and the candidate item."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rechub_dist.embedded import Embedded, Lookup, Output
from rechub_dist.features import DenseFeature, Feature, Outputs, SequenceFeature, SparseFeature, TimeGapFeature
from rechub_dist.layers.arguments import check_layers, check_outputs, check_positive, check_rate
from rechub_dist.layers.attention import SelfAttention
from rechub_dist.layers.inputs import Fields, check_cut, check_distinct, check_pairs, unpooled
from rechub_dist.layers.masking import newest_first, zero_padding
from rechub_dist.layers.mlp import MLP
from rechub_dist.models.base import Model


class BST(Model):
    """logit = MLP([other features, F_0, F_1 .. F_max_length]), F the transformer's outputs  (sections 2.1 to 2.3).

    F_0 belongs to the candidate, F_k to the k-th newest behaviour; beyond the history there are zeros. What enters the
    transformer is an item's attribute vectors (id, category, ...) and its position vector, concatenated and mapped to
    `hidden_size`. The position of a behaviour is the bucket of its gap in time, pos(v_i) = t(v_t) - t(v_i) with the
    row's own time t(v_t); the candidate, which has no gap, has a vector of its own. Without times, positions are
    counted back from the candidate: 0, then 1 for the newest behaviour, and so on.

    Blocks are those of section 2.2, layer norms after the residuals:
    S = LayerNorm(x + Dropout(MultiHead(x))), F = LayerNorm(S + Dropout(FFN(S))).

    FFN is Linear, LeakyReLU, Linear. Our additions are the linear map, as the concatenated width need not be divisible
    by the heads, and the dropouts after FFN's LeakyReLU and in the MLP, at the one rate.

    Args:
        features: the other features of user, item and context; may be empty. Tables without a width take
            `hidden_size`, others keep theirs.
        behavior_features: the history in time order, one sequence per attribute; all of a row's have the same length.
            The MLP's input holds `max_length` behaviours, the newest of longer histories.
        num_heads: attention heads, a divisor of `hidden_size`.
        num_layers: blocks (the paper's best has one).
        hidden_size: width of the transformer, and of the tables of behaviours, candidate and time gaps.
        dropout_rate: of all dropouts.
        target_features: the candidate, one feature per attribute: target_features[i] and behavior_features[i] read
            the same table. They are part of the sequence, so leave them out of `features`.
        time_gaps: the behaviours' times before the row's own, with the history's `max_length` and `keep`.
        hidden_units: hidden widths of the MLP; None takes the paper's 1024, 512, 256.
        feedforward_units: hidden width of FFN; None takes 4 * hidden_size.
        activation: of the MLP; the paper's is "leaky_relu", which FFN always has.
        batch_norm: batch normalisation in the MLP.
        outputs: the number of logits in a list, [C] for a label of C classes; None for one.
    """

    table_width = "hidden_size"
    paper = "Chen et al. 2019, Behavior Sequence Transformer for E-commerce Recommendation in Alibaba"

    def __init__(
        self,
        features: list[Feature],
        behavior_features: list[SequenceFeature],
        num_heads: int,
        num_layers: int,
        hidden_size: int,
        dropout_rate: float,
        *,
        target_features: list[SparseFeature],
        time_gaps: TimeGapFeature | None = None,
        hidden_units: list[int] | None = None,
        feedforward_units: int | None = None,
        activation: str = "leaky_relu",
        batch_norm: bool = False,
        outputs: Outputs = None,
    ) -> None:
        super().__init__()
        self.label_outputs = check_outputs(outputs, 1)
        check_layers("num_layers", num_layers)
        check_positive("hidden_size", hidden_size)
        check_rate("dropout_rate", dropout_rate)
        if feedforward_units is not None:
            check_positive("feedforward_units", feedforward_units)
        gaps = [] if time_gaps is None else [time_gaps]
        check_distinct([*features, *target_features, *behavior_features, *gaps])
        check_pairs(behavior_features, target_features)
        if gaps and not isinstance(time_gaps, TimeGapFeature):
            raise ValueError(f"time_gaps is a {type(time_gaps).__name__}: make it a TimeGapFeature")
        check_cut([*behavior_features, *gaps])
        self.fields = Fields.of(features, hidden_size, "hidden_size", keep_dim=True) if features else Fields((), ())
        self.target_lookups = Fields.of(target_features, hidden_size, "hidden_size").lookups
        self.behavior_lookups = unpooled(behavior_features, hidden_size, "hidden_size")
        self.gap_lookups = unpooled(gaps, hidden_size, "hidden_size")

        self.max_length = behavior_features[0].max_length
        # The candidate's position, and where positions are indices those of the behaviours, from the newest back.
        self.positions = nn.Parameter(torch.empty(1 if gaps else self.max_length + 1, hidden_size))
        nn.init.normal_(self.positions, std=0.01)  # like the tables
        self.input = nn.Linear((len(target_features) + 1) * hidden_size, hidden_size)
        self.blocks = nn.ModuleList(
            _Block(hidden_size, num_heads, feedforward_units or 4 * hidden_size, dropout_rate)
            for _ in range(num_layers)
        )
        self.mlp = MLP(
            self.fields.width + (self.max_length + 1) * hidden_size,
            [1024, 512, 256] if hidden_units is None else hidden_units,
            dropout_rate,
            activation=activation,
            batch_norm=batch_norm,
            out_dim=self.label_outputs[0],
        )

    def lookups(self) -> tuple[Lookup, ...]:
        return (*self.fields.lookups, *self.target_lookups, *self.behavior_lookups, *self.gap_lookups)

    def dense_features(self) -> tuple[DenseFeature, ...]:
        return self.fields.dense

    def aligned_features(self) -> tuple[tuple[str, ...], ...]:
        return (tuple(lookup.feature.name for lookup in (*self.behavior_lookups, *self.gap_lookups)),)

    def forward(self, embedded: Embedded) -> Output:
        """Logits [B, 1], or [B, C]."""
        x, mask = self._sequence(embedded)
        for block in self.blocks:
            x = block(x, mask)
        slots = zero_padding(x, mask)
        slots = F.pad(slots, (0, 0, 0, self.max_length + 1 - slots.shape[1]))  # [B, max_length + 1, H]
        others = [*(embedded.vectors[name] for name in self.fields.names)]
        others += [embedded.dense[name] for name in self.fields.dense_names]
        return Output(logits=self.mlp(torch.cat([*others, slots.flatten(1)], dim=1)))

    def _sequence(self, embedded: Embedded) -> tuple[Tensor, Tensor]:
        """The candidate, then the history from newest to oldest, [B, 1 + L, H], and the mask of real positions."""
        lengths = embedded.sequences[self.behavior_lookups[0].name].lengths
        target = torch.cat([embedded.vectors[lookup.name] for lookup in self.target_lookups], dim=1)  # [B, D]
        behaviors = self._newest(embedded, self.behavior_lookups)  # [B, L, D]
        items = torch.cat([target[:, None], behaviors], dim=1)
        rows, length = items.shape[:2]
        if self.gap_lookups:
            own = self.positions.expand(rows, 1, -1)
            positions = torch.cat([own, self._newest(embedded, self.gap_lookups)], dim=1)
        else:
            positions = self.positions[:length].expand(rows, -1, -1)
        mask = torch.arange(length, device=items.device) <= lengths[:, None]
        return zero_padding(self.input(torch.cat([items, positions], dim=2)), mask), mask

    def _newest(self, embedded: Embedded, lookups: tuple[Lookup, ...]) -> Tensor:
        """Concatenated vectors of the newest `max_length` behaviours: [B, L, D], newest first."""
        sequences = [embedded.sequences[lookup.name] for lookup in lookups]
        values = torch.cat([sequence.values for sequence in sequences], dim=2)
        return newest_first(values, sequences[0].lengths)[:, : self.max_length]


class _Block(nn.Module):
    def __init__(self, width: int, num_heads: int, feedforward_units: int, dropout_rate: float) -> None:
        super().__init__()
        self.attention = SelfAttention(width, num_heads)
        self.attention_norm = nn.LayerNorm(width)
        self.network = nn.Sequential(
            nn.Linear(width, feedforward_units),
            nn.LeakyReLU(),
            nn.Dropout(dropout_rate),
            nn.Linear(feedforward_units, width),
        )
        self.network_norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout_rate)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.attention_norm(x + self.dropout(self.attention(x, mask)))
        return self.network_norm(x + self.dropout(self.network(x)))
